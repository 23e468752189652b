"""What checkpoints' templates rely on."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest

from text.chat_template import ChatTemplate, TemplateError

USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "Well, "}


def render(source: str, **options) -> str:
    messages = options.pop("messages", [USER])
    options.setdefault("add_generation_prompt", False)
    return ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"}).render(
        messages, **options
    )


def test_tokens_and_variables() -> None:
    assert render("{{ bos_token }}{{ x }}{{ eos_token }}", variables={"x": 3}) == "<s>3</s>"


def test_variables_cannot_replace_the_messages() -> None:
    assert render("{{ messages[0].content }}", variables={"messages": [ASSISTANT]}) == "hi"


def test_tojson_keeps_html_and_unicode() -> None:
    source = "{{ messages[0] | tojson }}"
    assert render(source, messages=[{"role": "u", "content": "<é>"}]) == (
        '{"role": "u", "content": "<é>"}'
    )
    assert render("{{ x | tojson(indent=2) }}", variables={"x": [1]}) == "[\n  1\n]"


def test_raise_exception_reaches_the_client() -> None:
    with pytest.raises(TemplateError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


def test_loop_controls_trimming_and_generation_blocks() -> None:
    source = (
        "{% for i in [1, 2, 3] %}\n    {% if i == 2 %}{% continue %}{% endif %}\n{{ i }}"
        "{% if i == 3 %}{% break %}{% endif %}\n{% endfor %}"
        "{% generation %}x{% endgeneration %}"
    )
    assert render(source).replace("\n", "") == "13x"


def test_strftime_now() -> None:
    assert render("{{ strftime_now('%Y') }}") == str(datetime.now().year)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}",
    ],
)
def test_the_sandbox_holds(source: str) -> None:
    with pytest.raises(TemplateError):
        render(source)


@pytest.mark.parametrize("source", ["{{ messages[0].content.missing.more }}", "{{ 1 + 'a' }}"])
def test_failures_are_the_clients_to_read(source: str) -> None:
    with pytest.raises(TemplateError):
        render(source)


def test_a_broken_template_is_found_at_load() -> None:
    with pytest.raises(TemplateError, match="does not compile"):
        ChatTemplate("{% for %}", {})


def test_continue_final_message_leaves_it_open() -> None:
    source = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    prompt = render(source, messages=[USER, ASSISTANT], continue_final_message=True)
    assert prompt == "<user>hi</s><assistant>Well, "


def test_continue_final_message_needs_text_that_is_shown() -> None:
    with pytest.raises(TemplateError, match="text content"):
        render("x", messages=[{"role": "assistant", "content": None}], continue_final_message=True)
    with pytest.raises(TemplateError, match="does not show"):
        render("x", messages=[ASSISTANT], continue_final_message=True)
    with pytest.raises(ValueError, match="excludes"):
        render("x", continue_final_message=True, add_generation_prompt=True)


CONSTRUCTS = (
    "{%- set ns = namespace(last=-1) -%}"
    "{%- for message in messages[::-1] -%}{%- set index = messages|length - 1 - loop.index0 -%}"
    "{%- if ns.last < 0 and message.role == 'user' and message.content is string -%}"
    "{%- set ns.last = index -%}{%- endif -%}{%- endfor -%}"
    "{%- for message in messages -%}"
    "{%- if loop.previtem is not defined or loop.previtem.role != message.role -%}"
    "[{{ message.role | upper }}]{%- endif -%}"
    "{%- set content = message['content'] | trim -%}"
    "{%- if '</think>' in content -%}"
    "{%- set content = content.split('</think>')[-1].lstrip('\\n') -%}{%- endif -%}"
    "{%- if message.tool_calls is defined and message.tool_calls is not none -%}"
    "{%- for call in message.tool_calls -%}"
    "{%- for name, value in call.function.arguments.items() -%}"
    "({{ name }}={{ value | tojson }}){%- endfor -%}{%- endfor -%}{%- endif -%}"
    "{{ content }}{%- if loop.index0 > ns.last -%}!{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt and enable_thinking is defined and not enable_thinking -%}"
    "<think></think>{%- endif -%}"
)
CONVERSATION = [
    {"role": "system", "content": "  be brief "},
    {"role": "user", "content": "a"},
    {"role": "user", "content": "b"},
    {
        "role": "assistant",
        "content": "<think>\nhm\n</think>\n\nc",
        "tool_calls": [{"function": {"name": "f", "arguments": {"x": [1, "é"]}}}],
    },
]


def test_constructs_that_checkpoints_use() -> None:
    prompt = render(
        CONSTRUCTS,
        messages=CONVERSATION,
        add_generation_prompt=True,
        variables={"enable_thinking": False},
    )
    assert prompt == '[SYSTEM]be brief[USER]ab[ASSISTANT](x=[1, "é"])c!<think></think>'


@pytest.mark.slow
@pytest.mark.parametrize("generate", [False, True])
def test_the_same_prompt_as_the_transformers_library(generate: bool) -> None:
    utilities = pytest.importorskip("transformers.utils.chat_template_utils")
    bundled = Path(__file__).parents[2] / "assets/demo/target/chat_template.jinja"
    for source in (CONSTRUCTS, bundled.read_text(encoding="utf-8")):
        expected, _ = utilities.render_jinja_template(
            [CONVERSATION],
            chat_template=source,
            add_generation_prompt=generate,
            bos_token="<s>",
            eos_token="</s>",
        )
        assert render(source, messages=CONVERSATION, add_generation_prompt=generate) == expected[0]


@pytest.mark.slow
@pytest.mark.parametrize("content", ["Well", "Well, ", " Well"])
def test_continuing_as_the_transformers_library_does(content: str) -> None:
    utilities = pytest.importorskip("transformers.utils.chat_template_utils")
    source = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    messages = [USER, {"role": "assistant", "content": content}]
    expected, _ = utilities.render_jinja_template(
        [messages], chat_template=source, continue_final_message=True
    )
    assert render(source, messages=messages, continue_final_message=True) == expected[0]
