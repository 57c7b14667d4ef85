"""Builds the CUDA operators if they are missing and this machine can compile them, and loads the operators of the device."""

import os
import subprocess
import sys
from pathlib import Path
from shutil import which

import torch

from megatron_ledom.errors import VerificationError
from megatron_ledom.hardware_check.check import Outcome, Setting, failed, passed, skipped
from megatron_ledom.ops.__main__ import architectures
from megatron_ledom.ops.library import backend, extension_path
from megatron_ledom.platform.cpu_ops import find_cpu_ops
from megatron_ledom.storage.files import write_file

CHECKOUT = Path(__file__).parents[2]


def operators(setting: Setting) -> Outcome:
    """Report the operators of the device. Those of CUDA are built first, for the GPUs here, if they are missing."""
    if setting.device == "cpu":
        found = find_cpu_ops()
        return passed(f"CPU operators {found.state}") if found.module is not None else skipped(f"CPU operators: {found.state}")
    built = False
    if not extension_path().exists():
        reason = why_not_built()
        if reason is not None:
            return skipped(f"CUDA operators not built, and not to be built here: {reason}")
        build(Path(setting.folder), capabilities(setting.num_gpus))
        built = True
    compiled = architectures(extension_path())
    numbers = {"architectures": compiled, "built_now": built, "gpus": capabilities(setting.num_gpus)}
    state = backend("cuda")
    if not state.usable:
        return failed(state.state, **numbers)
    return passed(f"CUDA operators for {compiled} {'built and ' if built else ''}loaded", **numbers)


def capabilities(num_gpus: int) -> list[str]:
    """Return the compute capabilities of the GPUs, such as `["90"]`."""
    return sorted({"{}{}".format(*torch.cuda.get_device_capability(index)) for index in range(num_gpus)})


def why_not_built() -> str | None:
    """Return the reason why the CUDA operators cannot be built here; None if they can."""
    if not (CHECKOUT / "setup.py").exists() or not (CHECKOUT / "csrc").is_dir():
        return "the package is installed without its sources; install it from a checkout, with nvcc on the PATH"
    home = os.environ.get("CUDA_HOME")
    if which("nvcc", path=f"{home}/bin" if home else None) is None:
        return "nvcc is not found; set CUDA_HOME, or put nvcc on the PATH"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    return None


def build(folder: Path, archs: list[str]) -> None:
    """Compile the operators in `folder` by setup.py, for some compute capabilities, and copy them to where the package loads them.

    The compiler's output is in the log. Raises VerificationError if the build fails.
    """
    target = folder / "built"
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(target), "--build-temp", str(folder / "objects")]
    environment = {**os.environ, "LEDOM_CUDA": "1", "LEDOM_CUDA_ARCHS": ";".join(archs)}
    done = subprocess.run(command, cwd=CHECKOUT, env=environment)
    made = target / "megatron_ledom" / extension_path().name
    if done.returncode or not made.exists():
        raise VerificationError(
            f"the build of the CUDA operators ended with exit code {done.returncode}; see the end of the log"
        )
    write_file(extension_path(), made.read_bytes())
