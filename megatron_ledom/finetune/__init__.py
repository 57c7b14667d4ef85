"""Fine-tuning: pairs of a prompt and an answer become packed shards; documents become batches of transformers' Trainer."""

from typing import TYPE_CHECKING

from megatron_ledom.lazy import lazy_exports

if TYPE_CHECKING:
    from megatron_ledom.finetune.documents import DocumentCollator, encode_documents, save_finetuned

__all__ = ["DocumentCollator", "encode_documents", "save_finetuned"]

__getattr__ = lazy_exports(
    __name__, {"megatron_ledom.finetune.documents": ["DocumentCollator", "encode_documents", "save_finetuned"]}
)
