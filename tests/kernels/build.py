"""Compiles kernels for the tests, once for each state of their sources.

Compiled files are in LEDOM_KERNEL_CACHE (default: build/kernels), named by a hash of the command, the compiler's version and every
source file of the op, of csrc/common and of csrc/emulation. CI may keep that folder between runs.
"""

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from tests.support.paths import ROOT

CSRC = ROOT / "csrc"
EMULATED_FLAGS = (
    "-std=c++17",
    "-g1",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
    "-Wno-maybe-uninitialized",
    "-fPIC",
)

GPU_FLAGS = ("-std=c++17", "-O3", "-Werror=all-warnings")


def op_names() -> list[str]:
    """Return the folders of csrc/ that contain kernels."""
    return sorted(path.parent.name for path in CSRC.glob("*/*.cu"))


def cache_folder() -> Path:
    """Return the folder of compiled files."""
    return Path(os.environ.get("LEDOM_KERNEL_CACHE", ROOT / "build" / "kernels"))


@cache
def compiler_version(compiler: str) -> str:
    """Return the version text of the compiler."""
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout


def gpu_compiler() -> str:
    """Return nvcc; tests that need it are skipped without it."""
    found = nvcc()
    assert found is not None, "no nvcc"
    return found


@cache
def nvcc() -> str | None:
    """Return the real nvcc: the one on the PATH may be a script that calls it."""
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if found is None:
        return None
    lines = subprocess.run(
        [found, "--dryrun", "-E", "-x", "cu", "/dev/null"], capture_output=True, text=True
    ).stderr.splitlines()
    tops = [line.partition("TOP=")[2].strip() for line in lines if line.startswith("#$ TOP=")]
    return str(Path(tops[0]).resolve() / "bin" / "nvcc") if tops else found


def source_hash(sources: Sequence[Path], csrc: Path) -> str:
    """Return a hash of the sources, of the files in their folders, and of the shared headers."""
    folders = {source.parent for source in sources if source.suffix == ".cu"} | {csrc / "common", csrc / "emulation"}
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources))
    for folder in sorted(folders):
        for path in sorted(folder.iterdir()):
            if path.is_file() and path.suffix in (".h", ".cu", ".cpp"):
                digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def compiled(name: str, command: Sequence[str], sources: Sequence[Path], csrc: Path = CSRC) -> Path:
    """Return the output of `command` on `sources`, from the cache or compiled now. Raises RuntimeError with the compiler's output.

    `name` may have an extension, which the output keeps. The compiler's output is in a file of the same name with `.log` appended.
    """
    identity = repr((command, compiler_version(command[0]), source_hash(sources, csrc)))
    stem, dot, ending = name.partition(".")
    output = cache_folder() / f"{stem}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}{dot}{ending}"
    if output.exists():
        return output
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as scratch:
        part = Path(scratch, output.name)
        arguments = [*command, f"-I{csrc}", *map(str, sources), "-o", str(part)]
        done = subprocess.run(arguments, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(arguments)}\n{done.stdout}{done.stderr}")
        output.with_name(output.name + ".log").write_text(done.stdout + done.stderr)
        part.replace(output)
    return output


def emulated_library(op: str, csrc: Path = CSRC, options: Sequence[str] = ("-O2",)) -> Path:
    """Return the op's kernels and launchers compiled as C++ for the CPU, as a shared library with the same C interface."""
    command = ["g++", *EMULATED_FLAGS, *options, "-shared", "-fvisibility=hidden", "-fno-gnu-unique", "-x", "c++"]
    return compiled(f"{op}.so", command, [csrc / op / f"{op}.cu", csrc / "emulation" / "control.cpp"], csrc)


def library_without_gpu(op: str, csrc: Path = CSRC) -> Path:
    """Return the op as built by nvcc for sm_90, with host code, linked with a CUDA runtime without a GPU (runtime_without_gpu.cpp)."""
    host = compiled(
        f"{op}.o",
        [gpu_compiler(), *GPU_FLAGS, "-arch=sm_90", "-Xcompiler=-fPIC,-fvisibility=hidden", "-c"],
        [csrc / op / f"{op}.cu"],
        csrc,
    )
    runtime = ROOT / "tests" / "kernels" / "runtime_without_gpu.cpp"
    name = f"{op}-{host.stem.rpartition('-')[2]}-without-gpu.so"
    return compiled(name, ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-Wl,-Bsymbolic"], [runtime, host], csrc)


def ptx(op: str, csrc: Path = CSRC) -> Path:
    """Return the PTX of the op's kernels for sm_90."""
    return compiled(f"{op}.ptx", [gpu_compiler(), *GPU_FLAGS, "-arch=sm_90", "-ptx"], [csrc / op / f"{op}.cu"], csrc)


def cubin(op: str, architecture: str, csrc: Path = CSRC) -> Path:
    """Return the machine code; the assembler's report on registers and stacks is in the file with `.log` appended."""
    command = [gpu_compiler(), *GPU_FLAGS, f"-arch={architecture}", "-Xptxas=-v", "-cubin"]
    return compiled(f"{op}-{architecture}.cubin", command, [csrc / op / f"{op}.cu"], csrc)
