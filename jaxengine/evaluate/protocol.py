"""OpenAI's bodies: what one asks for as requests, and what became of them as its response.

Fields beyond OpenAI's are named as in SamplingParams. A field that would do nothing here is refused; null is as good as
absent. `/v1/score` has the fields of vLLM's, for log-likelihoods: see `_score`.
"""

import time
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

from jaxengine.embedding import Embedding
from jaxengine.errors import RequestError, UnsupportedError
from jaxengine.request import Logprobs, RequestOutput, SamplingParams
from jaxengine.scoring import encode_pairs, fit, score_of, score_params

SAMPLING = (
    "n", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "seed", "stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "max_tokens", "min_tokens",
    "logit_bias", "allowed_token_ids", "bad_words", "skip_special_tokens", "spaces_between_special_tokens", "timeout",
)  # fmt: skip
TEMPLATE = ("chat_template", "chat_template_kwargs", "add_generation_prompt", "continue_final_message")
LABELS = ("model", "user", "metadata", "store", "service_tier")  # these change no answer, at OpenAI neither
# What has a meaning elsewhere, and is not built: field -> the value that asks for nothing, and what to do instead.
UNSUPPORTED: Mapping[str, tuple[Any, str]] = {
    "stream": (False, "a batch has no streams: leave it out"),
    "stream_options": (None, "a batch has no streams: leave it out"),
    "best_of": (1, "ask for n completions with logprobs and choose"),
    "suffix": ("", "put it into the prompt, as the model expects it"),
    "tools": ([], "answers are not parsed for tool calls: describe the tools in a message"),
    "tool_choice": ("none", "answers are not parsed for tool calls"),
    "functions": ([], "answers are not parsed for calls"),
    "function_call": ("none", "answers are not parsed for calls"),
    "response_format": ({"type": "text"}, "allowed_token_ids and logit_bias restrict single tokens"),
    "modalities": (["text"], "only text is made"),
    "audio": (None, "only text is made"),
    "truncate_prompt_tokens": (None, "shorten the prompt, or give token ids"),
}
NEVER = -9999.0  # JSON has no -inf; OpenAI's word for it


@dataclass(frozen=True)
class Job:
    """Requests that answer one body together; `respond` takes their outputs, in order, and gives the response's body.

    It raises the error of a request that failed.
    """

    prompts: Sequence[Any]
    params: Sequence[SamplingParams]
    respond: Callable[[Sequence[RequestOutput]], dict[str, Any]]


@dataclass(frozen=True)
class Server:
    """Whom the bodies are for."""

    llm: Any  # an LLM
    names: Sequence[str]  # the `model` that a body may ask for; the first one is answered when it asks for none
    defaults: Mapping[str, Any]  # sampling fields that hold where a body says nothing

    def params(self, body: Mapping[str, Any], key: str, **more: Any) -> SamplingParams:
        """A body's sampling parameters. Without a seed, one of `key`: order and company do not change what is drawn."""
        asked = {name: body[name] for name in SAMPLING if body.get(name) is not None}
        params = replace(self.llm.get_default_sampling_params(), **{**more, **self.defaults, **asked})
        if params.seed is not None:
            return params
        digest = blake2b(_bytes(f"{self.llm.config.seed} {key}"), digest_size=8).digest()
        return replace(params, seed=int.from_bytes(digest, "little"))


def job(server: Server, url: str, body: Any, key: str) -> Job:
    """What a body asks for. `key` names it: the response's id and, where none is given, the seed come from it.

    Raises RequestError naming the field that cannot be served, UnsupportedError for what is not built.
    """
    if url not in ROUTES:
        raise UnsupportedError(f"url={url!r} is not among {sorted(ROUTES)}")
    read, known = ROUTES[url]
    if not isinstance(body, Mapping):
        raise RequestError(f"body={body!r:.200} must be an object")
    body = {name: value for name, value in body.items() if value is not None}
    for name in body.keys() & UNSUPPORTED.keys():
        nothing, instead = UNSUPPORTED[name]
        if body[name] != nothing:
            raise UnsupportedError(f"{name}={body[name]!r:.200} is not supported; {instead}")
    if unknown := body.keys() - UNSUPPORTED.keys() - set(known) - set(LABELS):
        raise RequestError(f"{url} has no field {sorted(unknown)}; it has {sorted((*known, *LABELS))}")
    if body.get("model", server.names[0]) not in server.names:
        raise RequestError(
            f"model={body['model']!r} is not served; {sorted(set(server.names))} are names of the one that is"
        )
    return read(server, body, key)


def _head(server: Server, body: Mapping[str, Any], key: str, kind: str) -> dict[str, Any]:
    model = body.get("model", server.names[0])
    return {"id": response_id(key), "object": kind, "created": int(time.time()), "model": model}


def response_id(key: str) -> str:
    """The same for the same key, in every run."""
    return f"batch_req_{blake2b(_bytes(key), digest_size=12).hexdigest()}"


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _flag(body: Mapping[str, Any], name: str, default: bool) -> bool:
    if not isinstance(value := body.get(name, default), bool):
        raise RequestError(f"{name}={value!r} must be true or false")
    return value


def _usage(outputs: Sequence[RequestOutput]) -> dict[str, int]:
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    completion = sum(len(c.token_ids) for output in outputs for c in output.outputs)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _checked(outputs: Sequence[RequestOutput]) -> Sequence[RequestOutput]:
    for output in outputs:
        if output.error is not None:
            raise output.error
    return outputs


# -- completions


def _completion(server: Server, body: Mapping[str, Any], key: str) -> Job:
    """`prompt`: a text, token ids, or a list of these. `echo` with `logprobs`: also those of the prompt; then
    `max_tokens` may be 0. `choices` come prompt by prompt, n each."""
    prompt = body.get("prompt")
    if not isinstance(prompt, str | list) or prompt == []:
        raise RequestError(f"prompt={prompt!r:.200} must be a text, a list of token ids, or a list of these")
    single = isinstance(prompt, str) or isinstance(prompt[0], int)
    prompts = server.llm.frontend.token_ids([prompt] if single else prompt)
    echo, wanted = _flag(body, "echo", False), body.get("logprobs")
    as_ids = _flag(body, "return_tokens_as_token_ids", False)
    draws = body.get("max_tokens") != 0
    if not draws and not (echo and wanted is not None):
        raise RequestError("max_tokens=0 needs echo=true and logprobs: there would be nothing to answer")
    if wanted == -1:
        raise RequestError("logprobs=-1, the whole vocabulary, is for LLM.generate; give a number of tokens")
    asked = {"logprobs": wanted if draws else None, "prompt_logprobs": wanted if echo else None}
    several = len(prompts) > 1
    params = [server.params(body, f"{key} {i}" if several else key, **asked) for i in range(len(prompts))]

    def respond(outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        name = _token_name(server, as_ids)
        choices: list[dict[str, Any]] = []
        for output in _checked(outputs):
            start = "" if not echo else output.prompt
            if start is None:
                start = server.llm.get_tokenizer().decode(output.prompt_token_ids, skip_special_tokens=False)
            for completion in output.outputs:
                logprobs = None
                if wanted is not None:
                    parts = [output.prompt_logprobs] if echo else []
                    parts += [completion.logprobs] if draws else []
                    first = [output.prompt_token_ids[0]] if echo else []
                    logprobs = _completion_logprobs(first, parts, name)
                choices.append(
                    {"index": len(choices), "text": start + completion.text, "logprobs": logprobs,
                     "finish_reason": completion.finish_reason, "stop_reason": completion.stop_reason}
                )  # fmt: skip
        return _head(server, body, key, "text_completion") | {"choices": choices, "usage": _usage(outputs)}

    return Job(prompts, params, respond)


def _token_name(server: Server, as_ids: bool) -> Callable[[int], str]:
    return (lambda token: f"token_id:{token}") if as_ids else server.llm.get_tokenizer().token_text


def _completion_logprobs(first: Sequence[int], parts: Sequence[Any], name: Callable[[int], str]) -> dict[str, Any]:
    """first: a prompt's first token, which has no log-probability."""
    tokens: list[str] = [name(token) for token in first]
    values: list[float | None] = [None] * len(first)
    tops: list[dict[str, float] | None] = [None] * len(first)
    for part in parts:
        for token, row in zip(part.token_ids.tolist(), part[part.skipped :], strict=True):
            top: dict[str, float] = {}
            for other, entry in row.items():  # two tokens may have one text: the more probable one is shown
                text = name(other)
                top[text] = max(top.get(text, NEVER), entry.logprob)
            tokens.append(name(token))
            values.append(max(row[token].logprob, NEVER))
            tops.append(top)
    offsets, end = [], 0
    for token in tokens:
        offsets.append(end)
        end += len(token)
    return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}


# -- chat


def _chat(server: Server, body: Mapping[str, Any], key: str) -> Job:
    """`logprobs`: true or false; `top_logprobs`: how many others of each. Without `max_tokens` an answer may fill
    max_model_len."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(m, Mapping) for m in messages):
        raise RequestError(f"messages={messages!r:.200} must be a list of messages, one at least")
    template = {name: body[name] for name in TEMPLATE if name in body}
    prompts = server.llm.chat_prompts([[_text_message(m) for m in messages]], **template)
    wanted, top = _flag(body, "logprobs", False), body.get("top_logprobs", 0)
    if top and not wanted:
        raise RequestError(f"top_logprobs={top!r} needs logprobs=true")
    if top == -1:
        raise RequestError("top_logprobs=-1, the whole vocabulary, is for LLM.generate; give a number of tokens")
    if "max_completion_tokens" in body:
        if "max_tokens" in body:
            raise RequestError("max_tokens and max_completion_tokens are two names of one limit: give one of them")
        body = body | {"max_tokens": body["max_completion_tokens"]}  # type: ignore[operator]
    more = {"logprobs": top if wanted else None, "max_tokens": None}
    as_ids = _flag(body, "return_tokens_as_token_ids", False)

    def respond(outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        [output] = _checked(outputs)
        choices = [
            {"index": completion.index,
             "message": {"role": "assistant", "content": completion.text, "refusal": None},
             "logprobs": _chat_logprobs(completion.logprobs, _token_name(server, as_ids)) if wanted else None,
             "finish_reason": completion.finish_reason, "stop_reason": completion.stop_reason}
            for completion in output.outputs
        ]  # fmt: skip
        return _head(server, body, key, "chat.completion") | {"choices": choices, "usage": _usage(outputs)}

    return Job(prompts, [server.params(body, key, **more)], respond)


def _text_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message with the parts of its content joined. Raises UnsupportedError for parts that are not text."""
    content = message.get("content")
    if not isinstance(content, list):
        return dict(message)
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise UnsupportedError(f"the part {part!r:.200} of a message is not text, and only text is served")
    return {**message, "content": "\n".join(part["text"] for part in content)}


def _chat_logprobs(found: Logprobs | None, name: Callable[[int], str]) -> dict[str, Any]:
    assert found is not None

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = name(token)
        return {"token": text, "logprob": max(logprob, NEVER), "bytes": list(text.encode())}

    own = zip(found.token_ids.tolist(), found.logprobs.tolist(), strict=True)
    tops = zip(found.top_token_ids.tolist(), found.top_logprobs.tolist(), strict=True)
    content = [entry(*it) | {"top_logprobs": list(map(entry, *best))} for it, best in zip(own, tops, strict=True)]
    return {"content": content, "refusal": None}


# -- scores


def _score(server: Server, body: Mapping[str, Any], key: str) -> Job:
    """Log-likelihood of `text_2` behind the context `text_1`, as LLM.score: both a text, or lists of equal length, or
    one `text_1` for all of `text_2`. `truncate`: a long context loses its first tokens."""
    first, second = (body.get(name) for name in ("text_1", "text_2"))
    contexts, endings = ([side] if isinstance(side, str) else side for side in (first, second))
    for name, side in (("text_1", contexts), ("text_2", endings)):
        if not isinstance(side, list) or not side or not all(isinstance(text, str) for text in side):
            raise RequestError(f"{name}={body.get(name)!r:.200} must be a text or a list of texts")
    assert isinstance(contexts, list) and isinstance(endings, list)
    if len(contexts) not in (1, len(endings)):
        raise RequestError(f"{len(contexts)} texts in text_1 for {len(endings)} in text_2; give one, or as many")
    contexts = contexts * len(endings) if len(contexts) == 1 else contexts
    special, truncate = _flag(body, "add_special_tokens", True), _flag(body, "truncate", False)
    llm = server.llm
    pairs = encode_pairs(list(zip(contexts, endings)), llm.encode, llm.prefix_token, special)
    kept = [fit(pair, llm.max_model_len, truncate) for pair in pairs]

    def respond(outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        scores = [score_of(output) for output in outputs]
        data = [
            {"index": i, "object": "score", "score": score.logprob, "is_greedy": score.is_greedy,
             "token_ids": score.token_ids.tolist(), "token_logprobs": [max(x, NEVER) for x in score.logprobs.tolist()]}
            for i, score in enumerate(scores)
        ]  # fmt: skip
        return _head(server, body, key, "list") | {"data": data, "usage": _usage(outputs)}

    return Job([[*a, *b] for a, b in kept], [score_params(pair) for pair in kept], respond)


# -- embeddings


def _embeddings(server: Server, body: Mapping[str, Any], key: str) -> Job:
    """`input`: a text, token ids, or a list of these. `pooling`, `normalize`, `dimensions`, `add_special_tokens` and
    `truncate` as LLM.embed has them; `encoding_format`: float, or base64 of float32, little-endian."""
    given, llm = body.get("input"), server.llm
    if not isinstance(given, str | list) or not len(given):
        raise RequestError(f"input={given!r:.200} must be a text, a list of token ids, or a list of these")
    inputs = [given] if isinstance(given, str) or isinstance(given[0], int) else given
    special, truncate = _flag(body, "add_special_tokens", True), _flag(body, "truncate", False)
    encoding = body.get("encoding_format", "float")
    if encoding not in ("float", "base64"):
        raise RequestError(f"encoding_format={encoding!r} must be 'float' or 'base64'")
    how = Embedding(
        llm.model_config.hidden_size, body.get("pooling", "last"), body.get("normalize", True), body.get("dimensions")
    )
    parsed = llm.frontend.token_ids([llm.encode(text, special) if isinstance(text, str) else text for text in inputs])
    rows = [how.request(row["prompt_token_ids"], llm.max_model_len, truncate) for row in parsed]

    def respond(outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        data = []
        for i, output in enumerate(outputs):
            vector = how.vector(output)
            shown = vector.tolist() if encoding == "float" else b64encode(vector.astype("<f4").tobytes()).decode()
            data.append({"object": "embedding", "index": i, "embedding": shown})
        count = sum(len(prompt) - 1 for prompt, _ in rows)
        usage = {"prompt_tokens": count, "total_tokens": count}
        return _head(server, body, key, "list") | {"data": data, "usage": usage}

    return Job([prompt for prompt, _ in rows], [params for _, params in rows], respond)


ROUTES: Mapping[str, tuple[Callable[[Server, Mapping[str, Any], str], Job], Sequence[str]]] = {
    "/v1/completions": (_completion, (*SAMPLING, "prompt", "echo", "logprobs", "return_tokens_as_token_ids")),
    "/v1/chat/completions": (
        _chat,
        (*SAMPLING, *TEMPLATE, "messages", "logprobs", "top_logprobs", "max_completion_tokens",
         "return_tokens_as_token_ids"),
    ),
    "/v1/embeddings": (
        _embeddings,
        ("input", "encoding_format", "dimensions", "pooling", "normalize", "add_special_tokens", "truncate"),
    ),
    "/v1/score": (_score, ("text_1", "text_2", "add_special_tokens", "truncate")),
}  # fmt: skip
