"""Everything about a model that is not its weights: vocabulary, template, end tokens, context length."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ropeway import hub
from ropeway.contract import SamplingParams
from ropeway.errors import ConfigError
from ropeway.modelspec import load_spec
from ropeway.text.dialect import Dialect, choose
from ropeway.text.template import ChatTemplate, load_template
from ropeway.text.tokenizer import HubTokenizer, Tokenizer


@dataclass(frozen=True, kw_only=True)
class ModelText:
    """`eos_ids` end an answer. `context_limit` is the longest prompt plus answer in tokens. `generation` holds the
    checkpoint's own sampling defaults. The parsers are names as in the server's settings."""

    name: str
    tokenizer: Tokenizer
    template: ChatTemplate | None
    eos_ids: tuple[int, ...]
    context_limit: int
    generation: Mapping[str, Any]
    tool_call_parser: str = "auto"
    reasoning_parser: str = "auto"

    @cached_property
    def dialect(self) -> Dialect:
        """How the model writes thoughts and calls of tools. Raises ConfigError if there is no such parser."""
        sources = self.template.sources.values() if self.template is not None else ()
        return choose(
            self.tokenizer,
            "\n".join(sources),
            tool_call_parser=self.tool_call_parser,
            reasoning_parser=self.reasoning_parser,
        )

    @property
    def sampling_defaults(self) -> SamplingParams:
        """What holds where a request says nothing: the checkpoint's generation_config.json, as in vLLM."""
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        own = {name: self.generation[name] for name in names if self.generation.get(name) is not None}
        return SamplingParams(**own)


def load_text(
    model: str,
    *,
    revision: str | None = None,
    download_dir: str | None = None,
    model_impl: str = "auto",
    tokenizer: str | None = None,
    chat_template: str | None = None,
    max_model_len: int | None = None,
    tool_call_parser: str = "auto",
    reasoning_parser: str = "auto",
) -> ModelText:
    """What the service needs of `model` ('bundled', a directory, or a hub name), without its weights.

    `tokenizer` names another directory or hub model for vocabulary and template, `chat_template` a file.
    Blocks, and may download. Raises ModelError or ConfigError.
    """
    directory = hub.locate(model, revision=revision, download_dir=download_dir, weights=False)
    spec = load_spec(directory, model, model_impl)
    words = directory if tokenizer is None else hub.tokenizer_directory(tokenizer, download_dir)
    vocabulary = HubTokenizer.load(words)
    if max_model_len is not None and max_model_len > spec.context_limit:
        raise ConfigError(
            f"max_model_len is {max_model_len}, but {model} is made for {spec.context_limit} tokens. Use "
            f"--max-model-len {spec.context_limit} or less.",
            param="max_model_len",
        )
    eos = [*spec.eos_ids, *([vocabulary.eos_id] if vocabulary.eos_id is not None else [])]
    return ModelText(
        name=model,
        tokenizer=vocabulary,
        template=load_template(words, chat_template),
        eos_ids=tuple(dict.fromkeys(eos)),
        context_limit=max_model_len or spec.context_limit,
        generation=spec.generation,
        tool_call_parser=tool_call_parser,
        reasoning_parser=reasoning_parser,
    )
