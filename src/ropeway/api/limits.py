"""Bounds on a request that hold before anything is built from it."""

from __future__ import annotations

from typing import Final

from ropeway.api.errors import HttpError

MAX_DEPTH: Final = 64
"""Levels of nested arrays and objects in a body."""

MAX_STRINGS: Final = 100_000
"""Strings in a body, names of fields included."""

MAX_FIELDS: Final = 1000
"""Fields of a body itself, known or not."""

MAX_ELEMENTS: Final = 400_000
"""Array elements and object members in a body, so that a short text cannot become many Python objects."""

MAX_MESSAGES: Final = 4096
MAX_CONTENT_PARTS: Final = 4096
MAX_SEQUENCES: Final = 128
"""Prompts times `n`: the requests that one body may fan out into."""

MAX_STOP_STRINGS: Final = 16
MAX_STOP_LENGTH: Final = 256
MAX_STOP_TOKENS: Final = 128
MAX_LOGIT_BIAS: Final = 1024
MAX_ALLOWED_TOKENS: Final = 1024
MAX_BAD_WORDS: Final = 128
MAX_LOGPROBS: Final = 1000
"""Alternatives for each token that `--max-logprobs` may allow at most."""

MAX_TOOLS: Final = 128
MAX_DOCUMENTS: Final = 256
MAX_LABEL: Final = 512
"""Characters of cache_salt and the like."""

MAX_METADATA: Final = 16
MAX_TEMPLATE_KWARGS: Final = 16
BODY_SECONDS: Final = 60.0
"""A body must have arrived after this time."""

FILE_SECONDS: Final = 3600.0
"""An uploaded file must have; of it too something must arrive every `BODY_SECONDS`."""

_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_OPENING = frozenset(b"[{")


def check_shape(body: bytes) -> None:
    """Refuse what is not UTF-8, and JSON that nests too deeply or has too many parts, by scans that are linear in its
    length.

    Works on a skeleton without strings. Says nothing about whether the JSON is valid. Raises HttpError (400).
    """
    # Without escaped backslashes and escaped quotes, every quote opens or closes a string.
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"") if b"\\" in body else body
    if plain.count(b'"') > 2 * MAX_STRINGS:
        raise HttpError(400, f"The body has more than {MAX_STRINGS} strings. Send less in one request.")
    skeleton = b"".join(plain.split(b'"')[::2])
    brackets = skeleton.translate(None, _NOT_BRACKETS)
    elements = max(skeleton.count(b","), len(brackets) // 2)
    if elements > MAX_ELEMENTS:
        raise HttpError(400, f"The body has {elements} elements; at most {MAX_ELEMENTS} are accepted in one request.")
    depth = 0
    for bracket in brackets:
        if bracket in _OPENING:
            depth += 1
            if depth > MAX_DEPTH:
                raise HttpError(400, f"The body nests deeper than {MAX_DEPTH} levels. Flatten it.")
        else:
            depth -= 1
    try:
        body.isascii() or body.decode()
    except UnicodeDecodeError as error:
        raise HttpError(
            400, f"The body is not valid UTF-8: byte {error.start} is {body[error.start]:#x}. Encode it so."
        ) from None
