"""The machine that a run meets: CUDA or CPU, launchers and SLURM; the one place that changes megatron-core."""
