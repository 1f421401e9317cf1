"""What LLM says of given text: scores, log-probabilities, embeddings, rankings. All of it goes through `generate`."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxengine.config import ModelConfig
from jaxengine.embedding import Embedding, as_list
from jaxengine.errors import RequestError
from jaxengine.request import Pooling, SamplingParams
from jaxengine.reranking import ANSWERS, TEMPLATE, RankedDocument, rerank
from jaxengine.scoring import Score, encode_pairs, score_pairs, score_rolling
from jaxengine.tokenizer import Tokenizer


class TextMethods(ABC):
    """The part of LLM that draws nothing."""

    model_config: ModelConfig

    @abstractmethod
    def generate(self, prompts: Any, sampling_params: Any = None, *, use_tqdm: Any = True) -> Any: ...

    @abstractmethod
    def get_tokenizer(self) -> Tokenizer: ...

    @property
    @abstractmethod
    def max_model_len(self) -> int: ...

    def score(
        self,
        pairs: Sequence[tuple[Any, Any]],
        *,
        add_special_tokens: bool = True,
        truncate: bool = False,
        use_tqdm: bool | Callable[..., Any] = True,
    ) -> list[Score]:
        """How probable each continuation is behind its context: one Score for each pair, in their order.

        pairs: (context, continuation), two texts or two lists of token ids. Pairs of one context are computed together
        and share it through the prefix cache. Tokens are cut as in lm-evaluation-harness: the context's trailing spaces
        belong to the continuation, and an empty context is the BOS token (EOS, where there is none).
        add_special_tokens: the context gets what the tokenizer puts before a text. truncate: a context too long for
        max_model_len (the last token, a target only, does not count) loses its first tokens; otherwise it raises.

        Raises RequestError for bad input, EngineError when the device fails.

        >>> from jaxengine import LLM
        >>> with LLM() as llm:
        ...     scores = llm.score([("import os", "\\nimport sys"), ("import os", "\\n)))")], use_tqdm=False)
        >>> scores[0].logprob > scores[1].logprob
        True
        """
        ids = encode_pairs(list(pairs), self.encode, self.prefix_token, add_special_tokens)  # type: ignore[arg-type]
        return score_pairs(
            self.generate, ids, max_model_len=self.max_model_len, truncate=truncate, use_tqdm=use_tqdm
        )  # fmt: skip

    def loglikelihood(self, pairs: Sequence[tuple[Any, Any]], **how: Any) -> list[tuple[float, bool]]:
        """`score`, as lm-evaluation-harness has it: (sum of log-probabilities, is it what greedy decoding gives)."""
        return [(score.logprob, score.is_greedy) for score in self.score(pairs, **how)]

    def score_rolling(self, texts: Sequence[Any], *, use_tqdm: bool | Callable[..., Any] = True) -> list[Score]:
        """How probable whole texts are (texts, or lists of token ids): one Score of all tokens of each.

        The first token stands behind BOS (EOS, where there is none), which is not scored. A text longer than
        max_model_len comes in windows, as in lm-evaluation-harness with a context of one token. Raises like `score`.
        """
        ids = [self.get_tokenizer().encode(text, False) if isinstance(text, str) else list(text) for text in texts]
        return score_rolling(
            self.generate, ids, self.prefix_token(), max_model_len=self.max_model_len, use_tqdm=use_tqdm
        )  # fmt: skip

    def loglikelihood_rolling(self, texts: Sequence[Any], **how: Any) -> list[float]:
        """The sums of `score_rolling`."""
        return [score.logprob for score in self.score_rolling(texts, **how)]

    def logprobs(self, token_ids: Any, *, use_tqdm: bool = False) -> list[Any]:
        """Teacher-forced: what the model gives each token of these sequences but the first, all those before it given.

        token_ids: several lists of token ids. Answers float32 [len - 1] for each. They run as one batch among whatever
        else is served, and each is of one weight version. Raises RequestError, EngineError.

        >>> from jaxengine import LLM
        >>> with LLM() as llm:
        ...     [found] = llm.logprobs([llm.encode("import os")])
        >>> len(found) == len(llm.encode("import os")) - 1 and bool((found < 0).all())
        True
        """
        params = SamplingParams(max_tokens=0, prompt_logprobs=0, detokenize=False)
        outputs = self.generate([{"prompt_token_ids": ids} for ids in token_ids], params, use_tqdm=use_tqdm)
        for output in outputs:
            if output.error is not None:
                raise output.error
        return [output.prompt_logprobs.logprobs for output in outputs if output.prompt_logprobs is not None]

    def embed(
        self,
        prompts: Any,
        *,
        pooling: Pooling = "last",
        normalize: bool = True,
        dimensions: int | None = None,
        add_special_tokens: bool = True,
        truncate: bool = False,
        use_tqdm: bool | Callable[..., Any] = True,
    ) -> np.ndarray:
        """Hidden states behind the model's last norm, pooled: float32 [len(prompts), dimensions], one row for a single
        text, or the token ids of one.

        prompts: a text, a list of token ids, or several of these. pooling: the state of the "last" token, the "mean" of
        all, or that of the first ("cls"). dimensions: the first ones alone, as Matryoshka models are made for; None:
        all. normalize: to length 1, after that. truncate: a text longer than max_model_len loses its last tokens;
        otherwise it raises. Raises RequestError, EngineError.

        >>> from jaxengine import LLM
        >>> with LLM() as llm:
        ...     vectors = llm.embed(["import os", "class A:"], pooling="mean", use_tqdm=False)
        >>> vectors.shape
        (2, 256)
        """
        how = Embedding(self.model_config.hidden_size, pooling, normalize, dimensions)
        prompts = as_list(prompts)
        ids = [self.encode(text, add_special_tokens) if isinstance(text, str) else text for text in prompts]
        rows = [how.request(row, self.max_model_len, truncate) for row in ids]  # type: ignore[arg-type]
        outputs = self.generate([ids for ids, _ in rows], [params for _, params in rows], use_tqdm=use_tqdm)
        size = dimensions or self.model_config.hidden_size
        return np.array([how.vector(output) for output in outputs], np.float32).reshape(len(rows), size)

    def rerank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        template: str = TEMPLATE,
        answers: tuple[str, str] = ANSWERS,
        top_n: int | None = None,
        **how: Any,
    ) -> list[RankedDocument]:
        """The documents by how probably the model says that they answer the query, most relevant first.

        template: the question, with {query} and {document} in it, as the model was trained to be asked; answers: the
        texts behind it that say yes and no. The relevance is P(yes) / (P(yes) + P(no)). top_n: only so many. how: goes
        to `score`; its truncate=True cuts the template's beginning off. Raises like `score`.
        """
        return rerank(lambda pairs: self.score(pairs, **how), query, documents, template, answers, top_n)

    def prefix_token(self) -> int:
        """What stands before a text that has nothing before it: BOS, or EOS. Raises RequestError when there is none."""
        tokenizer = self.get_tokenizer()
        for name in ("bos_token", "eos_token"):
            text = tokenizer.special_tokens.get(name)
            if text is not None and (token := tokenizer.token_id(text)) is not None:
                return token
        raise RequestError("an empty context needs a BOS or EOS token, and the tokenizer names none: give a context")

    def encode(self, text: str | Sequence[str], add_special_tokens: bool = True) -> list[int] | list[list[int]]:
        """Token ids of a text, or of each text. Raises RequestError for half of a surrogate pair."""
        tokenizer = self.get_tokenizer()
        try:
            if isinstance(text, str):
                return tokenizer.encode(text, add_special_tokens)
            return tokenizer.encode_batch(text, add_special_tokens)
        except TypeError as error:  # the tokenizer's word for it
            raise RequestError(f"{text!r:.200} is not valid Unicode text") from error
