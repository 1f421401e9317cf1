"""One engine's share of a batch: a line becomes requests, and what became of these its record."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from jaxengine.errors import EngineError, JaxEngineError, RequestError, UnsupportedError
from jaxengine.evaluate.journal import Record, id_key, line_key
from jaxengine.evaluate.manifest import manifest
from jaxengine.evaluate.protocol import Job, Server, job, response_id
from jaxengine.progress import count_tokens
from jaxengine.request import RequestOutput

LINE_FIELDS = {"custom_id", "method", "url", "body"}
CODES = {RequestError: "invalid_request", UnsupportedError: "unsupported", EngineError: "engine_error"}


@dataclass(frozen=True)
class Line:
    """number: from 1 on."""

    number: int
    custom_id: str
    content: Mapping[str, Any]


@dataclass(frozen=True)
class Answer:
    """The record of a line, and how many tokens went into it."""

    record: Record
    prompt_tokens: int = 0
    output_tokens: int = 0


@dataclass(eq=False)
class Started:
    """A line whose requests run."""

    line: Line
    job: Job
    requests: Sequence[Any]
    outputs: dict[int, RequestOutput] = field(default_factory=dict)

    @property
    def ended(self) -> bool:
        return len(self.outputs) == len(self.requests)


class Answering:
    """An LLM that answers lines. made_by: the manifest of its answers. ahead: so many requests keep it busy.

    Raises RequestError for bad `defaults`.
    """

    def __init__(self, llm: Any, defaults: Mapping[str, Any], served_names: Sequence[str]):
        given = Path(llm.source["model"] or "parameters")
        self.llm = llm
        self.server = Server(llm, served_names or [given.name, str(given)], dict(defaults))
        self.made_by = manifest(self.server, served_names)
        self.ahead: int = 2 * llm.config.data_parallel_size * llm.config.max_num_seqs

    def start(self, line: Line, tell: Callable[[Started, RequestOutput], None]) -> Started | Answer:
        """Hands a line's requests to the engine; `tell` gets the end of each, in the engine's thread.

        A line that cannot be served is answered at once. Raises EngineError when the engine has ended.
        """
        try:
            content = line.content
            if unknown := set(content) - LINE_FIELDS:
                raise RequestError(f"a line has no field {sorted(unknown)}; it has {sorted(LINE_FIELDS)}")
            if content.get("method", "POST") != "POST":
                raise RequestError(f"method={content['method']!r} must be 'POST'")
            asked = job(self.server, content.get("url", ""), content.get("body"), id_key(line.custom_id))
            started = Started(line, asked, self.llm.requests(asked.prompts, asked.params))
            for place, request in enumerate(started.requests):
                self.llm.start(request, partial(_note, started, place, tell), every_step=False)
            return started
        except Exception as error:  # whatever is wrong with a line, the others go on
            self.llm.raise_if_ended()
            return Answer(failure(line.custom_id, line.number, error))

    def answer(self, started: Started) -> Answer:
        """Of a line that has ended. Raises EngineError when the engine ended it with itself."""
        outputs = [started.outputs[place] for place in range(len(started.requests))]
        if any(isinstance(output.error, EngineError) for output in outputs):
            self.llm.raise_if_ended()
        return Answer(self._record(started, outputs), *count_tokens(outputs))

    def _record(self, started: Started, outputs: Sequence[RequestOutput]) -> Record:
        line = started.line
        try:
            if any(completion.finish_reason == "abort" for output in outputs for completion in output.outputs):
                raise EngineError("a request of this line was ended by LLM.abort")
            body = started.job.respond(outputs)
        except Exception as error:
            return failure(line.custom_id, line.number, error)
        response = {"status_code": 200, "request_id": body["id"], "body": body}
        return {"id": body["id"], "custom_id": line.custom_id, "response": response, "error": None}


def _note(started: Started, place: int, tell: Callable[[Started, RequestOutput], None], output: RequestOutput) -> None:
    started.outputs[place] = output
    tell(started, output)


def failure(custom_id: str | None, number: int, error: Exception) -> Record:
    """The record of a line that failed; `line`, its number from 1 on, names it where custom_id cannot."""
    code = next((code for kind, code in CODES.items() if isinstance(error, kind)), "internal_error")
    text = str(error) if isinstance(error, JaxEngineError) else f"{type(error).__name__}: {error}"
    key = line_key(number) if custom_id is None else id_key(custom_id)
    return {
        "id": response_id(key), "custom_id": custom_id, "line": number, "response": None,
        "error": {"code": code, "message": text},
    }  # fmt: skip
