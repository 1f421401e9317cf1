"""update_weights on a live engine: what becomes of requests in flight, of the prefix cache, and of a failure."""

import asyncio
import gc
import itertools
import threading
import time
import weakref
from concurrent.futures import Future
from contextlib import suppress
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxengine import (
    LLM,
    AsyncLLM,
    CheckpointError,
    ConfigError,
    EngineClosedError,
    EngineError,
    MemoryPlanError,
    SamplingParams,
    WeightsDeletedError,
    live_weights,
)
from jaxengine.engine.updates import PendingUpdate
from jaxengine.sharding import create_mesh
from jaxengine.weights import in_memory, load_params, open_checkpoint
from tests.models.harness import PagedModel
from tests.slow_steps import slowed
from tests.tiny_llm import CONFIGS, MAX_LENGTH, OPTIONS, check_integrity, model_folder, tensors, write_model

CONFIG = open_checkpoint(model_folder()).config
SMALL = {"max_num_seqs": 4, "max_num_batched_tokens": 16, "page_size": 8}  # few programs to compile
PROMPT = list(range(40, 60))


@cache
def weights(which: str) -> dict[str, jax.Array]:
    """Two sets of canonical parameters that have nothing in common but their shapes."""
    params = load_params(open_checkpoint(model_folder()), "float32", create_mesh())
    return {path: jnp.array(x) if which == "a" else jnp.flip(x, 0) for path, x in params.items()}


@cache
def reference(which: str) -> PagedModel:
    return PagedModel(CONFIG, weights(which), MAX_LENGTH, rows=1)


def logprobs_of(which: str, ids) -> np.ndarray:
    """float64 [len(ids) - 1]: of each token but the first, under these weights."""
    model = reference(which)
    model.reset()
    logits = np.concatenate([model.extend({0: ids[i : i + 64]})[0] for i in range(0, len(ids), 64)])[:-1]
    logits = logits.astype(np.float64)
    return (logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))[np.arange(len(ids) - 1), ids[1:]]


def check_spans(output, names) -> int:
    """Each span's log-probabilities are those of the version that it names; returns the number of spans."""
    [completion] = output.outputs
    ids, found = [*output.prompt_token_ids, *completion.token_ids], completion.logprobs.logprobs
    assert len(found) == len(completion.token_ids) > 0
    spans = completion.weight_versions
    assert spans[0][0] == 0 and completion.weight_version == spans[-1][1]
    ends = [first for first, _ in spans[1:]] + [len(found)]
    for (first, version), end in zip(spans, ends, strict=True):
        assert first < end
        want = logprobs_of(names[version], ids)[len(output.prompt_token_ids) - 1 :]
        np.testing.assert_allclose(found[first:end], want[first:end], atol=1e-4)
    return len(spans)


def sampling(max_tokens, **fields):
    return SamplingParams(**({"temperature": 1, "max_tokens": max_tokens, "logprobs": 0, "ignore_eos": True,
                              "detokenize": False} | fields))  # fmt: skip


def engine(**options):
    return LLM(weights("a"), config=CONFIGS["llama"], **(SMALL | options))


@pytest.fixture(scope="module")
def shared():
    with engine() as llm:
        yield llm


@pytest.fixture
def llm(shared):
    """Serves weights a; the version goes on from test to test."""
    shared.update_weights(weights("a"))
    yield shared
    check_integrity(shared)


def fresh(shared, **options):
    llm = engine(**options)
    llm._runner._programs = shared._runner._programs
    return llm


class Traffic:
    """Threads that generate until they are told to stop."""

    def __init__(self, llm):
        self.llm, self.outputs, self.errors, self.ended = llm, [], [], False
        self.threads = [threading.Thread(target=self.run, args=(seed,)) for seed in range(2)]

    def run(self, seed):
        random = np.random.default_rng(seed)
        try:
            while not self.ended:
                prompts = [[*PROMPT, *random.integers(3, 600, n).tolist()] for n in random.integers(1, 12, 3)]
                params = sampling(int(random.integers(4, 24)))
                if seed:
                    self.outputs += [o for o in self.llm.generate(prompts, params, stream=True) if o.finished]
                else:
                    self.outputs += self.llm.generate(prompts, params, use_tqdm=False)
        except Exception as error:
            self.errors.append(error)

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.ended = True
        for thread in self.threads:
            thread.join()


def live_bytes():
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


@pytest.mark.parametrize("updates", [6, pytest.param(100, marks=pytest.mark.full)])
def test_updates_during_traffic(updates):
    """Of an engine that owns its weights: each update makes copies, and frees those before."""
    sets = {which: weights(which) for which in "ab"}  # made, and their programs compiled, before the count begins
    with engine(warmup=True, fuse_weights=True) as llm:
        names = {0: "a"}
        compiled, held = len(llm._runner._programs), live_bytes()
        with slowed(llm, 0.001), Traffic(llm) as traffic:
            for i, mode in zip(range(1, updates + 1), itertools.cycle(("continue", "restart", "wait"))):
                seen = len(traffic.outputs)
                while len(traffic.outputs) < seen + 2 and not traffic.errors:
                    time.sleep(0.002)
                names[i] = "ab"[i % 2]
                result = llm.update_weights(sets[names[i]], mode=mode, in_place=i % 4 == 0)
                assert result.version == i == llm.get_metrics()["weight_version"]
        assert not traffic.errors
        metrics = llm.get_metrics()
        assert metrics["compilations_after_warmup"] == 0 and len(llm._runner._programs) == compiled
        assert metrics["prefix_cache_hits"] > 0
        check_integrity(llm)
        assert live_bytes() == held
    assert all(o.outputs[0].finish_reason == "length" for o in traffic.outputs)
    assert len(traffic.outputs) % 3 == 0 and len({o.request_id for o in traffic.outputs}) == len(traffic.outputs)
    spans = [check_spans(output, names) for output in traffic.outputs]
    assert max(spans) > 1, "no request was in flight during an update"


def in_flight(llm, mode, stream=False, **fields):
    """An update to b while one request has some output and another waits; their outputs, and the update's result."""
    outputs, started = [], threading.Event()
    version = llm.get_metrics()["weight_version"]

    def run():
        for output in llm.generate(PROMPT, sampling(60, **fields), stream=True) if stream else ():
            outputs[:] = [output]
            started.set()
        if not stream:
            outputs.extend(llm.generate([PROMPT], sampling(60, **fields), use_tqdm=False))

    with slowed(llm):
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        if stream:
            started.wait()
        else:
            before = llm.get_metrics()["generation_tokens"]
            while llm.get_metrics()["generation_tokens"] < before + 3:
                time.sleep(0.001)
        result = llm.update_weights(weights("b"), version + 5, mode=mode)
    [after] = llm.generate([PROMPT], sampling(4), use_tqdm=False)
    thread.join(60)
    assert outputs, "the request was never answered"
    names = {version: "a", version + 5: "b"}
    assert result.version == version + 5 and check_spans(after, names) == 1
    assert after.outputs[0].weight_version == version + 5
    check_spans(outputs[0], names)
    assert len(outputs[0].outputs[0].token_ids) == 60
    return outputs[0], result


def test_wait_finishes_on_the_old_weights(llm):
    output, result = in_flight(llm, "wait")
    assert len(output.outputs[0].weight_versions) == 1
    assert output.outputs[0].weight_version == result.version - 5
    assert result.restarted == result.continued == ()


def test_wait_holds_later_requests_back(shared):
    with fresh(shared) as llm, slowed(llm):
        early, late = [], []
        first = llm.generate([PROMPT], sampling(60, output_kind="final_only"), stream=True)
        threads = [threading.Thread(target=lambda: early.extend(first))]
        threads[0].start()
        while llm.get_metrics()["generation_tokens"] < 3:
            time.sleep(0.001)
        threads.append(threading.Thread(target=llm.update_weights, args=(weights("b"),)))
        threads[1].start()
        while llm._loop._engine._update is None:
            time.sleep(0.001)
        llm.abort(["unknown"])
        late += llm.generate([PROMPT, PROMPT[::-1]], sampling(5), use_tqdm=False, priority=-5)
        for thread in threads:
            thread.join()
        assert [o.outputs[0].weight_versions for o in (*early, *late)] == [((0, 0),), ((0, 1),), ((0, 1),)]
        for output in (*early, *late):
            check_spans(output, {0: "a", 1: "b"})
        check_integrity(llm)


def test_restart_begins_again(llm):
    output, result = in_flight(llm, "restart", detokenize=False)
    assert output.outputs[0].weight_versions == ((0, result.version),)
    assert result.restarted == (output.request_id,) and result.continued == ()


@pytest.mark.parametrize(("mode", "stream"), [("continue", False), ("continue", True), ("restart", True)])
def test_continue_keeps_what_there_is(llm, mode, stream):
    """Also what a restart would take back from a reader."""
    output, result = in_flight(llm, mode, stream)
    (start, old), (middle, new) = output.outputs[0].weight_versions
    assert (start, old, new) == (0, result.version - 5, result.version) and 0 < middle < 60
    assert result.continued == (output.request_id,) and result.restarted == ()


def test_deltas_have_spans_of_their_own(llm):
    version, tokens, spans = llm.get_metrics()["weight_version"], [], []
    with slowed(llm):
        for output in llm.generate(PROMPT, sampling(40, output_kind="delta"), stream=True):
            [completion] = output.outputs
            spans += [(len(tokens) + first, version) for first, version in completion.weight_versions]
            tokens += completion.token_ids
            if len(tokens) >= 3 and version == llm.get_metrics()["weight_version"]:
                llm.update_weights(weights("b"), mode="continue")
    assert len(tokens) == 40 and spans[0] == (0, version) and spans[-1][1] == version + 1
    assert {v for _, v in spans} == {version, version + 1} and spans == sorted(spans)


def test_text_and_prompt_logprobs_start_over_too():
    """A restarted text holds nothing of the old weights', and log-probabilities of a prompt are one version's."""
    with LLM(model_folder(), **OPTIONS) as llm, slowed(llm):
        outputs = []
        long = list(range(3, 250))
        params = [sampling(5, prompt_logprobs=0), sampling(100, detokenize=True, stop=["never to be found"])]
        thread = threading.Thread(target=lambda: outputs.extend(llm.generate([long, PROMPT], params, use_tqdm=False)))
        thread.start()
        while llm.get_metrics()["generation_tokens"] < 2:
            time.sleep(0.001)
        result = llm.update_weights(
            {name: np.flip(x, -1 if x.ndim == 2 and "embed" not in name else 0) for name, x in tensors().items()},
            mode="restart",
        )
        read = llm._loop.call(  # by the detokenizers: nothing of what was dropped
            lambda engine: [
                (len(output._ids), sequence.num_read) for sequence, output in engine.sink._outputs.items() if output
            ]
        )
        assert read and all(ids == known for ids, known in read)
        thread.join()
        assert outputs[1].request_id in result.restarted
        [completion] = outputs[1].outputs
        assert completion.text == llm.get_tokenizer().decode(completion.token_ids)
        assert check_spans(outputs[1], {1: "b"}) == 1  # HuggingFace's [out, in], flipped at its last axis
        np.testing.assert_allclose(
            outputs[0].prompt_logprobs.logprobs,
            logprobs_of("ab"[outputs[0].outputs[0].weight_version], long),
            atol=1e-4,
        )
        check_integrity(llm)


def test_nothing_of_an_old_version_is_reused(llm):
    """Even when the version's number comes back with other weights."""
    long = list(range(3, 83))
    version = llm.get_metrics()["weight_version"]
    for which in "abab":
        llm.update_weights(weights(which), version)
        for cached in (0, 72):  # a page and a last token less
            [output] = llm.generate([long], sampling(3), use_tqdm=False)
            assert output.num_cached_tokens == cached
            check_spans(output, {version: which})


def test_from_files_of_every_kind(llm, tmp_path):
    from jaxengine.weights import save_checkpoint

    folder = model_folder()
    checkpoint = open_checkpoint(folder)
    save_checkpoint(checkpoint, weights("b"), tmp_path / "orbax")
    for source, which in ((tmp_path / "orbax", "b"), (str(folder), "a"), (tmp_path / "orbax", "b")):
        for in_place in (False, True):
            version = llm.update_weights(source, in_place=in_place).version
            [output] = llm.generate([PROMPT], sampling(5), use_tqdm=False)
            check_spans(output, {version: which})


# -- refusals and failures


def test_a_mismatch_is_refused_by_name_and_changes_nothing(llm, tmp_path):
    version = llm.get_metrics()["weight_version"]
    good = weights("b")
    lacking = {path: x for path, x in good.items() if path != "layers.1.mlp.up_proj.kernel"}
    for in_place in (False, True):
        for params, match in (
            (lacking, r"missing: layers\.1\.mlp\.up_proj\.kernel"),
            (good | {"norm.scale": jnp.ones(5)}, r"of shape \[5\], where the config says \[64\]: norm\.scale"),
            (good | {"norm.scale": jnp.ones(64, jnp.int32)}, r"of dtype int32.*: norm\.scale"),
            (good | {"norm.bias": jnp.ones(64)}, r"unexpected: norm\.bias \[64\]"),
            (model_folder("windows"), "is of another model: model_type='qwen2', the engine's has 'llama'"),
        ):
            with pytest.raises(CheckpointError, match=match):
                llm.update_weights(params, in_place=in_place)
    broken = write_model(tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="corrupt"):
        llm.update_weights(broken, in_place=True)
    for bad in ({"mode": "later"}, {"version": -1}, {"version": True}, {"version": 1.5}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            llm.update_weights(good, **bad)
    assert llm.get_metrics()["weight_version"] == version
    [output] = llm.generate([PROMPT], sampling(5), use_tqdm=False)
    check_spans(output, {version: "a"})


def test_a_failed_update_leaves_the_old_weights(llm, monkeypatch):
    def fail(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    version = llm.get_metrics()["weight_version"]
    with monkeypatch.context() as patch:
        patch.setattr(in_memory, "_placed", fail)
        with pytest.raises(MemoryPlanError, match="the old ones go on serving; in_place=True"):
            llm.update_weights(weights("b"))
    [output] = llm.generate([PROMPT], sampling(5), use_tqdm=False)
    check_spans(output, {version: "a"})


def test_a_failure_in_place_ends_the_engine(shared, monkeypatch):
    with fresh(shared) as llm, slowed(llm):
        done = []

        def read():
            with suppress(EngineError):
                done.extend(o for o in llm.generate([PROMPT], sampling(200), stream=True))

        thread = threading.Thread(target=read)
        thread.start()
        while not done:
            time.sleep(0.001)

        def fail(*_):
            raise OSError("the disk is gone")

        with monkeypatch.context() as patch:
            patch.setattr(in_memory, "_placed", fail)
            with pytest.raises(EngineError, match=r"old weights were given up already: the disk is gone; close\(\)"):
                llm.update_weights(weights("b"), mode="continue", in_place=True)
        with pytest.raises(EngineError, match="old weights were given up"):
            llm.generate([PROMPT], sampling(5), use_tqdm=False)
        with pytest.raises(EngineError, match="old weights were given up"):
            llm.update_weights(weights("b"))
        thread.join()
        assert 0 < len(done) < 200


def test_close_while_an_update_waits(shared):
    llm = fresh(shared)
    with slowed(llm):
        stream = llm.generate([PROMPT], sampling(200), stream=True)
        next(stream)
        failed = []

        def update():
            try:
                llm.update_weights(weights("b"))
            except EngineClosedError as error:
                failed.append(error)

        thread = threading.Thread(target=update)
        thread.start()
        while llm._loop._engine._update is None:
            time.sleep(0.001)
        llm.close()
        thread.join()
    assert len(failed) == 1


def test_an_interrupted_caller_withdraws_its_update(llm, monkeypatch):
    class Interrupted(Future):
        def result(self, timeout=None):
            raise KeyboardInterrupt

    version = llm.get_metrics()["weight_version"]
    stream = llm.generate([PROMPT], sampling(200), stream=True)
    with slowed(llm), monkeypatch.context() as patch:
        next(stream)
        patch.setattr(live_weights, "PendingUpdate", partial(PendingUpdate, done=Interrupted()))
        with pytest.raises(KeyboardInterrupt):
            llm.update_weights(weights("b"))
    [output] = llm.generate([PROMPT], sampling(5), use_tqdm=False)  # nobody is held back
    check_spans(output, {version: "a"})
    stream.close()
    assert llm.update_weights(weights("b")).version == version + 1


def test_in_place_there_is_never_a_second_copy(shared):
    """Owned weights: the old ones are gone when the new ones are made."""
    sets = {which: weights(which) for which in "ab"}
    with engine(fuse_weights=True) as llm:
        llm._runner.compilations.mark_warm()
        ghosts = [weakref.ref(x) for x in llm._runner.weights.leaves]
        alive = []
        placed = in_memory._placed

        def count(*arguments):
            alive.append(sum(ghost() is not None for ghost in ghosts))
            return placed(*arguments)

        in_memory._placed = count
        try:
            llm.update_weights(sets["b"], in_place=True)
            assert alive == [0] * len(sets["b"])
            ghosts[:] = [weakref.ref(x) for x in llm._runner.weights.leaves]
            alive.clear()
            llm.update_weights(sets["b"])
            assert min(alive) == len(ghosts)  # staged: the old ones serve meanwhile
            assert llm.get_metrics()["compilations_after_warmup"] == 0  # copying and fusing included
        finally:
            in_memory._placed = placed


def test_an_update_after_each_step_of_training(shared):
    """The trainer donates its parameters and hands over the new ones: no copy, no compilation, the new answers."""
    params = {path: jnp.copy(x) for path, x in weights("a").items()}
    with LLM(params, config=CONFIGS["llama"], **SMALL) as llm:
        llm._runner._programs = shared._runner._programs
        step = jax.jit(lambda tree: jax.tree.map(lambda x: jnp.flip(x, 0), tree), donate_argnums=0)
        for version, which in ((1, "b"), (2, "a"), (3, "b")):
            params = step(params)
            with pytest.raises(WeightsDeletedError):
                llm.generate([PROMPT], sampling(3), use_tqdm=False)
            llm.update_weights(params)
            assert {id(x) for x in llm._runner.weights.leaves} == {id(x) for x in params.values()}
            [output] = llm.generate([PROMPT], sampling(3), use_tqdm=False)
            check_spans(output, {version: which})


def test_from_asyncio(shared):
    async def run():
        async with AsyncLLM(weights("a"), config=CONFIGS["llama"], **SMALL) as llm:
            llm._llm._runner._programs = shared._runner._programs
            result, last = None, None
            with slowed(llm._llm):
                async for output in llm.generate(PROMPT, sampling(40)):
                    last = output
                    if result is None:
                        result = await llm.update_weights(weights("b"), 7, mode="restart")
            return last, result

    output, result = asyncio.run(run())
    assert result.continued == (output.request_id,) and check_spans(output, {0: "a", 7: "b"}) == 2
