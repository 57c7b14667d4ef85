"""Convert checkpoints to Hugging Face folders and back, with a parity check of the logits."""

from typing import TYPE_CHECKING

from megatron_ledom.lazy import lazy_exports

if TYPE_CHECKING:
    from megatron_ledom.convert.hf_export import export_hf
    from megatron_ledom.convert.hf_import import import_hf

__all__ = ["export_hf", "import_hf"]

__getattr__ = lazy_exports(
    __name__,
    {
        "megatron_ledom.convert.hf_export": ["export_hf"],
        "megatron_ledom.convert.hf_import": ["import_hf"],
    },
)
