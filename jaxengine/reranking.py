"""Reranking: a decoder model is asked whether a document answers a query, and yes is weighed against no."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxengine.errors import RequestError
from jaxengine.scoring import Score

TEMPLATE = "Query: {query}\nDocument: {document}\nQuestion: Does the document answer the query, yes or no?\nAnswer:"
ANSWERS = (" yes", " no")


@dataclass(frozen=True)
class RankedDocument:
    """A document's place among the others; index: in the list that was given."""

    index: int
    document: str
    relevance: float  # probability of the first answer, of both together


def rerank(
    score: Callable[[Sequence[tuple[str, str]]], Sequence[Score]],
    query: str,
    documents: Sequence[str],
    template: str,
    answers: tuple[str, str],
    top_n: int | None,
) -> list[RankedDocument]:
    """The documents, most relevant first; `score` is LLM.score. Raises RequestError."""
    documents = documents if isinstance(documents, str) else list(documents)
    if isinstance(documents, str) or not all(isinstance(text, str) for text in (query, *documents)):
        raise RequestError(f"query={query!r:.100} must be a text, and documents={documents!r:.100} a list of texts")
    if top_n is not None and (not isinstance(top_n, int) or top_n < 1):
        raise RequestError(f"{top_n=} must be an integer, 1 or more")
    if not isinstance(template, str):
        raise RequestError(f"{template=} must be a text")
    if missing := [name for name in ("{query}", "{document}") if name not in template]:
        raise RequestError(f"{template=} has no {missing[0]}")
    if len(answers) != 2 or answers[0] == answers[1]:
        raise RequestError(f"{answers=} must be two texts: the answer that says yes, the one that says no")
    before, after = template.split("{document}", 1)
    before, after = before.replace("{query}", query), after.replace("{query}", query)
    scores = iter(score([(before + text + after, answer) for text in documents for answer in answers]))
    ranked = []
    for i, text in enumerate(documents):
        margin = next(scores).logprob - next(scores).logprob
        ranked.append(RankedDocument(i, text, 1 / (1 + math.exp(-margin)) if margin > -700 else 0.0))
    return sorted(ranked, key=lambda it: -it.relevance)[:top_n]
