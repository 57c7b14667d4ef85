"""Inference engines for Reverse Reward: transformers or vLLM in this process, or a completions server."""
