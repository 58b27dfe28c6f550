"""Settings of a server with several models."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RoutesConfig:
    """Which deployments there are, and who gets which."""
