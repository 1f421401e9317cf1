"""What the tests of sampling share: rows that ask for nothing, random logits, the jitted sampler."""

from functools import partial

import jax
import numpy as np

from jaxengine.sampling import SamplingFields, sample

V, R, B = 37, 4, 3  # a vocabulary that does not fill its last word of the mask
WORDS = -(-V // 32)
draw = jax.jit(sample, static_argnames=("mode", "num_logprobs", "logprobs_mode", "whole_vocab"))
# Each new combination of shapes and static arguments compiles for a second: tests share these.
raw = partial(draw, mode="everything", num_logprobs=5, logprobs_mode="raw", whole_vocab=True)
processed = partial(draw, mode="everything", num_logprobs=5, logprobs_mode="processed", whole_vocab=True)
DRAWS = {"greedy": partial(draw, mode="greedy"), "sampled": partial(draw, mode="sampled"), "everything": raw}


def make_fields(rows=R, vocab=V, **changes):
    """Fields of `rows` rows that ask for nothing, but for `changes`: arrays, or one value for all rows."""
    columns = {
        "temperature": (np.float32, 1), "top_k": (np.int32, 0), "top_p": (np.float32, 1), "min_p": (np.float32, 0),
        "presence": (np.float32, 0), "frequency": (np.float32, 0), "repetition": (np.float32, 1),
        "sample_index": (np.int32, 0),
    }  # fmt: skip
    fields = {
        name: np.full(rows, changes.pop(name, default), dtype)
        if np.ndim(changes.get(name)) == 0
        else np.asarray(changes.pop(name), dtype)
        for name, (dtype, default) in columns.items()
    }
    neutral = {
        "position": np.arange(rows, dtype=np.int32),
        "seed": np.tile(np.array([[7, 9]], np.uint32), (rows, 1)),
        "counts": np.zeros((rows, vocab), np.int16),
        "mask": np.full((rows, -(-vocab // 32)), 0xFFFFFFFF, np.uint32),
        "bias_ids": np.full((rows, B), -1, np.int32),
        "bias_values": np.zeros((rows, B), np.float32),
    }
    return SamplingFields(**fields, **{**neutral, **changes})


def take_rows(fields, index):
    return jax.tree.map(lambda x: np.asarray(x)[index], fields)


def random_logits(rows=R, vocab=V, seed=0, scale=2.0):
    return (np.random.default_rng(seed).normal(size=(rows, vocab)) * scale).astype(np.float32)


def log_softmax(x):
    x = np.asarray(x, np.float64)
    x = x - x.max(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        return x - np.log(np.exp(x).sum(-1, keepdims=True))


def equations(jaxpr):
    """Every equation, those of inner functions too, with the values they compute."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)
