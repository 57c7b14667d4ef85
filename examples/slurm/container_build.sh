#!/bin/bash
# Build an image of the project: FILE.sif with Apptainer, or FILE.sqsh with enroot, for pyxis. Start it in the project's folder:
#   bash examples/slurm/container_build.sh ledom.sif
#   LEDOM_CUDA_ARCHS=90 bash examples/slurm/container_build.sh ledom.sqsh
# No GPU is needed, but the network, and about 30 GB of disk for the CUDA base image and torch.
# Apptainer and enroot are not yet run with it; container_install.sh is.
set -euo pipefail

fail() {
    echo "error: $*" >&2
    exit 2
}

target="${1:-}" work=build/container definition=examples/slurm/container.def
setting() { sed -n "s/^    $1=//p" "$definition"; }
[[ -f "$definition" ]] || fail "there is no $definition here; start it in the project's folder"
case "$target" in
*.sif) program=apptainer ;;
*.sqsh) program=enroot ;;
*) fail "'$target' is neither FILE.sif (Apptainer) nor FILE.sqsh (enroot and pyxis); give one" ;;
esac
[[ ! -e "$target" ]] || fail "$target exists; name another file, or remove it: a running job may use it"
command -v "$program" >/dev/null || fail "there is no $program on $HOSTNAME; install it, or build $target where it is"
base="${BASE:-$(setting BASE)}"

# What an installation needs: no environment, data or runs of the checkout.
mkdir -p "$work"
files=(pyproject.toml setup.py MANIFEST.in README.md LICENSE constraints csrc examples/configs examples/slurm megatron_ledom)
{
    echo "source: $(git describe --always --dirty 2>/dev/null || echo "no git commit")"
    echo "base: $base"
} >"$work/source.txt"
tar -cf "$work/source.tar" --exclude=__pycache__ --exclude='*.so' "${files[@]}" -C "$work" source.txt

if [[ "$program" == apptainer ]]; then
    echo "BASE=$base" >"$work/arguments" # a file, because --build-arg splits its value at commas
    for name in LEDOM_CUDA LEDOM_CUDA_ARCHS EXTRAS; do
        [[ -z "${!name+set}" ]] || echo "$name=${!name}" >>"$work/arguments"
    done
    apptainer build --build-arg-file "$work/arguments" "$target.part.sif" "$definition"
    mv "$target.part.sif" "$target"
else
    container="ledom-build-$$"
    [[ "$base" != *.*/* ]] || base="${base/\//#}" # enroot separates the registry by #
    enroot import --output "$work/base-$$.sqsh" "docker://$base"
    trap 'rm -f "$work/base-$$.sqsh"; enroot remove --force "$container" || true' EXIT
    enroot create --name "$container" "$work/base-$$.sqsh"
    # void: its hook for GPUs would fail on a node without them
    NVIDIA_VISIBLE_DEVICES=void enroot start --root --rw --mount "$PWD/$work:/mnt" \
        --env "LEDOM_CUDA=${LEDOM_CUDA:-$(setting LEDOM_CUDA)}" \
        --env "LEDOM_CUDA_ARCHS=${LEDOM_CUDA_ARCHS:-$(setting LEDOM_CUDA_ARCHS)}" \
        --env "EXTRAS=${EXTRAS-$(setting EXTRAS)}" \
        "$container" bash -c 'mkdir -p /opt/megatron_ledom && tar -xf /mnt/source.tar -C /opt/megatron_ledom &&
            bash /opt/megatron_ledom/examples/slurm/container_install.sh'
    enroot export --output "$target.part.sqsh" "$container"
    mv "$target.part.sqsh" "$target"
fi
echo "$target is built; use it with CONTAINER=$target"
