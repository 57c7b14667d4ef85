"""Fine-tuning of a scorer: pairs of a prompt and an answer become packed shards, which the trainer reads like other shards."""
