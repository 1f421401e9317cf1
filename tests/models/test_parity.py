"""Logits of every family and option against transformers': in one chunk, in pieces, token by token."""

import random

import numpy as np
import pytest

from jaxengine.sharding import create_mesh
from jaxengine.weights import load_params, open_checkpoint
from tests.models.harness import PagedModel
from tests.references import tiny

TOLERANCE = 1e-4  # of the largest logit
# What decoding, other implementations or joined kernels could do differently; other variants run those in full only.
TELLING = ("llama_mqa_head_dim", "llama_biases", "mistral", "qwen2_layer_types", "qwen3_moe_dense_layer", "gpt_oss",
           "gpt2_inverse_layer")  # fmt: skip
OPTIONS = ({"transpose": True}, {"implementation": "reference"}, {"fuse": False})


def cases(always: bool):
    return [
        pytest.param(name, options, id="-".join([name, *map(str, options.values())]),
                     marks=() if name in TELLING or (always and not options) else pytest.mark.full)
        for options in OPTIONS
        for name in tiny.variants()
    ]  # fmt: skip


def load(name: str, options: dict, folder) -> PagedModel:
    checkpoint = open_checkpoint(tiny.write_checkpoint(name, folder))
    params = load_params(checkpoint, "float32", create_mesh())
    return PagedModel(checkpoint.config, params, tiny.reference(name)["max_model_len"], **options)


def worst(name: str, logits) -> float:
    """Largest difference to transformers' logits, relative to its largest; `logits` of every token of the sequence."""
    reference = tiny.reference(name)
    difference = np.abs(np.asarray(logits)[reference["positions"]] - reference["logits"])
    return float(difference.max() / np.abs(reference["logits"]).max())


@pytest.mark.parametrize(("name", "options"), cases(always=True))
def test_chunks(name, options, tmp_path):
    """The whole sequence at once; then three rows at their own pace, single tokens beside chunks."""
    model, tokens = load(name, options, tmp_path), tiny.reference(name)["token_ids"]
    errors = {"one chunk": worst(name, model.extend({1: tokens})[1])}
    model.reset(seed=1)
    draw, rows, kinds = random.Random(2), {0: [], 1: [], 2: []}, set()
    while todo := [row for row in rows if len(rows[row]) < len(tokens)]:
        sizes = {row: draw.choice((1, 1, 3, 5, 11, 17)) for row in todo if draw.random() < 0.8}
        chunks = {row: tokens[len(rows[row]) :][:size] for row, size in sizes.items()}
        for row, logits in model.extend(chunks).items():
            rows[row] += list(logits)
        kinds.add((any(len(chunk) == 1 for chunk in chunks.values()), any(len(chunk) > 1 for chunk in chunks.values())))
    assert kinds >= {(True, True), (True, False), (False, True)}
    errors |= {f"row {row}": worst(name, logits) for row, logits in rows.items()}
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.parametrize(("name", "options"), cases(always=False))
def test_token_by_token(name, options, tmp_path):
    """Two rows, one ahead of the other, beside one that stays empty."""
    model, tokens = load(name, options, tmp_path), tiny.reference(name)["token_ids"]
    first, second = [], []
    for i in range(len(tokens) + 5):
        new = {row: tokens[j] for row, j in ((2, i), (0, i - 5)) if 0 <= j < len(tokens)}
        logits = model.decode(new)
        first += [logits[2]] if 2 in logits else []
        second += [logits[0]] if 0 in logits else []
    errors = worst(name, first), worst(name, second)
    assert max(errors) < TOLERANCE, errors
