"""Make a corpus with one command: pin what is not pinned, train the tokenizer if it is missing, build, blend, write the card."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ledom.corpus.addresses import is_commit, is_hub
from megatron_ledom.corpus.blend import CorpusBlendSettings, corpus_blend
from megatron_ledom.corpus.build import BuildSettings, SourceBuild, build, stored_listing
from megatron_ledom.corpus.card import CardSettings, write_card
from megatron_ledom.corpus.pin import PinSettings, pin
from megatron_ledom.corpus.recipe import Recipe, load_recipe
from megatron_ledom.data.preprocess.train_tokenizer import TrainTokenizerSettings, train_tokenizer
from megatron_ledom.errors import MismatchError, UsageError
from megatron_ledom.tokenizers.corpus_tokenizer import load_tokenizer
from megatron_ledom.tokenizers.sentencepiece_bpe import SPECIALS

logger = logging.getLogger(__name__)
BLEND_NAME = "blend.yaml"


@dataclass(kw_only=True, slots=True)
class MakeSettings:
    """Options of `ledom corpus make`."""

    recipe: str
    overrides: Sequence[str] = ()
    workers: int | None = None
    seq_length: int | None = None
    global_batch_size: int | None = None
    allow_repeats: bool = False


def make(settings: MakeSettings) -> Path:
    """Make everything and return the path of the config lines, OUTPUT/blend.yaml."""
    recipe = load_recipe(settings.recipe, settings.overrides)
    loose = [name for name, source in recipe.sources.items() if is_hub(source.address) and not is_commit(source.revision)]
    if loose and stored_listing(settings.recipe, None)[0] is None:
        pin(PinSettings(recipe=settings.recipe, overrides=settings.overrides))
    build_settings = BuildSettings(recipe=settings.recipe, overrides=settings.overrides, workers=settings.workers)
    _make_tokenizer(recipe, build_settings)
    build(build_settings)
    blend = Path(recipe.output, BLEND_NAME)
    corpus_blend(
        CorpusBlendSettings(
            recipe=settings.recipe,
            overrides=settings.overrides,
            seq_length=settings.seq_length,
            global_batch_size=settings.global_batch_size,
            allow_repeats=settings.allow_repeats,
            output=str(blend),
        )
    )
    card = write_card(CardSettings(recipe=settings.recipe, overrides=settings.overrides))
    logger.info("%s has the config lines (`base:` of a config), %s the card", blend, card)
    return blend


def _make_tokenizer(recipe: Recipe, settings: BuildSettings) -> None:
    """Train the tokenizer on the sources if it does not exist and the recipe says how large it is.

    Raise MismatchError for an existing one of another size.
    """
    if recipe.tokenizer_vocab_size is None:
        return
    if Path(recipe.tokenizer).exists():
        found = load_tokenizer(recipe.tokenizer, recipe.eod_token).vocab_size - len(SPECIALS)
        if found != recipe.tokenizer_vocab_size:
            raise MismatchError(
                f"tokenizer {recipe.tokenizer} has {found:,} pieces, tokenizer_vocab_size={recipe.tokenizer_vocab_size:,}; name another"
                " folder to train one of this size, or set tokenizer_vocab_size to null to use a tokenizer that is not trained here"
            )
        return
    keys = {(source.text_key, source.text_template) for source in recipe.sources.values()}
    if len(keys) > 1:
        raise UsageError(
            f"tokenizer {recipe.tokenizer} does not exist, and it cannot be trained on sources with different text keys"
            f" ({', '.join(sorted(str(key) for key, _ in keys))}); train it with `ledom train-tokenizer`"
        )
    [(text_key, template)] = keys
    listing, where = stored_listing(settings.recipe, settings.listing)
    inputs = [path for name in recipe.sources for path in SourceBuild(recipe, name, settings, listing, where).inputs()]
    train_tokenizer(
        TrainTokenizerSettings(
            input=inputs,
            vocab_size=recipe.tokenizer_vocab_size,
            output=recipe.tokenizer,
            text_key=text_key,
            text_template=template,
            on_error="skip",
        )
    )
