"""Token ids become text while they are generated: whole characters only, and stop strings found wherever they end.

The text of an output is `Tokenizer.decode` of its ids alone, without the prompt, as in transformers (a SentencePiece
output that begins with `▁Paris` is "Paris"). Joining all pieces gives exactly that text, with two exceptions: it ends
at a stop string, and a run of byte tokens that turns out not to be UTF-8 after whole characters of it were shown keeps
those (decoding all of it at once would replace them too).
"""

from collections.abc import Hashable, Sequence
from functools import cache
from typing import Any, NamedTuple, Protocol

from tokenizers.decoders import DecodeStream

from jaxengine.errors import RequestError
from jaxengine.tokenizer import Tokenizer


class TextParams(Protocol):
    """The fields of SamplingParams that text depends on."""

    stop: Sequence[str]
    include_stop_str_in_output: bool
    skip_special_tokens: bool
    spaces_between_special_tokens: bool
    detokenize: bool
    min_tokens: int


class TextUpdate(NamedTuple):
    """What new tokens did to a text. `keep` of them count; those behind a stop string do not."""

    text_delta: str
    stop: str | None
    keep: int


@cache
def _no_text(keep: int) -> TextUpdate:
    return TextUpdate("", None, keep)


class Detokenizer:
    """The growing text of one output.

    `text` is what has been handed out so far, and may be shown: it never ends in half a character, nor in what could
    be the beginning of a stop string (unless stop strings stay in the text).
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        *,
        include_stop_str: bool = False,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
        min_tokens: int = 0,
    ):
        """`min_tokens`: stop strings that end within the text of so many first tokens are passed over."""
        if stop and tokenizer.clean_up_spaces:
            raise RequestError(
                f"stop={list(stop)!r}: this tokenizer changes spaces after decoding (clean_up_tokenization_spaces), so "
                "that text is known at the end only; use stop_token_ids"
            )
        self._tokenizer, self._stop, self._include_stop = tokenizer, tuple(stop), include_stop_str
        self._skip, self._spaces, self._min_tokens = skip_special_tokens, spaces_between_special_tokens, min_tokens
        self._longest = max(map(len, self._stop), default=0)
        self._firsts = {stop[0] for stop in self._stop}
        self._ids: list[int] = []
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._pending = 0  # last ids whose text is not complete
        self._decoded = ""  # text of the others
        self._shown = 0  # characters of it that were handed out
        self._ended = False

    @property
    def text(self) -> str:
        return self._decoded[: self._shown]

    def append(self, token_ids: Sequence[int]) -> TextUpdate:
        """Takes the next tokens; after a stop string it may not be called again."""
        for taken, token_id in enumerate(token_ids, 1):
            start = len(self._decoded)
            self._decode(token_id)
            if len(self._ids) <= self._min_tokens:
                continue
            if self._stop and (found := self._find_stop(text := self._decoded + self._front_of_pending(), start)):
                stop, begin = found
                self._decoded = text[: begin + len(stop) if self._include_stop else begin]
                self._ended = True
                return TextUpdate(self._show(len(self._decoded)), stop, taken)
        return TextUpdate(self._show(len(self._decoded) - self._held_back()), None, len(token_ids))

    def finish(self, token_ids: Sequence[int] = ()) -> str:
        """The rest of the text, that of these last tokens included; no stop string is looked for in it.

        Incomplete characters become replacement characters.
        """
        self._ids += token_ids
        self._pending += len(token_ids)
        if self._pending and not self._ended:
            whole = self._tokenizer.decode(self._ids, self._skip, self._spaces)
            if whole.startswith(self._decoded):
                self._decoded = whole
            else:
                self._decoded += self._tokenizer.decode_inside(self._ids[-self._pending :], self._skip)
        self._ended = True
        return self._show(len(self._decoded))

    def _show(self, end: int) -> str:
        start, self._shown = self._shown, max(self._shown, end)
        return self._decoded[start : self._shown]

    def _decode(self, token_id: int) -> None:
        self._ids.append(token_id)
        self._pending += 1
        if self._tokenizer.clean_up_spaces:
            return  # a later token may take a space away
        if not self._spaces and not self._skip and set(self._ids[-2:]) <= self._tokenizer.added_ids:
            self._stream = DecodeStream(skip_special_tokens=False)
        try:
            piece = self._stream.step(self._tokenizer.backend, token_id)
        except Exception:  # "invalid prefix": bytes that were a character are none together with these
            pending = self._ids[-self._pending :]
            piece = self._tokenizer.decode_inside(pending, self._skip)
            self._stream = DecodeStream(ids=self._tokenizer.anchor_ids, skip_special_tokens=self._skip)
        if piece is not None:
            self._decoded += piece
            self._pending = 0

    def _front_of_pending(self) -> str:
        """Whole characters that share a token with a part of one."""
        if not self._pending:
            return ""
        return self._tokenizer.decode_inside(self._ids[-self._pending :], self._skip).rstrip("\ufffd")

    def _find_stop(self, text: str, start: int) -> tuple[str, int] | None:
        """The stop string that ends first behind `start`, and where it begins; of several the longest."""
        found = []
        for stop in self._stop:
            begin = text.find(stop, max(0, start - len(stop) + 1))
            if begin >= 0:
                found.append((begin + len(stop), begin, stop))
        if not found:
            return None
        _, begin, stop = min(found)
        return stop, begin

    def _held_back(self) -> int:
        """Characters at the end that could be the beginning of a stop string."""
        if self._longest < 2 or self._include_stop:
            return 0
        tail = self._decoded[1 - self._longest :]
        if not self._firsts.isdisjoint(tail):
            for at in range(len(tail)):
                if any(stop.startswith(tail[at:]) for stop in self._stop):
                    return len(tail) - at
        return 0


class TextSink:
    """The detokenizers of all running outputs, in the form that the engine's commit wants. For one thread."""

    def __init__(self, tokenizer: Tokenizer | None):
        """None: only for outputs that are not detokenized."""
        self._tokenizer = tokenizer
        self._outputs: dict[Hashable, Detokenizer | None] = {}

    def open(self, key: Hashable, prompt_ids: Sequence[int], params: TextParams) -> None:
        """Starts an output; `params` are its SamplingParams. `prompt_ids` do not enter into its text."""
        assert self._tokenizer is not None or not params.detokenize
        self._outputs[key] = (
            Detokenizer(
                self._tokenizer,
                params.stop,
                include_stop_str=params.include_stop_str_in_output,
                skip_special_tokens=params.skip_special_tokens,
                spaces_between_special_tokens=params.spaces_between_special_tokens,
                min_tokens=params.min_tokens,
            )
            if params.detokenize and self._tokenizer
            else None
        )

    def update(self, items: Sequence[tuple[Any, Sequence[int]]]) -> list[TextUpdate]:
        """New token ids by output, to new text by output, in the same order."""
        updates = []
        for key, ids in items:
            output = self._outputs[key]
            updates.append(output.append(ids) if output else _no_text(len(ids)))
        return updates

    def close(self, key: Hashable, ids: Sequence[int] = ()) -> str:
        """Ends an output and forgets it; the text that was still held back, and that of the last ids.

        For an output that is wanted at its end only, these may be all: decoded at once they take a fraction of the
        time. A key that is not open gives no text.
        """
        output = self._outputs.pop(key, None)
        return output.finish(ids) if output else ""
