"""Progress bars: of requests, and of anything else that takes long."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from jaxengine.request import RequestOutput


@contextmanager
def progress_bar(use_tqdm: bool | Callable[..., Any], total: int | None) -> Iterator[Callable[[RequestOutput], None]]:
    """A function that shows one more finished request, with input and output tokens/s so far."""
    with token_bar("Processed prompts", use_tqdm, total) as show:
        yield lambda output: show(1, [output])


@contextmanager
def token_bar(
    what: str, use_tqdm: bool | Callable[..., Any], total: int | None
) -> Iterator[Callable[[int, Sequence[RequestOutput]], None]]:
    """A function that shows so many more finished, and whose outputs count into the tokens/s."""
    if not use_tqdm:
        yield lambda done, outputs: None
        return
    with _tqdm(use_tqdm)(total=total, desc=what, dynamic_ncols=True) as bar:
        tokens = [0, 0]

        def show(done: int, outputs: Sequence[RequestOutput]) -> None:
            for output in outputs:
                tokens[0] += len(output.prompt_token_ids)
                tokens[1] += sum(len(completion.token_ids) for completion in output.outputs)
            seconds = bar.format_dict["elapsed"] or 1e-9
            rates = [f"{count / seconds:.2f} toks/s" for count in tokens]
            bar.set_postfix_str(f"input: {rates[0]}, output: {rates[1]}", refresh=False)
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
