"""Pretraining of reverse language models on megatron-core: text to shards, training, export, Reverse Reward."""

__version__ = "0.1.0"
