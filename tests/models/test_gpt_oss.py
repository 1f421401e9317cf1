"""gpt_oss from MXFP4 to tokens: what is loaded, saved again, and drawn by the engine."""

import numpy as np
import pytest

from jaxengine import LLM, SamplingParams
from jaxengine.errors import UnsupportedModelError
from jaxengine.sharding import create_mesh
from jaxengine.weights import checkpoint_in_memory, load_params, open_checkpoint, save_checkpoint
from tests.converters.test_mxfp4 import decoded
from tests.models.harness import PagedModel
from tests.references import tiny
from tests.tiny_llm import OPTIONS
from tests.weight_helpers import assert_same, edit_json

QUANTIZED = "gate_up_proj", "down_proj"
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}


def write_mxfp4(folder):
    """The tiny model with random experts in MXFP4, and beside it what they are."""
    quantized, plain = folder / "quantized", folder / "plain"
    tensors = tiny.tensors("gpt_oss")
    for path in (quantized, plain):
        tiny.write_checkpoint("gpt_oss", path)
    edit_json(quantized / "config.json", quantization_config=MXFP4)
    stored = dict(tensors)
    for name in [name for name in tensors if name.endswith(QUANTIZED)]:
        experts, size_in, size_out = stored.pop(name).shape
        raw = (tiny.uniform(name, experts * size_in * size_out // 2) * 1000).astype(np.int64)
        blocks = (raw % 256).astype(np.uint8).reshape(experts, size_out, size_in // 32, 16)
        scales = (122 + raw[: blocks[..., 0].size] % 4).astype(np.uint8).reshape(blocks.shape[:3])
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        tensors[name] = decoded(blocks, scales).astype(np.float32)
    (quantized / "model.safetensors").unlink()
    tiny.write_safetensors(stored, quantized, shards=3)
    tiny.write_safetensors(tensors, plain)
    return quantized, plain


def test_mxfp4_is_loaded_as_what_it_stands_for_and_saved_as_that(tmp_path):
    quantized, plain = map(open_checkpoint, write_mxfp4(tmp_path))
    mesh = create_mesh()
    assert quantized.config == plain.config
    for dtype in ("float32", "bfloat16"):
        params = load_params(quantized, dtype, mesh)
        assert_same(params, load_params(plain, dtype, mesh))
    save_checkpoint(quantized, params, tmp_path / "saved", "safetensors")
    saved = open_checkpoint(tmp_path / "saved")
    assert "quantization_config" not in saved.hf_config
    assert_same(params, load_params(saved, "bfloat16", mesh))


def test_arrays_by_the_names_of_transformers(tmp_path):
    """What takes turns in a file does so in memory."""
    checkpoint = open_checkpoint(tiny.write_checkpoint("gpt_oss", tmp_path))
    mesh, config = create_mesh(), tiny.config("gpt_oss")
    found = load_params(checkpoint_in_memory(tiny.tensors("gpt_oss"), config), "float32", mesh)
    for path, array in load_params(checkpoint, "float32", mesh).items():
        np.testing.assert_array_equal(array, found[path], err_msg=path)
    gate = found["layers.1.mlp.experts.gate_proj.kernel"]
    np.testing.assert_array_equal(gate, tiny.tensors("gpt_oss")["model.layers.1.mlp.experts.gate_up_proj"][..., ::2])


def test_another_quantization_is_refused(tmp_path):
    quantized, _ = write_mxfp4(tmp_path)
    edit_json(quantized / "config.json", quantization_config={"quant_method": "fp8"})
    with pytest.raises(UnsupportedModelError, match=r"quantization_config=\{'quant_method': 'fp8'\}"):
        open_checkpoint(quantized)


@pytest.mark.parametrize("attention", ["xla", pytest.param("reference", marks=pytest.mark.full)])
def test_greedy_tokens_of_the_engine(tmp_path, attention):
    """Prompts in chunks and of several lengths; the model's own logits, token by token, say what is right."""
    quantized, _ = write_mxfp4(tmp_path)
    tokens = tiny.reference("gpt_oss")["token_ids"]
    prompts, count = [tokens[:30], tokens[:3], tokens[5:16]], 12
    greedy = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
    with LLM(quantized, attention=attention, **(OPTIONS | {"max_num_batched_tokens": 16})) as llm:
        outputs = [output.outputs[0].token_ids for output in llm.generate(prompts, greedy, use_tqdm=False)]
        assert llm._runner.attention == attention
    checkpoint = open_checkpoint(quantized)
    model = PagedModel(checkpoint.config, load_params(checkpoint, "float32", create_mesh()), 64)
    last = {row: logits[-1] for row, logits in model.extend(dict(enumerate(prompts))).items()}
    for i in range(count):
        for row, logits in last.items():
            two = np.sort(logits)[-2:]
            assert two[1] - two[0] > 1e-3, "a tie, which rounding decides"
            assert outputs[row][i] == logits.argmax(), (row, i)
        last = model.decode({row: int(outputs[row][i]) for row in last})
