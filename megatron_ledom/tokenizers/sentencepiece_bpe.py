"""SentencePiece BPE as in LEDOM (arXiv 2507.01335): training, and an exact conversion to a tokenizer.json.

The pieces are <unk> 0, <s> 1, </s> 2, 256 bytes, then merges and characters. Characters without a piece are encoded as bytes.
Each digit is its own piece, text is not normalised, whitespace is kept, and every text gets a space in front (the dummy
prefix). Five specials follow the pieces, so their ids depend on the number of pieces only: with 64,000 pieces <EOD> is 64002.
"""

import io
import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from megatron_ledom.errors import DataError, UsageError, VerificationError

SPECIALS = ("<CLS>", "<SEP>", "<EOD>", "<MASK>", "<PAD>")
EOD_TOKEN = "<EOD>"
SPACE = "\u2581"  # how SentencePiece writes a space inside a piece

MAX_SENTENCE_CHARACTERS = 1000  # SentencePiece silently skips lines above 4,192 bytes, so longer lines are cut

TEXT_START = r"\A"
MAX_PROBED = 500
"""Largest number of user-defined pieces with which a conversion is tested."""

ODD_TEXTS = (
    "",
    " ",
    "   ",
    "a",
    " a",
    "a ",
    "  two  spaces  ",
    "line\nline\n\n\nline\r\nend\n",
    "\tdef f(x):\n\t\treturn x ** 2\n",
    "        eight spaces",
    "1234567890 3.14159 1,000 v2.0",
    "Größe, naïve, Þórr, cafe\u0301 and café",
    "日本語のテキスト、中文文本。한국어",
    "שלום עולם مرحبا بالعالم नमस्ते",
    "👩‍👩‍👧‍👦 🇩🇪 👍🏽 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𓀀",
    "\u00a0\u200b\u3000\ufeff\u2028\x00\x07\x7f\u0085",
    "<unk> <s> </s> <EOD> <0x0A> [MASK]",
    f"{SPACE}{SPACE} a{SPACE}b",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa abababababababababa",
    "==== ---- //// #### **** ....",
)
"""Texts on which tokenizers often differ. Every conversion is tested on them."""


def train(texts: Iterable[str], vocab_size: int, max_sentences: int | None = None) -> bytes:
    """Train on `texts` and return the `.model` file: `vocab_size` pieces, then the five specials.

    SentencePiece learns from lines. `max_sentences` limits their number, and so the memory: the lines are then a uniform
    sample with a fixed seed. The result depends on the texts and the arguments only. Raises UsageError if SentencePiece cannot
    learn from the texts.
    """
    import sentencepiece

    lines = _sentences(texts)
    written = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines if max_sentences is None else iter(_drawn(lines, max_sentences)),
            model_writer=written,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            add_dummy_prefix=True,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,  # indentation becomes one piece
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            shuffle_input_sentence=False,
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise UsageError(
            f"SentencePiece cannot learn {vocab_size:,} pieces from this text ({error}); give it more text or change --vocab-size"
        ) from error
    return append_specials(written.getvalue())


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text.split("\n"):
            for start in range(0, len(line), MAX_SENTENCE_CHARACTERS):
                yield line[start : start + MAX_SENTENCE_CHARACTERS]


def _drawn(lines: Iterable[str], number: int) -> list[str]:
    """Return a uniform sample of the lines in their order, by reservoir sampling."""
    generator = random.Random(0)
    kept: list[tuple[int, str]] = []
    for index, line in enumerate(lines):
        if len(kept) < number:
            kept.append((index, line))
        elif (slot := generator.randrange(index + 1)) < number:
            kept[slot] = (index, line)
    return [line for _, line in sorted(kept)]


def append_specials(model: bytes) -> bytes:
    """Append the five specials to a `.model` file, as control pieces: no text encodes to a control piece."""
    proto = parse_model(model, "the trained model")
    for special in SPECIALS:
        proto.pieces.add(piece=special, score=0.0, type=proto.SentencePiece.CONTROL)
        proto.trainer_spec.control_symbols.append(special)
    proto.trainer_spec.vocab_size = len(proto.pieces)
    return bytes(proto.SerializeToString(deterministic=True))


def parse_model(model: bytes, where: str) -> Any:
    """Return the ModelProto of a `.model` file. `where` names the file in errors. Raises DataError."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(model)
    except DecodeError as error:
        raise DataError(f"{where} is not a SentencePiece model ({error}); download it again") from error
    if not proto.pieces:
        raise DataError(f"{where} is not a SentencePiece model: it has no pieces; download it again")
    return proto


def convert(model: bytes, where: str, samples: Sequence[str] = ()) -> str:
    """Return the text of a tokenizer.json with the ids of a SentencePiece BPE `.model`. `where` names the model in errors.

    The conversion is tested on ODD_TEXTS and `samples`. Raises VerificationError with the text if its ids differ. One kind of
    text is not exact: a user-defined piece alone, before which SentencePiece puts a dummy prefix.
    """
    proto = parse_model(model, where)
    _check_convertible(proto, where)
    chosen = [piece.piece for piece in proto.pieces if piece.type == proto.SentencePiece.USER_DEFINED]
    converted = _converted(proto)
    if chosen:
        converted = json.dumps(prefix_texts_only(json.loads(converted), chosen, alone=True), ensure_ascii=False)
    around = [text for piece in chosen[:MAX_PROBED] for text in (f"a{piece}b c", f"{piece} a", f"{piece}{piece}b")]
    check_conversion(model, converted, [*ODD_TEXTS, *around, *samples], where)
    return converted


def is_dummy_prefix(step: dict[str, Any]) -> bool:
    """Return True if a step of a normalizer adds the dummy prefix."""
    pattern = step.get("pattern")
    at_start = isinstance(pattern, dict) and str(pattern.get("Regex", "")).startswith(TEXT_START)
    return step["type"] == "Prepend" or (step["type"] == "Replace" and at_start)


def prefix_texts_only(stored: dict[str, Any], whole: Sequence[str], *, alone: bool = False) -> dict[str, Any]:
    """Return a converted tokenizer.json that adds the dummy prefix to whole texts only, not after each added token of `whole`.

    The library would add the prefix to every part between added tokens. As in stock transformers (5.x), a text that begins with
    such a token gets no prefix. With `alone`, only a text that consists of such a token gets none, nearly as in SentencePiece.
    """
    steps = list((stored.get("normalizer") or {}).get("normalizers") or ())
    if not whole or not any(map(is_dummy_prefix, steps)):
        return stored
    spelled = "|".join(map(re.escape, sorted(whole, key=len, reverse=True)))
    start = {"Regex": rf"{TEXT_START}(?!(?:{spelled})\z)(?=[\s\S])" if alone else f"{TEXT_START}(?!{spelled})"}
    once = [{"type": "Replace", "pattern": start, "content": SPACE} if is_dummy_prefix(step) else step for step in steps]
    added = [{**token, "normalized": token["normalized"] or token["content"] in whole} for token in stored["added_tokens"]]
    return {**stored, "normalizer": {"type": "Sequence", "normalizers": once}, "added_tokens": added}


def without_word(stored: dict[str, Any], word: str) -> dict[str, Any]:
    """Return a tokenizer.json of `prefix_texts_only` in which a text that begins with `word` gets the dummy prefix again."""
    steps = list((stored.get("normalizer") or {}).get("normalizers") or ())
    patterns = [str((step.get("pattern") or {}).get("Regex", "")) for step in steps]
    if not any(pattern.startswith(TEXT_START) for pattern in patterns):
        return stored
    added = stored["added_tokens"]
    words = [token["content"] for token in added if not token["special"] and token["normalized"] and token["content"] != word]
    if words:
        return prefix_texts_only(stored, words, alone=any(r"\z" in pattern for pattern in patterns))
    plain = [{"type": "Prepend", "prepend": SPACE} if is_dummy_prefix(step) else step for step in steps]
    return {**stored, "normalizer": {**stored["normalizer"], "normalizers": plain}}


def _check_convertible(proto: Any, where: str) -> None:
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    found = [
        (trainer.model_type != trainer.BPE, "is not a BPE model"),
        (bool(normalizer.precompiled_charsmap), f"normalises text ({normalizer.name})"),
        (normalizer.remove_extra_whitespaces, "removes extra whitespace"),
        (not normalizer.escape_whitespaces or trainer.treat_whitespace_as_suffix, "treats spaces in an unusual way"),
    ]
    reasons = [reason for applies, reason in found if applies]
    if reasons:
        raise DataError(
            f"{where} {', '.join(reasons)}: only BPE models that do not change the text can be used as a .model;"
            " convert it with the transformers library and pass the folder with its tokenizer.json"
        )


def _converted(proto: Any) -> str:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    kinds = proto.SentencePiece
    vocab = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    unknown = next(piece.piece for piece in proto.pieces if piece.type == kinds.UNKNOWN)
    tokenizer = Tokenizer(
        models.BPE(
            vocab, _merges(proto, vocab), unk_token=unknown, fuse_unk=True, byte_fallback=proto.trainer_spec.byte_fallback
        )
    )
    to_space = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if proto.normalizer_spec.add_dummy_prefix:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
        tokenizer.decoder = decoders.Sequence([*to_space, decoders.Strip(" ", 1, 0)])
    else:
        tokenizer.normalizer = normalizers.Replace(" ", SPACE)
        tokenizer.decoder = decoders.Sequence(to_space)
    specials = [piece.piece for piece in proto.pieces if piece.type in (kinds.UNKNOWN, kinds.CONTROL)]
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False) for piece in specials])
    chosen = [piece.piece for piece in proto.pieces if piece.type == kinds.USER_DEFINED]
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in chosen])
    return str(tokenizer.to_str())


def _merges(proto: Any, vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Return every split of a piece into two pieces, best score first: SentencePiece merges the pair with the best result."""
    normal = {piece.piece: piece.score for piece in proto.pieces if piece.type == proto.SentencePiece.NORMAL}
    ranked = []
    for piece, score in normal.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in normal and right in normal:
                ranked.append((-score, vocab[left], vocab[right], left, right))
    return [(left, right) for *_, left, right in sorted(ranked)]


def check_conversion(model: bytes, tokenizer_json: str, texts: Sequence[str], where: str) -> None:
    """Compare the ids of both forms on `texts`. Raises VerificationError with the first text that differs."""
    import sentencepiece
    from tokenizers import Tokenizer

    try:
        pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{where} is not a SentencePiece model that the library can load ({first}); download it again"
        ) from error
    converted = Tokenizer.from_str(tokenizer_json)
    converted.encode_special_tokens = True  # as in SentencePiece, "<EOD>" in a text is ordinary text
    for text in texts:
        expected, found = pieces.encode(text), converted.encode(text, add_special_tokens=False).ids
        if expected != found:
            raise VerificationError(
                f"{where} cannot be converted exactly: {text[:80]!r} gets the ids {found[:12]} instead of {expected[:12]};"
                " convert it with the transformers library and pass the folder with its tokenizer.json"
            )


def tokenizer_config() -> str:
    """Return the `tokenizer_config.json` of a tokenizer trained here. Its eos is <EOD>, at which generation stops."""
    names = {"bos": "<s>", "eos": EOD_TOKEN, "unk": "<unk>", "pad": "<PAD>", "cls": "<CLS>", "sep": "<SEP>", "mask": "<MASK>"}
    config: dict[str, Any] = {f"{role}_token": token for role, token in names.items()}
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    return json.dumps(config, indent=2) + "\n"
