"""Progress bars: of requests, and of anything else that takes long."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from jaxengine.request import RequestOutput


@contextmanager
def progress_bar(use_tqdm: bool | Callable[..., Any], total: int | None) -> Iterator[Callable[[RequestOutput], None]]:
    """A function that shows one more finished request, with input and output tokens/s so far."""
    with token_bar("Processed prompts", use_tqdm, total) as show:
        yield lambda output: show(1, *count_tokens([output]))


def count_tokens(outputs: Iterable[RequestOutput]) -> tuple[int, int]:
    """Of prompts, of completions."""
    rows = [(len(o.prompt_token_ids), sum(len(completion.token_ids) for completion in o.outputs)) for o in outputs]
    return sum(prompt for prompt, _ in rows), sum(output for _, output in rows)


@contextmanager
def token_bar(what: str, use_tqdm: bool | Callable[..., Any], total: int | None) -> Iterator[Callable[..., None]]:
    """A function of (done, input tokens, output tokens, a note): so many more; it shows tokens/s, then the note."""
    if not use_tqdm:
        yield lambda *_: None
        return
    with _tqdm(use_tqdm)(total=total, desc=what, dynamic_ncols=True) as bar:
        tokens = [0, 0]

        def show(done: int, prompt_tokens: int, output_tokens: int, note: str = "") -> None:
            tokens[0] += prompt_tokens
            tokens[1] += output_tokens
            seconds = bar.format_dict["elapsed"] or 1e-9
            rates = [f"{count / seconds:.2f} toks/s" for count in tokens]
            bar.set_postfix_str(f"input: {rates[0]}, output: {rates[1]}{note}", refresh=False)
            bar.update(done)

        yield show


@contextmanager
def counting_bar(what: str, show: bool = True) -> Iterator[Callable[[int, int], None]]:
    """A function of (done, total) that shows a bar once there is something to show."""
    bar = None

    def update(done: int, total: int) -> None:
        nonlocal bar
        if show:
            bar = bar or _tqdm(True)(total=total, desc=what, dynamic_ncols=True)
            bar.update(done - bar.n)

    try:
        yield update
    finally:
        if bar is not None:
            bar.close()


def _tqdm(use_tqdm: bool | Callable[..., Any]) -> Callable[..., Any]:
    if callable(use_tqdm):
        return use_tqdm
    from tqdm.auto import tqdm

    return tqdm
