"""Errors of SQLite and of the file system, as ours."""

from __future__ import annotations

import contextlib
import errno
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from ropeway.errors import StorageError

_FULL = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)
_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
_AGAIN_SECONDS = 5.0


@contextlib.contextmanager
def translated(path: Path) -> Iterator[None]:
    """Work on `path`. Raises StorageError for what the disk or SQLite refuses; a constraint of a table that is broken
    (`sqlite3.IntegrityError`) is the caller's own affair."""
    try:
        yield
    except OSError as error:
        where = error.filename or path
        hint = "Free some space, or take" if error.errno in _SPACE else "Take"
        raise StorageError(
            f"{where} cannot be read or written: {error.strerror}. {hint} another --data-dir.",
            retry_after=_AGAIN_SECONDS,
        ) from error
    except sqlite3.IntegrityError:
        raise
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        hint = "Free some space." if code in _FULL else "Look at the file, or take another --data-dir."
        raise StorageError(f"{path.name}: {error}. {hint}", retry_after=_AGAIN_SECONDS) from error
