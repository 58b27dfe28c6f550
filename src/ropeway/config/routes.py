"""Settings of a server with several models."""

from __future__ import annotations

from dataclasses import dataclass

from ropeway.config.option import option


@dataclass(frozen=True, kw_only=True)
class RoutesConfig:
    """Which deployments there are, and who gets which."""

    routes: str | None = option(
        None,
        "Routes",
        "YAML file with several models and other servers to serve, and which requests go where (default: one model).",
    )
