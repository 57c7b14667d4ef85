"""Describes the machine and checks its devices: memory, capability, arithmetic, and access between GPUs."""

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path
from shutil import which
from typing import Any

import torch

from megatron_ledom.hardware_check.check import Outcome, Setting, failed, passed
from megatron_ledom.platform.cpu_ops import find_cpu_ops
from megatron_ledom.training.history import git_state

PACKAGES = ("torch", "megatron-core", "transformer-engine", "triton", "transformers", "numpy", "flash-attn", "apex")
CPU_RANKS = 2
"""Processes of the checks on a CPU, unless --gpus gives a number."""
FREE_FRACTION = 0.9
"""Part of a GPU's memory that must be free: less means that another program uses it."""
NVIDIA_DRIVER = "/dev/nvidiactl"
"""Device file of NVIDIA's driver: it exists where the driver is loaded, and in a container that was started with GPUs."""
HIDES_GPUS = ("", "-1")
"""Values of CUDA_VISIBLE_DEVICES for no GPU."""
SMI_SECONDS = 15
"""Time limit of nvidia-smi. Without persistence mode it takes seconds for each GPU."""
AMPERE = (8, 0)
"""Lowest compute capability with bf16 instructions, for which the CUDA operators are built."""


def environment(setting: Setting) -> Outcome:
    """Describe this machine and check each device. Its numbers have `device` and `ranks`, which the other checks use.

    setting.device may be `auto`: the CPU, if torch finds no GPU and the machine has none either. setting.num_gpus is 0 for all
    GPUs.
    """
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = chosen_device(setting.device, found)
    wanted = setting.num_gpus or (found if device == "cuda" else CPU_RANKS)
    ranks = min(wanted, found) if device == "cuda" else wanted
    numbers = {"device": device, "ranks": ranks, "commit": commit(), **software(), **processor()}
    if device == "cpu":
        return passed(_on_cpu(setting), **numbers)
    if found == 0:
        return failed(f"torch finds no GPU: {why_no_gpu()} (--device cpu checks the CPU instead)", **numbers)
    numbers |= {"driver": driver(), "nccl": nccl_version(), "gpus": []}
    problems = [] if wanted <= found else [f"--gpus {wanted}, but {found} GPUs are visible"]
    for index in range(ranks):
        described, wrong = gpu(index)
        numbers["gpus"].append(described)
        problems += wrong
    numbers["peer_access"] = peer_access([index for index, one in enumerate(numbers["gpus"]) if "capability" in one])
    _print_topology()
    return failed("; ".join(problems), **numbers) if problems else passed(_on_gpus(numbers), **numbers)


def chosen_device(wanted: str, found: int) -> str:
    """Return the device to check. `auto` means the GPUs too if there is a driver but torch finds none, so that the check fails."""
    if wanted != "auto":
        return wanted
    offers_gpus = os.path.exists(NVIDIA_DRIVER) and os.environ.get("CUDA_VISIBLE_DEVICES") not in HIDES_GPUS
    return "cuda" if found or offers_gpus else "cpu"


def commit() -> str | None:
    """Return the commit of the checkout, with "and changes" if files differ from it; None for an installed package."""
    checkout = Path(__file__).parents[2]
    state = git_state(checkout) if (checkout / "csrc").is_dir() else None
    return f"{state['commit']}{' and changes' * state['dirty']}" if state else None


def software() -> dict[str, Any]:
    """Return the versions of Python and of the packages that compute; None for a missing package."""
    versions: dict[str, Any] = {"python": platform.python_version(), "system": f"{platform.system()} {platform.release()}"}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions | {"cuda": torch.version.cuda}


def processor() -> dict[str, Any]:
    """Return the processor's name, its cores and threads for this process, and the machine's memory in GiB."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8") if os.path.exists("/proc/cpuinfo") else ""
    names = [line.partition(":")[2].strip() for line in lines.splitlines() if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "memory_gib": round(memory, 1),
        "cpu_operators": find_cpu_ops().state,
    }


def why_no_gpu() -> str:
    """Return the reason why torch sees no GPU."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install a CUDA build"
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) in HIDES_GPUS:
        return f"CUDA_VISIBLE_DEVICES={visible} hides all GPUs; unset it"
    if not os.path.exists(NVIDIA_DRIVER):
        return "there is no /dev/nvidiactl; load the driver, or start the container with GPUs"
    return f"torch is built for CUDA {torch.version.cuda}, the driver is {driver()}; compare both in NVIDIA's table"


def driver() -> str:
    """Return the version of the NVIDIA driver."""
    return _nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0].strip() or "unknown"


def nccl_version() -> str:
    """Return the version of NCCL in torch, such as `2.27.5`."""
    version: tuple[int, ...] = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
    return ".".join(map(str, version))


def gpu(index: int) -> tuple[dict[str, Any], list[str]]:
    """Describe a GPU and let it compute. Returns its description and its problems. An error of CUDA is a problem of this GPU."""
    try:
        return _working_gpu(index)
    except (RuntimeError, AssertionError) as error:
        return {"name": "unknown"}, [f"GPU {index} cannot be used: {str(error).partition(chr(10))[0]}"]


def _working_gpu(index: int) -> tuple[dict[str, Any], list[str]]:
    """Describe a GPU that CUDA can use. Not yet run on hardware."""
    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    capability = torch.cuda.get_device_capability(index)
    described = {
        "name": properties.name,
        "memory_gib": round(total / 2**30, 1),
        "free_gib": round(free / 2**30, 1),
        "capability": f"{capability[0]}.{capability[1]}",
        "multiprocessors": properties.multi_processor_count,
        "bf16": capability >= AMPERE,
    }
    problems = []
    if free < FREE_FRACTION * total:
        problems.append(f"GPU {index} has {free / 2**30:.1f} of {total / 2**30:.1f} GiB free: another program uses it")
    if capability < AMPERE:
        problems.append(f"GPU {index} has compute capability {described['capability']}, below 8.0: no bf16, no CUDA operators")
    ones = torch.ones(256, 256, device=f"cuda:{index}", dtype=torch.bfloat16 if capability >= AMPERE else torch.float32)
    if not bool((ones @ ones == 256).all()):
        problems.append(f"GPU {index} multiplies two matrices of ones wrongly")
    return described, problems


def peer_access(gpus: Sequence[int]) -> str:
    """Return the number of pairs of GPUs that read each other's memory, such as `56 of 56 pairs`."""
    pairs = list(permutations(gpus, 2))
    direct = sum(torch.cuda.can_device_access_peer(one, other) for one, other in pairs)
    return f"{direct} of {len(pairs)} pairs" if pairs else "one GPU"


def _on_gpus(numbers: dict[str, Any]) -> str:
    names = sorted({one["name"] for one in numbers["gpus"]})
    return f"{numbers['ranks']} x {' and '.join(names)}, driver {numbers['driver']}, CUDA {numbers['cuda']}"


def _on_cpu(setting: Setting) -> str:
    return "the CPU, as asked" if setting.device == "cpu" else f"the CPU, because torch finds no GPU: {why_no_gpu()}"


def _print_topology() -> None:
    """Print the links between the GPUs to the log."""
    print(_nvidia_smi("topo", "-m"), flush=True)


def _nvidia_smi(*arguments: str) -> str:
    """Return the output of nvidia-smi; nothing without that program, or if it does not answer: the report can do without."""
    tool = which("nvidia-smi")
    try:
        return subprocess.run([tool, *arguments], capture_output=True, text=True, timeout=SMI_SECONDS).stdout if tool else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        print(error, flush=True)
        return ""
