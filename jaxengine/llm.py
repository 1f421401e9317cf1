"""LLM: text in, text out. The one place that wires the parts together."""

import atexit
import os
import queue
import sys
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import closing
from itertools import chain, islice, repeat
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, Self, overload

from jaxengine.beam_search import BeamSearchOutput, beam_search
from jaxengine.config import EngineConfig, ModelConfig, ParamRule, engine_option_names
from jaxengine.engine.lockstep import Follower, Leader
from jaxengine.engine.loop import EngineLoop
from jaxengine.errors import ConfigError, EngineError, RequestError, UnsupportedError, WeightsDeletedError
from jaxengine.evaluate.batch import BatchSummary, run_batch
from jaxengine.frontend import Frontend, is_token_ids
from jaxengine.progress import progress_bar
from jaxengine.request import BeamSearchParams, RequestOutput, RequestOutputs, SamplingParams, WeightUpdate
from jaxengine.text_methods import TextMethods
from jaxengine.tokenizer import Tokenizer

SHIPPED_MODEL = Path(__file__).parent / "assets" / "stdlib-5m"
LAZY_REQUESTS = 2  # of an iterable of prompts, requests in the engine at a time, in units of all shards' max_num_seqs


class LLM(TextMethods):
    """A model that answers. Every method may be called from any thread, with or without a running event loop.

    >>> with LLM() as llm:
    ...     [output] = llm.generate("import", SamplingParams(temperature=0, max_tokens=4), use_tqdm=False)
    >>> output.outputs[0].finish_reason
    'length'
    """

    def __init__(
        self,
        model: Any = None,
        *,
        config: Any = None,
        param_mapping: Mapping[str, ParamRule] | None = None,
        tokenizer: str | os.PathLike | None = None,
        revision: str | None = None,
        load_format: str = "auto",
        download_dir: str | None = None,
        trust_remote_code: bool = False,
        hf_overrides: Mapping[str, Any] | None = None,
        generation_config: Literal["auto", "off"] = "auto",
        block_size: int | None = None,
        **options: Any,
    ):
        """Loads the model and plans the memory; programs are compiled when they are first needed, or by `warmup=True`.

        model: hub id, folder (HuggingFace or Orbax) or GGUF file; None: the small code model that ships with jaxengine.
        Or parameters in memory, see docs/trainer.md: an nnx.Module of ours, its state, or a tree of arrays by canonical
        or by transformers' names, any other with `param_mapping`, from patterns of dotted paths to ParamRule; they are
        borrowed where dtype, layout and sharding fit, unless fuse_weights=True. config: what they are of, as
        config.json's content or path, a transformers config, or a ModelConfig. An Orbax checkpoint takes both as well.
        tokenizer: hub id or folder of another tokenizer. load_format: auto, safetensors, gguf, orbax or dummy (seeded
        random weights). hf_overrides: replaces entries of the checkpoint's config. generation_config: "auto" takes
        sampling defaults and further end-of-sequence ids from the checkpoint, "off" does not. block_size: another name
        of page_size. options: the fields of EngineConfig.

        Raises ModelNotFoundError, CheckpointError, ConfigError, MemoryPlanError; UnsupportedError for what is not
        built.
        """
        if trust_remote_code:
            raise UnsupportedError(
                "trust_remote_code=True: a checkpoint's Python code would need torch, and run unchecked; only families "
                "with a converter of ours are served"
            )
        if generation_config not in ("auto", "off"):
            raise ConfigError(f"{generation_config=} must be 'auto' or 'off'")
        in_memory = model is not None and not isinstance(model, str | os.PathLike)
        if in_memory and config is None:
            raise ConfigError(
                f"model of type {type(model).__name__}: parameters in memory need config=, which says what they are "
                "of: config.json's content, a transformers config, or a ModelConfig"
            )
        if in_memory and (load_format != "auto" or revision is not None or hf_overrides):
            raise ConfigError("load_format=, revision= and hf_overrides= are of checkpoints, the model is in memory")
        if block_size is not None:
            options = {"page_size": block_size} | options
        if unknown := set(options) - set(engine_option_names()):
            raise ConfigError(f"LLM has no option {sorted(unknown)}; those of the engine are {engine_option_names()}")
        engine_config = EngineConfig(**options)
        named = SHIPPED_MODEL if model is None else model
        self.source = {  # what the weights are, for records of runs; without a name for parameters in memory
            "model": str(named) if isinstance(named, str | os.PathLike) else None, "revision": revision,
            "load_format": load_format, "tokenizer": None if tokenizer is None else str(tokenizer),
            "hf_overrides": dict(hf_overrides or {}), "generation_config": generation_config,
            "param_mapping": {name: str(rule) for name, rule in (param_mapping or {}).items()},
        }  # fmt: skip
        from jaxengine import assembly  # jax and the model: not before the options are known to be good

        parts = assembly.assemble(
            model=SHIPPED_MODEL if model is None else model, tokenizer=tokenizer, revision=revision,
            load_format=load_format, download_dir=download_dir, hf_overrides=hf_overrides,
            use_generation_config=generation_config == "auto", config=engine_config, model_config=config,
            param_mapping=param_mapping,
        )  # fmt: skip
        self.config: EngineConfig = parts.config
        self.model_config: ModelConfig = parts.model
        self.source["config"] = None if config is None else str(parts.model)
        self._tokenizer, self._sampling_defaults = parts.tokenizer, parts.sampling_defaults
        self.frontend: Frontend = parts.frontend
        self._runner, self._weights = parts.runner, parts.weights
        self._loop = parts.loop
        self._finalizer = weakref.finalize(self, self._loop.close)  # also when the interpreter ends
        # The others are told why; and jax waits for them in its own hook, which must come later.
        if isinstance(parts.runner, Leader) or isinstance(parts.loop, Follower):
            atexit.register(_close_at_exit, self._loop)

    # -- text

    @overload
    def generate(
        self, prompts: Any, sampling_params: Any = None, *, stream: Literal[False] = False,
        use_tqdm: bool | Callable[..., Any] = True, priority: int | Sequence[int] = 0,
    ) -> RequestOutputs: ...  # fmt: skip
    @overload
    def generate(
        self, prompts: Any, sampling_params: Any = None, *, stream: bool, use_tqdm: bool | Callable[..., Any] = True,
        priority: int | Sequence[int] = 0,
    ) -> Any: ...  # fmt: skip
    def generate(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        stream: bool = False,
        use_tqdm: bool | Callable[..., Any] = True,
        priority: int | Sequence[int] = 0,
    ) -> RequestOutputs | Iterator[RequestOutput]:
        """Continues prompts: one output for each, in their order.

        prompts: a text, a list of token ids, a dict (`prompt` or `prompt_token_ids`, and `cache_salt`: pages are shared
        only within a salt), or several of these. A list is checked as a whole before anything starts. Another iterable
        is pulled as requests finish; a prompt of it that cannot be served gives an output with `.error`.
        sampling_params: one for all or one each; None: the model's own defaults. priority: smaller goes first.
        stream: an iterator of outputs as they grow (see SamplingParams.output_kind), of all requests as they come;
        closing it ends them. use_tqdm: a progress bar, or a function that makes one.

        Raises RequestError for bad input, EngineError when the engine cannot go on, WeightsDeletedError when
        parameters that it borrowed are gone (update_weights brings others). A request on which the device
        failed ends with finish_reason "error" and the error in `.error`.
        """
        single = isinstance(prompts, str | Mapping) or (is_token_ids(prompts) and len(prompts) > 0)
        requests, total = self._requests([prompts] if single else prompts, sampling_params, priority)
        if stream:
            return self._updates(requests, total, every_step=True)
        return self._collect(requests, total, use_tqdm)

    def chat(
        self,
        messages: Sequence[Any],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[Any] | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        stream: bool = False,
        use_tqdm: bool | Callable[..., Any] = True,
        priority: int | Sequence[int] = 0,
    ) -> Any:
        """Answers a conversation (a list of {"role", "content"}) or several of them; otherwise like `generate`.

        tools, chat_template and chat_template_kwargs go to the model's chat template. continue_final_message: the last
        message is left open and continued. Raises RequestError, also for a model without a template.
        """
        conversations = messages if messages and not isinstance(messages[0], Mapping) else [messages]
        prompts = self.chat_prompts(
            conversations, tools=tools, chat_template=chat_template, chat_template_kwargs=chat_template_kwargs,
            add_generation_prompt=add_generation_prompt, continue_final_message=continue_final_message,
        )  # fmt: skip
        return self.generate(prompts, sampling_params, stream=stream, use_tqdm=use_tqdm, priority=priority)

    def chat_prompts(
        self,
        conversations: Sequence[Sequence[Any]],
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **how: Any,
    ) -> list[dict[str, Any]]:
        """The prompts that `chat` gives to `generate`: text from the template, and its token ids."""
        tokenizer = self.get_tokenizer()
        texts = [tokenizer.apply_chat_template(chat, **how, **(chat_template_kwargs or {})) for chat in conversations]
        ids = tokenizer.encode_batch(texts, add_special_tokens=False)
        return [{"prompt": text, "prompt_token_ids": row} for text, row in zip(texts, ids)]

    def beam_search(self, prompts: Any, params: BeamSearchParams, *, use_tqdm: bool = False) -> list[BeamSearchOutput]:
        """The best completions of each prompt, best first. Raises RequestError."""
        single = isinstance(prompts, str | Mapping) or (is_token_ids(prompts) and len(prompts) > 0)
        parsed = self.frontend.token_ids([prompts] if single else list(prompts))
        return beam_search(self.generate, self.frontend, parsed, params, use_tqdm)

    # -- batches

    def run_batch(self, source: Any, sink: Any, **options: Any) -> BatchSummary:
        """Answers a batch in OpenAI's format, line by line; started again it goes on where it was stopped.

        source: a JSONL, CSV or parquet file, or an iterable of lines ({"custom_id", "url", "body"}). sink: a JSONL
        file, or a function that takes each record. options: see jaxengine.evaluate.batch.run_batch.
        """
        return run_batch(self, source, sink, **options)

    # -- state

    def get_tokenizer(self) -> Tokenizer:
        """Raises RequestError for a model without one."""
        if self._tokenizer is None:
            raise RequestError("the model has no tokenizer: pass tokenizer=, or token ids")
        return self._tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What holds when no sampling parameters are given: the checkpoint's generation_config over our defaults."""
        return SamplingParams(**self._sampling_defaults)

    def get_metrics(self) -> dict[str, Any]:
        """Counts since the start and the present state, by the names that Prometheus will show."""
        metrics = self._loop.call(lambda engine: engine.metrics())
        return metrics | {"compilations_after_warmup": self._runner.compilations.after_warmup}

    def reset_prefix_cache(self) -> None:
        """Forgets what the prefix cache holds; running requests keep their pages."""
        self._loop.call(lambda engine: engine.reset_prefix_cache())

    def update_weights(
        self,
        params: Any,
        version: int | None = None,
        *,
        mode: Literal["wait", "restart", "continue"] = "wait",
        in_place: bool = False,
        param_mapping: Mapping[str, ParamRule] | None = None,
    ) -> WeightUpdate:
        """Serves other weights of the same model from the next step on, with the compiled programs that are there.

        params: parameters in memory as for the constructor (borrowed where they fit, unless fuse_weights=True), or a
        checkpoint's folder, file or hub id. version: names them in outputs and metrics; None: the next number.
        mode: requests in flight finish first on the old weights, while later ones are held back ("wait"); or they
        "restart" from their prompts; or they "continue": their tokens stay, keys and values are computed again. A
        request that has streamed tokens continues instead of restarting: the result says so, and `weight_versions` of
        its output. in_place: the old weights are given up first, so that there is never a second copy. param_mapping:
        as for the constructor, whose table holds when there is none.

        Everything is checked before anything is touched: CheckpointError names each parameter that does not fit, and
        the old weights go on serving, as they do after any failure without in_place. With it, a failure after the
        check ends the engine with an EngineError. MemoryPlanError when there is no room for both.
        """
        return self._weights.update(self._loop, params, version, mode, in_place, param_mapping)

    def sleep(self, level: int = 1) -> None:
        """Gives device memory back: the KV cache (level 1), or the KV cache and the weights (level 2).

        Compiled programs stay. Requests in flight keep their tokens and go on after `wake_up`; new ones, updates and a
        second sleep are refused with an EngineError. Borrowed weights are let go of, not deleted.
        """
        self._weights.sleep(self._loop, level)

    def wake_up(self, params: Any = None, version: int | None = None) -> None:
        """Makes the KV cache again, with as many pages as before; awake, it does nothing.

        params, version: after level 2, the weights to serve and their name, as for `update_weights`. Raises
        MemoryPlanError, and sleeps on, when the memory is not free yet; CheckpointError for weights that do not fit.
        """
        self._weights.wake_up(self._loop, params, version)

    def follow(self) -> None:
        """In each of several processes but the first: does what process 0 does with its LLM, until that is closed.

        Raises EngineError where there is nobody to follow, or when an error ended process 0. When a process is gone,
        the others exit with status 1. See docs/several_hosts.md.
        """
        if not isinstance(self._loop, Follower):
            raise EngineError("follow() is for processes other than the first, of several that share a mesh")
        self._loop.follow()

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding; the tokenizer may name fewer."""
        return self.model_config.vocab_size

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and output together."""
        return self.frontend.max_model_len

    def close(self) -> None:
        """Ends every request and gives the memory back; a second call does nothing."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._loop.close(_reason(error))
        self._finalizer.detach()

    # -- requests

    def _requests(self, prompts: Any, params: Any, priority: Any) -> tuple[Iterator[Any], int | None]:
        """Requests (or outputs, for prompts that cannot be served) and their number; None: not known yet."""
        self._loop.raise_if_ended()
        if not isinstance(prompts, Iterable):
            raise RequestError(f"prompts={prompts!r} must be a text, token ids, a dict, or an iterable of these")
        params = self.get_default_sampling_params() if params is None else params
        each = _each("sampling_params", params), _each("priority", priority)
        if not isinstance(prompts, Sequence) and not hasattr(prompts, "dtype"):
            return map(self._request_or_error, prompts, *each), None
        prompts = list(prompts)
        for name, values in (("sampling_params", params), ("priority", priority)):
            if isinstance(values, Sized) and len(values) != len(prompts):
                raise RequestError(f"{len(values)} {name} for {len(prompts)} prompts")
        requests = [self.frontend.request(*row) for row in zip(self.frontend.token_ids(prompts), *each)]
        for request in requests:
            self._loop.check(request)
        return iter(requests), len(requests)

    def _request_or_error(self, prompt: Any, params: SamplingParams, priority: int) -> Any:
        try:
            [parsed] = self.frontend.token_ids([prompt])
            request = self.frontend.request(parsed, params, priority)
            self._loop.check(request)
            return request
        except RequestError as error:
            return self.frontend.refused(prompt, error)

    def _updates(self, requests: Iterator[Any], total: int | None, every_step: bool) -> Generator[Any]:
        """Outputs of all requests as they come. Ends them when it is closed, or when the caller is interrupted."""
        inbox: queue.SimpleQueue = queue.SimpleQueue()
        limit = LAZY_REQUESTS * self._runner.shards * self._runner.buckets.max_num_seqs if total is None else total
        active, tell = set[str](), inbox.put
        try:
            while True:
                for request in islice(requests, limit - len(active)):
                    if isinstance(request, RequestOutput):
                        inbox.put(request)
                    else:
                        active.add(request.request_id)
                        self.start(request, tell, every_step)
                if not active and inbox.empty():
                    return
                output = inbox.get()
                if output.finished:
                    active.discard(output.request_id)
                if isinstance(output.error, EngineError):
                    self._loop.raise_if_ended()
                if isinstance(output.error, WeightsDeletedError):
                    raise output.error
                yield output
        finally:
            self.abort(active)

    def requests(self, prompts: Sequence[Any], params: Sequence[SamplingParams]) -> list[Any]:
        """What `start` takes, one for each prompt, all checked. Raises RequestError. For front ends of ours."""
        return list(self._requests(list(prompts), params, 0)[0])

    def raise_if_ended(self) -> None:
        """Raises EngineError when the engine was closed or cannot go on."""
        self._loop.raise_if_ended()

    def abort(self, request_ids: Iterable[str]) -> None:
        """Ends requests; each gets one more output, with finish_reason "abort". Unknown ids are passed over."""
        self._loop.abort(request_ids)

    def start(self, request: Any, tell: Callable[[RequestOutput], None], every_step: bool) -> None:
        """Hands a request to the engine; `tell` gets its outputs, in the engine's thread. For front ends of ours."""
        request.watched = every_step and request.params.output_kind != "final_only"
        self._loop.add(request, self.frontend.reporter(request, tell, self._loop))

    def _collect(
        self, requests: Iterator[Any], total: int | None, use_tqdm: bool | Callable[..., Any]
    ) -> RequestOutputs:
        """The last output of each request, in the order of the requests."""
        order: list[str] = []
        found: dict[str, RequestOutput] = {}

        def noted() -> Iterator[Any]:
            for request in requests:
                order.append(request.request_id)
                yield request

        # Closed at once when the bar raises: an exception's traceback would keep it, and its requests, alive.
        updates = closing(self._updates(noted(), total, every_step=False))
        with updates as outputs, progress_bar(use_tqdm, total) as show:
            for output in outputs:
                found[output.request_id] = output
                show(output)
        return RequestOutputs(found[request_id] for request_id in order)


def _reason(error: BaseException | None) -> str | None:
    return None if error is None else f"{type(error).__name__}: {error}"


def _close_at_exit(loop: EngineLoop | Follower) -> None:
    loop.close(_reason(getattr(sys, "last_exc", None)))  # what ended the program


def _each(name: str, value: Any) -> Iterator[Any]:
    """The value for one prompt after another: always the same, or those of an iterable."""
    if isinstance(value, SamplingParams | Integral):
        return repeat(value)
    if not isinstance(value, Iterable):
        raise RequestError(f"{name}={value!r} must be one for all prompts, or one for each")
    return chain(value, _too_few(name))


def _too_few(name: str) -> Iterator[Any]:
    raise RequestError(f"there are fewer {name} than prompts")
    yield


def _later(name: str, instead: str) -> Any:
    def method(self: LLM, *_: Any, **__: Any) -> Any:
        raise UnsupportedError(f"LLM.{name} is not built yet; {instead}")

    method.__doc__ = f"Not built yet: raises UnsupportedError. {instead[0].upper()}{instead[1:]}."
    return method


for _name, _instead in {
    "apply_model": "jaxengine.models.build makes the module from canonical parameters",
}.items():
    setattr(LLM, _name, _later(_name, _instead))
