"""Train a SentencePiece BPE on a corpus. The output folder contains tokenizer.model, tokenizer.json and tokenizer_config.json."""

import logging
import time
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from megatron_ledom.data.readers.input_files import expand_inputs
from megatron_ledom.data.readers.records import OnError, ReadSettings, read_texts
from megatron_ledom.data.readers.streams import MAX_RECORD_BYTES
from megatron_ledom.data.readers.text_template import template_of
from megatron_ledom.errors import UsageError
from megatron_ledom.storage.files import real_path, write_file
from megatron_ledom.storage.folders import new_folder
from megatron_ledom.tokenizers import sentencepiece_bpe

logger = logging.getLogger(__name__)

NUM_SAMPLES = 200  # texts of the corpus on which the conversion is tested
SAMPLE_CHARACTERS = 5000


@dataclass(kw_only=True, slots=True)
class TrainTokenizerSettings:
    """Options of `ledom train-tokenizer`."""

    input: list[str]
    vocab_size: int
    """Number of pieces, without the five specials that follow them."""
    output: str
    text_key: str = "text"
    text_template: str | None = None
    """Template that joins the texts of several keys, in place of `text_key`. Use the one of preprocessing."""
    on_error: OnError = "fail"
    max_record_bytes: int = MAX_RECORD_BYTES
    max_sentences: int | None = None
    """Number of lines to learn from, a uniform sample; default: all."""


def train_tokenizer(settings: TrainTokenizerSettings) -> Path:
    """Train, write the folder in one step when it is complete, and return its path."""
    folder = real_path(settings.output)  # if this is a link to a missing folder, make that folder
    with new_folder(folder, option="--output") as part:
        started = time.monotonic()
        for name, content in _trained_files(settings).items():
            write_file(Path(part, name), content)
    logger.info("%s: %d pieces and 5 specials, %.1f s", folder, settings.vocab_size, time.monotonic() - started)
    return Path(folder)


def _trained_files(settings: TrainTokenizerSettings) -> dict[str, bytes]:
    if settings.max_sentences is not None and settings.max_sentences < 1:
        raise UsageError(f"--max-sentences {settings.max_sentences} is not possible; use 1 or more")
    if settings.max_record_bytes < 1:
        raise UsageError(f"--max-record-bytes {settings.max_record_bytes} is not possible; use 1 or more")
    read = ReadSettings(
        text_key=settings.text_key,
        template=template_of(settings.text_template, settings.text_key),
        on_error=settings.on_error,
        max_record_bytes=settings.max_record_bytes,
    )
    paths = expand_inputs(settings.input)
    skipped: Counter[str] = Counter()
    texts = tqdm(read_texts(paths, read=read, skipped=skipped), desc="read", unit=" documents", disable=None)
    model = sentencepiece_bpe.train(texts, settings.vocab_size, settings.max_sentences)
    for reason, number in sorted(skipped.items()):
        logger.warning("skipped %d records: %s", number, reason)
    samples = [text[:SAMPLE_CHARACTERS] for text in islice(read_texts(paths, read=read), NUM_SAMPLES)]
    return {
        "tokenizer.model": model,
        "tokenizer.json": sentencepiece_bpe.convert(model, "the trained model", samples).encode(),
        "tokenizer_config.json": sentencepiece_bpe.tokenizer_config().encode(),
    }
