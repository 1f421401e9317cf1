"""Renders a model's Jinja chat template with the same variables, functions and limits as transformers does.

transformers' own renderer takes a second to import; it is asked only to describe a Python function given as a tool.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import numpy as np
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jaxengine.errors import RequestError

_REASONING = (
    "reasoning_content",
    "thinking",
    "reasoning",
)  # names that a message's reasoning goes by; templates read the first
_MARK = "CONTINUE_HERE "  # with a space behind it: templates that strip the message are noticed


class ChatTemplates:
    """The templates of a model, by name, compiled when first used."""

    def __init__(self, templates: dict[str, str], special_tokens: Mapping[str, str]):
        self.templates, self.special_tokens = templates, special_tokens
        self._compiled: dict[str, jinja2.Template] = {}

    def render(
        self,
        messages: Sequence[Any],
        tools: Sequence[Any] | None,
        template: str | None,
        add_generation_prompt: bool,
        continue_final_message: bool | str,
        variables: Mapping[str, Any],
    ) -> str:
        """The conversation as text. Raises RequestError."""
        source = self._choose(template, tools)
        chat = [_message(message) for message in messages]
        if not chat:
            raise RequestError("messages=[] is an empty conversation; give at least one message")
        final = ""
        if continue_final_message:
            field = continue_final_message if isinstance(continue_final_message, str) else "content"
            final = _open_final_message(chat[-1], field, source)
        try:
            text = self._compile(source).render(
                {"documents": None, **self.special_tokens, **_plain(variables)},
                messages=chat,
                tools=None if tools is None else [_tool(tool) for tool in tools],
                add_generation_prompt=add_generation_prompt,
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            raise RequestError(f"the chat template refuses this conversation: {error}") from error
        return _cut_at_mark(text, final) if continue_final_message else text

    def _choose(self, template: str | None, tools: Any) -> str:
        if template is not None:
            return self.templates.get(template, template)
        name = "tool_use" if tools is not None and "tool_use" in self.templates else "default"
        if name in self.templates:
            return self.templates[name]
        if self.templates:
            raise RequestError(f"no chat template is the default; give chat_template=, one of {sorted(self.templates)}")
        raise RequestError(
            "this model has no chat template: give one as chat_template= (a Jinja template), or write the prompt "
            "yourself and call generate"
        )

    def _compile(self, source: str) -> jinja2.Template:
        if source not in self._compiled:
            try:
                self._compiled[source] = _environment().from_string(source)
            except jinja2.TemplateSyntaxError as error:
                raise RequestError(f"the chat template is not valid Jinja, line {error.lineno}: {error}") from error
        return self._compiled[source]


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what the assistant says, for training; here it is just its content."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    """Refuses names that reach into Python's internals."""

    def __init__(*args: Any, **kwargs: Any):  # templates may set an attribute called self
        jinja2.utils.Namespace.__init__(args[0])
        for name, value in dict(*args[1:], **kwargs).items():
            args[0][name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a chat template may not set {name!r}")
        super().__setitem__(name, value)


class _Dict:
    """`dict` in a template: makes dicts, and leads no further."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _environment() -> ImmutableSandboxedEnvironment:
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None,
                sort_keys: bool = False) -> str:  # fmt: skip
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    env.filters["tojson"] = to_json  # Jinja's own escapes HTML
    env.globals |= {
        "raise_exception": refuse,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return env


def _message(message: Any) -> dict[str, Any]:
    """A message as a plain dict, its reasoning under every name that templates look for."""
    plain = _plain(message)
    if not isinstance(plain, dict):
        raise RequestError(f"a chat message is a dict with role and content, not {message!r}")
    plain = {key: value for key, value in plain.items() if value is not None}  # templates render None as "None"
    reasoning = next((plain[name] for name in _REASONING if name in plain), None)
    return plain if reasoning is None else {"thinking": reasoning, **plain, "reasoning_content": reasoning}


def _plain(value: Any) -> Any:
    """JSON's types only: a template comes from the hub, and must not reach the methods of anything else."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, str):
        return str.__str__(value)  # an enum's value, not its name
    if isinstance(value, int | float):
        return int(value) if isinstance(value, int) else float(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if callable(getattr(value, "model_dump", None)):  # pydantic
        return _plain(value.model_dump())
    raise RequestError(f"a chat message holds a {type(value).__name__}; text, numbers, lists and dicts can be rendered")


def _tool(tool: dict[str, Any] | Callable[..., Any]) -> Any:
    if not callable(tool):
        return _plain(tool)
    from transformers.utils import get_json_schema

    try:
        return get_json_schema(tool)
    except Exception as error:  # missing type hints or docstring, in several classes
        raise RequestError(f"tool {tool!r} cannot be described: {error}") from error


def _open_final_message(message: dict[str, Any], field: str, source: str) -> str:
    """Marks the end of the last message's text, and returns that text."""
    content = message.get(field)
    if content is None:
        raise RequestError(f"continue_final_message: the last message has no {field!r} to continue")
    fields = [name for name in _REASONING if message.get(name) == content] if field in _REASONING else [field]
    if not any(name in source for name in fields):
        raise RequestError(f"continue_final_message={field!r}: the chat template does not read that field")
    if isinstance(content, str):
        message |= dict.fromkeys(fields, content + _MARK)
        return content
    for part in reversed(content):
        if "text" in part:
            text = part["text"]
            part["text"] += _MARK
            return text
    raise RequestError("continue_final_message: the last message has no text to continue")


def _cut_at_mark(text: str, final: str) -> str:
    at = text.rfind(_MARK.strip())
    if at < 0 or final.strip() not in text:
        raise RequestError("continue_final_message: the chat template drops or changes the last message")
    kept = text[:at]
    return kept if text[at:].startswith(_MARK) else kept.rstrip()
