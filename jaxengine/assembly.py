"""The parts of an engine, made in order: checkpoint, tokenizer, weights, memory plan, runner, scheduler, engine."""

import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax

from jaxengine.config import EngineConfig, ModelConfig, ParamRule
from jaxengine.engine.batch import Buckets, bucket_sizes
from jaxengine.engine.compilations import COMPILERS
from jaxengine.engine.engine import Engine
from jaxengine.engine.lockstep import Follower, Leader, runner_commands
from jaxengine.engine.loop import EngineLoop
from jaxengine.engine.runner import Runner
from jaxengine.engine.scheduler import Scheduler
from jaxengine.engine.shards import together
from jaxengine.errors import ConfigError
from jaxengine.frontend import Frontend
from jaxengine.kv_cache import cache_groups
from jaxengine.layers import ops
from jaxengine.live_weights import LiveWeights
from jaxengine.memory import Sizes, compiling_bytes, plan_pages, temporary_bytes
from jaxengine.models import one_share
from jaxengine.processes import Processes, check_mesh, connect
from jaxengine.progress import counting_bar
from jaxengine.sharding import DATA, EXPERT, LAYER, STAGE, TENSOR, as_created, axis_size, create_mesh
from jaxengine.text import TextSink
from jaxengine.tokenizer import Tokenizer
from jaxengine.weights import Checkpoint, checkpoint_in_memory, open_checkpoint
from jaxengine.weights.hub import locate
from jaxengine.weights.prepared import Prepared, load_prepared

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlatformDefaults:
    """What a device does well, where the user did not say."""

    max_num_seqs: int
    max_num_batched_tokens: int
    smallest_rows: int  # the smallest bucket of a decode step
    smallest_tokens: int  # the smallest bucket of a step with prompts
    block_q: int  # query tokens in a block of the extend kernel
    prompt_chunk: int  # prompt tokens whose logits exist at a time
    microbatch: int  # tokens of a mixed step for which reading a dense stage's weights takes no longer than computing
    attention: str


# On a GPU a step of a model with fewer bytes takes about as long as submitting it: see benchmarks/README.md.
SHORT_STEP_BYTES, SHORT_STEPS = 4e9, 4
# Of buckets, beyond which they are multiples: padding against programs to compile, see benchmarks/README.md.
ROW_STEP, TOKEN_STEP = 32, 512
PLATFORMS = {
    "cpu": PlatformDefaults(32, 512, 1, 16, 32, 128, 16, "xla"),
    # Two rows at least: XLA turns the products of a single row into reductions, which take 1.4 times as long.
    "gpu": PlatformDefaults(256, 8192, 2, 64, 64, 512, 256, "triton"),
}


@dataclass(frozen=True)
class Parts:
    config: EngineConfig
    model: ModelConfig
    tokenizer: Tokenizer | None
    sampling_defaults: Mapping[str, Any]
    frontend: Frontend
    runner: Runner | Leader
    loop: EngineLoop | Follower
    weights: LiveWeights


def assemble(*, config: EngineConfig, **given: Any) -> Parts:
    """See `_assemble`. Raises what LLM says."""
    program_folder = _set_compilation_cache(config.compilation_cache)
    if config.mesh is None:
        mesh = create_mesh(
            config.tensor_parallel_size, config.data_parallel_size, expert=config.expert_parallel_size,
            stage=config.pipeline_parallel_size,
        )  # fmt: skip
    else:
        mesh = as_created(config.mesh)
    check_mesh(mesh)
    sizes = {f"{axis}_parallel_size": mesh.shape[axis] for axis in (DATA, EXPERT, TENSOR)}
    config = replace(config, **sizes, pipeline_parallel_size=mesh.shape[STAGE])  # also where a user's mesh says them
    processes = connect() if mesh.is_multi_process else None
    try:
        return _assemble(mesh, processes, program_folder, config=config, **given)
    except BaseException as error:
        if processes is not None:
            processes.fail(f"{type(error).__name__}: {error}")
        raise


def _assemble(
    mesh: jax.sharding.Mesh,
    processes: Processes | None,
    program_folder: Path | None,
    *,
    model: Any,
    tokenizer: str | os.PathLike | None,
    config: EngineConfig,
    model_config: Any,
    param_mapping: Mapping[str, ParamRule] | None,
    **source: Any,
) -> Parts:
    """`source` goes to weights.open_checkpoint, where `model` is no tree of parameters."""
    if isinstance(model, str | os.PathLike):
        checkpoint = open_checkpoint(model, config=model_config, mapping=param_mapping, **source)
    else:
        checkpoint = checkpoint_in_memory(model, model_config, param_mapping)
    share = one_share(checkpoint.config, mesh)
    device = mesh.devices.flat[0]
    if device.platform not in PLATFORMS:
        raise ConfigError(f"{device.platform=} is not one of {sorted(PLATFORMS)}")
    defaults = PLATFORMS[device.platform]
    config = _resolve(config, checkpoint, defaults, device)
    assert config.max_model_len and config.max_num_seqs and config.max_num_batched_tokens
    if processes is not None:
        processes.check_same(_facts(config, checkpoint.config, mesh))
    sizes = Sizes(
        config.max_num_seqs,
        config.max_num_batched_tokens,
        config.max_model_len,
        config.page_size,
        defaults.prompt_chunk,
    )
    words = _load_tokenizer(tokenizer, checkpoint, source.get("download_dir"))
    params, borrowed = _load_weights(checkpoint, config, mesh)
    stages, weight_bytes = axis_size(mesh, STAGE), sum(p.nbytes for p in params.values())
    short = device.platform == "gpu" and weight_bytes / stages / axis_size(mesh, LAYER) < SHORT_STEP_BYTES
    # Between two calls a pipeline runs empty.
    steps = config.steps_per_call or (SHORT_STEPS if short or stages > 1 else 1)
    config = replace(config, steps_per_call=steps)
    experts, groups = share.experts, cache_groups(share.windows, share.num_kv_heads, share.head_dim)
    temporary = temporary_bytes(share, sizes, config.dtype, config.attention)
    reserved = temporary + COMPILERS * compiling_bytes(share, sizes, config.dtype)
    num_pages = plan_pages(config, share, groups, sizes, config.kv_cache_dtype, reserved, mesh.local_devices)
    if processes is not None:
        num_pages = processes.least(num_pages)
    buckets = Buckets(
        rows=bucket_sizes(min(defaults.smallest_rows, sizes.max_num_seqs), sizes.max_num_seqs, ROW_STEP),
        tokens=bucket_sizes(
            min(defaults.smallest_tokens, sizes.max_num_batched_tokens), sizes.max_num_batched_tokens, TOKEN_STEP
        ),
        block_q=defaults.block_q,
        page_size=sizes.page_size,
        groups=len(groups),
        max_num_seqs=sizes.max_num_seqs,
        microbatch=defaults.microbatch * (experts.count // experts.per_token if experts else 1),
        steps=(1, steps) if steps > 1 else (1,),
    )
    own = Runner(
        config, checkpoint.config, params, groups=groups, num_pages=num_pages, buckets=buckets,
        max_model_len=sizes.max_model_len, prompt_chunk=sizes.prompt_chunk, cache_dtype=config.kv_cache_dtype,
        attention=config.attention, temporary_bytes=temporary, mesh=mesh, program_folder=program_folder,
        borrowed=borrowed,
    )  # fmt: skip
    leader = Leader(own, processes) if processes is not None and processes.rank == 0 else None
    runner = leader or own
    schedulers = [
        Scheduler(
            groups, num_pages, page_size=sizes.page_size, max_num_seqs=sizes.max_num_seqs,
            max_num_batched_tokens=sizes.max_num_batched_tokens, max_model_len=sizes.max_model_len,
            enable_prefix_caching=config.enable_prefix_caching, priority_aging_steps=config.priority_aging_steps,
            steps_per_call=steps,
        )
        for _ in range(mesh.shape[DATA])
    ]  # fmt: skip
    frontend = Frontend(
        words, vocab_size=checkpoint.config.vocab_size, max_model_len=sizes.max_model_len,
        max_logprobs=config.max_logprobs, eos_token_ids=checkpoint.config.eos_token_ids, seed=config.seed,
    )  # fmt: skip
    engine = Engine(
        together(schedulers),
        runner,
        buckets,
        TextSink(words),
        vocab_size=checkpoint.config.vocab_size,
        steps_in_flight=config.steps_in_flight,
        is_device_error=partial(_is_device_error, leader),
    )
    if config.warmup:
        with counting_bar("Compiling") as progress:
            own.warmup(progress)
    weights = LiveWeights(config, checkpoint.config, mesh, param_mapping, runner)
    loop: EngineLoop | Follower
    if processes is None:
        loop = EngineLoop(engine, on_exit=lambda reason: own.close())
    elif leader is not None:
        leader.commands |= {"load": weights.load}
        loop = EngineLoop(engine, on_exit=leader.close)
    else:
        loop = Follower(runner_commands(own) | {"load": weights.load}, own.close, processes)
    return Parts(config, checkpoint.config, words, checkpoint.sampling_defaults, frontend, runner, loop, weights)


def _is_device_error(leader: Leader | None, error: Exception) -> bool:
    found = isinstance(error, jax.errors.JaxRuntimeError)
    if found and leader is not None:
        leader.lose(error)
    return found


def _facts(config: EngineConfig, model: ModelConfig, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """What must be the same in every process, for their programs to be the same."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    facts = asdict(model) | {field.name: getattr(config, field.name) for field in fields(config)} | {
        "jax": jax.__version__,
        "devices": [device.id for device in mesh.devices.flat],
        "XLA_FLAGS": [flag for flag in flags if not flag.startswith("--xla_dump")],
    }  # fmt: skip
    return {name: fact for name, fact in facts.items() if name not in ("mesh", "compilation_cache")}


def _resolve(
    config: EngineConfig, checkpoint: Checkpoint, defaults: PlatformDefaults, device: jax.Device
) -> EngineConfig:
    """The same config with every None and "auto" decided. Raises ConfigError."""
    model, in_memory = checkpoint.config, checkpoint.format == "memory"
    longest = model.max_position_embeddings
    length = config.max_model_len or longest
    if length > longest:
        raise ConfigError(
            f"max_model_len={length} exceeds the {longest} positions the model was made for; a rope scaling in "
            "hf_overrides may extend them"
        )
    if length < 2:
        raise ConfigError(f"max_model_len={length} must hold a token of prompt and one of output")
    rows, tokens = config.max_num_seqs, config.max_num_batched_tokens
    if rows and tokens and tokens < rows:
        raise ConfigError(f"max_num_batched_tokens={tokens} must be at least max_num_seqs={rows}: a token for each row")
    rows = rows or min(defaults.max_num_seqs, tokens or defaults.max_num_seqs)
    tokens = tokens or max(rows, defaults.max_num_batched_tokens)
    dtype = config.dtype
    if dtype == "auto":
        wide = model.dtype if model.dtype in ("float16", "bfloat16") else "bfloat16"
        dtype = model.dtype if in_memory else "float32" if device.platform == "cpu" else wide
    fuse = not in_memory if config.fuse_weights is None else config.fuse_weights
    attention = defaults.attention if config.attention == "auto" else config.attention
    cache_dtype = dtype if config.kv_cache_dtype == "auto" else config.kv_cache_dtype
    ops.check(
        attention, model, device, dtype=dtype, kv_cache_dtype=cache_dtype, page_size=config.page_size, tokens=tokens
    )
    logger.info(
        "%s on %s: dtype=%s kv_cache_dtype=%s attention=%s fuse_weights=%s max_model_len=%d max_num_seqs=%d "
        "max_num_batched_tokens=%d",
        model.model_type, device, dtype, cache_dtype, attention, fuse, length, rows, tokens,
    )  # fmt: skip
    return replace(
        config, max_model_len=length, max_num_seqs=rows, max_num_batched_tokens=tokens, dtype=dtype,
        kv_cache_dtype=cache_dtype, attention=attention, fuse_weights=fuse,
    )  # fmt: skip


def _load_tokenizer(
    named: str | os.PathLike | None, checkpoint: Checkpoint, download_dir: str | None
) -> Tokenizer | None:
    """The tokenizer of that name, or the checkpoint's; None: there is none, and token ids are all that is served."""
    if named is not None:
        return Tokenizer.load(locate(named, None, download_dir, weights=False))
    return None if checkpoint.tokenizer_source is None else Tokenizer.load(checkpoint.tokenizer_source)


def _load_weights(checkpoint: Checkpoint, config: EngineConfig, mesh: jax.sharding.Mesh) -> Prepared:
    remedy = "close() an engine that is no longer used, or give jax more memory (XLA_PYTHON_CLIENT_MEM_FRACTION)"
    with counting_bar("Loading weights", show=logger.isEnabledFor(logging.INFO)) as progress:
        return load_prepared(checkpoint, config, mesh, progress, remedy)


def _set_compilation_cache(choice: bool | str | Path) -> Path | None:
    """Where compiled programs are kept between processes. A setting of the whole process: one that is there stays.

    Returns the folder for the engine's own programs: none in a cache that is jax's by the user's setting, or not a
    local folder, or switched off.
    """
    if choice is False:
        return None
    if choice is True:
        choice = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "jaxengine" / "jax"
        if jax.config.jax_compilation_cache_dir not in (None, str(choice)):
            return None
    jax.config.update("jax_compilation_cache_dir", str(choice))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    usable = jax.config.jax_enable_compilation_cache and "://" not in str(choice)
    return Path(choice) / "programs" if usable else None
