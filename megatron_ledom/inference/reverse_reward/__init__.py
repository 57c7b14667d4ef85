"""Reverse Reward (LEDOM, arXiv 2507.01335): scores of candidates, step-level search, and files of ranked candidates."""
