"""Places at which a test can make this process die, stop or fail, as a power cut or a bug would.

`ROPEWAY_FAILPOINT=name:action[:n][,...]` is read once, at import. Actions: `kill` (SIGKILL to itself), `stop` (SIGSTOP,
until somebody sends SIGCONT), `raise` (an OSError: no space left), `sleep` (a tenth of a second). With `n` the action
is taken at the n-th passage only, without at every one. Without the variable a passage is one call of an empty
function.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from typing import Final

from ropeway.errors import ConfigError

NAMES: Final = frozenset(
    {"claim", "dispatch", "result", "committed", "load", "finalise", "rename", "webhook", "charge"}
)
"""After a lease is on the disk; before the call is made; with an answer that is not committed yet; after it is; between
two portions of a batch's lines; before a batch's files are written; before a file gets its name; between a webhook's
delivery and the record of it; between the entry of charges in the usage of keys and the record of that."""


def armed(setting: str) -> Callable[[str], None]:
    """The function that takes the actions of `setting`. Raises ConfigError if it names nothing that exists."""
    actions: dict[str, tuple[str, int]] = {}
    for part in setting.split(","):
        name, _, rest = part.partition(":")
        action, _, number = rest.partition(":")
        if name not in NAMES or action not in _ACTIONS or not (number or "1").isdigit():
            raise ConfigError(
                f"ROPEWAY_FAILPOINT={part!r}: write name:action or name:action:n, with a name of "
                f"{', '.join(sorted(NAMES))} and an action of {', '.join(_ACTIONS)}."
            )
        actions[name] = (action, int(number or 0))
    passed: Counter[str] = Counter()

    def act(name: str) -> None:
        if name in actions:
            passed[name] += 1
            action, number = actions[name]
            if number in (0, passed[name]):
                _ACTIONS[action]()

    return act


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _raise() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _sleep() -> None:
    time.sleep(0.1)


_ACTIONS: Final = {"kill": _kill, "stop": _stop, "raise": _raise, "sleep": _sleep}


def _unarmed(name: str) -> None:
    """Nothing happens here."""


_setting = os.environ.get("ROPEWAY_FAILPOINT", "")
failpoint: Callable[[str], None] = armed(_setting) if _setting else _unarmed
"""Pass the place `name`."""
