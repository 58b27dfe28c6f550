"""Durable tables: SQLite, one writer, one transaction for each change of state."""

from ropeway.store.database import Database, Schema

__all__ = ["Database", "Schema"]
