"""What checkpoints' templates rely on."""

from __future__ import annotations

from datetime import datetime

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
