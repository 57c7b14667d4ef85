#!/bin/bash
# Run the commands of the scripts of this folder in a container: docs/how_to/containers.md. They source this file if CONTAINER is set.
# It checks the settings, ends with an error before anything has started, and sets
#   container_run    words before a command that then runs in the container (Apptainer, bubblewrap; empty for pyxis)
#   container_srun   options of srun that put its tasks into the container (pyxis; empty for the others)
#   container_here   words before one command of the batch script or of the shell that submits
# Started as a program it runs the Python of the image, here or as a task of srun:
#   CONTAINER=ledom.sif bash examples/slurm/container.sh -m megatron_ledom.cli.main ops
# Apptainer and pyxis are not yet run with it; bubblewrap is (tests/slurm/test_container_jobs.py).
set -euo pipefail

container_refuse() {
    echo "error: $*" >&2
    exit 2
}

# Return if a file or folder exists. In a job it is looked for again for two minutes: a file system that is away for a moment must not
# end a run that SLURM has started again.
container_exists() {
    local attempt
    for attempt in 1 2 3 4 5 6; do
        [[ ! -e "$1" ]] || return 0
        [[ -n "${SLURM_JOB_ID:-}" ]] || return 1
        ((attempt == 6)) || sleep "${RETRY_SECONDS:-20}"
    done
    return 1
}

# Print the runtime that reads this image.
container_runtime() {
    case "$CONTAINER" in
    *.sif) echo apptainer ;;
    *.sqsh | *.squashfs) echo pyxis ;;
    *://*) container_refuse "CONTAINER=$CONTAINER is an address, which every rank would download: make a file of it with" \
        "apptainer build FILE.sif $CONTAINER, or write REGISTRY#IMAGE:TAG for pyxis" ;;
    *)
        [[ ! -d "$CONTAINER" ]] || container_refuse "CONTAINER=$CONTAINER is a folder: set CONTAINER_RUNTIME to apptainer or bwrap"
        [[ "$CONTAINER" != [./]* && "$CONTAINER" == *[#:]* ]] ||
            container_refuse "CONTAINER=$CONTAINER is neither FILE.sif, FILE.sqsh nor REGISTRY#IMAGE:TAG; correct it, or set CONTAINER_RUNTIME"
        echo pyxis
        ;;
    esac
}

# Refuse an image that the runtime does not read, and a missing runtime.
container_check() {
    case "$CONTAINER_RUNTIME" in
    apptainer)
        container_exists "$CONTAINER" || container_refuse "CONTAINER=$CONTAINER does not exist on $HOSTNAME; build it: docs/how_to/containers.md"
        command -v apptainer >/dev/null || container_refuse "there is no apptainer on $HOSTNAME; load its module, or submit with sbatch" \
            "where only the compute nodes have it"
        [[ -z "${APPTAINER_CLEANENV:-}${SINGULARITY_CLEANENV:-}" ]] ||
            container_refuse "APPTAINER_CLEANENV or SINGULARITY_CLEANENV is set, so the ranks would lack SLURM's variables; unset it"
        ;;
    pyxis)
        [[ "$CONTAINER" != *.sif ]] || container_refuse "CONTAINER=$CONTAINER is not for CONTAINER_RUNTIME=pyxis, which reads FILE.sqsh"
        [[ "$CONTAINER" != [./]* && "$CONTAINER" != *.sqsh && "$CONTAINER" != *.squashfs ]] || container_exists "$CONTAINER" ||
            container_refuse "CONTAINER=$CONTAINER does not exist on $HOSTNAME; build it: docs/how_to/containers.md"
        [[ "$(srun --help 2>/dev/null)" == *--container-image* ]] ||
            container_refuse "srun on $HOSTNAME has no --container-image: SLURM has no pyxis there; set CONTAINER_RUNTIME to another"
        ;;
    bwrap)
        container_exists "$CONTAINER/usr" || container_refuse "CONTAINER=$CONTAINER is no folder with the root of a system (it has no usr)"
        command -v bwrap >/dev/null || container_refuse "there is no bwrap on $HOSTNAME; install bubblewrap"
        ;;
    *) container_refuse "CONTAINER_RUNTIME=$CONTAINER_RUNTIME is not one of apptainer, pyxis and bwrap" ;;
    esac
}

# Set container_mounts to words SOURCE:TARGET:FLAG, where FLAG is rw or ro: the project's folder and CONTAINER_MOUNTS.
container_read_mounts() {
    local given source target flag more
    container_mounts=("$PWD:$PWD:rw")
    IFS=, read -ra given <<<"${CONTAINER_MOUNTS:-}"
    for more in "${given[@]}"; do
        IFS=: read -r source target flag more <<<"$more"
        [[ "$source" == /* ]] || source="$PWD/$source"
        [[ "${target:=$source}" == /* && "${flag:=rw}" =~ ^(rw|ro)$ && -z "$more" ]] ||
            container_refuse "CONTAINER_MOUNTS=$CONTAINER_MOUNTS is not a list SOURCE[:/TARGET[:ro]],..."
        container_exists "$source" || container_refuse "CONTAINER_MOUNTS names $source, which does not exist on $HOSTNAME"
        container_mounts+=("$source:$target:$flag")
    done
}

# Apptainer passes the environment on, except for what the image sets too, unless CONTAINER_ENV names it. It mounts the home and the
# node's /tmp. On a node without GPUs --nv only warns.
container_enter_apptainer() {
    local mount name
    for name in ${CONTAINER_ENV//,/ }; do export "APPTAINERENV_$name=${!name:-}"; done
    container_run=(apptainer exec --nv --pwd "$PWD")
    for mount in "${container_mounts[@]}"; do container_run+=(--bind "$mount"); done
    container_run+=("$CONTAINER")
    container_here=("${container_run[@]}")
}

# The file system of the image is read-only, so that what is written outside of the mounts fails instead of being lost with the
# container. A variable that the image sets too has the image's value, unless --container-env names it. SLURM's differ by task.
container_enter_pyxis() {
    local mounts names image="$CONTAINER"
    [[ ! -f "$image" ]] || image=$(realpath "$image")
    mounts=$(IFS=, && echo "${container_mounts[*]%:rw}")
    names="$(compgen -e | grep -E '^(NCCL|HF|LEDOM|TORCH|OMP|FI|OFI|UCX)_|^PYTHON' | paste -sd,)${CONTAINER_ENV:+,$CONTAINER_ENV}"
    container_srun=("--container-image=$image" "--container-mounts=$mounts" "--container-workdir=$PWD" --container-readonly
        --container-mount-home --no-container-entrypoint "--container-env=$names")
    container_here=(${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"})
    [[ -n "${SLURM_JOB_ID:-}" ]] || read -ra container_here <<<"${CONTAINER_SRUN_OPTIONS:-}"
    container_here=(srun --nodes=1 --ntasks=1 "${container_here[@]}" "${container_srun[@]}")
}

# No privileges needed: a user without any can try the scripts. SLURM signals every process of a task; bwrap must not die of what
# asks the trainer to save, so it ignores these signals, and the command gets their default again.
container_enter_bwrap() {
    local path name mount flag
    container_run=(env "--ignore-signal=USR1,USR2,TERM" bwrap --die-with-parent)
    for path in "${CONTAINER%/}"/*; do
        name="/${path##*/}"
        if [[ "$name" =~ ^/(dev|proc|sys|tmp)$ ]]; then
            continue
        elif [[ -L "$path" ]]; then
            container_run+=(--symlink "$(readlink "$path")" "$name")
        elif [[ -d "$path" && -r "$path" && -z "$(ls -A "$path")" ]]; then
            container_run+=(--dir "$name") # mounts may be below it
        else
            container_run+=(--ro-bind "$path" "$name")
        fi
    done
    for path in /etc/hosts /etc/resolv.conf; do
        [[ ! -f "$path" || ! -f "$CONTAINER$path" || -L "$CONTAINER$path" ]] || container_run+=(--ro-bind "$path" "$path")
    done
    container_run+=(--dev-bind /dev /dev --bind /proc /proc --ro-bind /sys /sys --bind /tmp /tmp)
    [[ ! -d "${HOME:-}" ]] || container_run+=(--bind "$HOME" "$HOME")
    for mount in "${container_mounts[@]}"; do
        [[ "$mount" == *:ro ]] && flag=--ro-bind || flag=--bind
        mount=${mount%:*}
        container_run+=("$flag" "${mount%:*}" "${mount#*:}")
    done
    container_run+=(--remount-ro / --chdir "$PWD" -- env "--default-signal=USR1,USR2,TERM")
    container_here=("${container_run[@]}")
}

# Log the image, and set what the commands of a container cannot ask SLURM for, since it has no scontrol and squeue: the address of
# the first rank, and on a SLURM before 23 the end of the job.
container_ask_slurm() {
    local host address="" attempt image=""
    [[ ! -f "$CONTAINER" ]] || image=", $(stat --format='%s bytes of %y' "$CONTAINER")"
    echo "$(date +%T) in the container $CONTAINER ($CONTAINER_RUNTIME$image)"
    for attempt in 1 2 3 4 5 6; do
        read -r host < <(scontrol show hostnames "$SLURM_JOB_NODELIST") || host=""
        [[ -z "$host" ]] || address=$(scontrol show node --oneliner "$host" | sed -En 's/.*\bNodeAddr=([^ ]+).*/\1/p') || address=""
        [[ -z "${MASTER_ADDR:-}$address" ]] || break
        ((attempt == 6)) || sleep "${RETRY_SECONDS:-20}"
    done
    export MASTER_ADDR="${MASTER_ADDR:-$address}"
    [[ -n "$MASTER_ADDR" ]] ||
        container_refuse "scontrol prints no address of the first node of $SLURM_JOB_NODELIST; set MASTER_ADDR to one that all ranks can reach"
    [[ -z "${SLURM_JOB_END_TIME:-}" ]] || return 0
    if address=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%e) && address=$(date -d "$address" +%s 2>/dev/null); then
        export SLURM_JOB_END_TIME="$address"
    fi
}

# Set container_node_check to the words of `ledom check-nodes`. It calls srun, so it runs outside of the container and only its ranks
# inside; any Python from 3.11 suffices, without packages.
container_check_nodes() {
    [[ -n "${HOST_PYTHON:-}" ]] ||
        container_refuse "CHECK_NODES=1 needs HOST_PYTHON in a container: a Python of the node itself, 3.11 or newer; it needs no packages"
    "$HOST_PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || container_refuse "HOST_PYTHON=$HOST_PYTHON is no Python from 3.11"
    container_node_check=(env PYTHONSAFEPATH= "$HOST_PYTHON" -c 'from megatron_ledom.cli.main import run_tool; run_tool("check-nodes")')
    if [[ "$CONTAINER_RUNTIME" == pyxis ]]; then
        # the limit includes the time in which each node unpacks the image
        container_node_check+=(--python "$PYTHON" --seconds 600 "--srun-options=$(printf '%q ' "${container_srun[@]}")")
    else
        container_node_check+=(--python examples/slurm/container.sh)
    fi
}

container_mounts=() container_run=() container_srun=() container_here=()
[[ -n "${CONTAINER:-}" ]] || container_refuse "CONTAINER_RUNTIME=${CONTAINER_RUNTIME:-} is set, but CONTAINER is not; set it to an image"
[[ " ${SBATCH_OPTIONS:-}" != *" --container-"* ]] ||
    container_refuse "both CONTAINER and a --container- option of SBATCH_OPTIONS are given: the batch script itself must not run in the container"
[[ "$PWD" != *[:,]* && "${HOME:-}" != *[:,]* ]] || container_refuse "the name of a folder that is mounted has a colon or a comma: $PWD, ${HOME:-}"
CONTAINER_RUNTIME="${CONTAINER_RUNTIME:-$(container_runtime)}" || exit 2
PYTHON="${PYTHON:-/opt/ledom/bin/python}"
container_check
container_read_mounts
# The image's package, with its compiled parts, and not the checkout's or one of the home.
export CONTAINER CONTAINER_RUNTIME CONTAINER_MOUNTS="${CONTAINER_MOUNTS:-}" CONTAINER_ENV="${CONTAINER_ENV:-}" PYTHON PYTHONSAFEPATH=1 PYTHONNOUSERSITE=1
"container_enter_$CONTAINER_RUNTIME"
[[ -z "${PYTHONPATH:-}" ]] || echo "PYTHONPATH=$PYTHONPATH is passed into the container" >&2
if [[ "${BASH_SOURCE[0]}" == "$0" ]]; then
    exec "${container_here[@]}" "$PYTHON" "$@"
fi
