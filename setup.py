"""Builds the C++ helpers and the CUDA operators where they can be built. What else there is to the package is in pyproject.toml.

LEDOM_EXTENSIONS=auto   the default: C++ is built where a compiler and the headers of Python are found; what does not compile
                        fails. Without it all but preprocessing and turning shards works, and the wheel is one for any machine
LEDOM_EXTENSIONS=1      it is built, or the build fails and says why
LEDOM_EXTENSIONS=0      nothing is built, the CUDA operators neither

LEDOM_CUDA=auto    the default: the operators are built where nvcc and a CUDA torch are found
LEDOM_CUDA=1       they are built, or the build fails and says why; a CPU torch will do, whose headers alone are needed
LEDOM_CUDA=0       they are not built
LEDOM_CUDA_ARCHS   compute capabilities, "80;90;100" if not said; code for the last one is kept as PTX, too, for newer GPUs
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

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import Extension, find_packages, setup

CUDA_OPS = "megatron_ledom._cuda_ops"
DEFAULT_ARCHS = "80;90;100"


def mode_of(variable: str) -> str:
    """auto, 0 or 1, as the environment says; exits for anything else."""
    mode = os.environ.get(variable, "auto")
    if mode not in ("auto", "0", "1"):
        sys.exit(f"{variable}={mode}, expected auto, 0 or 1")
    return mode


def why_no_extensions() -> str | None:
    """What C++ modules lack here; None if they can be built."""
    compiler = os.environ.get("CXX", sysconfig.get_config_var("CXX") or "c++")
    if not compiler or shutil.which(shlex.split(compiler)[0]) is None:
        return f"the C++ compiler {compiler} is not found; install one (Debian: apt install g++), or set CXX"
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    if not header.is_file():
        return f"the headers of Python are missing ({header}); install them (Debian: apt install python3-dev)"
    return None


def builds_extensions() -> bool:
    """Whether anything is compiled; exits with the reason if it must be and cannot."""
    mode, lacking = mode_of("LEDOM_EXTENSIONS"), why_no_extensions()
    reason = "LEDOM_EXTENSIONS=0" if mode == "0" else lacking
    if mode == "1" and reason:
        sys.exit(f"LEDOM_EXTENSIONS=1, but {reason}")
    if reason and mode_of("LEDOM_CUDA") == "1":
        sys.exit(f"LEDOM_CUDA=1, but {reason}")
    if reason:
        print(
            f"megatron_ledom: C++ helpers not built, all but preprocessing and reversing shards works without: {reason}",
            file=sys.stderr,
        )
    return reason is None


def find_nvcc() -> Path | None:
    """The compiler, where it really is: the one on the PATH may be a script that calls it."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if found is None:
        return None
    told = subprocess.run([found, "--dryrun", "-E", "-x", "cu", "/dev/null"], capture_output=True, text=True).stderr
    tops = [line.partition("TOP=")[2].strip() for line in told.splitlines() if line.startswith("#$ TOP=")]
    return Path(tops[0]).resolve() / "bin" / "nvcc" if tops else Path(found)


def find_torch() -> tuple[Path | None, bool]:
    """The folder of torch, if this build can see one, and whether it is a CUDA torch; torch is not imported."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None, False
    folder = Path(spec.origin).parent
    return folder, (folder / "lib" / "libtorch_cuda.so").exists()


def why_not(nvcc: Path | None, torch: Path | None) -> str | None:
    """What the CUDA operators lack here; None if they can be built."""
    if nvcc is None:
        return "nvcc is not found; set CUDA_HOME, or put nvcc on the PATH"
    if torch is None:
        return "torch is not in the build's environment; install torch, then use pip install --no-build-isolation ."
    if not (torch / "include/torch/csrc/stable/library.h").exists():
        return f"the torch in {torch} has no stable ABI; install torch 2.10 or newer"
    return None


def cuda_extension() -> Extension | None:
    """The CUDA operators if they are to be built; exits with the reason if they must be and cannot."""
    mode = mode_of("LEDOM_CUDA")
    if mode == "0":
        print("megatron_ledom: CUDA operators not built: LEDOM_CUDA=0", file=sys.stderr)
        return None
    nvcc, (torch, has_cuda) = find_nvcc(), find_torch()
    reason = why_not(nvcc, torch)
    if mode == "1" and reason:
        sys.exit(f"LEDOM_CUDA=1, but {reason}")
    if reason is None and mode == "auto" and not has_cuda:
        reason = "this torch has no CUDA (LEDOM_CUDA=1 builds them all the same)"
    if reason:
        print(f"megatron_ledom: CUDA operators not built: {reason}", file=sys.stderr)
        return None
    sources = sorted(glob("csrc/*/*.cu")) + sorted(glob("csrc/bindings/*.cpp"))
    extension = Extension(CUDA_OPS, sources, depends=sorted(glob("csrc/*/*.h")))
    extension.nvcc, extension.torch = nvcc, torch
    return extension


class Build(build_ext):
    """pybind11's builder, which hands CUDA operators to nvcc."""

    def get_ext_filename(self, fullname: str) -> str:
        """The CUDA operators hold nothing of Python: their file's name says no version of it."""
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
        """Code for every asked-for GPU that this nvcc knows, PTX for the last."""
        known = subprocess.run([str(ext.nvcc), "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
        asked = [arch for arch in os.environ.get("LEDOM_CUDA_ARCHS", DEFAULT_ARCHS).replace(",", ";").split(";") if arch]
        archs = [arch for arch in asked if f"compute_{arch.rstrip('af')}" in known]
        if not archs:
            sys.exit(f"LEDOM_CUDA_ARCHS={';'.join(asked)}: {ext.nvcc} knows none of them, but {' '.join(known)}")
        code = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
        code += [f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}", "-t0"]
        return [str(ext.nvcc), "-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", *code]

    def binding_flags(self, ext: Extension) -> list[str]:
        """The bindings see torch's headers, and the architectures that the kernels are built for."""
        return [os.environ.get("CXX", "g++"), "-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", f"-I{ext.torch}/include"]

    def link(self, ext: Extension, objects: list[str], target: Path) -> None:
        """With libtorch, not libtorch_cpu alone, so that libtorch_cuda's symbols are found where it has one."""
        toolkit = ext.nvcc.resolve().parents[1]
        torch = [f"-L{ext.torch}/lib", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-Wl,--as-needed"]
        cuda = [f"-L{toolkit}/lib64", f"-L{toolkit}/lib", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        self.spawn([os.environ.get("CXX", "g++"), "-shared", *objects, *torch, *cuda, "-o", str(target)])


def helper(name: str, folder: str) -> Pybind11Extension:
    """A C++ module of one folder of csrc/."""
    return Pybind11Extension(
        f"megatron_ledom.{name}",
        sorted(glob(f"{folder}/*.cpp")),
        include_dirs=[folder],
        depends=sorted(glob(f"{folder}/*.h")),
        cxx_std=17,
        extra_compile_args=["-O3"],
    )


def extensions() -> list[Extension]:
    """Everything that is compiled."""
    if not builds_extensions():
        return []
    cuda = cuda_extension()
    return [helper("_helpers", "csrc/helpers"), helper("_cpu_ops", "csrc/cpu_ops"), *([cuda] if cuda else [])]


setup(
    packages=[*find_packages(include=["megatron_ledom*"]), "megatron_ledom.configs"],
    package_dir={"megatron_ledom.configs": "examples/configs"},  # a wheel holds the configs of the checkout
    package_data={
        "megatron_ledom": ["py.typed"],
        "megatron_ledom.configs": ["*.yaml"],
        "megatron_ledom.planning.hardware": ["*.yaml"],
        "megatron_ledom.planning.validation": ["*.yaml", "*.md"],
    },
    ext_modules=extensions(),
    cmdclass={"build_ext": Build},
)
