"""Chat templates: rendered as in transformers, and what is refused."""

import json

import pytest

from jaxengine.errors import RequestError
from jaxengine.tokenizer import Tokenizer
from tests.references import gguf_files
from tests.vocabularies import byte_level, write_folder

MODEL = Tokenizer(
    byte_level(), {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>"}, {"default": gguf_files.TEMPLATE}
)
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": " Well,  "}]
TEMPLATES = {
    "tools": "{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}{{ messages[0].content }}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "loop_controls": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "specials": "{{ bos_token }}{{ messages[-1]['content'] | trim }}{{ eos_token }}{{ custom }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "undefined": "{{ tools is none }}{{ documents is none }}{{ nothing is defined }}{{ add_generation_prompt }}",
    "dict": "{{ dict(a=1) }}{{ dict.fromkeys(['x']) }}",
    "blocks": "{% for m in messages %}\n    {{ m.role }}\n    {% endfor %}\n{# gone #}\nend\n",
    "reasoning": "{% for m in messages %}{{ m.reasoning_content }}{{ m.thinking }}{% endfor %}",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_in_transformers(name):
    from transformers.utils.chat_template_utils import render_jinja_template

    tools = [{"type": "function", "function": {"name": "f", "description": "<é & 'x'>"}}] if name == "tools" else None
    chat = [{"role": "user", "content": "Hi <b>&amp; é"}, {"role": "assistant", "content": "Yo", "reasoning": "hm"}]
    expected, _ = render_jinja_template(
        [chat],
        tools=tools,
        chat_template=TEMPLATES[name],
        add_generation_prompt=True,
        **MODEL.special_tokens,
        custom="!",
    )
    assert MODEL.apply_chat_template(chat, tools, TEMPLATES[name], custom="!") == expected[0]


def test_a_function_as_a_tool():
    def add(a: int, b: int) -> int:
        """Adds.

        Args:
            a: one
            b: other
        """
        return a + b

    text = MODEL.apply_chat_template(CHAT, [add], TEMPLATES["tools"])
    assert json.loads(text.removesuffix("Hi"))[0]["function"]["parameters"]["required"] == ["a", "b"]


@pytest.mark.parametrize(
    "template", [gguf_files.TEMPLATE, "{% for m in messages %}{{ m['content'] | trim }}|{% endfor %}"]
)
def test_continue_final_message(template):
    text = MODEL.apply_chat_template(CHAT, chat_template=template, continue_final_message=True)
    assert text.endswith("Well," if "trim" in template else " Well,  ")
    assert "CONTINUE" not in text
    assert CHAT[-1]["content"] == " Well,  "


def test_the_prompt_for_the_answer_is_left_out_on_request():
    assert MODEL.apply_chat_template(CHAT).endswith("<|im_start|>assistant\n")
    assert MODEL.apply_chat_template(CHAT, add_generation_prompt=False).endswith("<|im_end|>\n")


def test_templates_by_name():
    model = Tokenizer(byte_level(), {}, {"default": "D", "tool_use": "T", "rag": "R"})
    assert model.apply_chat_template(CHAT) == "D"
    assert model.apply_chat_template(CHAT, tools=[{"name": "f"}]) == "T"
    assert model.apply_chat_template(CHAT, chat_template="rag") == "R"
    assert model.apply_chat_template(CHAT, chat_template="X{{ 1 }}") == "X1"


def test_where_templates_come_from(tmp_path):
    listed = [{"name": "default", "template": "D"}, {"name": "rag", "template": "R"}]
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": listed}
    folder = write_folder(tmp_path, byte_level(), config, "llama")
    assert Tokenizer.load(folder).chat_templates == {"default": "D", "rag": "R"}
    (folder / "chat_template.jinja").write_text("J")
    assert Tokenizer.load(folder).chat_templates == {"default": "J"}
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("T")
    assert Tokenizer.load(folder).chat_templates == {"default": "J", "tool_use": "T"}


@pytest.mark.parametrize(
    ("messages", "options", "complaint"),
    [
        ([], {}, "empty conversation"),
        (["hi"], {}, "a dict with role and content, not 'hi'"),
        ([{"role": "user", "content": object()}], {}, "holds a object"),
        (CHAT, {"chat_template": "{% if %}"}, "not valid Jinja, line 1"),
        (CHAT, {"chat_template": "{{ raise_exception('only one message') }}"}, "only one message"),
        (CHAT, {"chat_template": "{{ messages.__class__.__mro__ }}"}, "unsafe"),
        (CHAT, {"chat_template": "{{ messages.append(1) }}"}, "unsafe|not safely"),
        (CHAT, {"add_generation_prompt": True, "continue_final_message": True}, "begins a new message"),
        (CHAT, {"chat_template": "nothing of content", "continue_final_message": True}, "drops or changes"),
        (CHAT, {"continue_final_message": "thinking"}, "no 'thinking' to continue"),
    ],
)
def test_refused_chats(messages, options, complaint):
    with pytest.raises(RequestError, match=complaint):
        MODEL.apply_chat_template(messages, **options)


def test_a_model_without_a_template_says_so():
    with pytest.raises(RequestError, match="no chat template: give one as chat_template="):
        Tokenizer(byte_level()).apply_chat_template(CHAT)
    with pytest.raises(RequestError, match=r"none is the default|no chat template is the default.*\['rag'\]"):
        Tokenizer(byte_level(), {}, {"rag": "R"}).apply_chat_template(CHAT)
