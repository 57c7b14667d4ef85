"""The HTTP server `ledom serve`: completions, scores, rewards and rankings of a reverse model and its forward twin (extra `serve`)."""
