"""Builds the C++ helper of the data path at install time; everything else about the package is in pyproject.toml."""

from glob import glob

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

setup(
    ext_modules=[
        Pybind11Extension(
            "megatron_ledom._helpers",
            sorted(glob("csrc/helpers/*.cpp")),
            include_dirs=["csrc/helpers"],
            depends=sorted(glob("csrc/helpers/*.h")),
            cxx_std=17,
            extra_compile_args=["-O3"],
        )
    ],
    cmdclass={"build_ext": build_ext},
)
