"""What the manifests of a run's shards have to agree on, among each other and with the run; nothing but the manifests is read."""

from collections.abc import Mapping

from megatron_ledom.config.schema import RunConfig
from megatron_ledom.data.shard import ShardManifest
from megatron_ledom.direction import Direction
from megatron_ledom.errors import ConfigError, MismatchError
from megatron_ledom.provenance import Provenance


def check_manifests(config: RunConfig, manifests: Mapping[str, ShardManifest]) -> Provenance:
    """The provenance that all shards share, of at least one. Raises a LedomError that names the first that does not fit."""
    prefix, first = next(iter(manifests.items()))
    provenance = first.provenance
    _check_direction(prefix, first, config.data.direction)
    for other, manifest in manifests.items():
        manifest.provenance.check_same(provenance, f"the shard {other}", f"the shard {prefix}")
    check_pairs(config, manifests)
    stated = config.model.vocab_size
    if stated is not None and stated != provenance.vocab_size:
        raise MismatchError(
            f"model.vocab_size={stated} but the shard {prefix} has ids of {provenance.vocab_size};"
            " leave model.vocab_size out, or preprocess with the tokenizer that the run is meant for"
        )
    return provenance


def _check_direction(prefix: str, manifest: ShardManifest, direction: Direction) -> None:
    found = manifest.provenance.direction
    if found is not direction:
        raise MismatchError(
            f"the shard {prefix} is {found}, the run has data.direction={direction}: a {direction} model fed {found} ids"
            f" learns nonsense without an error; preprocess with --direction {direction}, or set data.direction={found}"
        )


def check_pairs(config: RunConfig, manifests: Mapping[str, ShardManifest]) -> None:
    """Refuse a run whose samples would not be the packs, or whose pairs would see each other. Raises ConfigError."""
    data = config.data
    for prefix, manifest in manifests.items():
        if not manifest.pairs:
            if data.loss_tokens != "all":
                raise ConfigError(
                    f"data.loss_tokens={data.loss_tokens} needs shards of pairs, {prefix} is one of text; make it with"
                    " tools/prepare_pairs.py, or set data.loss_tokens=all"
                )
            continue
        if manifest.pairs["seq_length"] != data.seq_length:
            raise ConfigError(
                f"the pairs of {prefix} are packed for data.seq_length={manifest.pairs['seq_length']}, the run has"
                f" {data.seq_length}; set that, or pack them anew with tools/prepare_pairs.py --seq-length {data.seq_length}"
            )
        if not data.reset_attention_mask:
            raise ConfigError(
                f"{prefix} holds pairs, which would see the pairs before them in their sample; set data.reset_attention_mask=true"
            )
