"""Imports Transformer Engine's Python sources without its compiled extension, so that its layers can be built on a CPU.

They cannot run: every function of the extension raises an error. The import changes modules of the whole process, so only a
process of its own may do it.
"""

import contextlib
import enum
import importlib.util
import os
import runpy
import sys
import types
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from typing import Any

EXTENSION = "transformer_engine_torch"
CUDNN_VERSION, CUBLAS_VERSION, TRITON_VERSION = 92000, 130100, "3.7"  # any that Transformer Engine accepts
ENUMS = {
    "DType": "kByte kInt32 kFloat32 kFloat16 kBFloat16 kFloat8E4M3 kFloat8E5M2 kFloat4E2M1",
    "NVTE_Fused_Attn_Backend": "NVTE_No_Backend NVTE_F16_arbitrary_seqlen NVTE_FP8",
}
"""Enumerations whose members the Python sources compare with their own; of the others they read only numbers."""
TRITON = ("triton", "triton.language", "triton.language.core", "triton.language.standard")


class NameOfExtension(type):
    """A class, function or number of the extension: its attributes are made when read, and its call raises RuntimeError."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = NameOfExtension(f"{cls.__name__}.{name}", (), {"__module__": cls.__module__})
        setattr(cls, name, made)
        return made

    def __int__(cls) -> int:
        return 0

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(
            f"{cls.__module__}.{cls.__name__} was called, which only Transformer Engine's compiled extension has"
        )


class AbsentModule(types.ModuleType):
    """A module whose names are classes that cannot be called."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = NameOfExtension(name, (), {"__module__": self.__name__})
        setattr(self, name, made)
        return made


class DecoratorModule(types.ModuleType):
    """Replaces Triton where torch comes without it: its decorators return the kernels, which never run here, unchanged."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: args[0] if args and callable(args[0]) else lambda kernel: kernel


def import_transformer_engine() -> types.ModuleType:
    """Return transformer_engine.pytorch, imported with a replaced extension. Call before anything of megatron-core is imported."""
    extension: Any = AbsentModule(EXTENSION)
    for name, members in ENUMS.items():
        setattr(extension, name, enum.IntEnum(name, members, start=0))
    extension.get_cudnn_version = lambda: CUDNN_VERSION
    extension.get_cublasLt_version = lambda: CUBLAS_VERSION
    sys.modules[EXTENSION] = extension
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # its own switch: no shared library is loaded
    import transformer_engine.common as common

    common.load_framework_extension = lambda framework: None
    with replaced_triton():
        return importlib.import_module("transformer_engine.pytorch")


@contextlib.contextmanager
def replaced_triton() -> Iterator[None]:
    """Let kernels be declared in the context, where Triton is not installed."""
    if importlib.util.find_spec("triton") is not None:
        yield
        return
    importlib.import_module("torch._dynamo")  # first, because torch decides once if there is a Triton
    for name in TRITON:
        module = sys.modules[name] = DecoratorModule(name)
        module.__dict__["__version__"] = TRITON_VERSION
        outer, _, last = name.rpartition(".")
        if outer:
            setattr(sys.modules[outer], last, module)
    try:
        yield
    finally:
        for name in TRITON:
            del sys.modules[name]


if __name__ == "__main__":  # MODULE ARGUMENTS...: run a module of the tests after the import
    import_transformer_engine()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
