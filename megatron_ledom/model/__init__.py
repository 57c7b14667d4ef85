"""The model: megatron-core's GPTModel built from a config, its layers, and the numbers of its parameters and operations."""
