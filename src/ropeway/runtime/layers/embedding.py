"""Token ids to vectors."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


class Embedding:
    """`weight` (vocab, hidden). Ids must be within the vocabulary."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __call__(self, token_ids: Tensor) -> Tensor:
        """(T,) int64 to (T, hidden), a new tensor."""
        return functional.embedding(token_ids, self.weight)
