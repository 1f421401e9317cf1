"""Logits -> token ids and log-probabilities. Pure functions; everything in float32.

A row's result depends on its own logits and fields only: not on the batch, the row's place in it, or the mode.

What min_p, top_k and top_p keep is always "all tokens within some distance of the best one", where the distance is
(largest logit - logit) / temperature, 0 or more. So each row needs one number, its limit, and nothing is sorted.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxengine.sharding import Axis, share_ids, total
from jaxengine.step import Mode

DRAW = 0  # purpose of the noise; others get their own number, so that two uses never share bits
COUNT_MAX = 0x7FFF  # of a token in `SamplingFields.counts`
_INFINITY_BITS = 0x7F800000  # of float32; floats of 0 or more are ordered as their bits are


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingFields:
    """What the rows of a step ask for. R rows, V tokens in the vocabulary (padding, with logits of -inf, included).

    The fields after `position` are read in the mode "everything" only; None there: no row asks for it.
    """

    temperature: jax.Array  # float32 [R]; 0: the token with the largest logit, the lowest id among equals
    top_k: jax.Array  # int32 [R]; 0 or less: off
    top_p: jax.Array  # float32 [R]; 1: off
    min_p: jax.Array  # float32 [R]; 0: off
    presence: jax.Array  # float32 [R]; 0: off
    frequency: jax.Array  # float32 [R]; 0: off
    repetition: jax.Array  # float32 [R]; 1: off
    seed: jax.Array  # uint32 [R, 2]
    sample_index: jax.Array  # int32 [R]: which of the request's n completions
    position: jax.Array  # int32 [R]: where in the sequence the token that is drawn will stand
    # Sign bit: the token is in the prompt. The other 15: how often it was generated, at most COUNT_MAX.
    counts: jax.Array | None = None  # int16 [R, V]
    mask: jax.Array | None = None  # uint32 [R, ceil(V / 32)]; bit t % 32 of word t // 32 set: t may be drawn
    bias_ids: jax.Array | None = None  # int32 [R, B]; -1: none
    bias_values: jax.Array | None = None  # float32 [R, B]


class Sampled(NamedTuple):
    """One token a row. Outside the mode "everything" the log-probabilities are zeros and the K wide arrays empty."""

    tokens: jax.Array  # int32 [R]
    logprob: jax.Array  # float32 [R]
    rank: jax.Array  # int32 [R]; 1: no token is more probable
    top_ids: jax.Array  # int32 [R, K], the most probable first, the lowest id first among equals
    top_logprobs: jax.Array  # float32 [R, K]
    vocab_logprobs: jax.Array  # float32 [R, V], or [R, 0] when not asked for


class TokenLogprobs(NamedTuple):
    """Log-probabilities of given tokens, and of the K best in their place."""

    logprob: jax.Array  # float32 [T]
    rank: jax.Array  # int32 [T]
    top_ids: jax.Array  # int32 [T, K]
    top_logprobs: jax.Array  # float32 [T, K]


@jax.named_scope("sample")
def sample(
    logits: jax.Array,
    fields: SamplingFields,
    mode: Mode,
    num_logprobs: int = 0,
    logprobs_mode: Literal["raw", "processed"] = "raw",
    whole_vocab: bool = False,
    axis: Axis | None = None,
) -> Sampled:
    """logits [R, V] of any float type -> one token for each row.

    The order is vLLM's: mask, bias, penalties, temperature, min_p, top_k, top_p. `mode` says what may be skipped:
    "greedy" all of it, "sampled" mask, bias, penalties and log-probabilities. Log-probabilities are of the logits as
    they came (raw), or of the distribution the token was drawn from (processed; for a row of temperature 0 the one
    before temperature). K is num_logprobs, or V if that is less. `axis`: the mesh axis over which V is split, in the
    first two modes; only numbers of R rows cross it.
    """
    logits = logits.astype(jnp.float32)
    rows = len(logits)
    if mode != "everything":
        tokens = argmax(logits, axis) if mode == "greedy" else _draw(logits, fields, axis)[0]
        none = jnp.zeros((rows, 0), jnp.float32)
        return Sampled(
            tokens, jnp.zeros(rows, jnp.float32), jnp.zeros(rows, jnp.int32), none.astype(jnp.int32), none, none
        )
    edited = edit_logits(logits, fields)
    tokens, limit = jax.lax.cond(
        jnp.any(fields.temperature > 0),
        _draw,
        lambda x, _: (argmax(x), jnp.full(rows, jnp.inf, jnp.float32)),
        edited,
        fields,
    )
    scores = logits
    if logprobs_mode == "processed":
        distance = _scaled_distance(edited, fields)
        scores = jnp.where(distance <= limit[:, None], -distance, -jnp.inf)
    found = token_logprobs(scores, tokens, num_logprobs)
    whole = log_softmax(scores) if whole_vocab else jnp.zeros((rows, 0), jnp.float32)
    return Sampled(tokens, *found, whole)


def argmax(x: jax.Array, axis: Axis | None = None) -> jax.Array:
    """x [R, V] -> int32 [R], the lowest index among equals. Two plain reductions: XLA's CPU vectorizes those."""
    x = jax.lax.optimization_barrier(x)  # both must see the same floats, not two computations of them
    vocab = x.shape[-1] if axis is None else x.shape[-1] * jax.lax.axis_size(axis)
    best = jnp.where(x == _largest(x, axis), share_ids(x.shape[-1], axis), vocab - 1)
    lowest = jnp.min(best, axis=-1)
    return lowest if axis is None else jax.lax.pmin(lowest, axis)


def _largest(x: jax.Array, axis: Axis | None) -> jax.Array:
    largest = jnp.max(x, axis=-1, keepdims=True)
    return largest if axis is None else jax.lax.pmax(largest, axis)


def _draw(logits: jax.Array, fields: SamplingFields, axis: Axis | None = None) -> tuple[jax.Array, jax.Array]:
    """float32 [R, V] -> tokens int32 [R], and the distance float32 [R] beyond which nothing was drawn."""
    greedy = fields.temperature <= 0
    distance = _scaled_distance(logits, fields, axis)
    limit = jnp.where(greedy, jnp.inf, _limit(distance, fields, axis))
    # Gumbel-max: argmax(log p + noise) is distributed as p.
    noised = jnp.where(distance <= limit[:, None], gumbel(fields, logits.shape[-1], axis=axis) - distance, -jnp.inf)
    return argmax(jnp.where(greedy[:, None], logits, noised), axis), limit


# -- logits


def edit_logits(logits: jax.Array, fields: SamplingFields) -> jax.Array:
    """float32 [R, V] -> the same with mask, biases and penalties applied."""
    vocab = logits.shape[-1]
    if fields.mask is not None:
        bits = fields.mask[:, :, None] >> jnp.arange(32, dtype=jnp.uint32) & 1
        logits = jnp.where(bits.reshape(len(bits), -1)[:, :vocab] != 0, logits, -jnp.inf)
    if fields.bias_ids is not None:
        ids = jnp.where(fields.bias_ids < 0, vocab, fields.bias_ids)  # dropped; -1 would be the last token
        logits = jax.lax.cond(
            jnp.any(fields.bias_ids >= 0),
            lambda x: x.at[jnp.arange(len(x))[:, None], ids].add(fields.bias_values, mode="drop"),
            lambda x: x,
            logits,
        )
    if fields.counts is not None:
        generated = fields.counts & COUNT_MAX
        repetition = fields.repetition[:, None]
        penalized = jnp.where(logits > 0, logits / repetition, logits * repetition)
        logits = jnp.where(fields.counts != 0, penalized, logits)
        logits = logits - fields.frequency[:, None] * generated.astype(jnp.float32)
        logits = logits - jnp.where(generated > 0, fields.presence[:, None], 0.0)
    return logits


def count_row(tokens: jax.Array, num_prompt: jax.Array, num_tokens: jax.Array, vocab: int) -> jax.Array:
    """A row of `SamplingFields.counts`, int16 [vocab], for a sequence.

    tokens int32 [L]: `num_prompt` of the prompt, then generated ones up to `num_tokens`, then padding.
    """
    index = jnp.arange(len(tokens))
    generated = (
        jnp.zeros(vocab, jnp.int32).at[tokens].add(((index >= num_prompt) & (index < num_tokens)).astype(jnp.int32))
    )
    in_prompt = jnp.zeros(vocab, bool).at[tokens].max(index < num_prompt)
    generated = jnp.minimum(generated, COUNT_MAX)
    return jnp.where(in_prompt, generated - (COUNT_MAX + 1), generated).astype(jnp.int16)


def count_tokens(counts: jax.Array, slots: jax.Array, tokens: jax.Array) -> jax.Array:
    """counts int16 [slots, V] with one more of tokens[i] in row slots[i]; a slot named twice counts one of them."""
    old = counts[slots, tokens]
    return counts.at[slots, tokens].set(old + (old & COUNT_MAX != COUNT_MAX).astype(jnp.int16))


# -- how far from the best token


def _distance(logits: jax.Array, axis: Axis | None = None) -> jax.Array:
    """float32 [R, V] -> largest logit - logit, 0 or more; infinite for logits of -inf, even if all are."""
    return _best(logits, axis) - logits


def _best(logits: jax.Array, axis: Axis | None = None) -> jax.Array:
    """float32 [R, V] -> [R, 1]; 0 where all are -inf."""
    best = _largest(logits, axis)
    return jnp.where(best == -jnp.inf, 0.0, best)


def _scaled_distance(logits: jax.Array, fields: SamplingFields, axis: Axis | None = None) -> jax.Array:
    """The same in units of the temperature, which is 1 for greedy rows."""
    return _distance(logits, axis) / jnp.where(fields.temperature > 0, fields.temperature, 1.0)[:, None]


def _limit(distance: jax.Array, fields: SamplingFields, axis: Axis | None) -> jax.Array:
    """float32 [R]: the distance up to which min_p, then top_k, then top_p keep tokens, ties included.

    top_p is a share of what min_p and top_k leave. For rows that use neither top_k nor top_p nothing is searched.
    """
    rows = len(distance)
    sampled = fields.temperature > 0
    limit = -jnp.log(fields.min_p)

    def within_top_k() -> jax.Array:
        def holds(limits):
            counts = total([jnp.sum(distance <= t[:, None], axis=-1, dtype=jnp.int32) for t in limits], axis)
            return jnp.stack([count >= fields.top_k for count in counts])

        return jnp.where(by_k, _smallest(holds, rows), jnp.inf)

    def within_top_p(limit: jax.Array) -> jax.Array:
        weight = jnp.where(distance <= limit[:, None], jnp.exp(-distance), 0.0)
        needed = fields.top_p * total(jnp.sum(weight, axis=-1), axis)

        def holds(limits):
            weights = total([jnp.sum(jnp.where(distance <= t[:, None], weight, 0.0), axis=-1) for t in limits], axis)
            return jnp.stack([each >= needed for each in weights])

        return jnp.where(by_p, jnp.minimum(limit, _smallest(holds, rows)), limit)

    by_k, by_p = sampled & (fields.top_k > 0), sampled & (fields.top_p < 1)
    top_k = jax.lax.cond(jnp.any(by_k), within_top_k, lambda: jnp.full(rows, jnp.inf, jnp.float32))
    return jax.lax.cond(jnp.any(by_p), within_top_p, lambda limit: limit, jnp.minimum(limit, top_k))


def _smallest(holds: Callable[[jax.Array], jax.Array], rows: int) -> jax.Array:
    """float32 [rows]: per row the smallest t >= 0 for which `holds(t)`, infinity if there is none.

    `holds` maps float32 [n, rows] to bool [n, rows] and turns from False to True once as t grows. A GPU reads the
    tokens once for several t, a CPU once for each.
    """
    halves, eighths = partial(_narrow, holds, rows, 2), partial(_narrow, holds, rows, 8)
    return jax.lax.platform_dependent(cpu=halves, default=eighths)


def _narrow(holds: Callable[[jax.Array], jax.Array], rows: int, parts: int) -> jax.Array:
    """See `_smallest`: an interval of floats, numbered by their bits, is cut into so many parts, until it has one."""

    def cut(_, interval):
        low, high = interval  # holds(low) is False, or low is -1; holds(high) is True, or high is infinity
        step = (high - low + parts - 1) // parts
        ends = low + step * jnp.arange(1, parts, dtype=jnp.int32)[:, None]
        true = holds(jax.lax.bitcast_convert_type(ends, jnp.float32)) | (ends >= high)
        low = low + step * jnp.sum(~true, axis=0, dtype=jnp.int32)
        return low, jnp.minimum(low + step, high)

    start = (jnp.full(rows, -1, jnp.int32), jnp.full(rows, _INFINITY_BITS, jnp.int32))
    passes = -(-31 // (parts.bit_length() - 1))  # parts is a power of two, the first interval less than 2**31 wide
    _, high = jax.lax.fori_loop(0, passes, cut, start)
    return jax.lax.bitcast_convert_type(high, jnp.float32)


# -- noise


def gumbel(fields: SamplingFields, vocab: int, purpose: int = DRAW, axis: Axis | None = None) -> jax.Array:
    """Gumbel noise, float32 [R, vocab], a function of seed, sample index, position, purpose and token id alone.

    `axis`: see `sample`; `vocab` is then the device's share.
    """
    key = (fields.seed[:, 0], fields.seed[:, 1])
    for word in (fields.sample_index, fields.position, jnp.full(len(fields.seed), purpose)):
        key = _fold_in(key, word.astype(jnp.uint32))
    ids = share_ids(vocab, axis, jnp.uint32)[None]
    bits, _ = _fold_in((key[0][:, None], key[1][:, None]), ids)
    # Finest near 0, where the largest noise comes from; never 0 or 1.
    uniform = jnp.minimum((bits.astype(jnp.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    return -jnp.log(-jnp.log1p(-uniform))


def _fold_in(key: tuple[jax.Array, jax.Array], data: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`jax.random.fold_in` of threefry2x32 (Salmon et al. 2011, 20 rounds), bit for bit, elementwise.

    Written out because it fuses and shards like any other arithmetic, and depends on none of jax's settings.
    """
    keys = (*key, key[0] ^ key[1] ^ jnp.uint32(0x1BD11BDA))
    x, y = keys[0], data + keys[1]
    for group in range(5):
        for rotation in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            x = x + y
            y = x ^ (y << rotation | y >> 32 - rotation)
        x = x + keys[(group + 1) % 3]
        y = y + keys[(group + 2) % 3] + jnp.uint32(group + 1)
    return x, y


# -- log-probabilities


def log_softmax(scores: jax.Array) -> jax.Array:
    """float32 [T, V] -> the same floats as `token_logprobs` gives."""
    best, log_total = _totals(scores)
    return scores - best - log_total


def _totals(scores: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The best of each row (0 where all are -inf), and the logarithm of what all weigh beside it."""
    best = _best(scores)
    total = jnp.sum(jnp.exp(scores - best), axis=-1, keepdims=True)
    return best, jnp.log(jnp.maximum(total, 1.0))  # the best token alone is 1; less: every score is -inf


def token_logprobs(scores: jax.Array, tokens: jax.Array, k: int) -> TokenLogprobs:
    """scores float32 [T, V] -> log-probabilities of `tokens` int32 [T] and of the k best, whose search costs more than
    the rest.

    Both come from `scores` in the same way: equal tokens have equal floats.
    """
    best, log_total = _totals(scores)
    own = jnp.take_along_axis(scores, tokens[:, None], axis=-1)
    rank = 1 + jnp.sum(scores > own, axis=-1, dtype=jnp.int32)
    top, ids = jax.lax.top_k(scores, min(k, scores.shape[-1]))
    return TokenLogprobs((own - best - log_total)[:, 0], rank, ids, top - best - log_total)
