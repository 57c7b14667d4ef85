"""The model: from a config to megatron-core's GPTModel, its layers, and its arithmetic."""
