"""Mistral 7B and its kin (Jiang et al. 2023): Llama's decoder with sliding-window attention, which `ModelSpec.windows`
tells the attention back end."""

from __future__ import annotations

from ropeway.runtime.models.llama import Llama


class Mistral(Llama):
    """Differs from Llama by its windows alone."""
