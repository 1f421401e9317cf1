"""The model "jaxengine" of lm-evaluation-harness; importing this registers it.

python -m jaxengine.evaluate.harness --model jaxengine --model_args model=my-model --tasks hellaswag
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxengine.errors import ConfigError, RequestError
from jaxengine.llm import LLM
from jaxengine.request import SamplingParams
from jaxengine.scoring import encode_pairs

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError as error:
    raise ImportError("lm-evaluation-harness is not installed: pip install 'jaxengine[eval]'") from error

MAX_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first one given holds
HARNESS_DEVICE = "cuda:0"  # the command line's default, which says nothing
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
            "seed", "stop_token_ids", "ignore_eos", "min_tokens", "bad_words", "skip_special_tokens")  # fmt: skip


@register_model("jaxengine")
class HarnessLM(LM):
    """Answers lm-evaluation-harness's requests with an LLM: all of a kind at once, scores with shared contexts.

    llm: one that is there already; otherwise LLM's arguments. max_gen_toks: tokens of an answer whose task sets no
    limit. add_special_tokens: texts get what the tokenizer puts before them, unless they begin with BOS already.
    batch_size: a number is max_num_seqs; "auto" (and the harness's own default, 1): the engine's choice.

    Raises ConfigError for arguments that have no meaning here.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        llm: LLM | None = None,
        max_gen_toks: int = 256,
        add_special_tokens: bool = True,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        **options: Any,
    ):
        super().__init__()
        if device not in (None, HARNESS_DEVICE) or max_batch_size is not None:
            raise ConfigError(
                f"{device=}, {max_batch_size=}: the device is JAX's (set JAX_PLATFORMS), and the engine makes its "
                "own batches (max_num_seqs, max_num_batched_tokens)"
            )
        if batch_size not in (None, "auto", 1, "1"):
            options = {"max_num_seqs": int(batch_size)} | options
        if llm is not None and (model is not None or options):
            raise ConfigError(f"llm= is a whole engine: model={model!r} and {sorted(options)} are for a new one")
        self.llm = LLM(model, **options) if llm is None else llm
        self.max_gen_toks, self.add_special_tokens = max_gen_toks, add_special_tokens

    # -- the three kinds of requests

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """requests: (context, continuation). Contexts that are too long lose their beginning."""
        pairs = [request.args for request in requests]
        # Chat templates put the BOS token into the text.
        begun = [self._begins_with_bos(context) for context, _ in pairs]
        plain = iter(self._encode([p for p, b in zip(pairs, begun) if not b], self.add_special_tokens))
        special = iter(self._encode([p for p, b in zip(pairs, begun) if b], False))
        ids = [next(special if b else plain) for b in begun]
        found = self.llm.loglikelihood(ids, truncate=True, use_tqdm=not disable_tqdm)
        return self._cached("loglikelihood", pairs, found)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """requests: (text,)."""
        texts = [self._ids(request.args[0]) for request in requests]
        found = self.llm.loglikelihood_rolling(texts, use_tqdm=not disable_tqdm)
        return self._cached("loglikelihood_rolling", [request.args for request in requests], found)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """requests: (context, generation arguments). Greedy unless these say do_sample or a temperature."""
        params = [self._params(request.args[1]) for request in requests]
        prompts = [self._prompt(request.args[0], p) for request, p in zip(requests, params)]
        outputs = self.llm.generate(prompts, params, use_tqdm=not disable_tqdm) if prompts else []
        for output in outputs:
            if output.error is not None:
                raise output.error
        texts = [output.outputs[0].text for output in outputs]
        return self._cached("generate_until", [request.args for request in requests], texts)

    def _cached(self, kind: str, keys: Sequence[Any], found: Sequence[Any]) -> list[Any]:
        for key, value in zip(keys, found, strict=True):
            self.cache_hook.add_partial(kind, key, value)
        return list(found)

    def _encode(self, pairs: Sequence[Any], add_special_tokens: bool) -> list[Any]:
        return encode_pairs(pairs, self.llm.encode, self.llm.prefix_token, add_special_tokens)  # type: ignore[arg-type]

    def _ids(self, text: str) -> list[int]:
        return self.llm.get_tokenizer().encode(text, self.add_special_tokens and not self._begins_with_bos(text))

    def _begins_with_bos(self, text: str) -> bool:
        bos = self.llm.get_tokenizer().special_tokens.get("bos_token")
        return bool(bos) and text.startswith(str(bos))

    def _prompt(self, context: str, params: SamplingParams) -> list[int]:
        """Its last tokens, where it leaves no room for the answer."""
        ids = self._ids(context)
        room = self.llm.max_model_len - (params.max_tokens or 0)
        if room < 1:
            raise RequestError(
                f"max_gen_toks={params.max_tokens} leaves no room for a context within "
                f"max_model_len={self.llm.max_model_len}"
            )
        return (ids or [self.llm.prefix_token()])[-room:]

    def _params(self, asked: Mapping[str, Any]) -> SamplingParams:
        asked = {name: value for name, value in asked.items() if value is not None}
        until = asked.pop("until", [])
        limits = [asked.pop(name) for name in MAX_TOKENS if name in asked]
        sampled = asked.pop("do_sample", asked.get("temperature", 0) > 0)
        if unknown := set(asked) - set(SAMPLING):
            raise RequestError(f"gen_kwargs has {sorted(unknown)}; jaxengine knows until, do_sample, max_gen_toks, and "
                               f"{', '.join(SAMPLING)}")  # fmt: skip
        if sampled and not asked.get("temperature", 1):
            raise RequestError(f"do_sample=True and temperature={asked['temperature']} contradict each other")
        asked["temperature"] = asked.get("temperature", 1.0) if sampled else 0.0
        stop = [text for text in ([until] if isinstance(until, str) else until) if text]
        return SamplingParams(stop=stop, max_tokens=int((limits or [self.max_gen_toks])[0]), **asked)

    # -- chats

    @property
    def tokenizer_name(self) -> str:
        """For the harness's caches of requests."""
        return str(self.llm.source["tokenizer"] or self.llm.source["model"]).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The model's template, by name or the default one; None when none is asked for. Raises RequestError."""
        if not chat_template:
            return None
        templates = self.llm.get_tokenizer().chat_templates
        name = chat_template if isinstance(chat_template, str) else "default"
        if name not in templates:
            raise RequestError(f"the model has no chat template {name!r}; it has {sorted(templates)}")
        return templates[name]

    def apply_chat_template(self, chat_history: Sequence[Any], add_generation_prompt: bool = True) -> str:
        """The conversation as text; without a generation prompt its last message is left open."""
        return self.llm.get_tokenizer().apply_chat_template(
            chat_history, add_generation_prompt=add_generation_prompt, continue_final_message=not add_generation_prompt
        )


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
