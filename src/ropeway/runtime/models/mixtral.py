"""Mixtral (Jiang et al. 2024): Mistral with experts in all layers."""

from __future__ import annotations

from ropeway.runtime.models.mixture import Mixture


class Mixtral(Mixture):
    """Differs from others with experts by the names of their tensors, which the spec knows."""
