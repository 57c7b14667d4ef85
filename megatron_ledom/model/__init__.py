"""The model: megatron-core's GPTModel built from a config, its layers, and its number of parameters and operations."""
