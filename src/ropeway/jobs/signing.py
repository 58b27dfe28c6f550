"""The secrets that events are signed with, by Standard Webhooks.

A secret is `whsec_` and 24 to 64 random bytes in base64. While one replaces another, events carry a signature of each,
and receivers accept either.
Source: https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md.
"""

from __future__ import annotations

import base64
import contextlib
import hmac
import os
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from ropeway.config.jobs import JobsConfig
from ropeway.errors import ConfigError
from ropeway.store import translated

_PREFIX: Final = "whsec_"
_FILE: Final = "webhook_secret"


def signature(keys: Sequence[str], event: str, timestamp: int, body: bytes) -> str:
    """The header `webhook-signature`: one signature with each secret of `keys`, over the id, the time and the body."""
    signed = f"{event}.{timestamp}.".encode() + body
    return " ".join("v1," + base64.b64encode(hmac.digest(_bytes(key), signed, "sha256")).decode() for key in keys)


class Keyring:
    """The secrets of a server, the newest first: those that the operator gave, else those in its data directory, which
    are read anew each time and made when they are first asked for. Raises ConfigError for one that is none."""

    def __init__(self, config: JobsConfig) -> None:
        self._given = _listed((config.webhook_secret or "").split(","), "--webhook-secret")
        self.path = config.data_path / _FILE

    @property
    def given(self) -> bool:
        """Whether they are the operator's, so that the file does not count."""
        return bool(self._given)

    def secrets(self) -> list[str]:
        """At least one. Raises StorageError and ConfigError."""
        if self._given:
            return self._given
        with translated(self.path):
            if not self.path.exists():
                # Whoever links first, of a server and a command that start together, makes the secret of both.
                with contextlib.suppress(FileExistsError):
                    self._put([new_secret()], os.link)
            lines = self.path.read_bytes().decode("ascii", "replace").splitlines()
        found = _listed(lines, str(self.path))
        if not found:
            raise ConfigError(f"{self.path} is empty. Put a secret into it, or remove it to get a new one.")
        return found

    def rotate(self) -> list[str]:
        """Put a new secret before the newest one of the file, and drop those before that. Raises like `secrets`."""
        changed = [new_secret(), *self.secrets()[:1]]
        with translated(self.path):
            self._put(changed, os.replace)
        return changed

    def _put(self, lines: Sequence[str], place: Callable[[Path, Path], None]) -> None:
        """Write the file aside, for nobody else to read, and `place` it as a whole."""
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        aside = self.path.with_name(f".{_FILE}.{secrets.token_hex(8)}")
        try:
            with open(os.open(aside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w", encoding="ascii") as file:
                file.writelines(line + "\n" for line in lines)
                file.flush()
                os.fsync(file.fileno())
            place(aside, self.path)
        finally:
            aside.unlink(missing_ok=True)


def new_secret() -> str:
    return _PREFIX + base64.b64encode(secrets.token_bytes(32)).decode()


def _listed(lines: Sequence[str], where: str) -> list[str]:
    """The secrets among `lines`. Raises ConfigError, without showing anything of them."""
    found = [line.strip() for line in lines if line.strip()]
    for number, secret in enumerate(found, 1):
        try:
            size = len(_bytes(secret))
        except ValueError:
            size = 0
        if not secret.startswith(_PREFIX) or not 24 <= size <= 64:
            raise ConfigError(
                f"Secret {number} of {where} is not {_PREFIX} and 24 to 64 bytes in base64. `ropeway webhooks secret` "
                "shows one that is.",
                param="webhook_secret",
            )
    return found


def _bytes(secret: str) -> bytes:
    return base64.b64decode(secret.removeprefix(_PREFIX), validate=True)
