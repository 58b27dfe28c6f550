"""Chat templates: equal to transformers, and harmless."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ropeway import hub
from ropeway.errors import ModelError, OverloadedError, RequestError, RopewayError, TemplateError
from ropeway.text.template import ChatTemplate, TemplateLimits, load_template

CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = """{% set loop_messages = messages %}
{% for message in loop_messages %}
    {% set head = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' %}
    {% set content = head + message['content'] | trim + '<|eot_id|>' %}
    {% if loop.index0 == 0 %}
        {% set content = bos_token + content %}
    {% endif %}
    {{- content }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set ns = namespace(index=0) %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
        {{- raise_exception("Conversation roles must alternate user/assistant/user/assistant") }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\n\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- else %}
        {{- " " + message["content"] + eos_token }}
    {%- endif %}
{%- endfor %}
"""
QWEN = """{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- else %}
        {{- 'You are helpful.' }}
    {%- endif %}
    {{- "\n\n# Tools\n<tools>" }}
    {%- for tool in tools %}
        {{- "\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\n</tools><|im_end|>\n" }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "user" or message.role == "system" and not (tools and loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- if message.reasoning_content is string and enable_thinking is defined and enable_thinking %}
            {{- '<think>' + message.reasoning_content + '</think>' }}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}{% generation %}{{ message.content + '<|im_end|>\n' }}{% endgeneration %}
        {%- for call in message.tool_calls or [] %}
            {{- '<tool_call>{"name": "' + call.function.name + '", "arguments": ' }}
            {{- (call.function.arguments | tojson(indent=2)) + '}' }}
        {%- endfor %}
    {%- else %}{%- continue %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
SOURCES = {"chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL, "qwen": QWEN}
TOOL = {"type": "function", "function": {"name": "weather", "description": "<b>é & 'so'</b>", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich <&>"}}}
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hello <b>'you' & me</b>"}],
    [{"role": "system", "content": "Be brief. "}, {"role": "user", "content": " héllo 你好 \n"}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "reasoning": "why b", "tool_calls": [CALL]},
        {"role": "user", "content": "c"},
    ],
]


def reference(source: str, chat: list[dict[str, Any]], **kwargs: Any) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    return render_jinja_template([chat], chat_template=source, **SPECIAL, **kwargs)[0][0]


@pytest.fixture(scope="module")
def templates() -> Iterator[dict[str, ChatTemplate]]:
    sources = {**SOURCES, "bundled": (hub.BUNDLED / "chat_template.jinja").read_text()}
    made = {name: ChatTemplate(source, SPECIAL) for name, source in sources.items()}
    yield made
    for template in made.values():
        template.close()


@pytest.mark.parametrize("name", [*SOURCES, "bundled"])
def test_renders_as_transformers_does(templates: dict[str, ChatTemplate], name: str) -> None:
    template = templates[name]
    source = template.sources["default"]
    for chat in CHATS:
        for prompt in (True, False):
            for variables in ({}, {"tools": [TOOL], "enable_thinking": True}):
                expected = reference(source, chat, add_generation_prompt=prompt, **variables)
                assert template.render(chat, add_generation_prompt=prompt, variables=variables) == expected


@pytest.mark.parametrize("name", [*SOURCES, "bundled"])
def test_continues_the_final_message_as_transformers_does(templates: dict[str, ChatTemplate], name: str) -> None:
    for ending in ("Sure, ", "Sure", " x\n"):
        chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": ending}]
        expected = reference(templates[name].sources["default"], chat, continue_final_message=True)
        assert templates[name].render(chat, add_generation_prompt=False, continue_final_message=True) == expected


@pytest.mark.parametrize("parts", [
    ["Sure, "], ["One.", "Two, "], ["Look:", {"type": "image_url", "image_url": "x"}],
])  # fmt: skip
def test_continues_the_last_text_of_content_in_parts(parts: list[Any]) -> None:
    source = (
        "{% for m in messages %}[{{ m.role }}]{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for part in m.content %}{{ part.text if part.text is defined else '<image>' }}{% endfor %}{% endif %}</s>"
        "{% endfor %}"
    )
    content = [part if isinstance(part, dict) else {"type": "text", "text": part} for part in parts]
    texts = [part for part in parts if isinstance(part, str)]
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": content}]
    template = ChatTemplate(source)
    found = template.render(chat, add_generation_prompt=False, continue_final_message=True)
    template.close()
    assert found == "[user]a</s>[assistant]" + "".join(texts)
    assert "ROPEWAY" not in json.dumps(content), "the caller's own message was changed"


@pytest.mark.parametrize(("content", "source", "match"), [
    (None, CHATML, "no text to continue"),
    ([{"type": "image_url"}], CHATML, "no text to continue"),
    ("b", "{% for m in messages %}{{ m.content | upper }}{% endfor %}", "does not show the last message as it is"),
    ("b", "{{ messages[0].content }}", "does not show the last message as it is"),
])  # fmt: skip
def test_what_cannot_be_continued_is_refused(content: Any, source: str, match: str) -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": content}]
    template = ChatTemplate(source)
    with pytest.raises(TemplateError, match=match):
        template.render(chat, add_generation_prompt=False, continue_final_message=True)
    with pytest.raises(RequestError, match="excludes add_generation_prompt") as caught:
        template.render(chat, continue_final_message=True)
    template.close()
    assert caught.value.param == "continue_final_message"


async def test_whoever_waits_too_long_for_the_renderer_is_told_to_come_again() -> None:
    template = ChatTemplate("{{ messages[0].content }}", limits=TemplateLimits(patience=0.0))
    with pytest.raises(OverloadedError, match="busy for more than 0 s") as caught:
        await template.render_async(CHATS[0])
    template.close()
    assert caught.value.retry_after == 1.0


def test_refusals_say_what_the_template_said(templates: dict[str, ChatTemplate]) -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    with pytest.raises(TemplateError, match="must alternate") as caught:
        templates["mistral"].render(chat)
    assert caught.value.param == "messages"
    with pytest.raises(TemplateError, match="empty"):
        templates["mistral"].render([])


@pytest.mark.parametrize("name", ["chat_template", "tokenize", "messages", "add_generation_prompt", "bos_token", "a b"])
def test_variables_cannot_take_the_renderers_own_names(templates: dict[str, ChatTemplate], name: str) -> None:
    with pytest.raises(RequestError) as caught:
        templates["chatml"].render(CHATS[0], variables={name: "x"})
    assert caught.value.param == "chat_template_kwargs"


def test_half_a_surrogate_pair_is_refused(templates: dict[str, ChatTemplate]) -> None:
    with pytest.raises(TemplateError, match="Unicode"):
        templates["chatml"].render([{"role": "user", "content": "\ud83d"}])


BOMBS = {
    "late": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "memory": "{% set n = 90000000000 %}{{ 'a' * n }}",
    "folded": "{{ 'a' * 90000000000 }}",
    "format": "{{ '%999999999999d' % 3 }}",
    "large": "{% set n = 2000000 %}{% for i in range(90) %}{{ 'a' * n }}{% endfor %}",
    "doubling": "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = ns.x * 2 %}{% endfor %}{{ns.x}}",
    "power": "{{ 9 ** 999999999 }}",
    "escape": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "syntax": "{% for %}",
}


async def test_bombs_end_in_time_while_the_loop_runs_on() -> None:
    """All at once: each ends with an error, and the event loop is never held up by one."""
    limits = TemplateLimits(deadline=0.3, max_output=10_000_000, max_memory=512 * 2**20)
    made = {name: ChatTemplate(source, limits=limits) for name, source in BOMBS.items()}
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.01)
            ticks += 1

    ticker = asyncio.create_task(tick())
    outcomes = await asyncio.gather(*(t.render_async(CHATS[0]) for t in made.values()), return_exceptions=True)
    ticker.cancel()
    assert all(isinstance(outcome, TemplateError) for outcome in outcomes), outcomes
    assert "was stopped" in str(outcomes[0])
    assert ticks >= 10
    for template in made.values():
        template.close()


def test_a_killed_worker_is_replaced_and_the_next_conversation_is_served() -> None:
    source = "{% if messages[0].content == 'bomb' %}" + BOMBS["late"] + "{% endif %}{{ messages[0].content }}"
    template = ChatTemplate(source, limits=TemplateLimits(deadline=1.0))
    assert template.render([{"role": "user", "content": "one"}]) == "one"
    with pytest.raises(TemplateError, match="longer than 1 s"):
        template.render([{"role": "user", "content": "bomb"}])
    assert template.render([{"role": "user", "content": "two"}]) == "two"
    template.close()


def test_the_worker_has_no_secrets_and_goes_with_its_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    template = ChatTemplate("x")
    template.render(CHATS[0])
    process = template._worker._sandbox._process
    assert process is not None
    environment = Path(f"/proc/{process.pid}/environ").read_bytes()
    assert b"secret" not in environment
    assert b"torch" not in Path(f"/proc/{process.pid}/maps").read_bytes()
    del template
    assert process.poll() is not None


def write(directory: Path, **files: Any) -> Path:
    for name, content in files.items():
        path = directory / name.replace("__", ".")
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return directory


def test_templates_are_found_where_models_keep_them(tmp_path: Path) -> None:
    assert load_template(tmp_path) is None
    write(tmp_path, chat_template__json={"chat_template": "J"})
    assert load_template(tmp_path).sources == {"default": "J"}
    write(tmp_path, tokenizer_config__json={"chat_template": "C", "bos_token": {"content": "<s>"}, "eos_token": "</s>"})
    found = load_template(tmp_path)
    assert (found.sources, found.special) == ({"default": "C"}, SPECIAL)
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    write(tmp_path, tokenizer_config__json={"chat_template": named})
    assert load_template(tmp_path).sources == {"default": "D", "tool_use": "T"}
    write(tmp_path, chat_template__jinja="F")
    assert load_template(tmp_path).sources == {"default": "F"}
    (tmp_path / "additional_chat_templates").mkdir()
    write(tmp_path / "additional_chat_templates", tool_use__jinja="U", rag__jinja="R", notes__txt="N")
    assert load_template(tmp_path).sources == {"default": "F", "tool_use": "U", "rag": "R"}
    write(tmp_path, other="O")
    assert load_template(tmp_path, str(tmp_path / "other")).sources == {"default": "O"}
    with pytest.raises(ModelError, match="--chat-template"):
        load_template(tmp_path, str(tmp_path / "missing"))


@pytest.mark.parametrize("given", [3, [], [{"name": "x"}], {"default": 4}])
def test_a_damaged_template_entry_is_a_model_error(tmp_path: Path, given: Any) -> None:
    write(tmp_path, tokenizer_config__json={"chat_template": given})
    with pytest.raises(ModelError):
        load_template(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_template_file_is_a_model_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(ModelError, match=r"chat_template\.json is damaged: .*Download it again"):
        load_template(write(tmp_path, chat_template__json=text))


def test_tools_choose_the_tool_template() -> None:
    template = ChatTemplate({"default": "D", "tool_use": "T"})
    assert template.render(CHATS[0]) == "D"
    assert template.render(CHATS[0], variables={"tools": [TOOL]}) == "T"
    template.close()
    with pytest.raises(RopewayError, match="none named 'default'"):
        ChatTemplate({"rag": "R"}).render(CHATS[0])


@pytest.mark.parametrize("wrong", ["{% for m in messages %}{{ m.content }", "{{ messages | shout }}"])
def test_a_template_that_is_none_is_told_before_anybody_speaks(wrong: str) -> None:
    with pytest.raises(ModelError, match=r"template cannot be compiled: Template\w+Error: .* \(line 1\)\. Correct it"):
        ChatTemplate(wrong).check()
    with pytest.raises(ModelError, match="template 'tool_use' cannot be compiled"):
        ChatTemplate({"default": CHATML, "tool_use": wrong}).check()


def test_what_only_fails_for_some_or_is_slow_is_no_reason_not_to_start() -> None:
    for source in (CHATML, "{{ raise_exception('no') }}", "{{ messages[0].a.b }}", "{{ 'a' * 10**10 }}"):
        template = ChatTemplate(source)
        template.check()
        template.close()
