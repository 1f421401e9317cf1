"""From what the user calls a model to a folder or a file on this machine."""

import os
import re
from pathlib import Path

from jaxengine.errors import ModelNotFoundError

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "tekken.json", "chat_template.jinja", "chat_template.json",
    "additional_chat_templates/*.jinja",
)  # fmt: skip
CONFIG_FILES = ("config.json", "generation_config.json")
WEIGHT_FILES = ("model*.safetensors", "model.safetensors.index.json", "params/*")


def locate(model: str | os.PathLike, revision: str | None, download_dir: str | None, weights: bool) -> Path:
    """The folder or GGUF file; a hub id is downloaded first, without its weights if they are not wanted.

    Raises ModelNotFoundError saying what to do.
    """
    path = Path(model).expanduser()
    if path.exists():
        if revision is not None:
            raise ModelNotFoundError(f"{revision=} of {path}: that is on this machine, only the hub has revisions")
        return path
    name = str(model)
    if not isinstance(model, str) or not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name) or name.endswith(".gguf"):
        raise ModelNotFoundError(f"there is no folder or file {name}")
    return download(name, revision, download_dir, weights)


def download(repository: str, revision: str | None, download_dir: str | None, weights: bool) -> Path:
    """The files of a hub repository that are needed, from the cache if they are there."""
    import huggingface_hub  # takes half a second
    from huggingface_hub import constants, errors

    patterns = [*CONFIG_FILES, *TOKENIZER_FILES, *(WEIGHT_FILES if weights else ())]
    named = repository if revision is None else f"{repository} at {revision=}"
    try:
        folder = huggingface_hub.snapshot_download(
            repository, revision=revision, cache_dir=download_dir, allow_patterns=patterns
        )
    except errors.GatedRepoError as error:
        remedy = f"accept its terms at https://huggingface.co/{repository}, then `hf auth login`"
        raise ModelNotFoundError(f"{named} is gated: {remedy}") from error
    except errors.RevisionNotFoundError as error:
        raise ModelNotFoundError(f"{repository} on the hub has no {revision=}") from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise ModelNotFoundError(
            f"{repository} is neither a folder here nor a model on the hub that you may see: check the spelling, or "
            "`hf auth login` if it is private"
        ) from error
    except Exception as error:  # the hub's client lets errors of several HTTP libraries through
        why = "HF_HUB_OFFLINE is set" if constants.is_offline_mode() else f"the hub cannot be reached ({error})"
        place = download_dir or constants.HF_HUB_CACHE
        raise ModelNotFoundError(
            f"{named} is neither a folder here nor complete in {place}, and {why}: go online, or fetch it elsewhere "
            f"with `hf download {repository}` and give the folder"
        ) from error
    return Path(folder)
