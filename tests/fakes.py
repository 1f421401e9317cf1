"""A device and a text sink in NumPy and plain Python, for tests of the engine's host side.

The fake runner keeps in its pages what a model's cache amounts to: for each token its id, its position, and a state
that depends on every token before it. The next token is a hash of all that it reads back through the page table within
each group's window, so that a wrong page, a wrong position, a stale entry or a page that was reused too early cannot
pass. `expected` computes the same from the token ids alone. States depend on the weights, a number here, so that what
another version wrote cannot pass either.
"""

from collections.abc import Sequence
from itertools import accumulate
from types import SimpleNamespace

import numpy as np

from jaxengine.engine.batch import Buckets, bucket_sizes
from jaxengine.engine.engine import Engine
from jaxengine.engine.scheduler import Scheduler
from jaxengine.engine.sequence import Request
from jaxengine.engine.shards import together
from jaxengine.kv_cache import CacheGroup
from jaxengine.request import SamplingParams
from jaxengine.step import StepInputs, StepOutputs, unpack
from tests.fake_shards import join, share

BITS = 2**61 - 1
TOP = 4  # of max_logprobs


class DeviceError(RuntimeError):
    """What the fake device raises."""


def mix(*values: int) -> int:
    result = 0x9E3779B97F4A7C15
    for value in values:
        result = ((result ^ value) * 0xD6E8FEB86659FD93 + 0x632BE59BD9B4E019) & (2**64 - 1)
        result ^= result >> 29
    return result & BITS


def next_states(before: int, tokens: Sequence[int], start: int, weights: int) -> list[int]:
    """The states of tokens from position `start` on, behind a token with state `before` (0: none is visible)."""
    numbered = enumerate(tokens, start)
    return list(accumulate(numbered, lambda state, item: mix(state, *item, weights), initial=before))[1:]


def hidden(visible: Sequence[int]) -> int:
    """What one group's attention makes of the states it sees."""
    return sum(visible) & BITS


def logprob_of(x: int, token: int) -> float:
    return -(mix(x, token) % 4096) / 256


def distribution(x: int, vocab: int) -> np.ndarray:
    return np.array([logprob_of(x, token) for token in range(vocab)], np.float32)


def draw(x: int, position: int, params: SimpleNamespace, allowed: Sequence[int], seen: Sequence[int]) -> int:
    """A token among the allowed ones; of the sampling parameters only what a slot must get right."""
    if params.temperature:
        x = mix(x, *params.seed, params.index, position)
    if params.repetition_penalty != 1:
        x = mix(x, *seen)
    return allowed[x % len(allowed)]


def mode_params(params: SamplingParams, seed: int, index: int) -> SimpleNamespace:
    words = np.array([seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF], np.uint32).view(np.int32).tolist()
    return SimpleNamespace(
        temperature=params.temperature, seed=words, index=index, repetition_penalty=params.repetition_penalty
    )


def expected(
    request: Request,
    windows: Sequence[int | None],
    vocab: int,
    index: int = 0,
    spans: Sequence[tuple[int, int]] = ((0, 0),),
) -> SimpleNamespace:
    """Tokens, log-probabilities and reason of the end that the request gets on a fake device of its own.

    spans: (output token, weights) for each change of the weights; the prompt belongs to the first.
    """
    params, tokens = request.params, list(request.prompt_token_ids)
    prompt = len(tokens)
    logprobs, hiddens, reason = [], [], None
    states: list[list[int]] = [[] for _ in windows]
    changes, weights = dict(spans), spans[0][1]

    def compute(until: int) -> None:
        for position in range(len(hiddens), until):
            for window, own in zip(windows, states, strict=True):
                before = own[-1] if own and (window is None or window > 1) else 0
                own += next_states(before, [tokens[position]], position, weights)
            seen = [
                hidden(own[0 if w is None else max(0, position + 1 - w) :])
                for own, w in zip(states, windows, strict=True)
            ]
            hiddens.append(mix(*seen))

    compute(prompt - 1)
    of_prompt = [logprob_of(x, tokens[p]) for p, x in enumerate(hiddens, 1)]
    reason = "length" if request.max_tokens == 0 else None
    while reason is None:
        output = len(tokens) - prompt
        if changes.get(output, weights) != weights:
            weights, hiddens, states = changes[output], [], [[] for _ in windows]
        compute(len(tokens))
        banned = set(request.stop_token_ids) if output < params.min_tokens else set()
        for word in request.bad_word_ids:
            if len(word) == 1 or tokens[1 - len(word) :] == word[:-1]:
                banned.add(word[-1])
        allowed = [t for t in (params.allowed_token_ids or range(vocab)) if t not in banned]
        token = draw(hiddens[-1], len(tokens), mode_params(params, request.seed, index), allowed, tokens)
        logprobs.append(logprob_of(hiddens[-1], token))
        tokens.append(token)
        if token in request.stop_token_ids and output + 1 >= params.min_tokens:
            reason = "stop"
        elif output + 1 == request.max_tokens:
            reason = "length"
    prompt_logprobs = of_prompt[max(1, params.prompt_logprobs_start) - 1 :]
    return SimpleNamespace(
        tokens=tokens[prompt:], reason=reason, logprobs=logprobs, prompt_logprobs=prompt_logprobs, hiddens=hiddens
    )


class FakeFlight:
    def __init__(self, runner: "FakeRunner", outputs: StepOutputs | None, error: Exception | None):
        self._runner, self._outputs, self._error = runner, outputs, error
        self._age = runner.resets

    def result(self) -> StepOutputs:
        runner = self._runner
        assert self._age == runner.resets, "a flight from before the reset was asked for"
        if self in runner.flying:
            assert runner.flying[0] is self, "results are taken in the order of the steps"
            runner.flying.pop(0)
        if self._error is not None:
            raise self._error
        assert self._outputs is not None
        return self._outputs


class FakeRunner:
    """Computes each step when it is submitted, in that order, and hands it over when asked.

    fail: step number -> "submit" or "result", where the device fails; poison: a token that fails each step.
    Each shard of the data axis is a device of its own.
    """

    def __init__(self, schedulers: Sequence[Scheduler], buckets: Buckets, vocab: int, columns: int, fail, poison):
        one = schedulers[0]
        self.groups, self.num_pages, self.page_size = one.groups, one.num_pages, one.page_size
        self.shards, self.buckets, self.vocab, self.columns = len(schedulers), buckets, vocab, columns
        self.fail, self.poison = fail or {}, poison
        self.fail_resets = 0
        self.steps = self.resets = self.max_flying = self.chunks = self.failures = self.most_steps = 0
        self.kinds: set[tuple] = set()
        self.weights = 0
        self.compiling = False
        self.reset()

    def reset(self) -> None:
        if self.fail_resets:
            self.fail_resets -= 1
            raise DeviceError("no reset")
        self.resets += 1
        self.flying: list[FakeFlight] = []
        self.devices = [FakeDevice(self) for _ in range(self.shards)]
        self.dead = False

    def submit(self, inputs: StepInputs) -> FakeFlight:
        assert not self.dead or self.flying, "a step after a failure that was seen, without a reset"
        number, self.steps = self.steps, self.steps + 1
        where = self.fail.get(number)
        if where == "submit":
            self.dead, self.failures = True, self.failures + 1
            raise DeviceError(f"step {number}")
        outputs, error = None, None
        if self.dead:
            error = DeviceError("the arrays are dead")
        else:
            outputs = self._run(inputs)
            if outputs is None or where == "result":
                self.dead, self.failures = True, self.failures + 1
                outputs, error = None, DeviceError(f"step {number}")
        flight = FakeFlight(self, outputs, error)
        self.flying.append(flight)
        self.max_flying = max(self.max_flying, len(self.flying))
        return flight

    def _run(self, inputs: StepInputs) -> StepOutputs | None:
        self.kinds.add((inputs.kind, inputs.mode))
        if self.shards == 1:
            assert inputs.order is None
            return self.devices[0].run(inputs)
        parts = [share(inputs, shard, self.shards, self.buckets.max_num_seqs) for shard in range(self.shards)]
        outputs = [device.run(part) for device, part in zip(self.devices, parts, strict=True)]
        return None if None in outputs else join(inputs, outputs)

    @property
    def computed(self) -> int:
        """Tokens since the last reset."""
        return sum(device.computed for device in self.devices)


class FakeDevice:
    """What one device keeps, and its part of a step."""

    def __init__(self, runner: FakeRunner):
        self.runner, self.groups, self.page_size = runner, runner.groups, runner.page_size
        self.buckets, self.vocab, self.poison = runner.buckets, runner.vocab, runner.poison
        slots = self.buckets.max_num_seqs + 1
        self.tables = np.full((len(self.groups), slots, runner.columns), -7)
        self.tables[:, -1] = 0
        self.last_token = np.full(slots, -7)
        self.slots: list[SimpleNamespace | None] = [None] * slots
        shape = (self.page_size, 3)  # token, position, state
        self.pools = [np.full((count, *shape), -1, np.int64) for count in runner.num_pages]
        self.computed = 0

    def run(self, inputs: StepInputs) -> StepOutputs | None:
        for write in inputs.slot_writes:
            for table, pages in zip(self.tables, write.pages, strict=True):
                table[write.slot] = 0
                table[write.slot, : len(pages)] = pages
            _, low, high, index, edits = write.ints
            self.slots[write.slot] = SimpleNamespace(
                temperature=write.floats[0], repetition_penalty=write.floats[5], seed=[low, high], index=index,
                edits=edits, mask=None, seen=None,
            )  # fmt: skip
        for write in inputs.logit_writes:
            self._slot(write.slot).mask, self._slot(write.slot).seen = write.mask.copy(), write.tokens.tolist()
        for write in inputs.mask_writes:
            self._slot(write.slot).mask = write.mask.copy()
        step = unpack(inputs.kind, inputs.bucket, inputs.packed.copy())
        for table, updates in zip(self.tables, step["page_updates"], strict=True):
            table[updates[:, 0], updates[:, 1]] = updates[:, 2]
        rows, tokens = self._rows(inputs.kind, step)
        if self.poison in tokens:
            return None
        if inputs.kind == "decode":
            return self._decode(inputs, rows, tokens, step["counts"].tolist())
        hiddens = self._compute(rows, tokens)
        self.computed += len(hiddens)
        if inputs.head_bucket is None:
            sampled = []
        else:
            head = unpack("head", inputs.head_bucket, inputs.head_packed)
            count = int((head["slots"] != self.buckets.max_num_seqs).sum())
            index = step["logit_index"][:count].tolist()
            sampled = list(
                zip(head["slots"][:count].tolist(), head["positions"][:count].tolist(), [hiddens[i] for i in index])
            )
        return self._outputs(inputs, sampled, hiddens)

    def _decode(self, inputs: StepInputs, rows, tokens: list[int], counts: list[int]) -> StepOutputs | None:
        steps = inputs.bucket.steps
        assert all(1 <= count <= steps for count in counts[: len(rows)]) and not any(counts[len(rows) :])
        self.runner.most_steps = max(self.runner.most_steps, *counts)
        drawn = np.full((len(rows), steps), -9, np.int32)
        for number in range(steps):
            active = [i for i, count in enumerate(counts[: len(rows)]) if number < count]
            if not active:
                break
            own = [(rows[i][0], rows[i][1] + number, j, 1) for j, i in enumerate(active)]
            if number:
                tokens = [int(self.last_token[rows[i][0]]) for i in active]
                if self.poison in tokens:
                    return None
            hiddens = self._compute(own, tokens)
            self.computed += len(hiddens)
            sampled = [(slot, start + 1, x) for (slot, start, _, _), x in zip(own, hiddens, strict=True)]
            drawn[active, number] = self._outputs(inputs, sampled, hiddens).tokens[:, 0]
        return StepOutputs(drawn)

    def _slot(self, slot: int) -> SimpleNamespace:
        found = self.slots[slot]
        assert found is not None, "a slot that was never written"
        return found

    def _rows(self, kind: str, step: dict) -> tuple[list[tuple[int, int, int, int]], list[int]]:
        """(slot, first position, first token's index, count) of each row, checked, and all tokens."""
        lengths, slots = step["lengths"].tolist(), step["slots"].tolist()
        count = sum(length > 0 for length in lengths)
        assert all(length > 0 for length in lengths[:count]) and len(set(slots[:count])) == count
        assert all(slot == self.buckets.max_num_seqs for slot in slots[count:])
        if kind == "decode":
            rows = [(slot, length - 1, i, 1) for i, (slot, length) in enumerate(zip(slots[:count], lengths[:count]))]
        else:
            q_start, q_len = step["q_start"].tolist(), step["q_len"].tolist()
            rows = [(slots[i], lengths[i] - q_len[i], q_start[i], q_len[i]) for i in range(count)]
            single = [q_len[i] == 1 for i in range(count)]
            assert single == sorted(single, reverse=True), "rows of one token come first"
            assert q_start[:count] == [0, *accumulate(q_len[: count - 1])][:count]
            blocks, size = [], self.buckets.block_q
            for i, (_, start, first, n) in enumerate(rows):
                assert step["token_row"][first : first + n].tolist() == [i] * n
                assert step["positions"][first : first + n].tolist() == list(range(start, start + n))
                if n > 1:
                    self.runner.chunks += 1
                    blocks += [(first - start - b, i, b) for b in range(first, first + n, size)]
            total = sum(n for *_, n in rows)
            assert (step["token_row"][total:] == -1).all()
            assert (step["block_row"][len(blocks) :] == -1).all()
            listed = list(zip(step["block_row"].tolist(), step["block_start"].tolist()))[: len(blocks)]
            assert listed == [(i, b) for _, i, b in sorted(blocks)], "those that see many keys come first"
        tokens = step["tokens"].tolist()
        known = []
        for slot, _, first, n in rows:
            own = tokens[first : first + n]
            known += [self.last_token[slot] if token < 0 else token for token in own]
            assert n == 1 or min(own) >= 0
        assert min(known, default=0) >= 0, "a last token that was never drawn"
        return rows, [int(token) for token in known]

    def _compute(self, rows, tokens: list[int]) -> list[int]:
        """Writes every token, then reads back what each of them may see."""
        size, parts = self.page_size, []
        for pool, table, group in zip(self.pools, self.tables, self.groups, strict=True):
            out: list[int] = []
            for slot, start, first, n in rows:
                begin = 0 if group.window is None else max(0, start + 1 - group.window)
                positions = np.arange(begin, start + n)
                pages = table[slot, positions // size]
                assert (pages > 0).all(), f"a null page is visible to slot {slot} at {start}"
                earlier = pool[pages, positions % size][: start - begin]
                assert (earlier[:, 0] >= 0).all(), "an entry that was never written is visible"
                assert (earlier[:, 1] == positions[: start - begin]).all(), "an entry of another position is visible"
                own = tokens[first : first + n]
                before = int(earlier[-1, 2]) if len(earlier) else 0
                if group.window == 1:
                    states = [next_states(0, [token], start + i, self.runner.weights)[0] for i, token in enumerate(own)]
                else:
                    states = next_states(before, own, start, self.runner.weights)
                entries = np.stack([own, positions[start - begin :], states], axis=1)
                pool[pages[start - begin :], positions[start - begin :] % size] = entries
                visible = earlier[:, 2].tolist() + states
                for p in range(start, start + n):
                    low = 0 if group.window is None else max(0, p + 1 - group.window)
                    out.append(hidden(visible[low - begin : p + 1 - begin]))
            parts.append(out)
        # Two rows that write to one page would have been one after the other above; on a device they are not.
        written = [
            (g, int(self.tables[g][slot, p // size]), p % size)
            for g in range(len(self.groups)) for slot, start, _, n in rows for p in range(start, start + n)
        ]  # fmt: skip
        assert len(set(written)) == len(written), "two tokens of a step are written to one place"
        return [mix(*seen) for seen in zip(*parts)]

    def _outputs(self, inputs: StepInputs, sampled, hiddens: list[int]) -> StepOutputs:
        tokens = []
        for slot, position, x in sampled:
            held = self._slot(slot)
            assert inputs.mode != "greedy" or not held.temperature, "the greedy program cannot draw"
            assert inputs.mode == "everything" or not held.edits, "this program edits no logits"
            allowed: Sequence[int] = range(self.vocab)
            if held.edits:
                bits = np.unpackbits(held.mask.astype("<u4").view(np.uint8), bitorder="little")[: self.vocab]
                allowed = np.flatnonzero(bits).tolist()
            token = draw(x, position, held, allowed, held.seen if held.edits else [])
            if held.edits:
                held.seen = held.seen + [token]
            self.last_token[slot] = token
            tokens.append(token)
        extra = {}
        if inputs.mode == "everything" and inputs.kind == "mixed":
            extra = dict(zip(("logprob", "rank", "top_ids", "top_logprobs"),
                             self._logprobs([x for *_, x in sampled], tokens)))  # fmt: skip
            if inputs.whole_vocab:
                extra["vocab_logprobs"] = self._distributions(x for *_, x in sampled)
        prompt, spans = None, []
        if inputs.prompt_asked is not None:
            places, targets = inputs.prompt_asked.tolist()
            assert max(places) < len(hiddens), "a token that was not computed"
            prompt = self._logprobs([hiddens[place] if place >= 0 else 0 for place in places], targets)
            spans = [
                np.stack([distribution(x, self.vocab) for x in hiddens[span.token : span.token + span.count]])
                for span in inputs.prompt_spans
                if span.best == -1
            ]
        return StepOutputs(np.array(tokens, np.int32)[:, None], **extra, prompt=prompt, prompt_vocab=tuple(spans))

    def _distributions(self, hiddens) -> np.ndarray:
        return np.array([distribution(x, self.vocab) for x in hiddens], np.float32).reshape(-1, self.vocab)

    def _logprobs(self, hiddens, tokens) -> tuple[np.ndarray, ...]:
        """Of each token, its rank, and the best `TOP`; not more of them than tests look at are right."""
        rows = self._distributions(hiddens)
        own = rows[np.arange(len(rows)), tokens]
        best = np.argsort(-rows, axis=1, kind="stable")[:, :TOP].astype(np.int32)
        return own, (rows > own[:, None]).sum(1).astype(np.int32) + 1, best, np.take_along_axis(rows, best, 1)


class FakeSink:
    """Token t is the letter number t; stop strings are looked for in the joined letters."""

    def __init__(self):
        self.texts: dict = {}

    def open(self, key, prompt_ids, params):
        self.texts[key] = ["", params]

    def update(self, items):
        updates = []
        for key, ids in items:
            entry, start, keep, stop = self.texts[key], len(self.texts[key][0]), 0, None
            while stop is None and keep < len(ids):
                entry[0] += letter(ids[keep])
                keep += 1
                stop = next((s for s in entry[1].stop if entry[0].endswith(s)), None)
            updates.append(SimpleNamespace(text_delta=entry[0][start:], stop=stop, keep=keep))
        return updates

    def close(self, key, ids):
        return "".join(letter(token) for token in ids) if self.texts.pop(key, None) else ""


def letter(token: int) -> str:
    return chr(ord("a") + token)


def groups_of(windows: Sequence[int | None]) -> list[CacheGroup]:
    return [CacheGroup((i,), window, 1, 8) for i, window in enumerate(windows)]


def make_engine(
    *, windows=(None,), pages=40, page_size=4, max_num_seqs=4, max_num_batched_tokens=16, flights=1, vocab=16,
    columns=64, block_q=4, steps_per_call=1, fail=None, poison=None, shards=1, **options,
) -> Engine:  # fmt: skip
    """An engine on a fake device. pages: of each group, or one number for all of them, the null page not counted.

    With several `shards` sizes are of each of them.
    """
    counts = [pages] * len(windows) if isinstance(pages, int) else pages
    schedulers = [
        Scheduler(
            groups_of(windows), [count + 1 for count in counts], page_size=page_size, max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens, max_model_len=columns * page_size,
            steps_per_call=steps_per_call, **options,
        )
        for _ in range(shards)
    ]  # fmt: skip
    buckets = Buckets(
        rows=bucket_sizes(1, max_num_seqs, 8),
        tokens=bucket_sizes(min(4, max_num_batched_tokens), max_num_batched_tokens, 16),
        block_q=block_q, page_size=page_size, groups=len(windows), max_num_seqs=max_num_seqs,
        steps=(1, steps_per_call),
    )  # fmt: skip
    runner = FakeRunner(schedulers, buckets, vocab, columns, fail, poison)
    return Engine(
        together(schedulers), runner, buckets, FakeSink(), vocab_size=vocab, steps_in_flight=flights,
        is_device_error=lambda error: isinstance(error, DeviceError),
    )  # fmt: skip


def make_request(request_id, prompt, *, priority=0, seed=0, eos=(), bad_words=(), timeout=None, **params) -> Request:
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 4, **params})
    return Request(
        str(request_id), None, list(prompt), params, tuple(eos), priority, seed=seed, max_tokens=params.max_tokens,
        stop_token_ids=frozenset({*params.stop_token_ids, *(() if params.ignore_eos else eos)}), deadline=timeout,
        bad_word_ids=[list(word) for word in bad_words],
        needs_everything=params.needs_everything or bool(bad_words),
        edits_logits=params.edits_logits or bool(bad_words),
        needs_last_token=any(len(word) > 1 for word in bad_words),
    )  # fmt: skip
