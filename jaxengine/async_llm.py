"""LLM for asyncio: one engine in the background, many callers."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Self

import numpy as np

from jaxengine.errors import EngineError, WeightsDeletedError
from jaxengine.llm import LLM
from jaxengine.request import RequestOutput, SamplingParams, WeightUpdate
from jaxengine.reranking import RankedDocument
from jaxengine.scoring import Score
from jaxengine.tokenizer import Tokenizer


class AsyncLLM:
    """The same engine and options as LLM; `generate` and `chat` are asynchronous iterators, as many at once as needed.

    >>> async def answer():
    ...     async with AsyncLLM() as llm:
    ...         async for output in llm.generate("import", SamplingParams(temperature=0, max_tokens=4)):
    ...             pass
    ...     return output.finished
    >>> asyncio.run(answer())
    True
    """

    def __init__(self, model: Any = None, **options: Any):
        """See LLM."""
        self._llm = LLM(model, **options)

    async def generate(
        self,
        prompt: Any,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
    ) -> AsyncIterator[RequestOutput]:
        """Outputs of one request as they grow: cumulative, deltas or the final one (SamplingParams.output_kind).

        prompt: a text, a list of token ids or a dict, as for LLM.generate. Leaving the iteration early, or cancelling
        the task, ends the request. Raises RequestError for bad input, EngineError when the engine cannot go on,
        WeightsDeletedError when parameters that it borrowed are gone.
        """
        frontend = self._llm.frontend
        [parsed] = frontend.token_ids([prompt])
        params = self.get_default_sampling_params() if sampling_params is None else sampling_params
        request = frontend.request(parsed, params, priority, request_id)
        outputs: asyncio.Queue[RequestOutput] = asyncio.Queue()
        events = asyncio.get_running_loop()

        def tell(output: RequestOutput) -> None:
            with suppress(RuntimeError):  # the loop was closed, and nobody listens any more
                events.call_soon_threadsafe(outputs.put_nowait, output)

        self._llm.start(request, tell, every_step=True)
        finished = False
        try:
            while not finished:
                output = await outputs.get()
                finished = output.finished
                if isinstance(output.error, EngineError):
                    self._llm.raise_if_ended()
                if isinstance(output.error, WeightsDeletedError):
                    raise output.error
                yield output
        finally:
            if not finished:
                self._llm.abort([request.request_id])

    async def chat(
        self,
        messages: Sequence[Any],
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        tools: Sequence[Any] | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        priority: int = 0,
    ) -> AsyncIterator[RequestOutput]:
        """Answers one conversation; otherwise like `generate`, and with LLM.chat's arguments."""
        [prompt] = self._llm.chat_prompts(
            [messages], tools=tools, chat_template=chat_template, chat_template_kwargs=chat_template_kwargs,
            add_generation_prompt=add_generation_prompt, continue_final_message=continue_final_message,
        )  # fmt: skip
        async for output in self.generate(prompt, sampling_params, request_id, priority=priority):
            yield output

    def encode(self, text: str | Sequence[str], add_special_tokens: bool = True) -> list[int] | list[list[int]]:
        """Token ids of a text, or of each text."""
        return self._llm.encode(text, add_special_tokens)

    def get_tokenizer(self) -> Tokenizer:
        """Raises RequestError for a model without one."""
        return self._llm.get_tokenizer()

    def get_default_sampling_params(self) -> SamplingParams:
        """What holds when no sampling parameters are given."""
        return self._llm.get_default_sampling_params()

    async def get_metrics(self) -> dict[str, Any]:
        """See LLM.get_metrics."""
        return await asyncio.to_thread(self._llm.get_metrics)

    async def reset_prefix_cache(self) -> None:
        """See LLM.reset_prefix_cache."""
        await asyncio.to_thread(self._llm.reset_prefix_cache)

    async def update_weights(self, params: Any, version: int | None = None, **how: Any) -> WeightUpdate:
        """See LLM.update_weights; requests are served meanwhile."""
        return await asyncio.to_thread(self._llm.update_weights, params, version, **how)

    async def sleep(self, level: int = 1) -> None:
        """See LLM.sleep."""
        await asyncio.to_thread(self._llm.sleep, level)

    async def wake_up(self, params: Any = None, version: int | None = None) -> None:
        """See LLM.wake_up."""
        await asyncio.to_thread(self._llm.wake_up, params, version)

    async def score(self, pairs: Sequence[tuple[Any, Any]], **how: Any) -> list[Score]:
        """See LLM.score. Cancelled, it runs to its end all the same, unheard; so do the methods below."""
        return await asyncio.to_thread(self._llm.score, pairs, **{"use_tqdm": False, **how})

    async def score_rolling(self, texts: Sequence[Any], **how: Any) -> list[Score]:
        """See LLM.score_rolling."""
        return await asyncio.to_thread(self._llm.score_rolling, texts, **{"use_tqdm": False, **how})

    async def embed(self, prompts: Any, **how: Any) -> np.ndarray:
        """See LLM.embed."""
        return await asyncio.to_thread(self._llm.embed, prompts, **{"use_tqdm": False, **how})

    async def rerank(self, query: str, documents: Sequence[str], **how: Any) -> list[RankedDocument]:
        """See LLM.rerank."""
        return await asyncio.to_thread(self._llm.rerank, query, documents, **{"use_tqdm": False, **how})

    async def logprobs(self, token_ids: Any) -> list[Any]:
        """See LLM.logprobs."""
        return await asyncio.to_thread(self._llm.logprobs, token_ids)

    def abort(self, request_id: str) -> None:
        """Ends a request; its iterator gives one more output, with finish_reason "abort"."""
        self._llm.abort([request_id])

    async def close(self) -> None:
        """Ends every request and gives the memory back; a second call does nothing."""
        await asyncio.to_thread(self._llm.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: Any) -> None:
        await asyncio.to_thread(self._llm.__exit__, *error)
