#!/bin/bash
# Install the project inside an image, from the files that container_build.sh has packed. container.def and container_build.sh run it.
# It makes the environment /opt/ledom with the versions of constraints/, and fails if something cannot be built.
# An image whose own Python has a CUDA torch, such as NVIDIA's for PyTorch, keeps that torch.
set -euo pipefail

prefix="${PREFIX:-/opt/ledom}"
extras="${EXTRAS-evaluation,fast,s3}"
export LEDOM_CUDA="${LEDOM_CUDA:-1}" LEDOM_EXTENSIONS=1
PYTHON="${PYTHON:-python3}"

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
if [[ "${SYSTEM_PACKAGES:-1}" == 1 ]]; then
    export DEBIAN_FRONTEND=noninteractive
    apt-get update
    # bubblewrap isolates the programs that a model writes for HumanEval
    apt-get install --yes --no-install-recommends python3 python3-dev python3-venv g++ bubblewrap
    rm -rf /var/lib/apt/lists/*
fi
version=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
pins="constraints/python$version.txt"
[[ -f "$pins" ]] || { echo "error: $PYTHON is Python $version, and there is no $pins; use an image with another, or set PYTHON" >&2 && exit 2; }
options=()
if "$PYTHON" -c 'import sys, torch; sys.exit(torch.version.cuda is None)' 2>/dev/null; then
    options=(--system-site-packages)
    grep -Ev '^(torch|triton)==' "$pins" >"$prefix.pins"
    pins="$prefix.pins"
fi
# pip reads it for build requirements, too; an image for PyTorch sets it to a file of its own, which would contradict ours.
PIP_CONSTRAINT=$(realpath "$pins")
export PIP_CONSTRAINT
"$PYTHON" -m venv "${options[@]}" "$prefix"
pip=("$prefix/bin/python" -m pip --disable-pip-version-check install --no-cache-dir --progress-bar off)
"${pip[@]}" 'setuptools>=77' 'pybind11>=2.13' torch
"${pip[@]}" --no-build-isolation ".${extras:+[$extras]}"
cp source.txt "$prefix/source.txt"
"$prefix/bin/python" -m pip freeze >"$prefix/packages.txt"
PREFIX="$prefix" bash "$PWD/examples/slurm/container_test.sh"
