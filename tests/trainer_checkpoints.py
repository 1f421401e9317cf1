"""Checkpoints as other trainers write them, made from transformers' tensors by the trainers' own recipes.

MaxText: to_maxtext.py with the hooks of utils/param_mapping.py (https://github.com/AI-Hypercomputer/maxtext,
src/maxtext/checkpoint_conversion). Tunix: tunix/models/*/params.py (https://github.com/google/tunix).
"""

import numpy as np


def sizes(config):
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    return heads, config.get("num_key_value_heads") or heads, width


def layer_of(hf, i):
    prefix = f"model.layers.{i}."
    return {name.removeprefix(prefix): x for name, x in hf.items() if name.startswith(prefix)}


def put(tree, path, value):
    *parents, leaf = path.split("/")
    for name in parents:
        tree = tree.setdefault(name, {})
    tree[leaf] = value


def maxtext_params(hf, config, scanned):
    """What lies below `params/params`."""
    heads, kv_heads, width = sizes(config)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}

    def interleave(x):  # adjust_rope
        if rope.get("rope_type") != "llama3":
            return x
        first, second = x[..., : width // 2], x[..., width // 2 :]
        return np.stack([first, second], axis=-1).reshape(x.shape)

    def one(layer):
        q = layer["self_attn.q_proj.weight"].T.reshape(-1, heads, width)
        if config["model_type"] in ("llama", "mistral"):  # scale_query_layer
            q = (q.astype(np.float32) * (1 / np.sqrt(np.float32(width)))).astype(q.dtype)
        tree = {
            "pre_self_attention_layer_norm/scale": layer["input_layernorm.weight"],
            "post_self_attention_layer_norm/scale": layer["post_attention_layernorm.weight"],
            "self_attention/query/kernel": interleave(q),
            "self_attention/key/kernel": interleave(layer["self_attn.k_proj.weight"].T.reshape(-1, kv_heads, width)),
            "self_attention/value/kernel": layer["self_attn.v_proj.weight"].T.reshape(-1, kv_heads, width),
            "self_attention/out/kernel": layer["self_attn.o_proj.weight"].T.reshape(heads, width, -1),
            "mlp/wi_0/kernel": layer["mlp.gate_proj.weight"].T,
            "mlp/wi_1/kernel": layer["mlp.up_proj.weight"].T,
            "mlp/wo/kernel": layer["mlp.down_proj.weight"].T,
        }
        for theirs, ours, count in (("query", "q", heads), ("key", "k", kv_heads), ("value", "v", kv_heads)):
            if (bias := layer.get(f"self_attn.{ours}_proj.bias")) is not None:
                tree[f"self_attention/{theirs}/bias"] = bias.reshape(count, width)
            if (norm := layer.get(f"self_attn.{ours}_norm.weight")) is not None:
                tree[f"self_attention/{theirs}_norm/scale"] = norm
        return tree

    layers = [one(layer_of(hf, i)) for i in range(config["num_hidden_layers"])]
    params = {}
    put(params, "token_embedder/embedding", hf["model.embed_tokens.weight"])
    put(params, "decoder/decoder_norm/scale", hf["model.norm.weight"])
    if "lm_head.weight" in hf:
        put(params, "decoder/logits_dense/kernel", hf["lm_head.weight"].T)
    for name in layers[0]:
        if scanned:
            put(params, f"decoder/layers/{name}", np.stack([layer[name] for layer in layers], axis=1))
        else:
            for i, layer in enumerate(layers):
                put(params, f"decoder/layers_{i}/{name}", layer[name])
    return params


def tunix_params(hf, config):
    """What lies in the item `model_params`: the state of its module."""
    heads, kv_heads, width = sizes(config)
    params = {}
    put(params, "embedder/input_embedding", hf["model.embed_tokens.weight"])
    put(params, "final_norm/w", hf["model.norm.weight"])
    if "lm_head.weight" in hf:
        put(params, "lm_head/w", hf["lm_head.weight"].T)
    for i in range(config["num_hidden_layers"]):
        layer = layer_of(hf, i)
        for part, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            kernel = layer[f"self_attn.{part}_proj.weight"].T
            put(params, f"layers/{i}/attn/{part}_proj/w", kernel.reshape(-1, count, width))
            if (bias := layer.get(f"self_attn.{part}_proj.bias")) is not None:
                put(params, f"layers/{i}/attn/{part}_bias", bias)
            if (norm := layer.get(f"self_attn.{part}_norm.weight")) is not None:
                put(params, f"layers/{i}/attn/{part}_norm/w", norm)
        put(params, f"layers/{i}/attn/o_proj/w", layer["self_attn.o_proj.weight"].T.reshape(heads, width, -1))
        for part in ("gate", "up", "down"):
            put(params, f"layers/{i}/mlp/{part}_proj/kernel", layer[f"mlp.{part}_proj.weight"].T)
        for part in ("input", "post_attention"):
            put(params, f"layers/{i}/{part}_layernorm/w", layer[f"{part}_layernorm.weight"])
    return params


def valued(tree):
    """Every array below a node `value`, as a saved nnx.State has it."""
    return {name: valued(x) for name, x in tree.items()} if isinstance(tree, dict) else {"value": tree}


def moments(params):
    """An optimizer's state, as optax.adamw's, with Linen's collection around each moment."""
    return [{"count": np.int32(3), "mu": {"params": params}, "nu": {"params": params}}, None]


def save_steps(folder, steps, **items):
    """With CheckpointManager: `<folder>/<step>/<item>`; an item named `default` is saved alone. Returns the folder."""
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(folder) as manager:
        for step in steps:
            saved = {name: ocp.args.PyTreeSave(tree) for name, tree in items.items()}
            manager.save(step, args=saved.get("default") or ocp.args.Composite(**saved))
    return folder


def save_tree(folder, tree):
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, tree)
    return folder
