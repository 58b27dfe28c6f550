"""Durable tables: SQLite, one writer, one transaction for each change of state."""

from ropeway.store.database import Database, Schema
from ropeway.store.failures import translated

__all__ = ["Database", "Schema", "translated"]
