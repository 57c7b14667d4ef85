"""Conversion of tiktoken rank files to tokenizer.json.

A rank file has no splitting pattern and no specials, so these come from elsewhere.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ledom.errors import DataError, UsageError

CL100K_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K_PATTERN = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
R50K_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@dataclass(frozen=True, slots=True)
class Encoding:
    """The parts of a tokenizer that a rank file lacks."""

    pattern: str
    special_tokens: dict[str, int]


PUBLISHED = {
    "r50k_base": Encoding(R50K_PATTERN, {"<|endoftext|>": 50256}),
    "cl100k_base": Encoding(CL100K_PATTERN, {"<|endoftext|>": 100257}),
    "o200k_base": Encoding(O200K_PATTERN, {"<|endoftext|>": 199999}),
}
"""Name of the file -> the parts that it lacks."""


def encoding_of(file: Path, config: dict[str, Any]) -> Encoding:
    """Return the pattern and specials of a rank file: those of its tokenizer_config.json, else those known for its name."""
    if "pattern" in config:
        specials = config.get("special_tokens")
        if not isinstance(specials, dict) or not all(isinstance(value, int) for value in specials.values()):
            raise DataError(
                f'the tokenizer_config.json of {file} has a "pattern" but no "special_tokens" with their ids; add them'
            )
        return Encoding(str(config["pattern"]), {str(token): int(index) for token, index in specials.items()})
    if file.stem in PUBLISHED:
        return PUBLISHED[file.stem]
    raise UsageError(
        f"tokenizer {file} contains tiktoken ranks without their splitting pattern; add a tokenizer_config.json to its folder"
        f' with "pattern" and "special_tokens" ({{token: id}}), or name the file {", ".join(PUBLISHED)}.tiktoken if it is one of these'
    )


def convert(file: Path, encoding: Encoding) -> str:
    """Return the text of a tokenizer.json with the same ids, as the transformers library converts it."""
    try:
        from transformers.convert_slow_tokenizer import TikTokenConverter

        converter = TikTokenConverter(str(file), pattern=encoding.pattern)
        tokenizer = converter.converted()
    except ImportError as error:
        raise UsageError(f"tokenizer {file}: tiktoken ranks need tiktoken; install it (pip install tiktoken)") from error
    except (ValueError, OSError, KeyError) as error:
        raise DataError(f"{file} is not a file of tiktoken ranks ({error}); download it again") from error
    from tokenizers import AddedToken

    tokenizer.post_processor = None
    for token, index in sorted(encoding.special_tokens.items(), key=lambda item: item[1]):
        tokenizer.add_special_tokens([AddedToken(token, normalized=False)])
        if tokenizer.token_to_id(token) != index:
            raise DataError(
                f"{file}: the special token {token!r} would get id {tokenizer.token_to_id(token)} instead of {index}: ids"
                " between the ranks and it are missing; use the tokenizer.json of the model"
            )
    return str(tokenizer.to_str())
