"""A checkpoint out: canonical parameters as Orbax, with configs and tokenizer beside them, for LLM to load."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from converters import ConversionError
from jaxengine.errors import CheckpointError
from jaxengine.models import param_specs
from jaxengine.weights.checkpoint import Checkpoint
from jaxengine.weights.hub import TOKENIZER_FILES
from jaxengine.weights.orbax_format import raise_unlike, save


def check_destination(destination: Path) -> None:
    if destination.exists():
        raise CheckpointError(f"{destination} is there already: give a folder that is not")


def save_checkpoint(checkpoint: Checkpoint, params: Mapping[str, jax.Array], destination: Path) -> None:
    """Writes a folder that `open_checkpoint` takes. It appears when it is complete; CheckpointError if it is there."""
    check_destination(destination)
    shapes = {path: array.shape for path, array in params.items()}
    raise_unlike(destination, shapes, param_specs(checkpoint.config))
    partial = destination.with_name(destination.name + ".incomplete")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        dtypes = {str(array.dtype) for array in params.values()}
        config = {name: value for name, value in checkpoint.hf_config.items() if name != "torch_dtype"}
        _write_json(partial / "config.json", config | {"dtype": dtypes.pop()})
        if checkpoint.generation_config:
            _write_json(partial / "generation_config.json", checkpoint.generation_config)
        _save_tokenizer(checkpoint.tokenizer_source, partial)
        save(partial, params)
        partial.rename(destination)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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
