"""The device side of the engine: parameters, KV cache, slots, and the jitted programs over them.

The runner's only inputs are StepInputs and a few commands. Programs take flat leaves: NNX is split once.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxengine.config import EngineConfig, ModelConfig
from jaxengine.engine.batch import Buckets
from jaxengine.engine.compilations import CompilationCounter, Compiler, compiler_options
from jaxengine.engine.device_slots import (
    LogitRules,
    Slots,
    packed_rules,
    packed_slots,
    write_mask,
    write_rules,
    write_slots,
)
from jaxengine.engine.device_steps import DeviceSteps
from jaxengine.engine.device_weights import DeviceWeights
from jaxengine.engine.flight import Flight
from jaxengine.engine.program_store import ProgramStore
from jaxengine.kv_cache import AXES, CacheGroup, create_cache
from jaxengine.layers.attention import Implementation
from jaxengine.layers.peers import create_peers, linked, peer_rows, peers_sharding
from jaxengine.models import sums_over_peers
from jaxengine.request import MAX_LOGIT_BIAS
from jaxengine.sharding import DATA, STAGE, named_sharding, on_each_device
from jaxengine.step import MODES, SLOT_FLOATS, SLOT_INTS, LogitWrite, SlotWrite, StepInputs, packed_size

logger = logging.getLogger(__name__)


class Runner:
    """Owns everything on the device. `submit` returns at once; `Flight.result` waits."""

    def __init__(
        self,
        config: EngineConfig,
        model: ModelConfig,
        params: Mapping[str, jax.Array],
        *,
        groups: Sequence[CacheGroup],
        num_pages: Sequence[int],
        buckets: Buckets,
        max_model_len: int,
        prompt_chunk: int,
        cache_dtype: str,
        attention: str,
        temporary_bytes: int,
        mesh: Mesh,
        program_folder: Path | None = None,
        borrowed: bool = False,
    ):
        """`borrowed`: somebody else may delete `params`; each step looks before it reads them. `program_folder`: where
        compiled programs are kept.
        """
        self.config, self.model, self.mesh, self.buckets = config, model, mesh, buckets
        self.groups, self.num_pages, self.cache_dtype = groups, num_pages, cache_dtype
        self.attention = cast(Implementation, attention)
        self.float8 = cache_dtype if cache_dtype.startswith("float8") and attention != "triton" else None
        self.max_model_len, self.prompt_chunk, self.temporary_bytes = max_model_len, prompt_chunk, temporary_bytes
        of_layer = {i: g for g, group in enumerate(groups) for i in group.layers}
        self.layer_group = tuple(of_layer[i] for i in range(len(of_layer)))
        self.weights = DeviceWeights(model, params, max_model_len, mesh, borrowed)
        self.vocab_size, self.shards, self.stages = model.vocab_size, mesh.shape[DATA], mesh.shape[STAGE]
        self._row_bytes = model.hidden_size * self.weights.leaves[0].dtype.itemsize
        uses_peers = self.stages == 1 and sums_over_peers(model, self.attention) and linked(mesh)
        self._peer_rows = min(buckets.rows[-1], peer_rows(mesh, self._row_bytes)) if uses_peers else 0
        self._gathers = self.shards > 1 and mesh.is_multi_process  # else a process could not read all shards' results
        self._programs: dict[tuple, Any] = {}
        self._compiler = Compiler(self._store(program_folder))
        self.compilations = CompilationCounter()
        self.reset()

    def reset(self) -> None:
        """Fresh, empty device state: after a failure the donated arrays are gone."""
        self.sleep(1)  # freed first: twice as much may not fit
        slots = self.shards * (self.buckets.max_num_seqs + 1)
        columns = -(-self.max_model_len // self.config.page_size)

        def array(shape, dtype, fill=0, axes=("rows",)):
            return jnp.full(shape, fill, dtype, device=named_sharding(self.mesh, axes))

        kept = "uint8" if self.float8 else self.cache_dtype
        self._cache = create_cache(self.groups, self.num_pages, self.config.page_size, kept, self.mesh)
        self._slots = Slots(
            array((slots,), jnp.int32),
            array((len(self.groups), slots, columns), jnp.int32, axes=(None, "rows")),
            array((slots, len(SLOT_INTS)), jnp.int32),
            array((slots, len(SLOT_FLOATS)), jnp.float32),
        )
        self._rules = LogitRules(
            array((slots, self.vocab_size), jnp.int16),
            array((slots, -(-self.vocab_size // 32)), jnp.uint32),
            array((slots, MAX_LOGIT_BIAS), jnp.int32, -1),
            array((slots, MAX_LOGIT_BIAS), jnp.float32),
        )
        self._peers = create_peers(self.mesh, self._peer_rows, self._row_bytes) if self._peer_rows else ()

    def sleep(self, level: int) -> None:
        """Gives up cache and slots (1), and the weights too (2); programs stay. `reset` makes the former again."""
        for name in ("_cache", "_slots", "_rules", "_peers"):
            for array in jax.tree.leaves(vars(self).pop(name, ())):
                array.delete()
        if level > 1:
            self.weights.drop()

    def close(self) -> None:
        """Frees the device memory that the engine made; parameters are freed when their owner drops them."""
        self.sleep(2)
        self._compiler.close()
        self._programs = {}
        self.compilations.close()

    # -- one step

    def submit(self, inputs: StepInputs) -> Flight:
        """Starts a step on the device and returns at once. Raises WeightsDeletedError."""
        self.weights.check()
        try:
            return self._submit(inputs)
        except Exception:
            self.weights.check()  # were they deleted just now?
            raise

    def _submit(self, inputs: StepInputs) -> Flight:
        if inputs.kind == "mixed":
            self._prepare(self._soon(inputs))
            self._prepare(self._later(inputs), wanted=False)
        self._write_slots(inputs.slot_writes)
        for write in inputs.logit_writes:
            self._write_rules(write)
        for new in inputs.mask_writes:
            mask = self._run("write_mask", (), self._rules.mask, self._own_slots(new.slot), new.mask)
            self._rules = self._rules._replace(mask=mask)
        if inputs.kind == "decode":
            key = (inputs.bucket, inputs.mode)
            self._cache, last, tables, tokens = self._run(
                "decode", key, self.weights.leaves, self._cache, *self._slots, self._peers, inputs.packed
            )
            self._slots = self._slots._replace(last_token=last, tables=tables)
            return Flight({"tokens": tokens}, (), inputs.order)
        return self._submit_mixed(inputs)

    def _submit_mixed(self, inputs: StepInputs) -> Flight:
        leaves, slots = self.weights.leaves, self._slots
        self._cache, tables, hidden, rows = self._run(
            "mixed", (inputs.bucket,), leaves, self._cache, slots.last_token, slots.tables, inputs.packed
        )
        self._slots = self._slots._replace(tables=tables)
        arrays: dict[str, Any] = {}
        if inputs.head_bucket is not None:
            key = (inputs.head_bucket, inputs.mode, inputs.whole_vocab)
            rules = self._rules if inputs.mode == "everything" else ()
            last, rules, arrays = self._run("head", key, leaves, rows, *self._slots, rules, inputs.head_packed)
            self._slots = self._slots._replace(last_token=last)
            self._rules = rules or self._rules
        spans = []
        if inputs.prompt_asked is not None:
            arrays = {**arrays, "prompt": self._prompt_logprobs(hidden, inputs)}
            # The whole vocabulary goes to the host chunk by chunk: on the device it would not fit.
            whole = [(span.token, span.token + span.count) for span in inputs.prompt_spans if span.best == -1]
            spans = [self._vocab_logprobs(hidden, *span) for span in whole]
        if inputs.pooled_rows is not None:
            arrays = {**arrays, "pooled": self._run("pool", (inputs.bucket,), leaves, hidden, inputs.pooled_rows)}
        return Flight(arrays, spans, inputs.order, (self.shards, inputs.bucket.tokens))

    def _prompt_logprobs(self, hidden: jax.Array, inputs: StepInputs) -> list[Any]:
        """Of one chunk after another. A loop or a condition in one program would have the host wait for the step: a
        GPU's are decided there.
        """
        assert inputs.prompt_asked is not None
        asked, (rows_of, logprobs_of) = inputs.prompt_asked.reshape(2, self.shards, -1), self._prompt_keys(inputs)
        _, (tokens, chunk) = rows_of
        asked = np.pad(asked, ((0, 0), (0, 0), (0, -tokens % chunk)), constant_values=-1)
        parts = []
        for start in range(0, int((asked[0] >= 0).sum(axis=1).max()), chunk):
            places, targets = asked[:, :, start : start + chunk].reshape(2, -1)
            rows = self._run(*rows_of, hidden, places)
            parts.append(self._run(*logprobs_of, self.weights.leaves, rows, targets))
        return parts

    def _prompt_keys(self, inputs: StepInputs) -> tuple[tuple[str, tuple], tuple[str, tuple]]:
        """The programs that pick a chunk's hidden states and give its log-probabilities."""
        tokens, best = inputs.bucket.tokens, any(span.best > 0 for span in inputs.prompt_spans)
        chunk = self._chunk(tokens)
        return ("prompt_rows", (tokens, chunk)), ("prompt", (chunk, best))

    def _vocab_logprobs(self, hidden: jax.Array, start: int, end: int) -> np.ndarray:
        tokens = hidden.shape[0] // self.shards
        chunk, shard = self._chunk(tokens), start // tokens
        parts = []
        for first in range(start, end, chunk):
            places = np.minimum(np.arange(first, first + chunk) - shard * tokens, tokens - 1).astype(np.int32)
            rows = self._run("prompt_rows", (tokens, chunk), hidden, np.tile(places, self.shards))
            part = self._run("prompt_vocab", (chunk,), self.weights.leaves, rows, np.int32(shard))
            parts.append(np.asarray(part)[: end - first])
        return np.concatenate(parts)

    def _chunk(self, tokens: int) -> int:
        """Prompt tokens whose logits exist at a time, in a step of so many tokens."""
        return min(self.prompt_chunk, tokens)

    def _own_slots(self, slot: int) -> np.ndarray:
        """What each shard writes to where one of them writes to this slot: the others to their null slot."""
        slots = np.full(self.shards, self.buckets.max_num_seqs, np.int32)
        shard, own = divmod(slot, self.buckets.max_num_seqs)
        slots[shard] = own
        return slots

    def _write_slots(self, writes: Sequence[SlotWrite]) -> None:
        for packed in self._packed_slots(writes):
            new = self._run("write_slots", (), *self._slots[1:], packed)
            self._slots = Slots(self._slots.last_token, *new)

    def _packed_slots(self, writes: Sequence[SlotWrite]) -> Iterator[np.ndarray]:
        columns = self._slots.tables.shape[2]
        return packed_slots(writes, self.shards, self.buckets.max_num_seqs, len(self.groups), columns)

    def _write_rules(self, write: LogitWrite) -> None:
        self._rules = self._run("write_rules", (), self._rules, *self._packed_rules(write))

    def _packed_rules(self, write: LogitWrite) -> tuple[np.ndarray, ...]:
        return packed_rules(write, self._own_slots(write.slot), self.max_model_len + 1)

    # -- programs

    def _run(self, name: str, key: tuple, *arguments: Any) -> Any:
        """Calls a program, compiled now if it is needed for the first time."""
        return (self._programs.get((name, *key)) or self._program(name, key))(*arguments)

    def _program(self, name: str, key: tuple) -> Any:
        """The compiled program; says when it needs more memory than was planned for."""
        self._prepare([(name, key)])
        program = self._programs.get((name, *key)) or self._compiler.take(name, key)
        self._programs[name, *key] = program
        size = program.memory_analysis()
        if size is not None and size.temp_size_in_bytes > self.temporary_bytes:
            logger.warning("program %s %s needs %d bytes of temporary memory, %d were planned",
                           name, key, size.temp_size_in_bytes, self.temporary_bytes)  # fmt: skip
        return program

    def _prepare(self, keys: Iterable[tuple[str, tuple]], wanted: bool = True) -> None:
        """Starts to compile what is not there yet."""
        for name, key in keys:
            if (name, *key) not in self._programs and (name, *key) not in self._compiler.waiting:
                lower, arguments = partial(self._lower, name, key), self._arguments(name, key)
                self._compiler.start(name, key, lower, arguments, wanted, self.buckets)

    @property
    def compiling(self) -> bool:
        """Whether a step may have to wait for a program."""
        return self._compiler.busy

    def _store(self, folder: Path | None) -> ProgramStore | None:
        """Not on a CPU, which lowers quickly and writes badly what it has from jax's own cache."""
        if folder is None or self.mesh.is_multi_process or self.mesh.devices.flat[0].platform != "gpu":
            return None
        config = replace(self.config, mesh=None, compilation_cache=True, seed=0)  # of these programs know nothing
        closed_over = config, self.model, self.groups, self.max_model_len, self.prompt_chunk, self.attention
        return ProgramStore(folder, self.mesh.devices, (*closed_over, self._peer_rows, self._row_bytes))

    def _device_steps(self) -> DeviceSteps:
        return DeviceSteps(
            weights=self.weights, config=self.config, buckets=self.buckets, layer_group=self.layer_group,
            vocab_size=self.vocab_size, attention=self.attention, float8=self.float8, shards=self.shards,
            stages=self.stages, peer_rows=self._peer_rows, gathers=self._gathers,
        )  # fmt: skip

    def _lower(self, name: str, key: tuple, arguments: tuple) -> Any:
        leaves, cache, whole = self.weights.specs, named_sharding(self.mesh, AXES), named_sharding(self.mesh)
        rows, tables = named_sharding(self.mesh, ("rows",)), named_sharding(self.mesh, (None, "rows"))
        each = peers_sharding(self.mesh)
        told, steps = whole if self._gathers else rows, self._device_steps()
        # Which arguments are donated; where all of them lie, and the results: pinned, one that drifts would compile the
        # next step again.
        programs: dict[str, tuple[Callable, tuple[int, ...], tuple, Any]] = {
            "decode": (
                steps.decode, (1, 2, 3), (leaves, cache, rows, tables, rows, rows, each, rows),
                (cache, rows, tables, told),
            ),
            "mixed": (steps.mixed, (1, 3), (leaves, cache, rows, tables, rows), (cache, tables, rows, rows)),
            "head": (steps.head, (2, 6), (leaves, rows, rows, tables, rows, rows, rows, rows), (rows, rows, told)),
            "prompt_rows": (steps.prompt_rows, (), (rows, rows), rows),
            "prompt": (steps.prompt, (), (leaves, rows, rows), told),
            "prompt_vocab": (steps.prompt_vocab, (), (leaves, rows, whole), whole),
            "pool": (steps.pool, (), (leaves, rows, rows), told),
            "write_slots": (write_slots, (0, 1, 2), (tables, rows, rows, rows), (tables, rows, rows)),
            "write_rules": (write_rules, (0,), (rows, rows, whole, whole, whole, whole), rows),
            "write_mask": (write_mask, (0,), (rows, rows, whole), rows),
        }  # fmt: skip
        function, donated, places, out = programs[name]
        function = partial(function, *key)
        if self.mesh.size > 1:
            specs = tuple(place if place is leaves else place.spec for place in places)
            function, arguments = on_each_device(function, arguments, specs, out, self.mesh)
        options = compiler_options(name, key[0].rows // self.stages if name == "decode" else 0, self.mesh)
        jitted = jax.jit(function, donate_argnums=donated, out_shardings=out, compiler_options=options)
        return jitted.lower(*arguments)

    # -- warm-up

    def warmup(self, on_program: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Compiles every program that a step can need. `on_program(done, total)` reports progress."""
        keys = self._all_keys()
        self._prepare(keys)
        for done, (name, key) in enumerate(keys, 1):
            self._program(name, key)
            on_program(done, len(keys))
        self.compilations.mark_warm()

    def _soon(self, inputs: StepInputs) -> list[tuple[str, tuple]]:
        """What a mixed step runs: their first times come together."""
        head = [("head", (inputs.head_bucket, inputs.mode, inputs.whole_vocab))] if inputs.head_bucket else []
        asked = self._prompt_keys(inputs) if inputs.prompt_asked is not None else ()
        return [("write_slots", ()), ("mixed", (inputs.bucket,)), *head, *asked]

    def _later(self, inputs: StepInputs) -> list[tuple[str, tuple]]:
        """The decode steps that likely follow a mixed step."""
        if inputs.head_bucket is None or inputs.mode == "everything":
            return []
        rows = inputs.head_bucket.rows
        return [("decode", (self.buckets.decode(rows, steps), inputs.mode)) for steps in self.buckets.steps]

    def _all_keys(self) -> list[tuple[str, tuple]]:
        """(name, static key) of every program."""
        keys: list[tuple[str, tuple]] = []
        for rows in self.buckets.rows:
            for steps in self.buckets.steps:
                keys += [("decode", (self.buckets.decode(rows, steps), mode)) for mode in MODES[:2]]
            modes = (*((mode, False) for mode in MODES), ("everything", True))
            keys += [("head", (self.buckets.head(rows), *mode)) for mode in modes]
        for tokens in self.buckets.tokens:
            bucket = self.buckets.mixed(tokens)
            keys += [("mixed", (bucket,)), ("prompt_rows", (tokens, self._chunk(tokens))), ("pool", (bucket,))]
        for chunk in sorted(set(map(self._chunk, self.buckets.tokens))):
            keys += [("prompt", (chunk, False)), ("prompt", (chunk, True)), ("prompt_vocab", (chunk,))]
        return [*keys, ("write_slots", ()), ("write_rules", ()), ("write_mask", ())]

    def _arguments(self, name: str, key: tuple) -> tuple:
        """What the program is lowered for: the live arrays, and stand-ins for what comes with a step."""
        slots, rules, leaves = self._slots, self._rules, self.weights.leaves

        def hidden(rows: int) -> jax.ShapeDtypeStruct:
            shape = (self.shards * rows, self.model.hidden_size)
            return jax.ShapeDtypeStruct(shape, leaves[0].dtype, sharding=named_sharding(self.mesh, ("rows",)))

        def ints(count: int) -> np.ndarray:
            return np.zeros(self.shards * count, np.int32)

        def packed() -> np.ndarray:
            return ints(packed_size(name, key[0]))

        mask = np.zeros(rules.mask.shape[1], np.uint32)
        match name:
            case "decode":
                return leaves, self._cache, *slots, self._peers, packed()
            case "head":
                rows = hidden(self.buckets.max_num_seqs)
                return leaves, rows, *slots, rules if key[1] == "everything" else (), packed()
            case "mixed":
                return leaves, self._cache, slots.last_token, slots.tables, packed()
            case "prompt_rows":
                return hidden(key[0]), ints(key[1])
            case "prompt":
                return leaves, hidden(key[0]), ints(key[0])
            case "prompt_vocab":
                return leaves, hidden(key[0]), np.int32(0)
            case "pool":
                return leaves, hidden(key[0].tokens), ints(key[0].tokens)
            case "write_slots":
                write = SlotWrite(0, (0,) * len(SLOT_INTS), (0,) * len(SLOT_FLOATS), ())
                return *slots[1:], next(self._packed_slots([write]))
            case "write_rules":
                return rules, *self._packed_rules(LogitWrite(0, np.zeros(0, np.int32), 0, mask, {}))
            case _:
                return rules.mask, ints(1), mask
