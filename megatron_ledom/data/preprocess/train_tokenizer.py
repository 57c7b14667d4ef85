"""Train a SentencePiece BPE on a corpus and write it as a folder: tokenizer.model, tokenizer.json, tokenizer_config.json."""

import logging
import shutil
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
from megatron_ledom.storage.files import real_path
from megatron_ledom.storage.locks import output_file_lock
from megatron_ledom.tokenizers import sentencepiece_bpe

logger = logging.getLogger(__name__)

NUM_SAMPLES = 200  # texts of the corpus the conversion is tried on
SAMPLE_CHARACTERS = 5000


@dataclass(kw_only=True, slots=True)
class TrainTokenizerSettings:
    """What tools/train_tokenizer.py was asked."""

    input: list[str]
    vocab_size: int
    """Pieces, without the five specials behind them."""
    output: str
    text_key: str = "text"
    text_template: str | None = None
    """Joins several keys to one text, in place of `text_key`; the same as preprocessing will be given."""
    on_error: OnError = "fail"
    max_record_bytes: int = MAX_RECORD_BYTES
    max_sentences: int | None = None
    """Lines to learn from, drawn evenly; default: all."""


def train_tokenizer(settings: TrainTokenizerSettings) -> Path:
    """Write the folder, at once and complete, and return its path."""
    folder = Path(real_path(settings.output))  # a link to a folder that is not there yet: that one is made
    try:
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(folder, error) from error
    with output_file_lock(folder):
        return _train_into(folder, settings)


def _train_into(folder: Path, settings: TrainTokenizerSettings) -> Path:
    if folder.exists():
        raise UsageError(f"{folder} exists already; choose another --output or remove it")
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
    started = time.monotonic()
    skipped: Counter[str] = Counter()
    texts = tqdm(read_texts(paths, read=read, skipped=skipped), desc="read", unit=" documents", disable=None)
    model = sentencepiece_bpe.train(texts, settings.vocab_size, settings.max_sentences)
    for reason, number in sorted(skipped.items()):
        logger.warning("skipped %d records: %s", number, reason)
    samples = [text[:SAMPLE_CHARACTERS] for text in islice(read_texts(paths, read=read), NUM_SAMPLES)]
    files = {
        "tokenizer.model": model,
        "tokenizer.json": sentencepiece_bpe.convert(model, "the trained model", samples).encode(),
        "tokenizer_config.json": sentencepiece_bpe.tokenizer_config().encode(),
    }
    _write_folder(folder, files)
    logger.info("%s: %d pieces and 5 specials, %.1f s", folder, settings.vocab_size, time.monotonic() - started)
    return folder


def _write_folder(folder: Path, files: dict[str, bytes]) -> None:
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        for name, content in files.items():
            (part / name).write_bytes(content)
        part.rename(folder)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        raise _cannot_write(folder, error) from error


def _cannot_write(folder: Path, error: OSError) -> UsageError:
    return UsageError(f"{folder} cannot be written ({error.strerror}); choose another --output")
