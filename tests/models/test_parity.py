"""Logits of every family and option against transformers': in one piece, in pieces, token by token."""

import random

import numpy as np
import pytest

from jaxengine.sharding import create_mesh
from jaxengine.weights import load_params, open_checkpoint
from tests.models.harness import PagedModel
from tests.references import tiny

TOLERANCE = 1e-4  # of the largest logit
# What attention or the joined kernels could do differently; the other variants run in full only.
TELLING = ("llama_mqa_head_dim", "llama_biases", "mistral", "qwen2_layer_types", "qwen3", "gpt2_inverse_layer")
ALL = [
    pytest.param(name, options, marks=() if options == {} or name in TELLING else pytest.mark.full,
                 id="-".join([name, *map(str, options.values())]))
    for options in ({}, {"implementation": "reference"}, {"fuse": False})
    for name in tiny.variants()
]  # fmt: skip


def worst(name: str, logits) -> float:
    """Largest difference to transformers' logits, relative to its largest; `logits` of every token of the sequence."""
    reference = tiny.reference(name)
    difference = np.abs(np.asarray(logits)[reference["positions"]] - reference["logits"])
    return float(difference.max() / np.abs(reference["logits"]).max())


@pytest.mark.parametrize(("name", "options"), ALL)
def test_logits_equal_transformers(name, options, tmp_path):
    checkpoint = open_checkpoint(tiny.write_checkpoint(name, tmp_path))
    params = load_params(checkpoint, "float32", create_mesh())
    model = PagedModel(checkpoint.config, params, tiny.reference(name)["max_model_len"], **options)
    tokens, errors = tiny.reference(name)["token_ids"], {}

    model.reset(seed=1)
    errors["one chunk"] = worst(name, model.extend({1: tokens})[1])

    model.reset(seed=2)
    errors["token by token"] = worst(name, [model.decode({2: token})[2] for token in tokens])

    # Three rows at their own pace, single tokens beside chunks, until each has all tokens.
    model.reset(seed=3)
    draw, rows, shapes = random.Random(4), {0: [], 1: [], 2: []}, set()
    while todo := [row for row in rows if len(rows[row]) < len(tokens)]:
        chunks = {
            row: tokens[len(rows[row]) :][: draw.choice((1, 1, 3, 5, 11, 17))] for row in todo if draw.random() < 0.8
        }
        for row, logits in model.extend(chunks).items():
            rows[row] += list(logits)
        shapes.add(tuple(sorted({min(len(chunk), 2) for chunk in chunks.values()})))
    assert (1, 2) in shapes, "no step held single tokens beside a chunk"
    errors |= {f"mixed, row {row}": worst(name, logits) for row, logits in rows.items()}

    assert max(errors.values()) < TOLERANCE, errors
