"""tiktoken rank files as tokenizer.json: the file holds ranks only, so the splitting pattern and specials come from elsewhere."""

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
"""By the name of the file."""


def encoding_of(file: Path, config: dict[str, Any]) -> Encoding:
    """The pattern and specials of a rank file: from tokenizer_config.json beside it, else by its name."""
    if "pattern" in config:
        specials = config.get("special_tokens")
        if not isinstance(specials, dict) or not all(isinstance(value, int) for value in specials.values()):
            raise DataError(
                f'tokenizer_config.json beside {file} has a "pattern" but no "special_tokens" with an id each; add them'
            )
        return Encoding(str(config["pattern"]), {str(token): int(index) for token, index in specials.items()})
    if file.stem in PUBLISHED:
        return PUBLISHED[file.stem]
    raise UsageError(
        f"tokenizer {file} holds tiktoken ranks without their splitting pattern; put a tokenizer_config.json beside it with"
        f' "pattern" and "special_tokens" ({{token: id}}), or name the file {", ".join(PUBLISHED)}.tiktoken if it is one of these'
    )


def convert(file: Path, encoding: Encoding) -> str:
    """The text of a tokenizer.json with the same ids (by the transformers library, which takes a moment to import)."""
    try:
        from transformers.convert_slow_tokenizer import TikTokenConverter

        converter = TikTokenConverter(str(file), pattern=encoding.pattern)
        tokenizer = converter.converted()
    except ImportError as error:
        raise UsageError(f"tokenizer {file}: tiktoken ranks need tiktoken; install it (pip install tiktoken)") from error
    except (ValueError, OSError, KeyError) as error:
        raise DataError(f"{file} is not a file of tiktoken ranks ({error}); fetch it again") from error
    from tokenizers import AddedToken

    tokenizer.post_processor = None
    for token, index in sorted(encoding.special_tokens.items(), key=lambda item: item[1]):
        tokenizer.add_special_tokens([AddedToken(token, normalized=False)])
        if tokenizer.token_to_id(token) != index:
            raise DataError(
                f"{file}: the special token {token!r} would get id {tokenizer.token_to_id(token)} instead of {index}: there are"
                " gaps between the ranks and it; use the model's tokenizer.json"
            )
    return str(tokenizer.to_str())
