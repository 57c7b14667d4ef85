"""The machine of a run: CUDA or CPU, launchers and SLURM. Only `megatron_ledom/platform` patches megatron-core."""
