"""The engine watches itself: what it looks like now, and the lives of its requests."""
