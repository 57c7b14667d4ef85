"""Model folders small enough for unit tests: tokenizers trained here, and Llama models of 2 layers and width 32."""

import json
import random
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_ledom.provenance import vocabulary_hash

SPECIALS = ["<unk>", "<s>", "</s>"]
EOD_TOKEN = "<EOD>"
CORPUS = [
    "The capital of France is Paris. The cat sat on the mat, and the dog ran after the cat.",
    "def area(width, height):\n    return width * height\n\n\nprint(area(3, 14))\n",
    "Once upon a time there was a café; naïve people went there, of course.\tThe end.\n\n  Indented lines.",
    "Berlin is the capital of Germany.  Two spaces, then three   spaces, 漢字 and 漢字.",
]
FRAGMENTS = [
    *["the", "The", "capital", "of", "Paris", "Parisian", "x", "42", "7", "hereof", "é", "café", "e\u0301"],
    *[
        "漢",
        "漢字",
        "日本",
        "🙂",
        "👩‍👩‍👧",
        "🇫🇷",
        "\n",
        "\n\n",
        "\t",
        " ",
        "  ",
        ".",
        ",",
        "'s",
        "(",
        "\u00a0",
        "▁",
        "</s>",
        "<EOD>",
        "\x00",
    ],
]


def random_text(rng: random.Random, most: int = 8) -> str:
    """Return a text of 1 to `most` fragments: words, digits, scripts, emoji, newlines, spaces, special tokens spelled out."""
    return "".join(rng.choice(FRAGMENTS) + rng.choice(["", "", " "]) for _ in range(rng.randint(1, most)))


@cache
def sentencepiece_like_json() -> str:
    """Return BPE with byte fallback and a dummy prefix, like a converted SentencePiece model: </s> is 2, <EOD> the last id."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trained.train_from_iterator(CORPUS * 4, trainers.BpeTrainer(vocab_size=200, show_progress=False))
    learned = json.loads(trained.to_str())["model"]
    pieces = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256)), *learned["vocab"]]
    merges = [tuple(merge) for merge in learned["merges"]]
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    to_space = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(to_space)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in [*SPECIALS, EOD_TOKEN]])
    return str(tokenizer.to_str())


@cache
def byte_level_json() -> str:
    """Return byte-level BPE like GPT-2's, with trimmed offsets in its template: <EOD> is 3."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[*SPECIALS, EOD_TOKEN],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    return str(tokenizer.to_str())


@cache
def metaspace_json() -> str:
    """Return the SentencePiece-like tokenizer of newer conversions, with the dummy prefix in a Metaspace pre-tokenizer."""
    tokenizer = Tokenizer.from_str(sentencepiece_like_json())
    tokenizer.normalizer = normalizers.Sequence([])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return str(tokenizer.to_str())


TOKENIZERS = {"sentencepiece": sentencepiece_like_json, "byte_level": byte_level_json, "metaspace": metaspace_json}


def tiny_config(vocab_size: int, **changed: Any) -> LlamaConfig:
    """Return a config with 2 layers, width 32 and 512 positions."""
    values = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    return LlamaConfig(**{**values, **changed})


def save_model_folder(
    folder: Path, model: LlamaForCausalLM, tokenizer_json: str, direction: str | None, eod_id: int | None = None
) -> Path:
    """Write a folder like an export, or a stock folder (`direction` None).

    eod_id None means <EOD>. The eos of tokenizer_config.json is </s>, not the eod, as in the published folder.
    """
    eod_id = Tokenizer.from_str(tokenizer_json).token_to_id(EOD_TOKEN) if eod_id is None else eod_id
    model.config.eos_token_id = eod_id
    model.generation_config.eos_token_id = eod_id
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "clean_up_tokenization_spaces": False})
    )
    if direction is not None:
        config = json.loads((folder / "config.json").read_text())
        config |= {"direction": direction, "eod_id": eod_id, "tokenizer_sha256": vocabulary_hash(tokenizer_json.encode())}
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def random_model_folder(folder: Path, tokenizer: str, direction: str | None, *, num_extra_rows: int = 0) -> Path:
    """Write a random model for one of TOKENIZERS, with `num_extra_rows` rows of padding after its vocabulary."""
    tokenizer_json = TOKENIZERS[tokenizer]()
    torch.manual_seed(7)
    vocab_size = Tokenizer.from_str(tokenizer_json).get_vocab_size() + num_extra_rows
    return save_model_folder(folder, LlamaForCausalLM(tiny_config(vocab_size)), tokenizer_json, direction)


def forward_and_reverse(root: Path, forward: str, reverse: str) -> tuple[Path, Path]:
    """Write a random forward and a random reverse model, each for one of TOKENIZERS, and return their folders."""
    return random_model_folder(root / "forward", forward, "forward"), random_model_folder(root / "reverse", reverse, "reverse")


def chain_model(vocab_size: int, next_of: dict[int, int]) -> LlamaForCausalLM:
    """Return a model whose most likely token after `t` is always `next_of[t]`: it uses the last embedding only."""
    torch.manual_seed(7)
    model = LlamaForCausalLM(tiny_config(vocab_size, hidden_size=128))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embeddings = torch.nn.functional.normalize(torch.randn(vocab_size, 128), dim=-1)
        model.model.embed_tokens.weight.copy_(embeddings)
        model.lm_head.weight.zero_()
        for token, following in next_of.items():
            model.lm_head.weight[following] += 5 * embeddings[token]
    return model


def divided_characters_folder(folder: Path) -> tuple[str, list[str]]:
    """Write a reverse model that writes two characters byte by byte, then a word and <EOD>.

    Returns the following text with which it begins, and the pieces of text of a stream.
    """
    pieces = ["▁is", "<0x97>", "<0xAD>", "<0xE5>", "<0xA2>", "<0xBC>", "<0xE6>", "▁cat", "<EOD>"]
    tokenizer = Tokenizer.from_str(sentencepiece_like_json())
    ids = [tokenizer.token_to_id(piece) for piece in pieces]
    if None in ids:
        pieces[0], pieces[-2] = "s", "t"
        ids = [tokenizer.token_to_id(piece) for piece in pieces]
    model = chain_model(tokenizer.get_vocab_size(), dict(pairwise(ids)))
    save_model_folder(folder, model, sentencepiece_like_json(), "reverse")
    return pieces[0].replace("▁", " "), ["字", "漢", pieces[-2].replace("▁", " ").strip()]
