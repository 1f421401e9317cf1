"""ModelConfig (what the checkpoint says) and EngineConfig (what the user asks for): frozen, validated once."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jaxengine.errors import ConfigError, UnsupportedError

ACTIVATIONS = (
    "silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "quick_gelu", "relu", "relu2", "tanh", "sigmoid",
)  # fmt: skip
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding, as in transformers' `rope_parameters`.

    `options` holds what the type needs beside `theta`: `factor`, `low_freq_factor`, `high_freq_factor`,
    `original_max_position_embeddings`, `beta_fast`, `beta_slow`, `mscale`, `mscale_all_dim`, `attention_factor`,
    `truncate`, `short_factor`, `long_factor`.
    """

    type: str = "default"
    theta: float = 10_000.0
    rotary_dim: int = 0  # leading dimensions of a head that are rotated; the rest pass through
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.type not in ROPE_TYPES:
            raise ConfigError(f"rope {self.type=} is not one of {ROPE_TYPES}")


@dataclass(frozen=True)
class ExpertsConfig:
    """A mixture of experts (Shazeer et al. 2017) in place of the MLP: a router chooses some for each token."""

    count: int
    per_token: int
    intermediate_size: int  # of each expert
    normalize: bool  # the weights of a token's experts sum to 1
    layers: tuple[int, ...]  # those that have experts, ascending; the others have an MLP of ModelConfig's size
    bias: bool = False  # the router and the three products of each expert have one
    swiglu: tuple[float, float] | None = None  # see layers.activation.clamped_swiglu; None: activation(gate) * up

    def __post_init__(self):
        for name in ("count", "per_token", "intermediate_size"):
            if not _is_int(getattr(self, name)) or getattr(self, name) < 1:
                raise ConfigError(f"experts: {name}={getattr(self, name)!r} must be a positive integer")
        if self.per_token > self.count:
            raise ConfigError(f"experts: {self.per_token=} is more than {self.count=}")
        if self.swiglu is not None and min(self.swiglu) <= 0:
            raise ConfigError(f"experts: {self.swiglu=} must be two positive numbers, or None")


@dataclass(frozen=True)
class ModelConfig:
    """A decoder in our own words: every option of the checkpoint's config that changes a result, and nothing else."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    activation: str
    norm_eps: float
    windows: tuple[int | None, ...]  # per layer: how many last positions a token sees, itself included; None = all
    attention_scales: tuple[float, ...]  # per layer: what q @ k is multiplied by
    rope: RopeConfig | None = None  # None: learned positions
    experts: ExpertsConfig | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sinks: bool = False  # a logit of each head that the softmax counts beside those of the keys
    tie_word_embeddings: bool = False
    dtype: str = "float32"  # of the checkpoint
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self):
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads",
                 "head_dim", "max_position_embeddings")  # fmt: skip
        for name in sizes:
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)!r} must be a positive integer")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"{self.num_heads=} is not a multiple of {self.num_kv_heads=}")
        if self.activation not in ACTIVATIONS:
            raise ConfigError(f"{self.activation=} is not one of {ACTIVATIONS}")
        for name in ("windows", "attention_scales"):
            if len(getattr(self, name)) != self.num_layers:
                raise ConfigError(f"{name} has {len(getattr(self, name))} entries for {self.num_layers=}")
        if self.experts and not set(self.experts.layers) <= set(range(self.num_layers)):
            raise ConfigError(f"{self.experts.layers=} are not all below {self.num_layers=}")

    @property
    def has_mlp(self) -> bool:
        """Is there a layer with an MLP, and not experts?"""
        return self.experts is None or len(self.experts.layers) < self.num_layers


@dataclass(frozen=True)
class ParamRule:
    """What a parameter of a foreign trainer becomes: an entry of the table `LLM(..., param_mapping={pattern: rule})`.

    `to` is the canonical path, with `\\1` for what the pattern's first group matched; with several paths the result is
    split into so many equal shares of its last dimension, unless `hook` gives a sequence with one array for each. `()`
    leaves the parameter out. The array is first transposed (these axes), then reshaped, then handed to `hook`, which
    jax must be able to trace.

    >>> ParamRule(r"layers.\\1.self_attn.o_proj.kernel", reshape=(-1, 64)).reshape  # from [heads, head_dim, hidden]
    (-1, 64)
    """

    to: str | tuple[str, ...]
    transpose: tuple[int, ...] | None = None
    reshape: tuple[int, ...] | None = None
    hook: Callable[[Any], Any] | None = None

    def __post_init__(self):
        for name in ("transpose", "reshape"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, tuple) and all(_is_int(i) for i in value)):
                raise ConfigError(f"ParamRule {name}={value!r} must be a tuple of integers or None")
        if not all(isinstance(path, str) for path in self.paths):
            raise ConfigError(f"ParamRule to={self.to!r} must be a canonical path, or a tuple of them")

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.to,) if isinstance(self.to, str) else tuple(self.to)

    def __str__(self) -> str:
        """The same in every process: the hook by its name."""
        hook = None if self.hook is None else getattr(self.hook, "__qualname__", type(self.hook).__name__)
        return f"{self.paths} {self.transpose} {self.reshape} {hook}"


DTYPES = {"half": "float16", "float": "float32", "float16": "float16", "bfloat16": "bfloat16", "float32": "float32"}
CACHE_DTYPES = DTYPES | {
    "fp8": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2", "float8_e4m3fn": "float8_e4m3fn",
    "float8_e5m2": "float8_e5m2",
}  # fmt: skip


@dataclass(frozen=True)
class EngineConfig:
    """What the user asks of the engine. `None` means: chosen at start-up from the model and the device, and logged.

    Sizes are in tokens unless the name says bytes.
    """

    # Rope scalings of type dynamic and longrope take their frequencies from it, not from each text's length.
    max_model_len: int | None = None  # prompt and output together; None: what the model was made for
    # Of weights and activations. auto: bfloat16 on GPU (float16 stays), float32 on CPU; that of parameters in memory.
    dtype: str = "auto"
    quantization: str | None = None
    kv_cache_dtype: str = "auto"  # auto: as dtype; fp8, fp8_e4m3, fp8_e5m2: half the bytes of bfloat16, not scaled
    page_size: int = 16
    gpu_memory_utilization: float = 0.9  # share of the device's memory that weights, cache and temporaries may take
    kv_cache_memory_bytes: int | None = None  # of each device; overrides the plan
    enable_prefix_caching: bool = True
    max_num_seqs: int | None = None  # rows in one step, of each shard of the data axis
    max_num_batched_tokens: int | None = None  # tokens in one step, likewise
    steps_in_flight: int = 1  # calls that run on the device while the host schedules the next: 0, 1 or 2
    # Tokens that a call draws of each sequence when nobody waits to be admitted; what comes after a stop is dropped.
    steps_per_call: int | None = None  # None: 4 where submitting a step takes as long as the step, else 1
    priority_aging_steps: int = 256  # steps of waiting that outweigh one unit of priority
    attention: str = "auto"  # auto | reference | xla | triton | mosaic (Hopper, without Triton)
    max_logprobs: int = 20  # largest SamplingParams.logprobs; -1 (whole vocabulary) is always possible
    logprobs_mode: str = "raw"  # raw: the model's distribution; processed: the one the token was drawn from
    # True: the engine's own copy, with one product for q, k, v and one for gate, up. False: the canonical arrays
    # themselves; a trainer's are then borrowed, not copied. None: False for parameters in memory, True for files.
    fuse_weights: bool | None = None
    seed: int = 0  # of requests that name none, and of dummy weights
    # False: none; a path: there; True: jax's setting or a default folder. But for that setting GPUs' programs are kept
    # twice: by what is lowered, for jax, and by what they are made from, which need not be lowered then.
    compilation_cache: bool | str | Path = True
    enforce_eager: bool = False  # compile each program when it is first needed; contradicts warmup=True
    warmup: bool = False  # compile every program before the first request
    # All four together: the first devices that there are.
    tensor_parallel_size: int = 1  # devices over which each layer is split
    expert_parallel_size: int = 1  # groups of so many devices, each with whole experts; all else is split over all
    pipeline_parallel_size: int = 1  # stages of so many devices, each with as many of the layers
    data_parallel_size: int = 1  # shards among which requests are divided, each with all these devices
    mesh: Mesh | None = None  # the same with devices of one's own choice: its axes data, stage, expert and tensor

    def __post_init__(self):
        def check(name: str, ok: bool, want: str):
            if not ok:
                raise ConfigError(f"{name}={getattr(self, name)!r} must be {want}")

        object.__setattr__(self, "dtype", _dtype_name("dtype", self.dtype, DTYPES))
        object.__setattr__(self, "kv_cache_dtype", _dtype_name("kv_cache_dtype", self.kv_cache_dtype, CACHE_DTYPES))
        for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "kv_cache_memory_bytes",
                     "steps_per_call"):  # fmt: skip
            value = getattr(self, name)
            check(name, value is None or (_is_int(value) and value > 0), "a positive integer or None")
        check("page_size", _is_int(self.page_size) and 1 <= self.page_size <= 256
              and self.page_size & (self.page_size - 1) == 0, "a power of two from 1 to 256")  # fmt: skip
        check("gpu_memory_utilization", 0 < self.gpu_memory_utilization <= 1, "above 0 and at most 1")
        check("steps_in_flight", self.steps_in_flight in (0, 1, 2), "0, 1 or 2")
        check("priority_aging_steps", _is_int(self.priority_aging_steps) and self.priority_aging_steps > 0, "positive")
        check("attention", self.attention in ("auto", "reference", "xla", "triton", "mosaic"),
              "auto, reference, xla, triton or mosaic")  # fmt: skip
        check("max_logprobs", _is_int(self.max_logprobs) and self.max_logprobs >= 0, "0 or more")
        check("fuse_weights", self.fuse_weights in (None, False, True), "None, False or True")
        check("logprobs_mode", self.logprobs_mode in ("raw", "processed"), "raw or processed")
        check(
            "warmup", not (self.warmup and self.enforce_eager), "False when enforce_eager=True asks for lazy compiling"
        )
        if self.quantization is not None:
            raise UnsupportedError(
                f"quantization={self.quantization!r}: only unquantized weights are served; leave it None"
            )
        axes = {"tensor": "tensor", "expert": "expert", "stage": "pipeline", "data": "data"}
        for axis, kind in axes.items():
            name = f"{kind}_parallel_size"
            size = getattr(self, name)
            check(name, _is_int(size) and size > 0, "a positive integer")
            if self.mesh is not None:
                there = self.mesh.shape.get(axis, 1)
                check(name, size in (1, there), f"left out, or the {there} of the mesh")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _dtype_name(option: str, dtype: Any, names: dict[str, str]) -> str:
    """jax's name of a dtype given as one of `names`, a NumPy dtype or a jnp scalar type."""
    name = dtype if isinstance(dtype, str) else getattr(dtype, "__name__", None) or getattr(dtype, "name", str(dtype))
    if name != "auto" and name not in names:
        raise ConfigError(f"{option}={dtype!r} is not one of auto, {', '.join(names)}")
    return names.get(name, name)


def engine_option_names() -> tuple[str, ...]:
    return tuple(f.name for f in fields(EngineConfig))
