"""A real model: logits and greedy tokens of SmolLM2-135M-Instruct, read from its GGUF file, against transformers'."""

import json

import numpy as np
import pytest

from jaxengine.sharding import create_mesh
from jaxengine.weights import load_params, open_checkpoint
from tests.models.harness import PagedModel
from tests.references import gguf_files, greedy


@pytest.mark.full
def test_logits_and_greedy_tokens_equal_transformers(smollm2):
    checkpoint = open_checkpoint(smollm2)
    params = load_params(checkpoint, "float32", create_mesh())
    model = PagedModel(checkpoint.config, params, 128, rows=1, tokens=128, page_size=16)
    kept = json.loads((gguf_files.FOLDER / "smollm2_logits.json").read_text())["answers"]
    answers, errors = gguf_files.load("smollm2")["answers"], []
    for number, (answer, expected) in enumerate(zip(answers, kept, strict=True)):
        model.reset(seed=number)
        prompt, tokens = answer["prompt_ids"], answer["token_ids"]
        logits = model.extend({0: prompt + tokens})[0]
        if expected["logits"]:
            errors.append(greedy.error(expected["logits"], logits))
        best = logits[len(prompt) - 1 : -1].argmax(-1)
        assert not greedy.wrong_steps(best, tokens, expected["near_ties"], 1e-4), answer["question"]
        # Decoding, token by token, gives what the whole sequence gave.
        if number == 0:
            model.reset(seed=100)
            decoded = np.stack([model.decode({0: token})[0] for token in prompt + tokens])
            errors.append(float(np.abs(decoded - logits).max() / np.abs(logits).max()))
    assert len(errors) == 5
    assert max(errors) < 1e-4, errors
