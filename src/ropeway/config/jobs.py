"""Settings of durable work: files, batches, deferred requests, webhooks."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ropeway.config.option import option


@dataclass(frozen=True, kw_only=True)
class JobsConfig:
    """Where durable work is kept, and how it is done."""

    data_dir: str | None = option(
        None,
        "Jobs",
        "Directory for what must outlive the server: keys, usage, files, batches (default: ropeway in XDG_DATA_HOME, "
        "which is ~/.local/share if unset).",
    )

    @property
    def data_path(self) -> Path:
        """`data_dir` with its default."""
        if self.data_dir is not None:
            return Path(self.data_dir).expanduser()
        return Path(os.environ.get("XDG_DATA_HOME") or "~/.local/share").expanduser() / "ropeway"
