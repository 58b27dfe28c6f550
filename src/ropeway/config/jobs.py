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

    max_file_mib: float = option(200.0, "Jobs", "Largest file that may be uploaded, in MiB.", low=0.001)
    max_batch_requests: int = option(50_000, "Jobs", "Requests that a batch may have.", low=1)
    max_jobs: int = option(100_000, "Jobs", "Deferred requests that may be unanswered; more are refused.", low=1)
    job_concurrency: int | None = option(
        None, "Jobs", "Requests of jobs that are computed at a time (default: as many as the engine has seats).", low=1
    )
    job_retention: float = option(72.0, "Jobs", "Hours that a deferred request is kept after it has ended.", low=0.0)

    redis_url: str | None = option(
        None,
        "Redis",
        "Redis over which servers share their jobs, such as redis://host:6379/0, rediss://... or unix://path. With a "
        "password, better in ROPEWAY_REDIS_URL.",
        secret=True,
    )
    redis_prefix: str = option(
        "ropeway", "Redis", "What the keys in Redis begin with: servers share what has the same prefix."
    )
    redis_window: int = option(
        128, "Redis", "Requests of this server that are on offer to the others at a time.", low=1, high=65536
    )

    webhook_url: str | None = option(
        None,
        "Webhooks",
        "URL that hears of everything that ends, besides the callback_url of requests and batches.",
        secret=True,
    )
    webhook_secret: str | None = option(
        None,
        "Webhooks",
        "Secrets to sign events with (whsec_...), the newest first, by commas (default: one in --data-dir, made at the "
        "first need).",
        secret=True,
    )
    webhook_allow: str | None = option(
        None, "Webhooks", "Host names, addresses and networks that events may go to though they are not public."
    )
    webhook_allow_http: bool = option(False, "Webhooks", "Send events to http URLs too.")
    webhook_ports: str = option("80,443,8443", "Webhooks", "Ports and ranges of them that events may go to.")

    @property
    def data_path(self) -> Path:
        """`data_dir` with its default."""
        if self.data_dir is not None:
            return Path(self.data_dir).expanduser()
        return Path(os.environ.get("XDG_DATA_HOME") or "~/.local/share").expanduser() / "ropeway"
