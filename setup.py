"""Builds the C++ helper of the data path at install time; everything else about the package is in pyproject.toml."""

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

setup(
    ext_modules=[
        Pybind11Extension(
            "megatron_ledom._helpers",
            ["csrc/helpers/helpers.cpp", "csrc/helpers/piece_encoder_bindings.cpp"],
            include_dirs=["csrc/helpers"],
            depends=[
                "csrc/helpers/big_pages.h",
                "csrc/helpers/pack_documents.h",
                "csrc/helpers/piece_encoder.h",
                "csrc/helpers/piece_encoder_bindings.h",
                "csrc/helpers/piece_vocabulary.h",
                "csrc/helpers/unit_cache.h",
            ],
            cxx_std=17,
            extra_compile_args=["-O3"],
        )
    ],
    cmdclass={"build_ext": build_ext},
)
