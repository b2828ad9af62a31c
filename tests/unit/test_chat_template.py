"""Chat templates, beside transformers' own rendering of them."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from precast.errors import InvalidRequest
from precast.tokenizer.chat_template import ChatOptions, ChatTemplate, read_chat_template
from precast.tokenizer.template_environment import ChatEnvironment, TemplateTimeout

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
CHAT = [
    {"role": "system", "content": "Be brief & <kind>."},
    {"role": "user", "content": ' Grüß "dich" 🙂 \n'},
    {"role": "assistant", "content": "<think>so</think>\n\nHello"},
    {"role": "user", "content": "again", "name": "ann"},
]
SMOLLM3 = """\
{%- if messages[0].role == "system" -%}
  {%- set system_message = messages[0].content -%}
  {%- set reasoning_mode = "/no_think" if "/no_think" in system_message else "/think" -%}
  {%- set custom = system_message.replace("/no_think", "").rstrip() -%}
{%- endif -%}
{{- "<|im_start|>system\\n" -}}
{{- "Today Date: " -}}{{ strftime_now("%d %B %Y") }}{{- "\\n" + (custom or "") -}}
{%- for message in messages -%}
    {%- set content = message.content if message.content is string else "" -%}
    {%- if message.role == "user" -%}
        {{ "<|im_start|>" + message.role + "\\n" + content + "<|im_end|>\\n" }}
    {%- elif message.role == "assistant" -%}
        {% generation %}
        {%- if reasoning_mode == "/think" -%}
            {{ "<|im_start|>assistant\\n" + content.lstrip("\\n") + "<|im_end|>\\n" }}
        {%- else -%}
            {{ "<|im_start|>assistant\\n<think>\\n\\n</think>\\n" + content + "<|im_end|>\\n" }}
        {%- endif -%}
        {% endgeneration %}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ "<|im_start|>assistant\\n" }}{%- endif -%}
"""
"""What SmolLM3's template does; its own is longer."""
TEMPLATES = {
    "smollm3": SMOLLM3,
    "tojson": "{{ messages | tojson }}{{ messages | tojson(indent=2, sort_keys=true) }}"
    "{{ messages | tojson(separators=(',', ':'), ensure_ascii=true) }}",
    "date": "{{ strftime_now('%Y') }}",
    "loop controls": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}"
    "{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content | trim }}{% endfor %}",
    "blocks": "{% for m in messages %}\n    {% if m.name %}\n {{ m.name }}\n  {% endif %}\n"
    "{% endfor %}",
    "absent": "{{ tools is none }}{{ documents is none }}{{ tools is defined }}{{ x is defined }}",
    "special": "{{ bos_token }}{{ eos_token }}{{ unk_token is defined }}",
    "scope": "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% endfor %}{{ ns.n }}{{ dict(a=1) }}{{ dict.fromkeys('ab') }}",
    "macros": "{% macro show(m, depth=2) %}{{ m.content * depth }}{% if caller %}{{ caller() }}"
    "{% endif %}{% endmacro %}{{ show(messages[0]) }}{% call show(messages[1]) %}!{% endcall %}",
    "recursion": "{% for k in [1, [2, [3]]] recursive %}{{ loop(k) if k is iterable else k }}"
    "{% endfor %}",
    "split": "{{ messages[2].content.split('</think>')[-1].lstrip('\\n') }}{{ 2 ** 10 }}",
    "filter": "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content')"
    " | join('|') }}",
}


def read(folder: Path, template: object = None, **files: str) -> ChatTemplate:
    for name, source in files.items():
        path = folder / (f"additional_chat_templates/{name}.jinja" if name != "default" else FILE)
        path.parent.mkdir(exist_ok=True)
        path.write_text(source)
    return read_chat_template(folder, {**TOKENS, "chat_template": template})


FILE = "chat_template.jinja"


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_in_transformers(tmp_path: Path, name: str) -> None:
    source = TEMPLATES[name]
    ours = read(tmp_path, source).render(CHAT)
    (theirs,), _ = render_jinja_template(
        [CHAT], chat_template=source, add_generation_prompt=True, **TOKENS
    )
    assert ours == theirs
    assert ours


CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


@pytest.mark.parametrize("source", [CHATML, CHATML.replace("m.content", "m.content | trim")])
@pytest.mark.parametrize("said", ["One,", "<", "end", "i", "|>", "<|im_end|>\n", "hi ", " hi"])
def test_a_message_goes_on_where_it_ends(tmp_path: Path, source: str, said: str) -> None:
    """Wherever else its text may be: "<" and "end" are in what the template writes behind it."""
    chat = [{"role": "user", "content": "<end>"}, {"role": "assistant", "content": said}]
    ours = read(tmp_path, source).render(chat, ChatOptions(continue_final_message=True))
    (theirs,), _ = render_jinja_template(
        [chat], chat_template=source, continue_final_message=True, **TOKENS
    )
    assert ours == theirs
    assert ours.endswith(f"<|im_start|>assistant\n{said.strip() if 'trim' in source else said}")


def test_a_message_without_a_text_goes_on_nowhere(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="no text to go on with"):
        read(tmp_path, CHATML).render(
            [{"role": "assistant", "content": None}], ChatOptions(continue_final_message=True)
        )


@pytest.mark.parametrize(
    "source",
    ["{{ namespace(_x=1) }}", "{{ dict.__class__.x }}", "{{ raise_exception('no') }}", "{{ x.y }}"],
)
def test_what_transformers_refuses_is_refused(tmp_path: Path, source: str) -> None:
    with pytest.raises(Exception):  # noqa: B017 - of many kinds
        render_jinja_template([CHAT], chat_template=source)
    with pytest.raises(InvalidRequest, match="refuses the messages: "):
        read(tmp_path, source).render(CHAT)


def test_files_come_before_the_config(tmp_path: Path) -> None:
    assert read(tmp_path, "config", default="file", rag="other").render(CHAT) == "file"


def test_the_default_of_several_templates(tmp_path: Path) -> None:
    several = [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]
    assert read(tmp_path, several).render(CHAT) == "b"


def test_several_templates_without_a_default_are_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="is the default: rag, tool_use"):
        read(tmp_path, None, rag="a", tool_use="b").render(CHAT)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (None, "has no chat template; use /v1/completions"),
        ("a\n{% if %}", "is broken: line 2: Expected an expression"),
        ("{% for m in messages %}", "is broken: line 1: Unexpected end of template"),
        ("{{ x | nonsense }}", "is broken: line 1: No filter named 'nonsense'"),
        ("{% break %}", "is broken: "),
        (5, "is broken: chat_template is neither"),
        ([{"name": "default"}], "is broken: 'template'"),
        ({"default": 5}, "is broken: chat_template is neither"),
    ],
)
def test_a_broken_template_says_so_when_it_is_used(
    tmp_path: Path, template: object, reason: str
) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(reason)) as refusal:
        read(tmp_path, template).render(CHAT)
    assert "\n" not in str(refusal.value)


def test_a_template_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidRequest, match="is broken: 'utf-8'"):
        read(tmp_path).render(CHAT)


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) ~ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% for a in range(99999) %}{% generation %}{% for b in range(99999) %}{% endfor %}"
        "{% endgeneration %}{% endfor %}",
    ],
)
def test_a_template_without_an_end_is_ended(source: str) -> None:
    environment = ChatEnvironment()
    template = environment.from_string(source)
    start = time.thread_time()
    with pytest.raises(TemplateTimeout), environment.limited(0.05):
        template.render()
    assert time.thread_time() - start < 1.0


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 999999999 }}",
        "{{ [1] * 999999999 }}",
        "{{ 999999999 * 'a' }}",
        "{{ 9 ** 99999999 }}",
        "{% for i in range(999999999) %}{% endfor %}",
    ],
)
def test_large_results_are_refused(tmp_path: Path, source: str) -> None:
    with pytest.raises(InvalidRequest, match=r"large|big"):
        read(tmp_path, source).render(CHAT)


def test_the_texts_of_a_template_are_known(tmp_path: Path) -> None:
    literals: Any = read(tmp_path, "<a>{{ '<b>' + messages[0]['<c>'] }}").literals
    assert {"<a>", "<b>", "<c>"} <= set(literals.split("\0"))


def test_special_tokens_may_be_objects(tmp_path: Path) -> None:
    config = json.loads('{"bos_token": {"content": "<b>"}, "chat_template": "{{ bos_token }}"}')
    assert read_chat_template(tmp_path, config).render(CHAT) == "<b>"
