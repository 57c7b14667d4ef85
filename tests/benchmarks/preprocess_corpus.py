"""Text and tokenizers for the preprocessing benchmarks, for runs that name none. Nothing is downloaded.

The small corpus is the text in this Python installation (sources, documentation, licences), cut at line ends into documents of
log-normal length, shuffled with a fixed seed: mostly English and code. Published numbers need a corpus with more languages.
"""

import functools
import gzip
import itertools
import json
import math
import random
import shutil
import string
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import orjson
import zstandard

SUFFIXES = (".py", ".pyi", ".rst", ".md", ".txt", ".h", ".hpp")
MAX_FILE_BYTES = 400_000
MEDIAN_CHARACTERS, SPREAD = 2400, 1.0  # of the log-normal lengths: those of a mixed corpus of documentation and web text
MIN_CHARACTERS = 200
BYTE_LEVEL_VOCAB, BYTE_LEVEL_EOD = 50_000, "<|endoftext|>"


def build_corpus(target: Path, megabytes: float) -> None:
    """Write at least `megabytes` of text as JSONL, or all text of this Python installation if it has less."""
    generator = random.Random(1234)
    roots = sorted({Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")})
    files = sorted({path for root in roots for path in root.rglob("*") if path.suffix in SUFFIXES and path.is_file()})
    generator.shuffle(files)
    documents: list[str] = []
    total = 0
    for path in files:
        if total >= megabytes * 1e6:
            break
        for document in _documents_of(path, generator):
            documents.append(document)
            total += len(document.encode())
    generator.shuffle(documents)
    with target.open("w", encoding="ascii") as file:
        for number, document in enumerate(documents):
            file.write(json.dumps({"id": number, "text": document}) + "\n")


def _documents_of(path: Path, generator: random.Random) -> Iterator[str]:
    if path.stat().st_size > MAX_FILE_BYTES:
        return
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return
    start = 0
    while start < len(text):
        end = start + max(MIN_CHARACTERS, int(math.exp(generator.gauss(math.log(MEDIAN_CHARACTERS), SPREAD))))
        cut = text.rfind("\n", start + MIN_CHARACTERS, end) + 1 if end < len(text) else 0
        end = cut or end
        if len(text[start:end].strip()) >= MIN_CHARACTERS:
            yield text[start:end]
        start = end


def cut_corpus(source: Path, target: Path, megabytes: float, *, new_words: bool = False) -> tuple[int, int]:
    """Copy the first `megabytes` of documents, repeating them if there are too few; return (documents, text bytes).

    With `new_words`, the letters of each repetition are shifted in the alphabet, so a cache of words never hits.
    """
    num_documents = text_bytes = 0
    with target.open("wb") as written:
        for repetition, line in _repeated_lines(source):
            if text_bytes >= megabytes * 1e6:
                break
            record = orjson.loads(line)
            if new_words and repetition:
                record["text"] = record["text"].translate(_shifted_letters(repetition))
                line = orjson.dumps(record)
            written.write(line.rstrip(b"\n") + b"\n")
            text_bytes += len(record["text"].encode())
            num_documents += 1
    return num_documents, text_bytes


def _repeated_lines(source: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of the file again and again, each with the number of earlier repetitions."""
    for repetition in itertools.count():
        line = b""
        with source.open("rb") as lines:
            for line in lines:
                yield repetition, line
        if not line:
            raise ValueError(f"{source} contains no document; give a JSONL file with a key `text`")


@functools.cache
def _shifted_letters(by: int) -> dict[int, int]:
    letters = string.ascii_lowercase
    shift = by % len(letters)
    small = str.maketrans(letters, letters[shift:] + letters[:shift])
    return small | str.maketrans(letters.upper(), letters[shift:].upper() + letters[:shift].upper())


def compress(source: Path, kind: str) -> Path:
    """Write source.gz or source.zst next to the source and return its path; `none` returns the source."""
    if kind == "none":
        return source
    target = source.with_name(f"{source.name}.{kind}")
    with source.open("rb") as plain:
        if kind == "gz":
            with gzip.open(target, "wb", compresslevel=6) as compressed:
                shutil.copyfileobj(plain, compressed, 1 << 20)
        else:
            with target.open("wb") as compressed:
                zstandard.ZstdCompressor(level=3).copy_stream(plain, compressed)
    return target


def train_byte_level(source: Path, folder: Path) -> Path:
    """Train a byte-level BPE on the corpus; write tokenizer.json, whose path is returned, and tokenizer_config.json."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=BYTE_LEVEL_VOCAB,
        special_tokens=[BYTE_LEVEL_EOD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with source.open("rb") as lines:
        tokenizer.train_from_iterator((orjson.loads(line)["text"] for line in lines), trainer)
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": BYTE_LEVEL_EOD}))
    return folder / "tokenizer.json"
