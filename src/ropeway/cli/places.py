"""Where commands put what they find: looked at before they begin, as some take minutes to find it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ropeway.errors import ConfigError


class Place:
    """A file to be written at the end, which `option` names. Folders on the way to it are made.

    Raises ConfigError if it cannot be written.
    """

    def __init__(self, path: Path, option: str, what: str = "result") -> None:
        self.path = path
        self._option = option
        self._what = what
        with self._told():
            path.parent.mkdir(parents=True, exist_ok=True)
            new = not path.exists()
            path.open("ab").close()
            if new:
                path.unlink()

    def write(self, text: str) -> None:
        """Raises ConfigError if the place cannot be written any more."""
        with self.written() as path:
            path.write_text(text, encoding="utf-8")

    @contextmanager
    def written(self) -> Iterator[Path]:
        """For what writes the file itself. The same error."""
        with self._told():
            yield self.path
        print(f"Saved to {self.path}", file=sys.stderr)

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigError(
                f"The {self._what} cannot be written to {self.path}: {error.strerror}. Check {self._option}."
            ) from None


def picture_place(path: Path, otherwise: str) -> Place:
    """The same for a picture. Raises ConfigError also if matplotlib is missing, where one can do what `otherwise`
    says, or does not know the kind of picture."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError:
        raise ConfigError(f"The picture needs matplotlib: pip install 'ropeway[plots]', or {otherwise}.") from None
    kinds = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix[1:].lower() not in kinds:
        raise ConfigError(f"--plot is {path}; its name must end with one of {', '.join(f'.{kind}' for kind in kinds)}.")
    return Place(path, "--plot", "picture")
