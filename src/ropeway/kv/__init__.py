"""Who holds which block of KV memory, and which blocks can be shared. Pure bookkeeping on integers."""

from ropeway.kv.keys import KeyChain
from ropeway.kv.pool import BlockPool
from ropeway.kv.tiers import Memory, PreemptionMode

__all__ = ["BlockPool", "KeyChain", "Memory", "PreemptionMode"]
