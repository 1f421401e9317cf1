"""Config tables and tensor tables: every option lands where it should, and what is not known is refused by name."""

import json
import math

import pytest

from converters import ConversionError, UnsupportedOptionError
from converters.attributes import IRRELEVANT, NEUTRAL
from converters.families import FAMILIES, model_config, sources, target, tensors
from jaxengine.config import ExpertsConfig, ModelConfig, RopeConfig
from jaxengine.models import param_specs
from tests.references import tiny

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def config_of(variant, **changes):
    return tiny.config(variant) | changes


def whole(arguments):
    rope, experts = arguments.get("rope"), arguments.get("experts")
    arguments = arguments | {"rope": rope and RopeConfig(**rope), "experts": experts and ExpertsConfig(**experts)}
    return ModelConfig(**arguments)


@pytest.mark.parametrize("variant", tiny.variants())
def test_every_option_loads_and_every_tensor_has_its_place(variant):
    config = whole(model_config(tiny.config(variant)))
    shapes = {path: spec.shape for path, spec in param_specs(config).items()}
    found, sizes = set(), dict.fromkeys(shapes, 0)
    written = tiny.fixtures()["variants"][variant]["tensors"]
    for name, shape in written.items():
        place = target(config.model_type, name)
        for path in place.paths:
            assert (path, place.index) not in found
            found.add((path, place.index))
            sizes[path] += math.prod(shape) // len(place.paths)
    assert sizes == {path: math.prod(shape) for path, shape in shapes.items()}
    held = {name for name in written if target(config.model_type, name).paths}
    assert set(sources(config.model_type, shapes)) == {
        name.removeprefix(FAMILIES[config.model_type].PREFIX) for name in held
    }
    if variant != "gpt2_bare":
        assert set(tensors(config.model_type, shapes)) == held


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("llama_theta_eps", {"norm_eps": 0.1, "rope": RopeConfig("default", 50.0, 16)}),
        ("llama_biases", {"qkv_bias": True, "o_bias": True, "mlp_bias": True}),
        ("llama_mqa_head_dim", {"num_kv_heads": 1, "head_dim": 32, "attention_scales": (32**-0.5,) * 3}),
        ("llama_bf16", {"dtype": "bfloat16"}),
        ("llama_tied_mha", {"tie_word_embeddings": True}),
        ("mistral", {"windows": (8, 8, 8), "qkv_bias": False}),
        ("mistral_full_head_dim", {"windows": (None, None, None)}),
        ("qwen2", {"qkv_bias": True, "o_bias": False, "windows": (None, None, None)}),
        ("qwen2_window", {"windows": (None, 8, 8)}),
        ("qwen2_legacy", {"windows": (None, None, 8), "dtype": "float16"}),
        ("qwen2_unused_window", {"windows": (None, None, None)}),
        ("qwen2_layer_types", {"windows": (4, None, 4)}),
        ("qwen3_bias_window", {"qk_norm": True, "qkv_bias": True, "o_bias": True, "windows": (None, 8, 8)}),
        (
            "mixtral",
            {
                "windows": (8, 8, 8),
                "qk_norm": False,
                "rope": RopeConfig("default", 1e6, 16),
                "experts": ExpertsConfig(4, 2, 96, True, (0, 1, 2)),
            },
        ),
        (
            "qwen3_moe",
            {
                "windows": (None, None, None),
                "qk_norm": True,
                "intermediate_size": 96,
                "experts": ExpertsConfig(8, 3, 48, True, (0, 1, 2)),
            },
        ),
        (
            "qwen3_moe_dense_layer",
            {"windows": (8, 8, 8), "qkv_bias": True, "o_bias": True, "experts": ExpertsConfig(8, 3, 48, False, (0, 2))},
        ),
        ("qwen3_moe_second_layer", {"experts": ExpertsConfig(8, 1, 48, False, (1,))}),
        (
            "gpt_oss",
            {
                "windows": (8, None, 8),
                "sinks": True,
                "qkv_bias": True,
                "o_bias": True,
                "experts": ExpertsConfig(8, 3, 96, True, (0, 1, 2), True, (1.702, 2.0)),
            },
        ),
        (
            "gpt_oss_yarn",
            {
                "windows": (None, None, 8),
                "qkv_bias": False,
                "o_bias": False,
                "experts": ExpertsConfig(8, 1, 96, True, (0, 1, 2), True, (1.3, 0.5)),
            },
        ),
        ("gpt2", {"tie_word_embeddings": True, "attention_scales": (0.25,) * 3, "intermediate_size": 256}),
        ("gpt2_unscaled", {"attention_scales": (1.0,) * 3}),
        ("gpt2_inverse_layer", {"attention_scales": (0.25, 0.125, 0.25 / 3)}),
        ("gpt2_inner_relu", {"intermediate_size": 80, "activation": "relu"}),
    ],
)
def test_options(variant, expected):
    config = whole(model_config(tiny.config(variant)))
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_both_spellings_of_rope_mean_the_same(key):
    base = {k: v for k, v in tiny.config("llama").items() if k not in ("rope_parameters", "dtype")}
    new = base | {"dtype": "float16", "rope_parameters": YARN | {"rope_theta": 500.0}}
    scaling = {key if name == "rope_type" else name: value for name, value in YARN.items()}
    old = base | {"torch_dtype": "float16", "rope_theta": 500, "rope_scaling": scaling}
    assert model_config(new) == model_config(old)
    assert model_config(new)["rope"]["theta"] == 500


def test_the_original_length_may_stand_beside_rope():
    plain = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
    options = lambda **more: model_config(config_of("llama", rope_parameters=plain, **more))["rope"]["options"]  # noqa: E731
    assert options(original_max_position_embeddings=16)["original_max_position_embeddings"] == 16
    assert options()["original_max_position_embeddings"] == 64  # max_position_embeddings, as transformers has it


def test_what_a_file_does_not_say_is_as_in_transformers():
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
             "num_attention_heads": 32}  # fmt: skip
    llama, mistral, qwen2, qwen3 = (
        model_config(sizes | {"model_type": kind}) for kind in ("llama", "mistral", "qwen2", "qwen3")
    )
    assert (llama["num_kv_heads"], mistral["num_kv_heads"], qwen2["num_kv_heads"]) == (32, 8, 32)
    assert (llama["head_dim"], qwen3["head_dim"], mistral["windows"]) == (2, 128, (4096, 4096))
    assert (llama["bos_token_id"], llama["eos_token_ids"], qwen2["eos_token_ids"]) == (1, (2,), ())
    assert "dtype" not in llama
    mixtral, qwen3_moe = (whole(model_config(sizes | {"model_type": kind})) for kind in ("mixtral", "qwen3_moe"))
    assert (mixtral.num_kv_heads, mixtral.windows, mixtral.norm_eps) == (8, (None, None), 1e-5)
    assert (mixtral.rope.theta, mixtral.experts) == (1e6, ExpertsConfig(8, 2, 96, True, (0, 1)))
    assert (qwen3_moe.num_kv_heads, qwen3_moe.head_dim, qwen3_moe.windows) == (4, 2, (None, None))
    assert (qwen3_moe.rope.theta, qwen3_moe.experts) == (1e4, ExpertsConfig(128, 8, 768, False, (0, 1)))
    gpt_oss = whole(model_config(sizes | {"model_type": "gpt_oss"}))
    assert (gpt_oss.num_kv_heads, gpt_oss.head_dim, gpt_oss.windows, gpt_oss.qkv_bias) == (8, 64, (128, None), True)
    assert gpt_oss.experts == ExpertsConfig(128, 4, 96, True, (0, 1), True, (1.702, 7.0))
    assert (gpt_oss.rope.type, gpt_oss.rope.theta, gpt_oss.rope.options["truncate"]) == ("yarn", 150_000, False)
    dense = sizes | {"model_type": "qwen3_moe", "mlp_only_layers": [0, 1]}
    assert model_config(dense)["experts"] is None
    hub = {"model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024,
           "vocab_size": 50257, "task_specific_params": {"text-generation": {"do_sample": True}}}  # fmt: skip
    gpt2 = model_config(hub)
    assert (gpt2["tie_word_embeddings"], gpt2["eos_token_ids"], gpt2["norm_eps"]) == (True, (50256,), 1e-5)


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_unknown_attributes_are_refused_all_at_once(kind):
    with pytest.raises(UnsupportedOptionError, match=r"attn_soft_cap=30\.0, moe=\{'experts': 4\}"):
        model_config(config_of(kind, attn_soft_cap=30.0, moe={"experts": 4}))


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_irrelevant_attributes_change_nothing(kind):
    plain = tiny.config(kind)
    more = dict.fromkeys(IRRELEVANT - {"model_type"}, "x") | NEUTRAL
    assert model_config({**more, **plain}) == model_config(plain)


@pytest.mark.parametrize(
    ("variant", "changes", "complaint"),
    [
        ("llama", {"model_type": "mamba"}, "model_type='mamba' is not one of gpt2, gpt_oss, llama"),
        ("llama", {"rope_interleaved": True}, "rope_interleaved=True"),
        ("llama", {"sliding_window": 8}, "sliding_window=8"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4}"),
        ("mistral", {"attention_bias": True}, "attention_bias=True"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention=True"),
        ("llama", {"dtype": "float8_e4m3fn"}, "dtype='float8_e4m3fn'"),
        ("llama", {"dtype": "float32", "torch_dtype": "float16"}, "one attribute twice"),
        ("llama", {"hidden_size": "64"}, "hidden_size='64' must be of type int"),
        ("llama", {"num_attention_heads": True}, "num_attention_heads=True must be of type int"),
        ("llama", {"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ("llama", {"head_dim": 15}, "size of 15 is odd"),
        ("llama", {"eos_token_id": [2, "x"]}, "eos_token_id="),
        ("llama", {"rope_parameters": {"rope_type": "mrope"}}, "rope type 'mrope' is not one of"),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, "'linear' lacks factor"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": "2"}}, "factor='2' must be a positive number"),
        ("llama", {"rope_parameters": YARN | {"alpha": 2.0}}, "for rope type 'yarn': alpha=2.0"),
        ("llama", {"rope_parameters": YARN | {"truncate": 1}}, "truncate=1 must be true or false"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ("llama", {"rope_scaling": YARN}, "one of them must be null"),
        ("llama_longrope_long", {"head_dim": 32}, "16 positive numbers"),
        ("mistral", {"sliding_window": 0}, "sliding_window=0 must be positive"),
        ("qwen2_layer_types", {"use_sliding_window": False}, "leaves no sliding_window"),
        ("qwen2_layer_types", {"layer_types": ["linear_attention"] * 3}, "layer_types="),
        ("qwen3_moe", {"mlp_only_layers": ["0"]}, "mlp_only_layers=['0']"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step=0"),
        ("qwen3_moe", {"shared_expert_intermediate_size": 9}, "shared_expert_intermediate_size=9"),
        ("mixtral", {"attention_bias": True}, "attention_bias=True"),
        ("gpt_oss", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("gpt_oss", {"sliding_window": None}, "leaves no sliding_window"),
        ("gpt_oss", {"layer_types": ["full_attention"]}, "for each of 3 layers"),
        ("gpt_oss", {"experts_per_token": 4}, "one attribute twice"),
        ("gpt_oss", {"quantization_config": {"quant_method": "awq"}}, "quantization_config={'quant_method': 'awq'}"),
        ("gpt2", {"n_head": 3}, "n_embd=64 is not a multiple of n_head=3"),
    ],
)
def test_refused(variant, changes, complaint):
    with pytest.raises(ConversionError) as caught:
        model_config(config_of(variant, **changes))
    assert complaint in str(caught.value)


@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "model_type"])
def test_what_is_lacking_is_named(name):
    config = tiny.config("llama")
    del config[name]
    with pytest.raises(ConversionError, match=f"lacks {name}"):
        model_config(config)


def test_names_with_and_without_prefix():
    for family, prefix, bare in [
        ("llama", "model.", "layers.12.mlp.up_proj.weight"),
        ("gpt2", "transformer.", "h.3.ln_1.bias"),
    ]:
        assert target(family, bare) == target(family, prefix + bare)
        assert target(family, prefix + prefix + bare) is None
    place = target("llama", "model.layers.12.mlp.up_proj.weight")
    assert (place.paths, place.transposed) == (("layers.12.mlp.up_proj.kernel",), True)
    fused = target("gpt2", "h.3.attn.c_attn.weight")
    assert fused.paths == tuple(f"layers.3.self_attn.{part}_proj.kernel" for part in "qkv")
    assert not fused.transposed
    turns = target("gpt_oss", "model.layers.3.mlp.experts.gate_up_proj_bias")
    assert turns.paths == tuple(f"layers.3.mlp.experts.{part}_proj.bias" for part in ("gate", "up"))
    assert turns.interleaved and not turns.transposed


@pytest.mark.parametrize(
    ("family", "name"),
    [("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"), ("gpt2", "h.0.attn.bias"),
     ("gpt2", "transformer.h.0.attn.masked_bias")],
)  # fmt: skip
def test_buffers_are_ignored(family, name):
    assert target(family, name).paths == ()


def test_the_tables_are_plain_data():
    """A config as it comes from JSON is not changed by being read."""
    config = tiny.config("llama_yarn_betas")
    before = json.dumps(config)
    model_config(config)
    assert json.dumps(config) == before
