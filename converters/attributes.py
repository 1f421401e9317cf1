"""What a config.json says, in ModelConfig's words. An attribute is handled, or changes no result, or is refused.

Defaults are those of the family's config class in transformers: what a file does not say means the same here.
"""

from collections.abc import Mapping
from typing import Any

from converters import ConversionError, UnsupportedOptionError

# Of training, of heads that are not served, of how transformers runs a model, of who wrote the file; and sampling
# defaults, which transformers reads from generation_config.json only.
IRRELEVANT = frozenset(
    """
    architectures transformers_version transformers.js_config _name_or_path _commit_hash name_or_path unsloth_version
    unsloth_fixed tokenizer_class model_type is_llama_config pretraining_tp use_cache cache_implementation
    initializer_range attention_dropout attn_pdrop embd_pdrop resid_pdrop gradient_checkpointing output_past n_ctx
    id2label label2id num_labels problem_type finetuning_task task_specific_params summary_type summary_use_proj
    summary_activation summary_proj_to_labels summary_first_dropout reorder_and_upcast_attn classifier_dropout
    output_attentions output_hidden_states return_dict torchscript use_bfloat16 chunk_size_feed_forward
    tie_encoder_decoder attn_implementation _attn_implementation _attn_implementation_autoset _flash_attn_2_enabled
    max_sequence_length pad_token_id sep_token_id decoder_start_token_id prefix is_decoder tie_last_hidden_states
    max_length min_length max_new_tokens min_new_tokens do_sample early_stopping num_beams num_beam_groups
    diversity_penalty temperature top_k top_p min_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores return_dict_in_generate
    forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens epsilon_cutoff eta_cutoff encoder_repetition_penalty output_router_logits
    router_aux_loss_coef router_jitter_noise
    """.split()
)
# Changes nothing while it has this value.
NEUTRAL: dict[str, Any] = {
    "is_encoder_decoder": False, "add_cross_attention": False, "cross_attention_hidden_size": None, "pruned_heads": {},
    "rope_interleaved": False, "use_mrope": False, "partial_rotary_factor": 1.0, "per_layer_config": None,
    "quantization_config": None, "attention_bias": False, "mlp_bias": False, "use_sliding_window": False,
    "sliding_window": None, "layer_types": None,
}  # fmt: skip
DTYPES = ("float32", "bfloat16", "float16")
REQUIRED: Any = object()
# Beside rope_theta: what each type must say, and what it may.
ROPE_OPTIONS: dict[str, tuple[set[str], set[str]]] = {
    "default": (set(), set()),
    "linear": ({"factor"}, set()),
    "dynamic": ({"factor"}, set()),
    "yarn": ({"factor"}, {"beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate"}),
    "longrope": ({"short_factor", "long_factor"}, {"factor", "attention_factor"}),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor"}, set()),
}
ROPE_IRRELEVANT = {"finetuned"}
ROPE_WITH_ORIGINAL = ("yarn", "longrope", "llama3")  # these know the length they were trained for


class Attributes:
    """The attributes of one config.json; each is taken once, and `finish` refuses what nobody took."""

    def __init__(self, config: Mapping[str, Any]):
        self._left = dict(config)

    def take(self, names: str, kinds: type | tuple[type, ...], default: Any = REQUIRED) -> Any:
        """The value of the attribute, which may have several names; `default` if it is absent.

        Raises ConversionError if it is absent without a default, or of another type than `kinds`.
        """
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        kinds += (int,) if float in kinds else ()
        found = {name: self._left.pop(name) for name in names.split() if name in self._left}
        if len({str(value) for value in found.values()}) > 1:
            raise ConversionError(f"one attribute twice, and otherwise: {_listed(found)}")
        if not found and default is REQUIRED:
            raise ConversionError(f"lacks {' or '.join(names.split())}")
        for name, value in found.items():
            if type(value) not in kinds and not (value is None and default is None):
                raise ConversionError(f"{name}={value!r} must be of type {' or '.join(k.__name__ for k in kinds)}")
            return value
        return default

    def finish(self) -> None:
        """Refuses every attribute that is left and could change a result."""
        unknown = {
            name: value
            for name, value in self._left.items()
            if name not in IRRELEVANT and not (name in NEUTRAL and value == NEUTRAL[name])
        }
        if unknown:
            raise UnsupportedOptionError(f"not supported: {_listed(unknown)}")


def _listed(attributes: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in attributes.items())


def common(a: Attributes, bos: int | None, eos: int | None) -> dict[str, Any]:
    """What every family has. `bos` and `eos` are the family's defaults. No "dtype" if the file does not say it."""
    dtype = a.take("dtype torch_dtype", str, None)
    dtype = dtype and dtype.removeprefix("torch.")
    if dtype not in (None, *DTYPES):
        raise UnsupportedOptionError(f"{dtype=} is not one of {', '.join(DTYPES)}")
    ends = a.take("eos_token_id", (int, list, type(None)), eos)
    return ({"dtype": dtype} if dtype else {}) | {
        "vocab_size": a.take("vocab_size", int),
        "bos_token_id": a.take("bos_token_id", (int, type(None)), bos),
        "eos_token_ids": token_ids("eos_token_id", ends),
    }


def token_ids(name: str, value: Any) -> tuple[int, ...]:
    """One id, a list of them or None, as a tuple."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(type(i) is not int or i < 0 for i in ids):
        raise ConversionError(f"{name}={value!r} must be a token id or a list of them")
    return tuple(dict.fromkeys(ids))


def rotary_decoder(
    a: Attributes, *, kv_heads: int | None = None, head_dim: int | None = None, positions: int,
    bos: int | None = None, eos: int | None = None, theta: float = 10_000.0, eps: float = 1e-6,
    rope_parameters: Mapping[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What llama and its kin have in common; the arguments are the family's defaults.

    `kv_heads`: None for as many as heads; `head_dim`: None for hidden_size / num_attention_heads. `rope_parameters`:
    None for no scaling.
    """
    hidden, heads = a.take("hidden_size", int), a.take("num_attention_heads", int)
    layers = a.take("num_hidden_layers", int)
    if min(hidden, heads, layers) < 1:
        raise ConversionError(
            f"hidden_size={hidden}, num_attention_heads={heads}, num_hidden_layers={layers}: too small"
        )
    width = a.take("head_dim", (int, type(None)), head_dim) or hidden // heads
    positions = a.take("max_position_embeddings", int, positions)
    return common(a, bos, eos) | {
        "hidden_size": hidden,
        "intermediate_size": a.take("intermediate_size", int),
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": a.take("num_key_value_heads", (int, type(None)), kv_heads) or heads,
        "head_dim": width,
        "max_position_embeddings": positions,
        "activation": activation(a.take("hidden_act", str, "silu")),
        "norm_eps": a.take("rms_norm_eps", float, eps),
        "tie_word_embeddings": a.take("tie_word_embeddings", bool, False),
        "attention_scales": (width**-0.5,) * layers,
        "windows": (None,) * layers,
        "rope": rope(a, width, positions, theta, rope_parameters or {}),
    }


def activation(name: str) -> str:
    return {"swish": "silu", "gelu_python": "gelu"}.get(name, name)


def rope(
    a: Attributes, head_dim: int, positions: int, default_theta: float, default: Mapping[str, Any]
) -> dict[str, Any]:
    """RopeConfig's arguments. Both spellings: rope_parameters, or rope_theta beside rope_scaling."""
    theta = a.take("rope_theta", float, None)
    legacy = a.take("rope_scaling", dict, None)
    stated = a.take("rope_parameters", dict, None)
    if legacy and stated and legacy != stated:
        raise ConversionError(
            f"rope_scaling={legacy!r} and rope_parameters={stated!r} together: one of them must be null"
        )
    given = {name: value for name, value in (legacy or stated or default).items() if value is not None}
    older = given.pop("type", "default")
    kind = given.pop("rope_type", older)
    theta = given.pop("rope_theta", default_theta if theta is None else theta)
    original = a.take("original_max_position_embeddings", int, None)
    if head_dim % 2:
        raise ConversionError(f"a head's size of {head_dim} is odd: rope turns pairs")
    if (partial := given.pop("partial_rotary_factor", 1.0)) != 1.0:
        raise UnsupportedOptionError(f"not supported: rope's partial_rotary_factor={partial!r}")
    if kind not in ROPE_OPTIONS:
        raise UnsupportedOptionError(f"rope type {kind!r} is not one of {', '.join(ROPE_OPTIONS)}")
    required, optional = ROPE_OPTIONS[kind]
    if kind in ROPE_WITH_ORIGINAL:
        within = given.pop("original_max_position_embeddings", positions)
        given["original_max_position_embeddings"] = within if original is None else original
        required = required | {"original_max_position_embeddings"}
    given = {name: value for name, value in given.items() if name not in ROPE_IRRELEVANT}
    if unknown := set(given) - required - optional:
        raise UnsupportedOptionError(f"not supported for rope type {kind!r}: {_listed({n: given[n] for n in unknown})}")
    if lacking := required - set(given):
        raise ConversionError(f"rope type {kind!r} lacks {', '.join(sorted(lacking))}")
    for name, value in {**given, "rope_theta": theta}.items():
        _check_rope_option(name, value, head_dim)
    return {"type": kind, "theta": float(theta), "rotary_dim": head_dim, "options": given}


def _check_rope_option(name: str, value: Any, head_dim: int) -> None:
    positive = lambda v: type(v) in (int, float) and v > 0  # noqa: E731
    if name in ("short_factor", "long_factor"):
        valid, want = isinstance(value, list) and len(value) == head_dim // 2 and all(map(positive, value)), ""
        want = f"{head_dim // 2} positive numbers, one for each pair of a head"
    elif name == "truncate":
        valid, want = isinstance(value, bool), "true or false"
    else:
        valid, want = positive(value), "a positive number"
    if not valid:
        raise ConversionError(f"rope's {name}={value!r} must be {want}")


def windows(a: Attributes, layers: int) -> tuple[int | None, ...]:
    """Per layer, in qwen2 and qwen3: layer_types says which have a window, or max_window_layers how many have none."""
    used = a.take("use_sliding_window", bool, False)
    window = positive_window(a.take("sliding_window", (int, type(None)), 4096))
    first = a.take("max_window_layers", int, 28)
    kinds = a.take("layer_types", list, None)
    window = window if used else None
    if kinds is None:
        return tuple(window if i >= first else None for i in range(layers))
    return windows_by_kind(kinds, window, layers)


def windows_by_kind(kinds: list[str], window: int | None, layers: int) -> tuple[int | None, ...]:
    """Per layer, from layer_types."""
    if len(kinds) != layers or set(kinds) - {"sliding_attention", "full_attention"}:
        raise ConversionError(
            f"layer_types={kinds!r} must be sliding_attention or full_attention for each of {layers} layers"
        )
    if "sliding_attention" in kinds and window is None:
        raise ConversionError(f"layer_types={kinds!r}, but the config leaves no sliding_window")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def positive_window(window: int | None) -> int | None:
    if window is not None and window < 1:
        raise ConversionError(f"sliding_window={window} must be positive, or null")
    return window
