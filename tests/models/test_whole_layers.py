"""Decode steps of few rows by one kernel a layer: which steps and models, and with its twin in the kernel's place the
same answers as op by op.
"""

import json
from collections import Counter
from pathlib import Path

import pytest

from jaxengine import LLM, SamplingParams
from jaxengine.layers.ops import WholeLayer
from jaxengine.models import llama, prepare
from jaxengine.weights import prepared
from pallas_kernels.decode_layer import LayerWeights, decode_layer_reference
from tests import tiny_llm

ROWS = 4
PROMPTS = [[7 + i] * (1 + 9 * i) for i in range(6)]


def answers(monkeypatch, kind, kernel, prompts=PROMPTS, **options):
    """Greedy tokens, and how often the kernel was traced in decode steps and in others, by number of tokens."""
    seen = Counter()
    run_layers = llama.Model.run_layers

    def counted(model, x, inputs, cache):
        before = seen["layers"]
        found = run_layers(model, x, inputs, cache)
        seen[len(x), inputs.block_row is None] += seen["layers"] - before
        return found

    def run(*args, **how):
        seen["layers"] += 1
        return decode_layer_reference(*args, **how)

    whole = WholeLayer(ROWS, 1, LayerWeights, lambda *args, **how: True, run) if kernel else None
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
    folder = kind if isinstance(kind, Path) else tiny_llm.model_folder(kind)
    with monkeypatch.context() as patch:
        patch.setattr(llama, "whole_layer", lambda implementation: whole)
        patch.setattr(llama.Model, "run_layers", counted)
        patch.setattr(prepared, "prepare", lambda *args: prepare(*args[:3], False, *args[4:]))  # as on GPUs
        with LLM(folder, **(tiny_llm.OPTIONS | options)) as llm:
            outputs = llm.generate(prompts, params, use_tqdm=False)
    del seen["layers"]
    return [list(output.outputs[0].token_ids) for output in outputs], {key for key, count in seen.items() if count}


@pytest.mark.parametrize(("kind", "steps"), [("llama", 1), ("shipped", 3)])
def test_the_same_tokens(kind, steps, monkeypatch, shipped_model):
    kind = shipped_model if kind == "shipped" else kind  # it norms q and k
    want, nothing = answers(monkeypatch, kind, False, steps_per_call=steps)
    found, seen = answers(monkeypatch, kind, True, steps_per_call=steps)
    assert found == want and not nothing
    assert seen <= {(rows, True) for rows in (1, 2, 4)} and (4, True) in seen


@pytest.mark.parametrize("kind", ["windows", "experts", "sinks"])
def test_models_with_other_options_go_op_by_op(kind, monkeypatch):
    assert not answers(monkeypatch, kind, True, PROMPTS[:2])[1]


@pytest.mark.parametrize(
    ("changes", "whole"),
    [
        ({}, True),
        ({"model_type": "mistral", "sliding_window": 20}, False),
        ({"model_type": "qwen2"}, False),  # it adds biases to q, k and v
        ({"mlp_bias": True}, False),
        ({"hidden_act": "gelu"}, False),
        ({"model_type": "gpt_oss", "num_local_experts": 4, "layer_types": ["full_attention"] * 2}, False),
    ],
    ids=str,
)
def test_each_option_that_the_kernel_does_not_have(changes, whole, tmp_path, monkeypatch):
    config = tiny_llm.CONFIGS["llama"] | changes
    (tmp_path / "config.json").write_text(
        json.dumps({name: config[name] for name in config if name != "architectures"})
    )
    assert bool(answers(monkeypatch, tmp_path, True, PROMPTS[:1], load_format="dummy")[1]) is whole


def test_kernels_that_lie_apart_go_op_by_op(monkeypatch):
    assert not answers(monkeypatch, "llama", True, PROMPTS[:2], fuse_weights=False)[1]
