"""Tiny random models as whole HuggingFace folders, and engines of them that all tests of a process share."""

import json
import tempfile
from functools import cache
from pathlib import Path

import numpy as np

from jaxengine import LLM
from jaxengine.engine.scheduler import Scheduler
from jaxengine.engine.shards import together
from tests.references import tiny
from tests.vocabularies import byte_level

VOCAB, MAX_LENGTH, WINDOW, EOS = 600, 256, 20, 2
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": MAX_LENGTH, "bos_token_id": 1, "eos_token_id": EOS,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "hidden_act": "silu", "dtype": "float32",
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}  # fmt: skip
CONFIGS = {
    "llama": SIZES | {"model_type": "llama", "num_hidden_layers": 2, "architectures": ["LlamaForCausalLM"]},
    # One full layer and two of a window: two groups of pages.
    "windows": SIZES | {"model_type": "qwen2", "num_hidden_layers": 3, "architectures": ["Qwen2ForCausalLM"],
                        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
                        "sliding_window": WINDOW, "use_sliding_window": True},
    "experts": SIZES | {"model_type": "mixtral", "num_hidden_layers": 2, "architectures": ["MixtralForCausalLM"],
                        "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    # Every other layer has a window.
    "sinks": SIZES | {"model_type": "gpt_oss", "num_hidden_layers": 3, "architectures": ["GptOssForCausalLM"],
                      "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW,
                      "swiglu_limit": 2.0},
}  # fmt: skip
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
# Small buckets: 4 of rows and 2 of tokens. Prompts of more than 32 tokens come in chunks.
OPTIONS = {"max_num_seqs": 8, "max_num_batched_tokens": 32, "page_size": 8}


def tensors(kind="llama"):
    config = CONFIGS[kind]
    hidden, inner, kv = config["hidden_size"], config["intermediate_size"], config["num_key_value_heads"] * 16
    shapes = {"model.embed_tokens.weight": (VOCAB, hidden), "model.norm.weight": (hidden,),
              "lm_head.weight": (VOCAB, hidden)}  # fmt: skip
    for i in range(config["num_hidden_layers"]):
        parts = {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,),
                 "self_attn.q_proj.weight": (hidden, hidden), "self_attn.k_proj.weight": (kv, hidden),
                 "self_attn.v_proj.weight": (kv, hidden), "self_attn.o_proj.weight": (hidden, hidden),
                 "mlp.gate_proj.weight": (inner, hidden), "mlp.up_proj.weight": (inner, hidden),
                 "mlp.down_proj.weight": (hidden, inner)}  # fmt: skip
        if config["model_type"] == "qwen2":
            parts |= {"self_attn.q_proj.bias": (hidden,), "self_attn.k_proj.bias": (kv,),
                      "self_attn.v_proj.bias": (kv,)}  # fmt: skip
        if config["model_type"] == "mixtral":
            parts = {name: shape for name, shape in parts.items() if not name.startswith("mlp.")}
            parts["block_sparse_moe.gate.weight"] = (config["num_local_experts"], hidden)
            for expert in range(config["num_local_experts"]):
                at = f"block_sparse_moe.experts.{expert}"
                parts |= {f"{at}.w1.weight": (inner, hidden), f"{at}.w3.weight": (inner, hidden),
                          f"{at}.w2.weight": (hidden, inner)}  # fmt: skip
        if config["model_type"] == "gpt_oss":
            parts = {name: shape for name, shape in parts.items() if not name.startswith("mlp.")}
            parts |= {f"self_attn.{part}_proj.bias": (size,) for part, size in zip("qkvo", (hidden, kv, kv, hidden))}
            count = config["num_local_experts"]
            parts |= {"self_attn.sinks": (config["num_attention_heads"],), "mlp.router.weight": (count, hidden),
                      "mlp.router.bias": (count,), "mlp.experts.gate_up_proj": (count, hidden, 2 * inner),
                      "mlp.experts.gate_up_proj_bias": (count, 2 * inner),
                      "mlp.experts.down_proj": (count, inner, hidden),
                      "mlp.experts.down_proj_bias": (count, hidden)}  # fmt: skip
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in parts.items()}
    return {name: tiny.tensor(name, shape) for name, shape in shapes.items()}


def write_model(folder, kind="llama", **generation_config):
    """config.json, weights, tokenizer and chat template, as HuggingFace writes them; returns the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS[kind]))
    tiny.write_safetensors(tensors(kind), folder)
    tokenizer = byte_level()
    tokenizer.save(str(folder / "tokenizer.json"))
    bos, eos = (tokenizer.id_to_token(i) for i in (1, EOS))
    words = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": TEMPLATE,
        "bos_token": bos,
        "eos_token": eos,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(words | {"eos_token": eos}))
    if generation_config:
        (folder / "generation_config.json").write_text(json.dumps(generation_config))
    return folder


@cache
def model_folder(kind="llama"):
    return write_model(Path(_temporary().name) / kind, kind)


@cache
def _temporary():
    return tempfile.TemporaryDirectory(prefix="jaxengine-tests-", ignore_cleanup_errors=True)


def shared_llm(kind="llama"):
    """The one engine of this model; it lives until the process ends. Only for tests that leave it as it was."""
    return _shared_llm(kind)


@cache
def _shared_llm(kind):
    return LLM(model_folder(kind), **OPTIONS)


def fresh_llm(kind="llama", pages=None, max_num_batched_tokens=None, **options):
    """An engine to break or to close. It borrows the shared one's programs, so `options` may not change shapes.

    pages: what each group of the scheduler may use, fewer than the device has. max_num_batched_tokens: the same.
    """
    llm = LLM(model_folder(kind), **(OPTIONS | options))
    llm._runner._programs = shared_llm(kind)._runner._programs
    if pages or max_num_batched_tokens:
        restrict(llm, pages, max_num_batched_tokens)
    return llm


def restrict(llm, pages=None, max_num_batched_tokens=None):
    """Gives an engine new schedulers, which may use fewer pages of each group, and fewer tokens in a step."""
    schedulers = [
        Scheduler(
            llm._runner.groups,
            [pages or count for count in llm._runner.num_pages],
            page_size=llm.config.page_size,
            max_num_seqs=llm.config.max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens or llm.config.max_num_batched_tokens,
            max_model_len=llm.config.max_model_len,
            enable_prefix_caching=llm.config.enable_prefix_caching,
            priority_aging_steps=llm.config.priority_aging_steps,
            steps_per_call=llm.config.steps_per_call,
        )
        for _ in range(llm._runner.shards)
    ]
    llm._loop._engine.scheduler = together(schedulers)


def check_integrity(llm):
    """No request, page or slot is left behind by an engine at rest."""
    metrics = llm.get_metrics()
    assert metrics["num_requests_running"] == metrics["num_requests_waiting"] == metrics["kv_cache_usage_perc"] == 0
    llm._loop.call(lambda engine: engine.check_integrity())
    assert llm._loop.num_requests == 0


@cache
def _reference_model(kind):
    from jaxengine.weights import open_checkpoint
    from tests.models.harness import PagedModel

    return PagedModel(open_checkpoint(model_folder(kind)).config, canonical_params(kind), MAX_LENGTH, rows=1)


@cache
def _reference_logits(kind, ids):
    model = _reference_model(kind)
    model.reset()
    return np.concatenate([model.extend({0: ids[i : i + 64]})[0] for i in range(0, len(ids), 64)])


def reference_logits(kind, ids):
    """float32 [len(ids), vocab] of the model itself, without engine, batch or prefix cache."""
    return _reference_logits(kind, tuple(ids))


def reference_logprobs(kind, ids):
    logits = reference_logits(kind, ids).astype(np.float64)
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)


def count_ties(kind, prompt, tokens):
    """How many of `tokens` are the most probable but for a near tie; a token that is less probable fails."""
    logits = reference_logits(kind, [*prompt, *tokens])[len(prompt) - 1 : -1]
    behind = logits.max(axis=1) - logits[np.arange(len(tokens)), tokens]
    assert (behind <= 1e-4).all(), f"token {behind.argmax()} of {tokens} lies {behind.max()} behind the best"
    return int((behind > 0).sum())


@cache
def canonical_params(kind="llama"):
    """On the default device, as a trainer has them."""
    from jaxengine.sharding import create_mesh
    from jaxengine.weights import load_params, open_checkpoint

    return load_params(open_checkpoint(model_folder(kind)), "float32", create_mesh())


def dense_logprobs(ids, held=lambda x: x):
    """The llama in plain NumPy, float64, without cache, pages or fused kernels: log-probabilities of ids[1:].

    held: what a cache makes of keys and values.
    """
    p = {path: np.asarray(x, np.float64) for path, x in canonical_params().items()}

    def norm(x, scale):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale

    def rotate(x):  # [tokens, heads, 16]
        angle = np.arange(len(ids))[:, None] * 10000.0 ** (-np.arange(8) / 8)
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        return np.concatenate([x[..., :8] * cos - x[..., 8:] * sin, x[..., 8:] * cos + x[..., :8] * sin], -1)

    x = p["embed_tokens.embedding"][np.array(ids)]
    for i in range(2):
        at = f"layers.{i}"
        y = norm(x, p[f"{at}.input_layernorm.scale"])
        q, k, v = ((y @ p[f"{at}.self_attn.{n}_proj.kernel"]).reshape(len(ids), -1, 16) for n in "qkv")
        q, k, v = rotate(q), held(rotate(k)).repeat(2, 1), held(v).repeat(2, 1)
        scores = np.einsum("qhd,khd->hqk", q, k) / 4 + np.triu(np.full((len(ids),) * 2, -np.inf), 1)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("hqk,khd->qhd", shares / shares.sum(-1, keepdims=True), v)
        x = x + mixed.reshape(len(ids), -1) @ p[f"{at}.self_attn.o_proj.kernel"]
        y = norm(x, p[f"{at}.post_attention_layernorm.scale"])
        gate = y @ p[f"{at}.mlp.gate_proj.kernel"]
        x = x + (gate / (1 + np.exp(-gate)) * (y @ p[f"{at}.mlp.up_proj.kernel"])) @ p[f"{at}.mlp.down_proj.kernel"]
    logits = norm(x, p["norm.scale"]) @ p["lm_head.kernel"]
    logits -= np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    return logits[np.arange(len(ids) - 1), ids[1:]]
