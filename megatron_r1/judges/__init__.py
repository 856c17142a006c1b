"""Models and functions that judge answers or rewrite them: served by an OpenAI-compatible server, or the user's own."""
