"""A checkpoint out: parameters as Orbax or as safetensors, with configs and tokenizer beside them."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from converters import ConversionError, families, safetensors_writer
from converters.safetensors_writer import SHARD_BYTES
from jaxengine.config import ParamRule
from jaxengine.errors import CheckpointError
from jaxengine.weights.checkpoint import Checkpoint
from jaxengine.weights.hub import TOKENIZER_FILES
from jaxengine.weights.orbax_format import save
from jaxengine.weights.rules import find_leaves


def check_destination(destination: Path) -> None:
    if destination.exists():
        raise CheckpointError(f"{destination} is there already: give a folder that is not")


def save_checkpoint(
    checkpoint: Checkpoint,
    params: Mapping[str, jax.Array],
    destination: Path,
    file_format: Literal["orbax", "safetensors"] = "orbax",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a folder that `open_checkpoint` takes, and transformers too if it is of safetensors.

    `params` are canonical, all of one dtype. `shard_bytes`: the most that a safetensors file holds. The folder appears
    when it is complete; CheckpointError if it is there, or if the parameters are not those of the checkpoint's config.
    """
    check_destination(destination)
    find_leaves(destination, params, checkpoint.config, {"(.*)": ParamRule(r"\1")})
    partial = destination.with_name(destination.name + ".incomplete")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        dtypes = {str(array.dtype) for array in params.values()}
        gone = "torch_dtype", "quantization_config"  # what was quantized is no more
        config = {name: value for name, value in checkpoint.hf_config.items() if name not in gone}
        _write_json(partial / "config.json", config | {"dtype": dtypes.pop()})
        if checkpoint.generation_config:
            _write_json(partial / "generation_config.json", checkpoint.generation_config)
        _save_tokenizer(checkpoint.tokenizer_source, partial)
        if file_format == "orbax":
            save(partial, params)
        else:
            _save_safetensors(partial, checkpoint.config.model_type, params, shard_bytes)
        partial.rename(destination)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _save_safetensors(folder: Path, model_type: str, params: Mapping[str, jax.Array], shard_bytes: int) -> None:
    shapes = {path: array.shape for path, array in params.items()}
    targets = families.tensors(model_type, shapes)

    def read(name: str) -> np.ndarray:
        target = targets[name]
        parts = [params[path] for path in target.paths]
        if target.index is not None:
            parts = [part[target.index] for part in parts]  # one expert of them comes to the host
        arrays = [np.asarray(part) for part in parts]
        if target.interleaved:
            whole = np.stack(arrays, axis=-1).reshape(*arrays[0].shape[:-1], -1)
        else:
            whole = np.concatenate(arrays, axis=-1)
        return whole.T if target.transposed else whole

    dtype = np.dtype(next(iter(params.values())).dtype)
    stored = {name: target.stored_shape(shapes) for name, target in targets.items()}
    safetensors_writer.write(folder, stored, dtype, read, shard_bytes)


def _save_tokenizer(source: Any, folder: Path) -> None:
    if isinstance(source, Path):
        for file in (file for pattern in TOKENIZER_FILES for file in source.glob(pattern)):
            target = folder / file.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)
    elif source is not None:  # a GGUF file
        try:
            config = dict(source.tokenizer_config)
            _write_json(folder / "tokenizer.json", source.tokenizer_json)
        except ConversionError as error:
            raise CheckpointError(str(error)) from error
        templates = [{"name": name, "template": text} for name, text in config.pop("chat_templates").items()]
        config |= {"as_in_file": True} | ({"chat_template": templates} if templates else {})
        _write_json(folder / "tokenizer_config.json", config)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
