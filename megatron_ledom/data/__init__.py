"""Training data: text to shards, and a blend of shards to training samples."""

from typing import TYPE_CHECKING

from megatron_ledom.lazy import lazy_exports

if TYPE_CHECKING:
    from megatron_ledom.data.preprocess.encode_parts import concatenate_documents, pack_documents
    from megatron_ledom.data.shards.shard import Counts, ShardReader, ShardWriter

__all__ = ["Counts", "ShardReader", "ShardWriter", "concatenate_documents", "pack_documents"]

__getattr__ = lazy_exports(
    __name__,
    {
        "megatron_ledom.data.shards.shard": ["Counts", "ShardReader", "ShardWriter"],
        "megatron_ledom.data.preprocess.encode_parts": ["concatenate_documents", "pack_documents"],
    },
)
