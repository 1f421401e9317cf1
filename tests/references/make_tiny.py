"""Makes tiny.json and tiny.npz from HuggingFace transformers (needs torch); `--check` makes them again and compares.

Each variant turns on one option of a family's config, or a few that do not hide each other, and is longer than its
window and than the length its rope was made for. `legacy` variants are spelled as transformers 4 wrote them.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).parent))
import tiny

TOKENS = 48
POSITIONS = [0, 5, 9, 17, 33, 47]
SIZES = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1,
         "eos_token_id": 2}  # fmt: skip
GPT2_SIZES = {"vocab_size": 128, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64, "bos_token_id": 1,
              "eos_token_id": 2}  # fmt: skip
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 48}
GPT_OSS = {"num_local_experts": 8, "num_experts_per_tok": 3, "sliding_window": 8, "head_dim": 16, "swiglu_limit": 2.0}
LONGROPE = {"rope_type": "longrope", "rope_theta": 500.0, "original_max_position_embeddings": 32,
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 1.7, 2.0, 2.5],
            "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0]}  # fmt: skip


def rope(kind: str, **options: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1000.0, **options}}


VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama_theta_eps": {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}, "rms_norm_eps": 0.1},
    "llama_tied_mha": {"tie_word_embeddings": True, "num_key_value_heads": 4},
    "llama_mqa_head_dim": {"num_key_value_heads": 1, "head_dim": 32},
    "llama_biases": {"attention_bias": True, "mlp_bias": True},
    "llama_gelu": {"hidden_act": "gelu"},
    "llama_bf16": {"dtype": "bfloat16"},
    "llama_linear": rope("linear", factor=4.0),
    "llama_dynamic": rope("dynamic", factor=4.0),
    "llama_dynamic_long": rope("dynamic", factor=4.0) | {"max_position_embeddings": 32, "max_model_len": 48},
    "llama_yarn": rope("yarn", factor=4.0, original_max_position_embeddings=16),
    "llama_yarn_betas": rope("yarn", factor=8.0, original_max_position_embeddings=32, beta_fast=4.0, beta_slow=0.5,
                             truncate=False, mscale=0.7, mscale_all_dim=0.2),
    "llama_yarn_factor": rope("yarn", factor=4.0, original_max_position_embeddings=32, attention_factor=0.8),
    "llama_llama3": rope("llama3", factor=8.0, original_max_position_embeddings=32, low_freq_factor=1.0,
                         high_freq_factor=4.0),
    "llama_longrope_long": {"rope_parameters": LONGROPE},
    "llama_longrope_short": {"rope_parameters": LONGROPE, "max_model_len": 32},
    "llama_longrope_factor": {"rope_parameters": LONGROPE | {"factor": 4.0, "attention_factor": 1.3}},
    "llama_legacy": {"legacy": True, "rope_theta": 300.0, "torch_dtype": "float32", "rope_scaling": {
        "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32}},
    "mistral": {"sliding_window": 8},
    "mistral_full_head_dim": {"sliding_window": None, "head_dim": 32},
    "mistral_tied_relu": {"tie_word_embeddings": True, "hidden_act": "relu", "sliding_window": 4},
    "qwen2": {},
    "qwen2_window": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen2_unused_window": {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 1},
    "qwen2_layer_types": {"use_sliding_window": True, "sliding_window": 4,
                          "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "qwen2_legacy": {"legacy": True, "rope_theta": 1000.0, "tie_word_embeddings": True, "use_sliding_window": True,
                     "sliding_window": 8, "max_window_layers": 2, "torch_dtype": "float16",
                     "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    "qwen3": {"head_dim": 32},
    "qwen3_bias_window": {"head_dim": 16, "attention_bias": True, "use_sliding_window": True, "sliding_window": 8,
                          "max_window_layers": 1},
    "qwen3_tied_linear": {"head_dim": 24, "tie_word_embeddings": True, **rope("linear", factor=2.0)},
    "mixtral": {"num_local_experts": 4, "sliding_window": 8},
    "mixtral_tied_head_dim": {"num_local_experts": 5, "num_experts_per_tok": 3, "head_dim": 32,
                              "tie_word_embeddings": True},
    "qwen3_moe": EXPERTS | {"head_dim": 32, "norm_topk_prob": True},
    "qwen3_moe_dense_layer": EXPERTS | {"mlp_only_layers": [1], "attention_bias": True, "use_sliding_window": True,
                                        "sliding_window": 8},
    "qwen3_moe_second_layer": EXPERTS | {"decoder_sparse_step": 2, "num_experts_per_tok": 1, "hidden_act": "gelu"},
    "gpt_oss": GPT_OSS,
    "gpt_oss_yarn": GPT_OSS | rope("yarn", factor=4.0, original_max_position_embeddings=16, truncate=False)
    | {"head_dim": 32, "swiglu_alpha": 1.3, "swiglu_limit": 0.5, "attention_bias": False, "tie_word_embeddings": True,
       "num_experts_per_tok": 1, "layer_types": ["full_attention", "full_attention", "sliding_attention"]},
    "gpt_oss_legacy": GPT_OSS | {"legacy": True, "torch_dtype": "bfloat16", "experts_per_token": 3,
                                 "initial_context_length": 16, "rope_theta": 1000.0, "rope_scaling": {
                                     "rope_type": "yarn", "factor": 8.0, "beta_fast": 4.0, "beta_slow": 1.0,
                                     "truncate": False, "original_max_position_embeddings": 16}},
    "gpt2": {},
    "gpt2_inner_relu": {"n_inner": 80, "activation_function": "relu"},
    "gpt2_unscaled": {"scale_attn_weights": False},
    "gpt2_inverse_layer": {"scale_attn_by_inverse_layer_idx": True},
    "gpt2_untied_eps": {"tie_word_embeddings": False, "layer_norm_epsilon": 0.1},
    "gpt2_bare": {"bare": True},  # names without `transformer.`, and the causal masks as buffers: the hub's gpt2
}  # fmt: skip


def make(name: str) -> tuple[dict[str, Any], np.ndarray]:
    """The variant's entry in tiny.json, and its logits [positions, vocab]."""
    options = dict(VARIANTS[name])
    legacy, bare, max_model_len = (
        options.pop("legacy", False),
        options.pop("bare", False),
        options.pop("max_model_len", 0),
    )
    family = next((kind for kind in ("qwen3_moe", "gpt_oss") if name.startswith(kind)), name.split("_")[0])
    written = (GPT2_SIZES if family == "gpt2" else SIZES) | options
    if legacy:
        written |= {"model_type": family, "architectures": ["LegacyForCausalLM"], "transformers_version": "4.40.0"}
        config = transformers.CONFIG_MAPPING[family].from_dict(dict(written))
    else:
        config = transformers.CONFIG_MAPPING[family](**json.loads(json.dumps(written)))
    dtype = str(config.dtype or "float32").removeprefix("torch.")
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            shape, kind = tuple(parameter.shape), str(parameter.dtype).removeprefix("torch.")
            source = key.removeprefix("transformer.") if bare else key
            parameter.copy_(torch.from_numpy(tiny.tensor(source, shape, kind).astype(np.float32)))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        saved = json.loads((Path(folder) / "config.json").read_text())
        with safe_open(Path(folder) / "model.safetensors", "pt") as file:
            shapes = {key: list(file.get_slice(key).get_shape()) for key in sorted(file.keys())}
        if any(".experts." in key for key in shapes):  # stacked in memory, one by one in files
            tiny.write_safetensors({key: tiny.tensor(key, tuple(s), dtype) for key, s in shapes.items()}, Path(folder))
            model = type(model).from_pretrained(folder, dtype=dtype, attn_implementation="eager",
                                                experts_implementation="eager").eval()  # fmt: skip
    if bare:
        shapes = {key.removeprefix("transformer."): shape for key, shape in shapes.items()}
        shapes |= {f"h.{i}.attn.bias": [1, 1, 64, 64] for i in range(3)}
    if legacy:
        saved = written
    length = max_model_len or TOKENS
    token_ids = ((tiny.uniform(f"tokens {name}", length) + 2) * 1000).astype(int) % 128
    positions = [i for i in POSITIONS if i < length]
    with torch.no_grad():
        logits, exact = (cast(model)(torch.tensor(token_ids[None])).logits[0, positions]
                         for cast in (torch.nn.Module.float, torch.nn.Module.double))  # fmt: skip
    error = float((logits - exact).abs().max() / exact.abs().max())
    entry = {"config": saved, "tensors": shapes, "dtype": dtype, "token_ids": token_ids.tolist(),
             "positions": positions, "max_model_len": max_model_len or 64, "input_hash": "",
             "float32_error": float(f"{error:.1e}")}  # fmt: skip
    arrays = {key: tiny.tensor(key, tuple(shape), dtype) for key, shape in shapes.items()}
    entry["input_hash"] = tiny.input_hash(arrays, entry["token_ids"])
    return entry, logits.float().numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with the fixtures instead of writing them")
    check = parser.parse_args().check
    torch.set_num_threads(1)
    made = {name: make(name) for name in VARIANTS}
    if check:
        worst = 0.0
        for name, (entry, logits) in made.items():
            old, old_logits = tiny.fixtures()["variants"][name], tiny.reference(name)["logits"]
            for key in set(entry) - {"float32_error", "config"}:
                assert old[key] == entry[key], f"{name}: {key} differs"
            drop = "transformers_version"
            assert {**old["config"], drop: 0} == {**entry["config"], drop: 0}, f"{name}: config differs"
            worst = max(worst, float(np.abs(logits - old_logits).max() / np.abs(old_logits).max()))
        assert set(made) == set(tiny.variants()), "other variants"
        assert worst < 2e-5, f"logits differ by {worst:.1e} of the largest"
        print(f"{len(made)} variants agree; largest difference of a logit {worst:.1e} of the largest logit")
        return
    versions = {"transformers": transformers.__version__, "torch": torch.__version__, "numpy": np.__version__}
    document = {"versions": versions, "variants": {name: entry for name, (entry, _) in made.items()}}
    compact = json.dumps(document, separators=(",", ":")).replace('},"', '},\n"')
    (tiny.FOLDER / "tiny.json").write_text(compact + "\n")
    np.savez(tiny.FOLDER / "tiny.npz", **{name: logits for name, (_, logits) in made.items()})
    for name, (entry, logits) in made.items():
        print(f"{name:24} float32 error {entry['float32_error']:.0e}  largest logit {np.abs(logits).max():.1f}")


if __name__ == "__main__":
    main()
