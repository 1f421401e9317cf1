"""The model that ships with the package: logits and 200 greedy tokens against transformers'."""

import json

import pytest

from jaxengine.sharding import create_mesh
from jaxengine.weights import load_params, open_checkpoint
from tests.models.harness import PagedModel
from tests.references import greedy, tiny


@pytest.mark.parametrize("answers", [slice(0, 5), pytest.param(slice(5, 50), marks=pytest.mark.full)], ids=["5", "45"])
def test_logits_and_greedy_tokens_equal_transformers(shipped_model, answers):
    """Each token is what the reference chose after the reference's own tokens before it."""
    fixture = tiny.FOLDER / "shipped.json"
    if not fixture.exists():
        pytest.skip("make_shipped.py has not run: it writes tests/references/shipped.json")
    checkpoint = open_checkpoint(shipped_model)
    params, errors = load_params(checkpoint, "float32", create_mesh()), []
    model = PagedModel(checkpoint.config, params, 256, rows=1, tokens=256, page_size=16)
    for seed, answer in enumerate(json.loads(fixture.read_text())["answers"][answers]):
        model.reset(seed)
        prompt, tokens = answer["prompt_ids"], answer["token_ids"]
        logits = model.extend({0: prompt + tokens[:-1]})[0]
        errors += [greedy.error(answer["logits"], logits)] if answer["logits"] else []
        best = logits[len(prompt) - 1 :].argmax(-1)
        wrong = greedy.wrong_steps(best, tokens, answer["near_ties"], 1e-4)
        assert not wrong, (prompt, wrong)
    assert max(errors, default=0) < 1e-4, errors
