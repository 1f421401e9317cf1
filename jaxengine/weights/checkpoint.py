"""What a checkpoint says of itself: format, ModelConfig, sampling defaults, where its tokenizer is."""

import json
import logging
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from converters import ConversionError, UnsupportedOptionError
from converters.attributes import DTYPES, token_ids
from converters.families import model_config
from converters.mxfp4 import Mxfp4Checkpoint, is_mxfp4
from converters.safetensors_reader import SafetensorsCheckpoint
from jaxengine.config import ExpertsConfig, ModelConfig, ParamRule, RopeConfig
from jaxengine.errors import CheckpointError, ConfigError, UnsupportedModelError
from jaxengine.weights.hub import TOKENIZER_FILES, locate
from jaxengine.weights.orbax_layouts import find_item, homes, recognize

log = logging.getLogger(__name__)

HEAD, EMBEDDING = "lm_head.kernel", "embed_tokens.embedding"
FORMATS = ("auto", "safetensors", "gguf", "orbax", "dummy")
# generation_config.json -> SamplingParams; `do_sample` comes last, since it overrules the temperature.
SAMPLING = {
    "temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p", "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens", "repetition_penalty": "repetition_penalty", "stop_strings": "stop",
}  # fmt: skip
# Change what transformers would sample, and nothing here, unless they have this value.
NOT_APPLIED: dict[str, Any] = {
    "num_beams": 1, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0, "penalty_alpha": 0, "guidance_scale": 1.0, "bad_words_ids": None, "top_h": None,
    "suppress_tokens": None, "begin_suppress_tokens": None, "sequence_bias": None, "forced_bos_token_id": None,
    "forced_eos_token_id": None, "exponential_decay_length_penalty": None, "length_penalty": 1.0,
}  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint; its weights are still on the disk, or a trainer's."""

    path: Path
    format: str  # safetensors | gguf | orbax | dummy | memory
    config: ModelConfig
    sampling_defaults: dict[str, Any]  # SamplingParams' names
    tokenizer_source: Any  # what Tokenizer.load takes; None: there is no tokenizer
    hf_config: Mapping[str, Any] = field(repr=False, default_factory=dict)  # config.json, overrides included
    generation_config: Mapping[str, Any] = field(repr=False, default_factory=dict)
    reader: Any = field(repr=False, default=None)  # names() and read(name) of its tensors; orbax: orbax_format.Tree
    arrays: Mapping[str, Any] = field(repr=False, default_factory=dict)  # in memory: rules.Leaf by canonical name


def open_checkpoint(
    model: str | os.PathLike,
    *,
    load_format: str = "auto",
    revision: str | None = None,
    download_dir: str | None = None,
    hf_overrides: Mapping[str, Any] | None = None,
    use_generation_config: bool = True,
    config: Any = None,
    mapping: Mapping[str, ParamRule] | None = None,
    default_config: ModelConfig | None = None,
    default_mapping: Mapping[str, ParamRule] | None = None,
) -> Checkpoint:
    """Finds a model, downloads it if it is on the hub, and reads what it says of itself; weights are not read.

    `hf_overrides` are laid over config.json, whole attributes at a time. `use_generation_config=False`: no sampling
    defaults, and only the end-of-sequence ids of config.json. Of Orbax only: `config` (see given_config) says what
    the model is, whatever config.json says, and `mapping` what becomes of each array (see rules.find_leaves);
    `default_config` holds where there is no config.json, `default_mapping` where the layout is not known. Raises
    CheckpointError and its kin.
    """
    if load_format not in FORMATS:
        raise ConfigError(f"{load_format=} is not one of {', '.join(FORMATS)}")
    path = _gguf_within(locate(model, revision, download_dir, weights=load_format != "dummy"))
    item = None if load_format == "dummy" else _orbax_item(path, load_format)
    if item is None and (config is not None or mapping is not None):
        raise ConfigError(
            "config= is for parameters in memory or in an Orbax checkpoint, and so is param_mapping=; hf_overrides= "
            "changes what a checkpoint says"
        )
    if config is not None and hf_overrides:
        raise ConfigError("hf_overrides= changes config.json, but config= says all of it")
    try:
        if item is not None:
            return _open_orbax(
                path, item, hf_overrides or {}, use_generation_config, config, mapping, default_config, default_mapping
            )
        return _open(path, load_format, hf_overrides or {}, use_generation_config)
    except UnsupportedOptionError as error:
        raise UnsupportedModelError(f"{path}: {error}") from error
    except (ConversionError, ConfigError) as error:
        raise CheckpointError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from error


def _gguf_within(path: Path) -> Path:
    """The one GGUF file of a folder that holds nothing else to serve."""
    if path.is_dir() and not (path / "config.json").exists():
        files = sorted(path.glob("*.gguf"))
        if len(files) > 1:
            raise CheckpointError(f"{path} holds several GGUF files, give one: {', '.join(f.name for f in files)}")
        return files[0] if files else path
    return path


def _orbax_item(path: Path, load_format: str) -> Path | None:
    """Safetensors come first, where a folder holds both and nobody says which."""
    if path.is_file() or load_format == "safetensors" or (load_format != "orbax" and any(path.glob("*.safetensors"))):
        return None
    return find_item(path)


def _open(path: Path, load_format: str, overrides: Mapping[str, Any], use_generation_config: bool) -> Checkpoint:
    reader: Any = None
    if path.is_file():
        from converters.gguf_checkpoint import open_gguf

        kind, reader = "gguf", open_gguf(path)
        hf_config, generation, tokenizer = reader.hf_config, reader.generation_config, reader
    else:
        kind = "safetensors"
        if not (path / "config.json").exists():
            raise CheckpointError(f"{path}: no model in HuggingFace's format (it has no config.json), nor one of Orbax")
        hf_config, generation = read_json(path / "config.json"), read_json(path / "generation_config.json", {})
        tokenizer = path if has_tokenizer(path) else None
    if load_format == "dummy":
        kind, reader = "dummy", None
    elif load_format not in ("auto", kind):
        raise CheckpointError(f"{path} is of format {kind}, not {load_format=}; leave it auto")
    elif kind == "safetensors":
        reader = SafetensorsCheckpoint(path)
        reader.names()  # a file that is missing or corrupt shows here
    hf_config = {**hf_config, **_plain(overrides)}
    if kind == "safetensors" and is_mxfp4(hf_config):
        reader = Mxfp4Checkpoint(reader)
    config, defaults = _with_generation(path, hf_config, _usual_dtype(reader), generation, use_generation_config)
    return Checkpoint(path, kind, config, defaults, tokenizer, hf_config, generation, reader)


def _open_orbax(
    path: Path,
    item: Path,
    overrides: Mapping[str, Any],
    use_generation_config: bool,
    given: Any,
    mapping: Mapping[str, ParamRule] | None,
    default_config: ModelConfig | None,
    default_mapping: Mapping[str, ParamRule] | None,
) -> Checkpoint:
    from jaxengine.weights.orbax_format import read_tree  # loads Orbax
    from jaxengine.weights.rules import usual_dtype

    tree = read_tree(item)
    layout = recognize(item, tree.arrays, mapping, default_mapping)
    arrays = {name.removeprefix(layout.root): x for name, x in tree.arrays.items() if name.startswith(layout.root)}
    places = list(dict.fromkeys((path, *homes(item))))
    generation = next((found for place in places if (found := read_json(place / "generation_config.json", {}))), {})
    hf_config: Mapping[str, Any] = next((c for place in places if (c := read_json(place / "config.json", {}))), {})
    if given is not None:
        config, hf_config = given_config(given)
        defaults = _sampling_defaults(generation) if use_generation_config else {}
    elif hf_config:
        hf_config = {**hf_config, **_plain(overrides)}
        config, defaults = _with_generation(path, hf_config, "float32", generation, use_generation_config)
    elif default_config is not None:
        config, defaults = default_config, {}
    else:
        raise CheckpointError(
            f"{path}: this Orbax checkpoint ({layout.trainer or 'canonical names'}) does not say what model it is of: "
            "give config= (what config.json holds, a file of it, a transformers config, or a ModelConfig), or put "
            "config.json beside it"
        )
    tree = replace(tree, arrays=arrays, mapping=layout.rules(path, config))
    config = replace(config, dtype=usual_dtype(arrays))
    tokenizer = next((place for place in places if has_tokenizer(place)), None)
    return Checkpoint(path, "orbax", config, defaults, tokenizer, hf_config, generation, tree)


def _with_generation(
    path: Path, hf_config: Mapping[str, Any], dtype: str, generation: Mapping[str, Any], use_it: bool
) -> tuple[ModelConfig, dict[str, Any]]:
    """The config, and SamplingParams' defaults."""
    more_ends: tuple[int, ...] = ()
    defaults: dict[str, Any] = {}
    if use_it:
        more_ends, defaults = token_ids("eos_token_id", generation.get("eos_token_id")), _sampling_defaults(generation)
    config = read_config(hf_config, dtype, more_ends)
    if use_it:
        log.info("%s: its generation config gives %s; it ends with any of %s",
                 path, defaults or "no defaults", config.eos_token_ids)  # fmt: skip
    return config, defaults


def has_tokenizer(folder: Path) -> bool:
    return any(file for pattern in TOKENIZER_FILES for file in folder.glob(pattern))


def given_config(config: Any) -> tuple[ModelConfig, Mapping[str, Any]]:
    """A user's `config=`, and what config.json would hold (empty for a ModelConfig).

    config: config.json's content, or its path; a transformers config, or a ModelConfig. Raises CheckpointError, or
    UnsupportedModelError.
    """
    if isinstance(config, ModelConfig):
        return config, {}
    if isinstance(config, str | os.PathLike):
        config = read_json(Path(config).expanduser())
    found = config.to_dict() if hasattr(config, "to_dict") else config
    if not isinstance(found, Mapping):
        raise CheckpointError(
            f"config={config!r:.100} must be what config.json holds, its path, a transformers config, or a ModelConfig"
        )
    try:
        return read_config(found, "float32", ()), found
    except UnsupportedOptionError as error:
        raise UnsupportedModelError(f"config: {error}") from error
    except (ConversionError, ConfigError) as error:
        raise CheckpointError(f"config: {error}") from error


def read_config(hf_config: Mapping[str, Any], dtype: str, more_ends: tuple[int, ...]) -> ModelConfig:
    """What config.json says; `dtype` where it names none."""
    arguments = model_config(hf_config)
    arguments.setdefault("dtype", dtype)
    if arguments.get("rope"):
        arguments["rope"] = RopeConfig(**arguments["rope"])
    if arguments.get("experts"):
        arguments["experts"] = ExpertsConfig(**arguments["experts"])
    # transformers' default ids may lie beyond a small vocabulary: such a token is never drawn.
    ends = dict.fromkeys((*arguments["eos_token_ids"], *more_ends))
    arguments["eos_token_ids"] = tuple(i for i in ends if i < arguments["vocab_size"])
    return ModelConfig(**arguments)


def read_json(path: Path, default: dict[str, Any] | None = None) -> dict[str, Any]:
    """An object; `default` if there is no such file, an error if there is no default either."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        if default is None:
            raise CheckpointError(f"there is no {path}") from error
        return default
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__} where an object should be")
    return content


def _plain(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """As they would be in config.json: lists for tuples."""
    try:
        return json.loads(json.dumps(dict(overrides)))
    except TypeError as error:
        raise ConfigError(f"hf_overrides={overrides!r} must be what JSON can hold: {error}") from error


def _usual_dtype(reader: Any) -> str:
    """For a config that does not say it: what most tensors have."""
    found = Counter(dtype for _, dtype in reader.names().values() if dtype in DTYPES) if reader else None
    return found.most_common(1)[0][0] if found else "float32"


def _sampling_defaults(generation: Mapping[str, Any]) -> dict[str, Any]:
    defaults = {ours: generation[name] for name, ours in SAMPLING.items() if generation.get(name) is not None}
    if generation.get("do_sample") is False:
        defaults["temperature"] = 0.0
    ignored = {n: v for n, v in generation.items() if n in NOT_APPLIED and v is not None and v != NOT_APPLIED[n]}
    if ignored:
        log.warning("generation_config.json: not applied: %s", ", ".join(f"{n}={v!r}" for n, v in ignored.items()))
    return defaults
