"""A step of several shards as what each of them gets of it, and their results as the runner hands them over."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from jaxengine.step import StepInputs, StepOutputs

ARRAYS = ("packed", "head_packed", "prompt_asked")
WRITES = ("slot_writes", "logit_writes", "mask_writes")
BY_ROW = ("tokens", "logprob", "rank", "top_ids", "top_logprobs", "vocab_logprobs")


def share(inputs: StepInputs, shard: int, shards: int, slots: int) -> StepInputs:
    """What one of so many shards, with so many slots each, gets of a step."""

    def part(array):
        size, rest = divmod(array.shape[-1], shards)
        assert not rest
        return array[..., shard * size : (shard + 1) * size]

    def own(items):
        return [replace(item, slot=item.slot % slots) for item in items if item.slot // slots == shard]

    tokens = inputs.bucket.tokens
    spans = [replace(s, token=s.token % tokens, begin=s.begin % tokens) for s in own(inputs.prompt_spans)]
    return replace(
        inputs,
        prompt_spans=spans,
        **{name: part(array) for name in ARRAYS if (array := getattr(inputs, name)) is not None},
        **{name: own(getattr(inputs, name)) for name in WRITES},
    )


def join(inputs: StepInputs, outputs: Sequence[StepOutputs]) -> StepOutputs:
    rows = (inputs.head_bucket or inputs.bucket).rows

    def ordered(name):
        arrays = [getattr(each, name) for each in outputs]
        if arrays[0] is None or inputs.order is None:
            return arrays[0]
        padded = [np.pad(a, [(0, rows - len(a))] + [(0, 0)] * (a.ndim - 1), constant_values=-9) for a in arrays]
        return np.concatenate(padded)[inputs.order]

    prompt = None if outputs[0].prompt is None else tuple(map(np.concatenate, zip(*(each.prompt for each in outputs))))
    whole = tuple(part for each in outputs for part in each.prompt_vocab)
    return StepOutputs(**{name: ordered(name) for name in BY_ROW}, prompt=prompt, prompt_vocab=whole)
