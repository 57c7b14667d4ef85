"""Test data one can read: in document k, position i is the word str(100*k + i), whose token id is that very number."""

import json
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

EOD_TOKEN = "<eod>"
EOD_ID = 1000
VOCAB_SIZE = 1001


def legible_tokenizer(folder: Path, *, eos: bool = True) -> Path:
    """Write a Hugging Face tokenizer folder in which the word "307" has id 307 (0..999) and <eod>, its eos, id 1000."""
    vocab = {str(number): number for number in range(EOD_ID)}
    tokenizer = Tokenizer(WordLevel({**vocab, EOD_TOKEN: EOD_ID} if eos else vocab, unk_token="0"))
    tokenizer.pre_tokenizer = Whitespace()
    if eos:
        tokenizer.add_special_tokens([EOD_TOKEN])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": EOD_TOKEN} if eos else config))
    return folder


def legible_ids(document: int, length: int) -> list[int]:
    """Ids [length] of one document in text order."""
    return [100 * document + position for position in range(length)]


def legible_documents(num_documents: int, length: int) -> list[str]:
    """Texts; `num_documents` up to 10 and `length` up to 100 keep every id below 1000 and different."""
    return [" ".join(map(str, legible_ids(document, length))) for document in range(num_documents)]


def write_jsonl(path: Path, texts: list[str], key: str = "text") -> Path:
    """Write one JSON object a line."""
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts), encoding="utf-8")
    return path
