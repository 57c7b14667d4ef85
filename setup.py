"""Builds the C++ helpers and the CUDA operators if possible. pyproject.toml has the rest of the package's description.

LEDOM_EXTENSIONS=auto   the default: the C++ is built if a compiler and the Python headers are found; a compile error ends the
                        build. Without the C++, preprocessing and reversing shards do not work, and the wheel fits any machine
LEDOM_EXTENSIONS=1      the C++ is built, or the build fails with the reason
LEDOM_EXTENSIONS=0      nothing is built, including the CUDA operators

LEDOM_CUDA=auto    the default: the operators are built if nvcc and a CUDA torch are found
LEDOM_CUDA=1       they are built, or the build fails with the reason; a CPU torch suffices, because only its headers are needed
LEDOM_CUDA=0       they are not built
LEDOM_CUDA_ARCHS   compute capabilities, "80;90;100" by default; PTX for the last one is included, for newer GPUs
"""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import Extension, find_packages, setup

CUDA_OPS = "megatron_ledom._cuda_ops"
DEFAULT_ARCHS = "80;90;100"


def mode_of(variable: str) -> str:
    """Return the variable's value: auto, 0 or 1. Exits for any other."""
    mode = os.environ.get(variable, "auto")
    if mode not in ("auto", "0", "1"):
        sys.exit(f"{variable}={mode}, expected auto, 0 or 1")
    return mode


def why_no_extensions() -> str | None:
    """Return the reason why C++ modules cannot be built here; None if they can."""
    compiler = os.environ.get("CXX", sysconfig.get_config_var("CXX") or "c++")
    if not compiler or shutil.which(shlex.split(compiler)[0]) is None:
        return f"the C++ compiler {compiler} is not found; install one (Debian: apt install g++), or set CXX"
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    if not header.is_file():
        return f"the headers of Python are missing ({header}); install them (Debian: apt install python3-dev)"
    return None


def builds_extensions() -> bool:
    """Return True if anything is compiled. Exits with the reason if a required build is not possible."""
    mode, lacking = mode_of("LEDOM_EXTENSIONS"), why_no_extensions()
    reason = "LEDOM_EXTENSIONS=0" if mode == "0" else lacking
    if mode == "1" and reason:
        sys.exit(f"LEDOM_EXTENSIONS=1, but {reason}")
    if reason and mode_of("LEDOM_CUDA") == "1":
        sys.exit(f"LEDOM_CUDA=1, but {reason}")
    if reason:
        print(
            f"megatron_ledom: C++ helpers not built, so preprocessing and reversing shards do not work: {reason}",
            file=sys.stderr,
        )
    return reason is None


def find_nvcc() -> Path | None:
    """Return the real path of nvcc: the one on the PATH may be a script that calls it."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if found is None:
        return None
    printed = subprocess.run([found, "--dryrun", "-E", "-x", "cu", "/dev/null"], capture_output=True, text=True).stderr
    tops = [line.partition("TOP=")[2].strip() for line in printed.splitlines() if line.startswith("#$ TOP=")]
    return Path(tops[0]).resolve() / "bin" / "nvcc" if tops else Path(found)


def find_torch() -> tuple[Path | None, bool]:
    """Return the folder of torch, if this build finds one, and True for a CUDA torch. Does not import torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None, False
    folder = Path(spec.origin).parent
    return folder, (folder / "lib" / "libtorch_cuda.so").exists()


def why_not(nvcc: Path | None, torch: Path | None) -> str | None:
    """Return the reason why CUDA operators cannot be built here; None if they can."""
    if nvcc is None:
        return "nvcc is not found; set CUDA_HOME, or put nvcc on the PATH"
    if torch is None:
        return "torch is not in the build's environment; install torch, then use pip install --no-build-isolation ."
    if not (torch / "include/torch/csrc/stable/library.h").exists():
        return f"the torch in {torch} has no stable ABI; install torch 2.10 or newer"
    return None


def cuda_extension() -> Extension | None:
    """Return the extension of the CUDA operators, or None. Exits with the reason if a required build is not possible."""
    mode = mode_of("LEDOM_CUDA")
    if mode == "0":
        print("megatron_ledom: CUDA operators not built: LEDOM_CUDA=0", file=sys.stderr)
        return None
    nvcc, (torch, has_cuda) = find_nvcc(), find_torch()
    reason = why_not(nvcc, torch)
    if mode == "1" and reason:
        sys.exit(f"LEDOM_CUDA=1, but {reason}")
    if reason is None and mode == "auto" and not has_cuda:
        reason = "this torch has no CUDA (LEDOM_CUDA=1 builds them anyway)"
    if reason:
        print(f"megatron_ledom: CUDA operators not built: {reason}", file=sys.stderr)
        return None
    sources = sorted(glob("csrc/*/*.cu")) + sorted(glob("csrc/bindings/*.cpp"))
    extension = Extension(CUDA_OPS, sources, depends=sorted(glob("csrc/*/*.h")))
    extension.nvcc, extension.torch = nvcc, torch
    return extension


class Build(build_ext):
    """pybind11's build command, extended by the CUDA operators, which nvcc compiles."""

    def get_ext_filename(self, fullname: str) -> str:
        """Return the file name; without a Python version for the CUDA operators, which do not use Python."""
        path: str = super().get_ext_filename(fullname)
        return str(Path(path).parent / "_cuda_ops.so") if fullname.endswith("_cuda_ops") else path

    def build_extension(self, ext: Extension) -> None:
        """Compile and link one extension."""
        if ext.name != CUDA_OPS:
            super().build_extension(ext)
            return
        folder, target = Path(self.build_temp, "cuda"), Path(self.get_ext_fullpath(ext.name))
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        objects = []
        for source in ext.sources:
            objects.append(str(folder / f"{Path(source).name}.o"))
            flags = self.nvcc_flags(ext) if source.endswith(".cu") else self.binding_flags(ext)
            self.spawn([*flags, "-Icsrc", "-c", source, "-o", objects[-1]])
        self.link(ext, objects, target)

    def nvcc_flags(self, ext: Extension) -> list[str]:
        """Return nvcc's command for all requested GPUs that it supports, with PTX for the last one."""
        known = subprocess.run([str(ext.nvcc), "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
        asked = [arch for arch in os.environ.get("LEDOM_CUDA_ARCHS", DEFAULT_ARCHS).replace(",", ";").split(";") if arch]
        archs = [arch for arch in asked if f"compute_{arch.rstrip('af')}" in known]
        if not archs:
            sys.exit(f"LEDOM_CUDA_ARCHS={';'.join(asked)}: {ext.nvcc} supports none of them, but {' '.join(known)}")
        code = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
        code += [f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}", "-t0"]
        return [str(ext.nvcc), "-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", *code]

    def binding_flags(self, ext: Extension) -> list[str]:
        """Return the compiler's command for the bindings, with torch's headers."""
        return [os.environ.get("CXX", "g++"), "-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", f"-I{ext.torch}/include"]

    def link(self, ext: Extension, objects: list[str], target: Path) -> None:
        """Link with libtorch as well as libtorch_cpu, so that symbols of libtorch_cuda are found if torch has it."""
        toolkit = ext.nvcc.resolve().parents[1]
        torch = [f"-L{ext.torch}/lib", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-Wl,--as-needed"]
        cuda = [f"-L{toolkit}/lib64", f"-L{toolkit}/lib", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        self.spawn([os.environ.get("CXX", "g++"), "-shared", *objects, *torch, *cuda, "-o", str(target)])


def helper(name: str, folder: str) -> Pybind11Extension:
    """Return the extension of a folder of csrc/."""
    return Pybind11Extension(
        f"megatron_ledom.{name}",
        sorted(glob(f"{folder}/*.cpp")),
        include_dirs=[folder],
        depends=sorted(glob(f"{folder}/*.h")),
        cxx_std=17,
        extra_compile_args=["-O3"],
    )


def extensions() -> list[Extension]:
    """Return all extensions to compile."""
    if not builds_extensions():
        return []
    cuda = cuda_extension()
    return [helper("_helpers", "csrc/helpers"), helper("_cpu_ops", "csrc/cpu_ops"), *([cuda] if cuda else [])]


ParallelCompile(default=0).install()  # the files of an extension at once, on all cores
setup(
    packages=[*find_packages(include=["megatron_ledom*"]), "megatron_ledom.configs"],
    package_dir={"megatron_ledom.configs": "examples/configs"},  # a wheel contains the configs of the checkout
    package_data={
        "megatron_ledom": ["py.typed"],
        "megatron_ledom.configs": ["*.yaml"],
        "megatron_ledom.hardware_check": ["*.json"],
        "megatron_ledom.planning.hardware": ["*.yaml"],
        "megatron_ledom.planning.validation": ["*.yaml", "*.md"],
        "megatron_ledom.serving": ["page/*", "status_page/*"],
    },
    ext_modules=extensions(),
    cmdclass={"build_ext": Build},
)
