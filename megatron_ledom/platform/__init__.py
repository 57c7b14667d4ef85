"""The machine of a run: CUDA or CPU, launchers and SLURM. Only this package patches megatron-core."""
