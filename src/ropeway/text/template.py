"""Chat templates: from a conversation to the text that the model was trained on.

Rendering happens in a worker process (`template_worker`): it is started at first use, kept, and replaced when a
template had to be killed at its deadline.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from ropeway.errors import ModelError, OverloadedError, RequestError, TemplateError
from ropeway.text.sandbox import Sandbox, SandboxError
from ropeway.text.tokenizer import read_settings, special_tokens

_TAG = "ROPEWAY_ANSWER_CONTINUES "
_REASONING = ("reasoning_content", "thinking", "reasoning")
_ASKS_FOR_NONE = re.compile(r"content['\"]?\]?\s+is\s+(not\s+)?none", re.IGNORECASE)
_OWN = frozenset(
    ("messages", "add_generation_prompt", "continue_final_message", "chat_template", "conversation", "tokenize",
     "return_dict", "return_tensors", "return_assistant_tokens_mask", "padding", "truncation", "max_length")
)  # fmt: skip


@dataclass(frozen=True)
class TemplateLimits:
    """What one rendering may take: seconds (of work, and of waiting for others), characters of output, and the worker's
    address space in bytes."""

    deadline: float = 2.0
    patience: float = 10.0
    max_output: int = 32 * 1024 * 1024
    max_memory: int = 1024 * 1024 * 1024


class ChatTemplate:
    """The chat template of one model. Safe to use from several threads; renders one conversation at a time.

    `sources` are the template by name; "default" is used unless the conversation has tools and there is a "tool_use".
    `special` are the tokens that the template may name (`bos_token`, ...).
    """

    def __init__(
        self,
        sources: str | Mapping[str, str],
        special: Mapping[str, str] | None = None,
        *,
        limits: TemplateLimits | None = None,
    ) -> None:
        self.sources = {"default": sources} if isinstance(sources, str) else dict(sources)
        self.special = dict(special or {})
        self.limits = limits or TemplateLimits()
        self._worker = _Worker(self.sources, self.limits)
        self._thread: ThreadPoolExecutor | None = None

    def reads(self, variable: str) -> bool:
        """Whether a source mentions a variable of that name."""
        return any(re.search(rf"\b{re.escape(variable)}\b", source) for source in self.sources.values())

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as text. `variables` are further names for the template to read, such as `tools` or
        `enable_thinking`. With `continue_final_message` the text ends where the last message does, so that the answer
        goes on from there. Blocks. Raises TemplateError or RequestError."""
        name, context, final = self._prepare(messages, add_generation_prompt, continue_final_message, variables)
        text = self._worker.render(name, context)
        return text if final is None else _cut_at_tag(text, final)

    async def render_async(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """`render` without blocking the event loop. Raises OverloadedError if it has to wait too long for its turn."""
        asked = time.monotonic()

        def work() -> str:
            if time.monotonic() - asked > self.limits.patience:
                raise OverloadedError(
                    f"The chat template was busy for more than {self.limits.patience:g} s. Try again later.",
                    retry_after=1.0,
                )
            return self.render(
                messages,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                variables=variables,
            )

        return await asyncio.get_running_loop().run_in_executor(self._executor(), work)

    def check(self) -> None:
        """Compile all sources. Blocks. Raises ModelError for one that is no template; whatever else may be wrong shows
        when it is used."""
        for name in self.sources:
            problem = self._worker.check(name)
            if problem:
                self.close()
                which = "" if name == "default" else f" {name!r}"
                raise ModelError(
                    f"The model's chat template{which} cannot be compiled: {problem}. Correct it, or give another with "
                    "--chat-template."
                )

    def warm(self) -> None:
        """Start the worker in the background, so that the first conversation need not wait for it."""
        self._executor().submit(self._worker.start)

    def _executor(self) -> ThreadPoolExecutor:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="chat-template")
        return self._thread

    def close(self) -> None:
        """End the worker. Rendering again starts a new one."""
        self._worker.stop()
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)
            self._thread = None

    def _prepare(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        continue_final_message: bool,
        variables: Mapping[str, Any] | None,
    ) -> tuple[str, dict[str, Any], str | None]:
        variables = dict(variables or {})
        tools = variables.pop("tools", None)
        documents = variables.pop("documents", None)
        for key in variables:
            if key in _OWN or key in self.special or not key.isidentifier():
                raise RequestError(
                    f"chat_template_kwargs may not set {key!r}. Remove it.", param="chat_template_kwargs"
                )
        if not messages:
            raise TemplateError("The conversation is empty. Send at least one message.", param="messages")
        if continue_final_message and add_generation_prompt:
            raise RequestError(
                "continue_final_message excludes add_generation_prompt. Set the latter to false.",
                param="continue_final_message",
            )
        name = "tool_use" if tools and "tool_use" in self.sources else "default"
        if name not in self.sources:
            raise TemplateError(
                f"The model has several chat templates ({', '.join(self.sources)}) but none named 'default'. "
                "Give one with --chat-template."
            )
        chat = [_with_reasoning(message) for message in messages]
        if _ASKS_FOR_NONE.search(self.sources[name]):
            chat = [_without_content(message) for message in chat]
        final = _mark_final(chat) if continue_final_message else None
        context = {
            **self.special,
            **variables,
            "messages": chat,
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt,
        }
        return name, context, final


def _with_reasoning(message: Mapping[str, Any]) -> dict[str, Any]:
    """Reasoning under each name that templates read it by."""
    reasoning = next((message[key] for key in _REASONING if message.get(key) is not None), None)
    if reasoning is None:
        return dict(message)
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _without_content(message: dict[str, Any]) -> dict[str, Any]:
    """Calls and nothing said have no content, and not an empty one, to templates that tell these apart."""
    silent = bool(message.get("tool_calls")) and not message.get("content")
    return {**message, "content": None} if silent else message


def _mark_final(chat: list[dict[str, Any]]) -> str:
    """Put the tag behind the last message's text, and return that text."""
    content = chat[-1].get("content")
    if isinstance(content, str):
        chat[-1]["content"] = content + _TAG
        return content
    if isinstance(content, list):
        for at in range(len(content) - 1, -1, -1):
            if isinstance(content[at], dict) and isinstance(content[at].get("text"), str):
                text: str = content[at]["text"]
                chat[-1]["content"] = [*content[:at], {**content[at], "text": text + _TAG}, *content[at + 1 :]]
                return text
    raise TemplateError(
        "continue_final_message is set, but the last message has no text to continue. Give it a content.",
        param="messages",
    )


def _cut_at_tag(text: str, final: str) -> str:
    at = text.rfind(_TAG.strip())
    if at < 0 or final.strip() not in text:
        raise TemplateError(
            "continue_final_message is set, but the chat template does not show the last message as it is. "
            "Use add_generation_prompt instead.",
            param="continue_final_message",
        )
    # A template that trims messages has taken the tag's own space away; then the message's end is trimmed as well.
    return text[:at] if text.startswith(_TAG, at) else text[:at].rstrip()


class _Worker:
    """Renders in a process of its own, and says in words what went wrong there."""

    def __init__(self, sources: dict[str, str], limits: TemplateLimits) -> None:
        settings = {
            "sources": sources,
            "deadline": limits.deadline,
            "max_output": limits.max_output,
            "max_memory": limits.max_memory,
        }
        script = Path(__file__).with_name("template_worker.py")
        self._sandbox = Sandbox(script, msgspec.msgpack.encode(settings), limits.deadline)
        self._limits = limits
        self.start, self.stop = self._sandbox.start, self._sandbox.stop

    def render(self, name: str, context: dict[str, Any]) -> str:
        try:
            job = msgspec.msgpack.encode((name, context))
        except (UnicodeEncodeError, TypeError, OverflowError, RecursionError) as error:
            raise TemplateError(
                f"The conversation cannot be given to the chat template: {error}. Send plain JSON with valid Unicode.",
                param="messages",
            ) from None
        kind, text = self._ask(job)
        if kind == "ok":
            return text
        if kind == "refused":
            raise TemplateError(
                f"The chat template refused these messages: {text.rstrip('.!')}. Send them as this model wants them.",
                param="messages",
            )
        what = {
            "late": f"took longer than {self._limits.deadline:g} s and was stopped",
            "large": f"made {text}",
            "memory": f"needed more than {self._limits.max_memory // 2**20} MiB of memory",
            "gone": "ended its process",
        }.get(kind, f"failed: {text}")
        raise TemplateError(
            f"The model's chat template {what}. Check the messages, or give another template with --chat-template.",
            param="messages",
        )

    def check(self, name: str) -> str:
        """What is wrong with a source as such; empty if nothing is, or if that cannot be found out now."""
        kind, text = self._ask(msgspec.msgpack.encode((name, None)))
        return text if kind == "error" else ""

    def _ask(self, job: bytes) -> tuple[str, str]:
        try:
            return msgspec.msgpack.decode(self._sandbox.ask(job), type=tuple[str, str])
        except SandboxError as error:
            return ("late" if error.late else "gone"), ""


def load_template(
    directory: Path, override: str | None = None, *, limits: TemplateLimits | None = None
) -> ChatTemplate | None:
    """The chat template of a model directory, or of the file `override`. None if the model has none.

    Looked for in this order: `override`, chat_template.jinja (others in additional_chat_templates/*.jinja),
    `chat_template` in tokenizer_config.json (a text, or a list of named ones), chat_template.json. Raises ModelError.
    """
    settings = read_settings(directory)
    sources: dict[str, str] = {}
    if override is not None:
        sources["default"] = _read_text(Path(override).expanduser(), "Check --chat-template.")
    elif (directory / "chat_template.jinja").is_file():
        sources["default"] = _read_text(directory / "chat_template.jinja", "Check the model directory.")
        for path in sorted((directory / "additional_chat_templates").glob("*.jinja")):
            sources[path.stem] = _read_text(path, "Check the model directory.")
    else:
        given = settings.get("chat_template")
        path = directory / "chat_template.json"
        if given is None and path.is_file():
            try:
                given = json.loads(_read_text(path, "Check the model directory.")).get("chat_template")
            except (ValueError, AttributeError) as error:
                raise ModelError(f"{path} is damaged: {error}. Download it again.") from None
        sources = _named(given, directory)
    return ChatTemplate(sources, special_tokens(settings), limits=limits) if sources else None


def _named(given: Any, directory: Path) -> dict[str, str]:
    if given is None:
        return {}
    if isinstance(given, str):
        return {"default": given}
    if isinstance(given, dict):
        given = [{"name": name, "template": source} for name, source in given.items()]
    try:
        sources = {entry["name"]: entry["template"] for entry in given}
    except (TypeError, KeyError):
        sources = {}
    if not sources or not all(isinstance(text, str) for pair in sources.items() for text in pair):
        raise ModelError(
            f"chat_template in {directory} is neither a text nor a list of named texts. Give one with --chat-template."
        )
    return sources


def _read_text(path: Path, advice: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ModelError(f"The chat template {path} cannot be read: {error.strerror}. {advice}") from None
    except UnicodeDecodeError as error:
        raise ModelError(f"The chat template {path} is no text: byte {error.start} is not UTF-8. {advice}") from None
