"""Which dialect a chat template shows, and conversations with calls in the templates of all families."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ropeway import hub
from ropeway.config import ServerConfig, settings
from ropeway.errors import ConfigError
from ropeway.text import reasoning, tools
from ropeway.text.dialect import choose
from ropeway.text.speech import join
from ropeway.text.template import ChatTemplate, load_template
from ropeway.text.tokenizer import ByteTokenizer
from toolformats import TOOLS

# Small templates that write calls and results as the published ones of their families do.
HERMES = """{% if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>
{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is false %}<think>

</think>

{% endif %}{% endif %}"""
LLAMA3 = """{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}
<|start_header_id|>{{ m.role if m.role != 'tool' else 'ipython' }}<|end_header_id|>

{% if m.tool_calls %}{"name": "{{ m.tool_calls[0].function.name }}", "parameters": \
{{ m.tool_calls[0].function.arguments | tojson }}}{% elif m.role == 'tool' %}{{ m.content | tojson }}{% else %}\
{{ m.content | trim }}{% endif %}<|eot_id|>{% endfor %}{% if add_generation_prompt %}
<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""
MISTRAL = """{% for m in messages %}{% if m.role == 'user' %}{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}\
[/AVAILABLE_TOOLS]{% endif %}[INST]{{ m.content }}[/INST]{% elif m.tool_calls %}[TOOL_CALLS][\
{% for c in m.tool_calls %}{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\
{% if not loop.last %}, {% endif %}{% endfor %}]</s>\
{% elif m.role == 'tool' %}{% if m.tool_call_id is undefined or m.tool_call_id | length != 9 %}\
{{ raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}{% endif %}\
[TOOL_RESULTS]{"content": {{ m.content | tojson }}}[/TOOL_RESULTS]{% else %}{{ m.content }}</s>{% endif %}\
{% endfor %}"""
MISTRAL_NEW = """{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]{% elif m.tool_calls %}\
{% for c in m.tool_calls %}[TOOL_CALLS]{{ c.function.name ~ '[ARGS]' ~ c.function.arguments }}{% endfor %}</s>\
{% elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.content }}\
[/TOOL_RESULTS]{% else %}[THINK]{{ tools }}[/THINK]{{ m.content }}</s>{% endif %}{% endfor %}"""
_DEEPSEEK = """{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{% if m.role == 'user' %}\
<｜User｜>{{ m.content }}{% elif m['content'] is none %}<｜Assistant｜><｜tool▁calls▁begin｜>\
{% for c in m.tool_calls %}\
{{ 'HEAD' + c['function']['arguments'] + 'TAIL' }}{% endfor %}\
<｜tool▁calls▁end｜><｜end▁of▁sentence｜>{% elif m.role == 'tool' %}<｜tool▁output▁begin｜>{{ m.content }}\
<｜tool▁output▁end｜>{% else %}<｜Assistant｜>{{ m.content }}<｜end▁of▁sentence｜>{% endif %}{% endfor %}\
{% if add_generation_prompt %}<｜Assistant｜>END{% endif %}"""
DEEPSEEK_V3 = (
    _DEEPSEEK.replace("HEAD", "<｜tool▁call▁begin｜>' + c.type + '<｜tool▁sep｜>' + c.function.name + '\\n```json\\n")
    .replace("TAIL", "\\n```<｜tool▁call▁end｜>")
    .replace("END", "<think>\n")
)
DEEPSEEK_V31 = (
    _DEEPSEEK.replace("HEAD", "<｜tool▁call▁begin｜>' + c.function.name + '<｜tool▁sep｜>")
    .replace("TAIL", "<｜tool▁call▁end｜>")
    .replace("END", "{{ '<think>' if thinking else '</think>' }}")
)
LLAMA4 = """{% if tools %}Call functions like this: [func_name1(params_name1=params_value1, params_name2=...), ...]
{{ tools | tojson }}{% endif %}{% for m in messages %}<|header_start|>{{ m.role }}<|header_end|>

{% if m.tool_calls %}[{% for c in m.tool_calls %}{{ c.function.name }}({% for key, value in \
c.function.arguments | items %}{{ key }}={{ value | tojson }}{% if not loop.last %}, {% endif %}{% endfor %})\
{% if not loop.last %}, {% endif %}{% endfor %}]{% else %}{{ m.content }}{% endif %}<|eot|>{% endfor %}\
{% if add_generation_prompt %}<|header_start|>assistant<|header_end|>

{% endif %}"""
GRANITE = """{% if thinking %}Write your thoughts after 'Here is my thought process:' and your answer after \
'Here is my response:'.{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"""
QWEN3_CODER = """{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>
<function={{ c.function.name }}>
{% for key, value in c.function.arguments | items %}<parameter={{ key }}>
{{ value if value is string else value | tojson }}
</parameter>
{% endfor %}</function>
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

FAMILIES: dict[str, tuple[str, str, str]] = {
    "hermes": (HERMES, "hermes", "qwen3"),
    "llama": (LLAMA3, "llama3_json", ""),
    "mistral": (MISTRAL, "mistral", ""),
    "mistral with [ARGS]": (MISTRAL_NEW, "mistral", "mistral"),
    "deepseek": (DEEPSEEK_V3, "deepseek_v3", "deepseek_r1"),
    "deepseek 3.1": (DEEPSEEK_V31, "deepseek_v31", "deepseek_v3"),
    "qwen coder": (QWEN3_CODER, "qwen3_xml", ""),
    "llama 4": (LLAMA4, "pythonic", ""),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_template_shows_the_dialect(family: str) -> None:
    source, tool_format, thoughts = FAMILIES[family]
    assert tools.detect(source)[0] == tool_format
    assert reasoning.detect(source)[0] == thoughts


def test_granite_is_known_by_its_thought_process() -> None:
    assert reasoning.detect(GRANITE)[0] == "granite"


def test_templates_without_tools_and_owners_who_know_better() -> None:
    plain = "{% for m in messages %}{{ m.content }}{% endfor %}"
    for source, why in [
        ("", "no chat template"),
        (plain, "does not mention tools"),
        (plain + "{{ tools }}", "no format"),
    ]:
        dialect = choose(ByteTokenizer(), source)
        assert dialect.tools is dialect.reasoning is None
        assert why in dialect.notes[0]
    assert choose(ByteTokenizer(), plain, tool_call_parser="hermes").tools is tools.FORMATS["hermes"]
    assert choose(ByteTokenizer(), HERMES, tool_call_parser="none", reasoning_parser="none").tools is None
    assert choose(ByteTokenizer(), MISTRAL).tools is not choose(ByteTokenizer(), MISTRAL_NEW).tools
    with pytest.raises(ConfigError, match="one of deepseek_v3") as caught:
        choose(ByteTokenizer(), plain, tool_call_parser="gpt")
    assert caught.value.param == "tool_call_parser"


def test_the_servers_options_are_the_formats() -> None:
    choices = {setting.name: setting.choices for setting in settings(ServerConfig)}
    assert choices["tool_call_parser"] == ("auto", "none", *sorted(tools.FORMATS))
    assert choices["reasoning_parser"] == ("auto", "none", *sorted(reasoning.FORMATS))


TOOL_LIST = [
    {"type": "function", "function": {"name": tool.name, "parameters": tool.parameters}} for tool in TOOLS.values()
]
ARGUMENTS = {"city": 'Zürich "West" }', "days": 2}


def conversation(arguments: Any) -> list[dict[str, Any]]:
    call = {"id": "abcdefgh1", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}
    return [
        {"role": "user", "content": "How will it be?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "Sunny.", "tool_call_id": "abcdefgh1"},
    ]


@pytest.mark.parametrize("family", [*FAMILIES, "bundled"])
def test_what_a_template_writes_its_dialect_reads(family: str) -> None:
    """The call of an earlier turn, as the template shows it to the model, is what the model is taken to say."""
    if family == "bundled":
        template = load_template(hub.locate("bundled"))
        assert template is not None
    else:
        template = ChatTemplate(FAMILIES[family][0])
    try:
        text = template.render(conversation(ARGUMENTS), variables={"tools": TOOL_LIST})
        assert "Sunny." in text
        turn = template.render(conversation(ARGUMENTS)[:2], variables={"tools": TOOL_LIST}, add_generation_prompt=False)
        before = template.render(conversation(ARGUMENTS)[:1], variables={"tools": TOOL_LIST})
    finally:
        template.close()
    dialect = choose(ByteTokenizer(), template.sources["default"])
    assert dialect.tools is not None
    common = next((n for n in range(len(before)) if before[n] != turn[n]), len(before))
    speech = dialect.speech([], list(TOOLS.values()))
    message = join([*speech.push(turn[common:].removeprefix("assistant\n")), *speech.finish()])
    assert [(name, json.loads(arguments)) for name, arguments in message.calls] == [("get_weather", ARGUMENTS)]


@pytest.mark.parametrize(("family", "variables", "thinks"), [
    ("hermes", {}, None), ("hermes", {"enable_thinking": False}, False), ("hermes", {"enable_thinking": True}, None),
    ("deepseek", {}, True), ("deepseek 3.1", {}, False), ("deepseek 3.1", {"thinking": True}, True),
])  # fmt: skip
def test_the_prompt_says_whether_the_model_thinks(family: str, variables: dict[str, Any], thinks: bool | None) -> None:
    template = ChatTemplate(FAMILIES[family][0])
    try:
        prompt = template.render([{"role": "user", "content": "<think>?"}], variables=variables)
    finally:
        template.close()
    dialect = choose(ByteTokenizer(), FAMILIES[family][0])
    assert dialect.thinks(ByteTokenizer().encode(prompt, False)) is thinks


def test_a_prompt_without_tools_is_what_the_bundled_model_was_trained_on() -> None:
    template = load_template(hub.locate("bundled"))
    assert template is not None
    try:
        assert template.render([{"role": "user", "content": "Hi"}]) == (
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        )
    finally:
        template.close()


@pytest.mark.parametrize(("prompt", "answer", "count"), [
    ("Hi", "<think>\nWell é</think>\n\nYes", len("<think>\nWell é</think>".encode())),
    ("Hi<think>\n", "Well\n</think>Yes</think>", len("Well\n</think>")),
    ("Hi<think>\n", "Well, well", len("Well, well")),
    ("Hi<think></think>", "Yes</think>", 0),
    ("Hi", "Yes <think>no</think>", 0),
    ("Hi", "", 0),
])  # fmt: skip
def test_the_tokens_of_thoughts_are_counted(prompt: str, answer: str, count: int) -> None:
    tokenizer = ByteTokenizer()
    dialect = choose(tokenizer, "", reasoning_parser="deepseek_r1")
    assert dialect.thought_tokens(tokenizer.encode(prompt, False), tokenizer.encode(answer, False)) == count
