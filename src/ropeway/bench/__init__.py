"""Load tools: measure any OpenAI-compatible server, or the engine in this process."""
