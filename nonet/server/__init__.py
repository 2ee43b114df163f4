"""The HTTP server: OpenAI's routes in front of the engine."""
