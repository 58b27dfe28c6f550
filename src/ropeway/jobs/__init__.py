"""Durable work that nobody waits for: what was accepted is done once, whatever is killed in between."""
