#!/bin/bash
# Test an image, inside of it: import the package and its compiled parts, and print its version, commit, torch and operators.
set -euo pipefail

prefix="${PREFIX:-/opt/ledom}"
cd / # the package of the image, not of a checkout
cat "$prefix/source.txt"
"$prefix/bin/python" -c 'import megatron_ledom._cpu_ops, megatron_ledom._helpers, torch
print(f"megatron_ledom {megatron_ledom.__version__} in {megatron_ledom.__path__[0]}")
print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, NCCL {torch.distributed.is_nccl_available()}")'
"$prefix/bin/python" -m megatron_ledom.ops
