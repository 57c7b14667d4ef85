"""Print the built operators and those that a model would use here: `ledom ops`, or `python -m megatron_ledom.ops`."""

import re
import subprocess
from pathlib import Path
from shutil import which

import torch

from megatron_ledom.ops.library import backend, describe, extension_path
from megatron_ledom.platform.cpu_ops import find_cpu_ops


def architectures(binary: Path) -> str:
    """Return the GPU architectures of the CUDA operators, listed by cuobjdump or else found as names in the file."""
    tool = which("cuobjdump")
    if tool is not None:
        listed = subprocess.run([tool, "--list-elf", str(binary)], capture_output=True, text=True).stdout
        found = set(re.findall(r"sm_\d+[af]?", listed))
    else:
        found = {name.decode() for name in re.findall(rb"sm_\d+[af]?", binary.read_bytes())}
    return ", ".join(sorted(found, key=lambda name: int(re.sub(r"\D", "", name)))) or "unknown"


def main() -> None:
    """Print the built CUDA and CPU operators, then those that an optimizer uses on a GPU and a model on each type of device."""
    path = extension_path()
    print(f"CUDA operators: {path} for {architectures(path)}" if path.exists() else "CUDA operators: not built")
    adam = "cuda" if backend("cuda").usable else "torch"
    print(f"CPU operators: {find_cpu_ops().state}")
    print(f"an optimizer on cuda without Transformer Engine and apex: adamw={adam} norm={adam} scale={adam}")
    devices = ["cuda", "cpu"] if torch.cuda.is_available() or path.exists() else ["cpu"]
    for device in devices:
        print(f"a model on {device}: {describe(torch.device(device), 'fused')}")


if __name__ == "__main__":
    main()
