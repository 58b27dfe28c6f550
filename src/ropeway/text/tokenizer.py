"""Text to token ids and back."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ropeway.errors import ModelError, RequestError
from ropeway.text.detokenizer import DecodeRule, IncrementalDecoder, PieceDecoder, Pieces, compile_rule

if TYPE_CHECKING:
    import tokenizers


PairLimits = tuple[int | None, int | None]
"""The most tokens that the texts of a pair may have; None is no limit."""


class Tokenizer(Protocol):
    """A vocabulary and its rules. Stateless and safe to use from several threads."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""

    @property
    def bos_id(self) -> int | None: ...

    @property
    def eos_id(self) -> int | None: ...

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that `skip_special_tokens` leaves out of texts."""

    @property
    def max_chars(self) -> int | None:
        """No token stands for more than this many characters of input; None where there is no such limit."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids. With `add_special_tokens` the vocabulary's own beginning and end marks are added.
        Raises RequestError for text that is not valid Unicode."""

    def encode_pair(
        self, first: str, second: str, most: int | None = None, limits: PairLimits = (None, None)
    ) -> tuple[list[int], int]:
        """Two texts as one prompt, with the vocabulary's own marks around and between them, and where the second one
        begins: 0 if the vocabulary gives both the same segment. `limits` cut the end of each to so many tokens, and
        `most` that of the second one so that there are at most so many in all. Raises RequestError if that leaves
        nothing of it, or for text that is not valid Unicode."""

    def decoder(
        self, skip_special_tokens: bool = True, *, starts: bool = True, shown: frozenset[int] = frozenset()
    ) -> IncrementalDecoder:
        """A decoder of one text. `starts` is false for text that continues another one, whose first space counts.
        `shown` are special tokens that are not skipped."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """A whole text at once."""

    def token_id(self, token: str) -> int | None:
        """The token that the vocabulary writes so."""

    def token_string(self, token_id: int) -> str:
        """The token as the vocabulary writes it; empty if there is none."""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that the token adds to a text."""


class _Table(ABC):
    """What all vocabularies share: pieces, and decoders over them. Subclasses give the strings."""

    def __init__(self, rule: DecodeRule, special_ids: frozenset[int]) -> None:
        self._rule = rule
        self.special_ids = special_ids
        self._tables: dict[frozenset[int], tuple[Pieces, Pieces | None]] = {}

    def decoder(
        self, skip_special_tokens: bool = True, *, starts: bool = True, shown: frozenset[int] = frozenset()
    ) -> IncrementalDecoder:
        pieces, first = self._without(self.special_ids - shown if skip_special_tokens else frozenset())
        return PieceDecoder(pieces, self._rule, first, starts=starts)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        decoder = self.decoder(skip_special_tokens)
        return decoder.push(ids) + decoder.flush()

    def token_string(self, token_id: int) -> str:
        return self._token(token_id) or ""

    def token_bytes(self, token_id: int) -> bytes:
        return self._without(frozenset())[0][token_id]

    def _without(self, skip: frozenset[int]) -> tuple[Pieces, Pieces | None]:
        if skip not in self._tables:
            first = self._rule.first
            self._tables[skip] = (
                Pieces(self._token, self._rule.piece, skip),
                Pieces(self._token, first, skip) if first is not None else None,
            )
        return self._tables[skip]

    @abstractmethod
    def _token(self, token_id: int) -> str | None:
        """The token as the tokenizer writes it; None if there is none of that number."""


class HubTokenizer(_Table):
    """A tokenizer.json, read by Hugging Face's `tokenizers`."""

    def __init__(
        self, tokenizer: tokenizers.Tokenizer, *, bos_id: int | None = None, eos_id: int | None = None
    ) -> None:
        # A checkpoint may carry the truncation of its training run; a prompt is never cut silently here.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._settings: dict[str, Any] = json.loads(tokenizer.to_str())
        self.bos_id = bos_id
        self.eos_id = eos_id
        added = tokenizer.get_added_tokens_decoder()
        self.vocab_size = max(tokenizer.get_vocab_size(with_added_tokens=True), max(added, default=-1) + 1)
        super().__init__(
            compile_rule(self._settings.get("decoder")),
            frozenset(token_id for token_id, token in added.items() if token.special),
        )

    @classmethod
    def load(cls, directory: Path) -> HubTokenizer:
        """The tokenizer of a model directory: tokenizer.json, and from tokenizer_config.json which of its tokens begin
        and end a text. Raises ModelError."""
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise ModelError(
                f"{directory} has no tokenizer.json. Make one with "
                "`transformers.AutoTokenizer.from_pretrained(...).save_pretrained(...)`, or give another --tokenizer."
            )
        import tokenizers

        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises bare Exception
            raise ModelError(f"{path} cannot be read: {error}. Download it again.") from None
        special = special_tokens(read_settings(directory))
        bos, eos = (special.get(name) for name in ("bos_token", "eos_token"))
        return cls(
            tokenizer,
            bos_id=tokenizer.token_to_id(bos) if bos is not None else None,
            eos_id=tokenizer.token_to_id(eos) if eos is not None else None,
        )

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        _check_unicode(text)
        # The batch call, because it leaves the interpreter lock while it works and skips offsets that nobody reads.
        batch = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = batch[0].ids
        return ids

    def encode_pair(
        self, first: str, second: str, most: int | None = None, limits: PairLimits = (None, None)
    ) -> tuple[list[int], int]:
        for text in (first, second):
            _check_unicode(text)
        one, two = self._tokenizer.encode_batch_fast([first, second], add_special_tokens=False)
        if limits[0] is not None:
            one.truncate(limits[0])
        marks = self._tokenizer.num_special_tokens_to_add(is_pair=True)
        room = _room(most, len(one.ids) + marks, limits[1])
        if room is not None:
            two.truncate(room)
        both = self._tokenizer.post_process(one, two)
        ids: list[int] = both.ids
        return ids, next((i for i, segment in enumerate(both.type_ids) if segment), 0)

    @cached_property
    def max_chars(self) -> int | None:
        model = self._settings.get("model") or {}
        splitter = json.dumps(self._settings.get("pre_tokenizer"))
        if not model.get("byte_fallback") and '"ByteLevel"' not in splitter:
            return None  # an unknown token may then stand for any amount of text
        longest = max(map(len, self._tokenizer.get_vocab()), default=1)
        # Unicode normalization composes up to three characters into one; other normalizers do not shorten so much.
        return longest * (1 if self._settings.get("normalizer") is None else 4)

    def token_id(self, token: str) -> int | None:
        found: int | None = self._tokenizer.token_to_id(token)
        return found

    def _token(self, token_id: int) -> str | None:
        if not 0 <= token_id < self.vocab_size:
            return None
        token: str | None = self._tokenizer.id_to_token(token_id)
        return token


class ByteTokenizer(_Table):
    """One token for each byte of UTF-8, and two special ones: 256 begins and 257 ends a text.

    For tests and for servers without a model: no file, no training, and every string is representable.
    """

    BOS, EOS = 256, 257

    def __init__(self) -> None:
        self.vocab_size = 258
        self.bos_id: int | None = self.BOS
        self.eos_id: int | None = self.EOS
        self.max_chars: int | None = 1
        super().__init__(DecodeRule(_latin1_or_special), frozenset((self.BOS, self.EOS)))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        _check_unicode(text)
        return [self.BOS, *text.encode()] if add_special_tokens else list(text.encode())

    def encode_pair(
        self, first: str, second: str, most: int | None = None, limits: PairLimits = (None, None)
    ) -> tuple[list[int], int]:
        start = [self.BOS, *self.encode(first, False)[: limits[0]], self.EOS]
        return [*start, *self.encode(second, False)[: _room(most, len(start), limits[1])]], len(start)

    def token_id(self, token: str) -> int | None:
        special = {"<|begin|>": self.BOS, "<|end|>": self.EOS}
        return special.get(token, ord(token) if len(token) == 1 and ord(token) < 256 else None)

    def _token(self, token_id: int) -> str | None:
        if 0 <= token_id < 256:
            return chr(token_id)
        return {self.BOS: "<|begin|>", self.EOS: "<|end|>"}.get(token_id)


def _latin1_or_special(token: str) -> bytes:
    return token.encode("latin-1")


def _room(most: int | None, taken: int, limit: int | None) -> int | None:
    """Tokens that the second text of a pair may have."""
    if most is None:
        return limit
    if taken >= most:
        raise RequestError(
            f"The query has {taken} tokens with the marks around it, which leaves no room for a document within {most} "
            "tokens. Shorten it.",
            param="query",
        )
    return most - taken if limit is None else min(most - taken, limit)


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"The text has half a surrogate pair at character {error.start}, which is not valid Unicode. "
            "Send whole characters.",
            param="prompt",
        ) from None


def read_settings(directory: Path) -> dict[str, Any]:
    """tokenizer_config.json, completed by special_tokens_map.json; empty if there is neither. Raises ModelError."""
    merged: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = directory / name
        if not path.is_file():
            continue
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ModelError(f"{path} cannot be read: {error}. Download it again.") from None
        if not isinstance(data, dict):
            raise ModelError(f"{path} must be a JSON object, not a {type(data).__name__}. Download it again.")
        merged.update({key: value for key, value in data.items() if value is not None})
    return merged


def special_tokens(settings: dict[str, Any]) -> dict[str, str]:
    """The named special tokens (`bos_token`, `eos_token`, ...) of a tokenizer_config.json, as strings."""
    found: dict[str, str] = {}
    for key, value in settings.items():
        content = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(content, str):
            found[key] = content
    return found
