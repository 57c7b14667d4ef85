"""Keys and values of prompts, so that a model reads a prompt once for all of its continuations.

Shapes: H heads, S positions, D width of a head.
"""

from typing import Any

import torch
from transformers import DynamicCache

Cache = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values of one row, [H, S, D] each, one pair for each layer."""


def read_caches(model: Any, sequences: list[list[int]]) -> list[Cache]:
    """Return the cache of each sequence (model order) from one forward pass; an empty one for an empty sequence.

    The cache is one that keeps all positions: a model's own keeps the last ones of a sliding window, and in shorter rows of the
    batch these are padding.
    """
    longest = max(map(len, sequences), default=0)
    if not longest:
        return [[] for _ in sequences]
    input_ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    for row, tokens in enumerate(sequences):
        input_ids[row, : len(tokens)] = torch.tensor(tokens)
    cache = DynamicCache()
    model(input_ids=input_ids.to(model.device), use_cache=True, past_key_values=cache, logits_to_keep=1)
    return [row_of_cache(cache, row, 0, len(tokens)) for row, tokens in enumerate(sequences)]


def row_of_cache(cache: Any, row: int, begin: int, end: int) -> Cache:
    """Return the positions [begin, end) of one row of a cache."""
    return [(layer.keys[row, :, begin:end], layer.values[row, :, begin:end]) for layer in cache.layers]


def padded_cache(caches: list[Cache], length: int) -> DynamicCache:
    """Return the caches of the rows as one of `length` positions, padded before their beginning; it will keep all positions."""
    cache = DynamicCache()
    if not length:
        return cache
    model_layers = max(map(len, caches))
    example = next(c for c in caches if c)
    for layer in range(model_layers):
        pair = []
        for side in (0, 1):
            shape = example[layer][side].shape
            joined = example[layer][side].new_zeros(len(caches), shape[0], length, shape[2])
            for row, own in enumerate(caches):
                if own:
                    joined[row, :, length - own[layer][side].shape[1] :] = own[layer][side]
            pair.append(joined)
        cache.update(pair[0], pair[1], layer)
    return cache
