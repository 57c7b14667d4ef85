"""A replacement of srun on one machine, for tests of the SLURM scripts without a SLURM."""

TWO_TASKS = r"""# start two tasks with SLURM's variables and forward USR1 to them; end with the exit code of the last one that fails
for rank in 0 1; do SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" & tasks+=($!); done
trap 'kill -USR1 "${tasks[@]}"' USR1
trap 'kill -KILL "${tasks[@]}"' TERM
status=0
for task in "${tasks[@]}"; do
    while kill -0 "$task" 2>/dev/null; do wait "$task" || true; done
    wait "$task" || status=$?
done
exit $status
"""
