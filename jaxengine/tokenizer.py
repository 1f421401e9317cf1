"""Text to token ids and back, chat templates. The ids and the text are those of HuggingFace transformers.

The usual checkpoint needs no import of transformers (it takes a second): `tokenizer.json` and the small files beside it
are read here. Where transformers would build something else than `tokenizer.json` says, it is asked (`_as_in_file`).
"""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import tokenizers
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers

from converters import ConversionError
from jaxengine.errors import CheckpointError, ModelNotFoundError, RequestError

log = logging.getLogger(__name__)

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Classes of transformers that build the pipeline in code, and special tokens they have unless the files say otherwise.
_DEFAULT_TOKENS: dict[str, dict[str, str]] = {
    "GPT2Tokenizer": dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
    "Qwen2Tokenizer": dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>"),
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
}
_CLASS_OF = {"gpt2": "GPT2Tokenizer", "qwen2": "Qwen2Tokenizer", "qwen3": "Qwen2Tokenizer"}  # by model_type
_GENERIC = ("", "PreTrainedTokenizer", "TokenizersBackend")  # these take tokenizer.json as it is
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# What transformers' `clean_up_tokenization_spaces` replaces, in this order.
_CLEAN_UP = ((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"),
             (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"))  # fmt: skip


class Tokenizer:
    """A vocabulary with its rules, special tokens and chat templates.

    `backend` is the `tokenizers.Tokenizer`; `special_tokens` maps names (`eos_token`) to their text, `chat_templates`
    names (`default`, `tool_use`) to Jinja templates.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str] | None = None,
        chat_templates: Mapping[str, str] | None = None,
        clean_up_spaces: bool = False,
    ):
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.special_tokens = dict(special_tokens or {})
        self.chat_templates = dict(chat_templates or {})
        self.clean_up_spaces = clean_up_spaces

    @classmethod
    def load(cls, source: Any) -> Self:
        """From a folder in HuggingFace's format, a GGUF file, or an open GgufCheckpoint.

        Raises ModelNotFoundError, or CheckpointError for files that are corrupt, lacking or of an unknown kind.
        """
        if hasattr(source, "tokenizer_json"):
            return cls._from_gguf(source)
        path = Path(source)
        if path.is_file():
            from converters.gguf_checkpoint import open_gguf

            try:
                return cls._from_gguf(open_gguf(path))
            except ConversionError as error:
                raise CheckpointError(str(error)) from error
        if not path.is_dir():
            raise ModelNotFoundError(f"no tokenizer at {path}: there is no such folder or GGUF file")
        config = _read_json(path / "tokenizer_config.json")
        if (path / "tokenizer.json").is_file():
            backend = _read_backend(path / "tokenizer.json")
            name = _class_name(path, config)
            if _as_in_file(backend, name, path, config):
                return cls._from_files(backend, name, path, config)
            log.warning("%s: transformers builds %s otherwise than tokenizer.json says; doing the same", path, name)
        return cls._from_transformers(path)

    @classmethod
    def _from_gguf(cls, checkpoint: Any) -> Self:
        try:
            backend = tokenizers.Tokenizer.from_str(json.dumps(checkpoint.tokenizer_json))
            config = checkpoint.tokenizer_config
        except ConversionError as error:
            raise CheckpointError(str(error)) from error
        except Exception as error:  # tokenizers raises nothing more precise
            raise CheckpointError(f"{checkpoint.path}: its tokenizer makes no sense: {error}") from error
        named = {key: value for key, value in config.items() if key in SPECIAL_TOKENS}
        return cls(backend, named, config["chat_templates"])

    @classmethod
    def _from_files(cls, backend: tokenizers.Tokenizer, name: str, folder: Path, config: dict[str, Any]) -> Self:
        legacy = {} if "added_tokens_decoder" in config else _read_json(folder / "special_tokens_map.json")
        settings = _DEFAULT_TOKENS.get(name, {}) | config | legacy
        named = {
            key: _content(value)
            for key, value in settings.items()
            if value is not None and (key in SPECIAL_TOKENS or (key.endswith("_token") and not isinstance(value, bool)))
        }
        listed = config.get("added_tokens_decoder", {})
        added = [AddedToken(**listed[i]) for i in sorted(listed, key=int)]
        extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
        if isinstance(extra, dict):
            named |= {key: _content(value) for key, value in extra.items()}
            extra = ()
        added += [AddedToken(_content(t), special=True, normalized=False) for t in (*named.values(), *extra)]
        known = {token.content for token in backend.get_added_tokens_decoder().values()}
        backend.add_tokens([token for token in added if token.content not in known])
        backend.encode_special_tokens = bool(config.get("split_special_tokens", False))
        cleaned = config.get("clean_up_tokenization_spaces") and (
            type(backend.model).__name__ != "BPE"
            or config.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output")
        )
        return cls(backend, named, _chat_templates(folder, config), bool(cleaned))

    @classmethod
    def _from_transformers(cls, folder: Path) -> Self:
        from transformers import AutoTokenizer

        try:
            slow = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
            backend = slow.backend_tokenizer
        except Exception as error:  # every kind there is, for every kind of bad file
            raise CheckpointError(
                f"{folder}: no tokenizer can be made of its files ({error}); give a folder with a tokenizer.json"
            ) from error
        templates = slow.chat_template or {}
        cleaned = slow.clean_up_tokenization_spaces and (
            type(backend.model).__name__ != "BPE"
            or slow.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output
        )
        templates = {"default": templates} if isinstance(templates, str) else templates
        return cls(backend, slow.special_tokens_map, templates, bool(cleaned))

    # -- ids and text

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; `add_special_tokens` adds what the model wants around it (mostly BOS), if anything."""
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """`encode` of each, in threads."""
        return [e.ids for e in self.backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)]

    def decode(
        self, ids: Iterable[int], skip_special_tokens: bool = True, spaces_between_special_tokens: bool = True
    ) -> str:
        """Text of token ids. Ids beyond the vocabulary (padding rows of the embedding) give nothing.

        `spaces_between_special_tokens=False` drops the space that a tokenizer which separates all tokens by spaces
        (one without a decoder, WordPiece) puts between two special tokens; others put none there anyhow.
        """
        ids = list(ids)
        parts = [ids]
        if not (spaces_between_special_tokens or skip_special_tokens):
            cuts = [i for i in range(1, len(ids)) if {ids[i - 1], ids[i]} <= self.added_ids]
            parts = [ids[start:end] for start, end in zip([0, *cuts], [*cuts, len(ids)])]
        text = "".join(self.backend.decode(part, skip_special_tokens=skip_special_tokens) for part in parts)
        if self.clean_up_spaces:
            for old, new in _CLEAN_UP:
                text = text.replace(old, new)
        return text

    def decode_inside(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ids in the midst of a text, where decoders that strip the first space have nothing to strip."""
        both = self.backend.decode([*self.anchor_ids, *ids], skip_special_tokens=skip_special_tokens)
        return both[len(self._anchor_text) :]

    def token_text(self, token_id: int) -> str:
        """Text of one token in the midst of a text; parts of characters give the replacement character."""
        return self.decode_inside([token_id], skip_special_tokens=False)

    @cached_property
    def anchor_ids(self) -> list[int]:
        """Some ordinary text, for others to follow."""
        return self.encode("a", add_special_tokens=False)

    @cached_property
    def _anchor_text(self) -> str:
        return self.backend.decode(self.anchor_ids, skip_special_tokens=False)

    # -- vocabulary

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; the model's embedding may have more rows."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def token_id(self, text: str) -> int | None:
        """Id of the token spelled so, None if there is none."""
        return self.backend.token_to_id(text)

    @property
    def bos_token_id(self) -> int | None:
        return self._named_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._named_id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        return self._named_id("pad_token")

    def _named_id(self, name: str) -> int | None:
        return self.backend.token_to_id(self.special_tokens[name]) if name in self.special_tokens else None

    @cached_property
    def added_ids(self) -> frozenset[int]:
        """Tokens that are found in a text before it is split."""
        return frozenset(self.backend.get_added_tokens_decoder())

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Those of them that `skip_special_tokens` skips."""
        return frozenset(i for i, token in self.backend.get_added_tokens_decoder().items() if token.special)

    # -- chat

    @cached_property
    def _chat(self) -> Any:
        from jaxengine.chat_template import ChatTemplates  # Jinja, which not everybody needs

        return ChatTemplates(self.chat_templates, self.special_tokens)

    def apply_chat_template(
        self,
        messages: Sequence[Any],
        tools: Sequence[Any] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | str = False,
        **kwargs: Any,
    ) -> str:
        """The prompt for a conversation, as text; encode it with `add_special_tokens=False`.

        `chat_template`: a Jinja template, or the name of one of the model's. `add_generation_prompt`: begin the
        assistant's answer; True unless `continue_final_message`, which leaves the last message open. `kwargs` are
        variables for the template. Raises RequestError, also for a model without a template.
        """
        if add_generation_prompt is None:
            add_generation_prompt = not continue_final_message
        elif add_generation_prompt and continue_final_message:
            raise RequestError("add_generation_prompt=True begins a new message, continue_final_message continues one")
        return self._chat.render(messages, tools, chat_template, add_generation_prompt, continue_final_message, kwargs)


def _class_name(folder: Path, config: dict[str, Any]) -> str:
    """The class of transformers that would read this folder, without its `Fast`; "" if nothing names one."""
    if config.get("as_in_file"):  # a folder of our own, made of a GGUF file, whose tokenizer.json is the whole truth
        return ""
    model = _read_json(folder / "config.json")
    model_type = model.get("model_type", "")
    if model_type == "qwen2":  # whatever the checkpoint says
        return "Qwen2Tokenizer"
    if model_type == "mistral" and not (folder / "tekken.json").exists():
        return ""
    named = config.get("tokenizer_class") or model.get("tokenizer_class") or _CLASS_OF.get(model_type, "")
    return named.removesuffix("Fast")


def _as_in_file(backend: tokenizers.Tokenizer, name: str, folder: Path, config: dict[str, Any]) -> bool:
    """Is what transformers would build just what tokenizer.json says?

    Some of its classes take only vocabulary and merges from the file and bring their own pipeline, as it stands here.
    """
    if "auto_map" in config or (folder / "tekken.json").exists():
        return False
    if name in _GENERIC:
        return True
    has_bytes = b"ByteLevel" in backend.pre_tokenizer.__getstate__() if backend.pre_tokenizer else False
    if name == "LlamaTokenizer" and has_bytes:  # Llama 3: transformers notices
        return True
    space = config.get("add_prefix_space")
    normalizer, flags = None, {"fuse_unk": False, "byte_fallback": False}
    decoder: Any = decoders.ByteLevel()
    if name == "GPT2Tokenizer":
        splitter: Any = pre_tokenizers.ByteLevel(add_prefix_space=bool(space))
    elif name == "Qwen2Tokenizer":
        normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(Regex(_QWEN2_SPLIT), "isolated")
        splitter = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=bool(space), use_regex=False)]
        )
    elif name == "LlamaTokenizer":
        space = space is None or space
        scheme = ("always" if config.get("legacy", False) else "first") if space else "never"
        splitter = pre_tokenizers.Metaspace("▁", scheme, split=False)
        strip = [decoders.Strip(" ", 1, 0)] if space else []
        decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
        flags = {"fuse_unk": True, "byte_fallback": True}
    else:
        return False
    model = backend.model
    return (
        type(model).__name__ == "BPE"
        and not (model.dropout or model.ignore_merges)
        and all(getattr(model, flag) == value for flag, value in flags.items())
        and _state(backend.normalizer) == _state(normalizer)
        and _state(backend.pre_tokenizer) == _state(splitter)
        and _state(backend.decoder) == _state(decoder)
    )


def _state(component: Any) -> Any:
    """What a part of the pipeline does, comparable."""
    state = None if component is None else json.loads(component.__getstate__())
    if isinstance(component, decoders.ByteLevel):
        return "ByteLevel"  # its fields are for encoding
    for part in (state or {}).get("pretokenizers", [state or {}]):
        part.pop("trim_offsets", None)
    return state


def _chat_templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """The model's templates by name. Files of their own take the place of those in tokenizer_config.json."""
    files = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        files["default"] = folder / "chat_template.jinja"
    if files:
        return {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    template = config.get("chat_template") or _read_json(folder / "chat_template.json").get("chat_template") or {}
    if isinstance(template, list):
        return {entry["name"]: entry["template"] for entry in template}
    return {"default": template} if isinstance(template, str) else template


def _content(token: Any) -> str:
    """Files spell a token as its text, or as an object with flags."""
    return token["content"] if isinstance(token, dict) else str(token)


def _read_json(path: Path) -> dict[str, Any]:
    """An empty one if the file is not there."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__} where an object should be")
    return content


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing more precise
        raise CheckpointError(f"{path}: not a tokenizer: {error}") from error
