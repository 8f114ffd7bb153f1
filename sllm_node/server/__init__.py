"""The HTTP edge: OpenAI's endpoints, admin, health, metrics."""
