"""Log-likelihood: (context, continuation) pairs become requests that share their context, and outputs become sums.

Boundaries between tokens, windows and the token before an empty context are those of lm-evaluation-harness.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxengine.errors import RequestError
from jaxengine.request import RequestOutput, SamplingParams

Pair = tuple[Sequence[int], Sequence[int]]  # token ids of context and continuation
Encode = Callable[[Sequence[str], bool], list[list[int]]]  # texts, add_special_tokens


@dataclass(frozen=True)
class Score:
    """Log-probabilities (natural logarithm) of a continuation's n tokens, each given all before it."""

    token_ids: np.ndarray  # int64 [n]
    logprobs: np.ndarray  # float32 [n]
    greedy: np.ndarray  # bool [n]: is no other token more probable in its place?
    num_context_tokens: int  # that were looked at; of a rolling score, of all windows
    num_computed_tokens: int  # that the model ran on: not those of the prefix cache, nor the last one, a target only
    num_truncated_tokens: int = 0  # of the context, dropped at its beginning

    @property
    def logprob(self) -> float:
        """The sum."""
        return float(self.logprobs.sum(dtype=np.float64))

    @property
    def is_greedy(self) -> bool:
        """Would greedy decoding have given just this continuation, or one as probable in each place?"""
        return bool(self.greedy.all())


def encode_pairs(
    pairs: Sequence[tuple[Any, Any]], encode: Encode, prefix_token: Callable[[], int], add_special_tokens: bool
) -> list[Pair]:
    """Token ids of pairs of texts, or of token ids; both of a pair are of one kind.

    The continuation's ids are those of `context + continuation` behind as many as `context` has alone; spaces at the
    end of the context go to the continuation first. An empty context is the prefix token. Raises RequestError.
    """
    checked = [_checked(pair) for pair in pairs]
    texts = [_move_spaces(*pair) for pair in checked if isinstance(pair[0], str) and pair[0]]
    contexts = list(dict.fromkeys(context for context, _ in texts))
    ids_of = dict(zip(contexts, encode(contexts, add_special_tokens))) if contexts else {}
    whole = iter(encode([a + b for a, b in texts], add_special_tokens) if texts else ())
    alone = [continuation for context, continuation in checked if context == ""]
    without_context = iter(encode(alone, False) if alone else ())
    found: list[Pair] = []
    for context, continuation in checked:
        if isinstance(context, str) and context:
            ids = ids_of[_move_spaces(context, continuation)[0]]
            pair: Pair = ids, next(whole)[len(ids) :]
        elif isinstance(context, str):
            pair = [], next(without_context)
        else:
            pair = context, continuation
        if not len(pair[1]):
            raise RequestError(f"the continuation {continuation!r} behind {context!r:.200} has no tokens")
        if not len(pair[0]):  # a text that begins with the prefix token itself has its context already
            first = prefix_token()
            rest = pair[1][1:] if pair[1][0] == first and len(pair[1]) > 1 else pair[1]
            pair = [first], rest
        found.append(pair)
    return found


def _checked(pair: Any) -> tuple[Any, Any]:
    if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
        raise RequestError(f"a pair is (context, continuation), not {pair!r:.200}")
    context, continuation = pair
    if isinstance(context, str) != isinstance(continuation, str):
        raise RequestError(f"context and continuation must both be texts or both token ids, not {pair!r:.200}")
    return context, continuation


def _move_spaces(context: str, continuation: str) -> tuple[str, str]:
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation


def score_pairs(
    generate: Callable[..., Sequence[RequestOutput]],
    pairs: Sequence[Pair],
    *,
    max_model_len: int,
    truncate: bool,
    use_tqdm: Any,
) -> list[Score]:
    """Scores in the order of the pairs; `generate` is LLM.generate.

    truncate: drops the first tokens of a context that is too long, else that is a RequestError; a continuation that
    leaves no room for one token before it always is.
    """
    kept = [fit(pair, max_model_len, truncate) for pair in pairs]
    order = by_context(kept)
    prompts, params = [[*kept[i][0], *kept[i][1]] for i in order], [score_params(kept[i]) for i in order]
    outputs = generate(prompts, params, use_tqdm=use_tqdm) if order else []
    dropped = [len(pair[0]) - len(short[0]) for pair, short in zip(pairs, kept)]
    found = {i: score_of(output, dropped[i]) for i, output in zip(order, outputs)}
    return [found[i] for i in range(len(pairs))]


def fit(pair: Pair, max_model_len: int, truncate: bool) -> Pair:
    """The pair within `max_model_len` tokens and one more, which is a target only and not computed.

    Raises RequestError for one that `score_pairs` would not take.
    """
    context, continuation = pair
    excess = len(context) + len(continuation) - 1 - max_model_len
    if len(continuation) > max_model_len or (excess > 0 and not truncate):
        raise RequestError(
            f"a context of {len(context)} and a continuation of {len(continuation)} tokens exceed "
            f"{max_model_len=} and a last one; truncate=True shortens contexts from the left, continuations must fit"
        )
    return context[max(0, excess) :], continuation


def score_params(pair: Pair) -> SamplingParams:
    """What the request for a pair, its prompt both after each other, asks for."""
    return SamplingParams(
        max_tokens=0, temperature=0, prompt_logprobs=0, prompt_logprobs_start=len(pair[0]), detokenize=False
    )


def by_context(pairs: Sequence[Pair]) -> list[int]:
    """The order in which pairs are computed: those of one context together, long ones first.

    The first of a context computes it for the others; what is short comes last and fills the last steps.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, (context, _) in enumerate(pairs):
        groups.setdefault(tuple(context), []).append(i)
    for group in groups.values():
        group.sort(key=lambda i: -len(pairs[i][1]))
    longest = sorted(groups.items(), key=lambda item: -len(item[0]) - len(pairs[item[1][0]][1]))
    return [i for _, group in longest for i in group]


def score_of(output: RequestOutput, dropped: int = 0) -> Score:
    """The score that a request for a pair brought. Raises the request's error."""
    if output.error is not None:
        raise output.error
    found = output.prompt_logprobs
    assert found is not None
    greedy = found.ranks == 1
    num_context = len(output.prompt_token_ids) - len(found.token_ids)
    computed = len(output.prompt_token_ids) - 1 - output.num_cached_tokens
    return Score(found.token_ids, found.logprobs, greedy, num_context, computed, dropped)


def rolling_windows(tokens: Sequence[int], prefix_token: int, size: int) -> Iterator[Pair]:
    """Pairs of at most `size` + 1 tokens whose continuations are `tokens` in order, each token once.

    As lm-evaluation-harness cuts them with a context of one token: the first window stands behind the prefix token,
    each other one behind the last token of the one before; the last window is as long as the others, so it looks
    back further.
    """
    for start in range(0, len(tokens), size):
        end = min(start + size, len(tokens))
        yield [prefix_token] if start == 0 else tokens[end - size - 1 : start], tokens[start:end]


def score_rolling(
    generate: Callable[..., Sequence[RequestOutput]],
    texts: Sequence[Sequence[int]],
    prefix_token: int,
    *,
    max_model_len: int,
    use_tqdm: Any,
) -> list[Score]:
    """Scores of whole texts, given as token ids, in windows; see `rolling_windows`."""
    windows = [list(rolling_windows(text, prefix_token, max_model_len)) for text in texts]
    pairs = [pair for own in windows for pair in own]
    scores = iter(score_pairs(generate, pairs, max_model_len=max_model_len, truncate=False, use_tqdm=use_tqdm))
    return [_join([next(scores) for _ in own]) for own in windows]


def _join(windows: Sequence[Score]) -> Score:
    """One score of a text's windows."""
    arrays = [(w.token_ids, w.logprobs, w.greedy) for w in windows]
    empty = np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros(0, bool)
    tokens, logprobs, greedy = map(np.concatenate, zip(empty, *arrays))
    context, computed = (sum(getattr(w, f"num_{name}_tokens") for w in windows) for name in ("context", "computed"))
    return Score(tokens, logprobs, greedy, context, computed)
