"""Reverse Reward (LEDOM, arXiv 2507.01335): scores of candidates, search by steps, and files of rankings."""
