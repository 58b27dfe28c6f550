"""Addresses of servers, as users type them."""

from __future__ import annotations

from urllib.parse import SplitResult, urlsplit


def http_address(url: str) -> SplitResult | None:
    """The parts of `url`; None if it is no http:// or https:// address that can be asked."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises for one that is no number, or too large
        (parts.hostname or "").encode("idna")  # raises for 127.0.0..1
    except ValueError:
        return None
    return parts if parts.scheme in ("http", "https") and parts.hostname and url.isprintable() else None
