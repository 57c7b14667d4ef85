"""NaN and infinity in logits raise an error that names model, item and token, in every command; -inf for a token is allowed."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from megatron_ledom.errors import NotFiniteError
from megatron_ledom.evaluation.harness.reverse_choices import among_choices
from megatron_ledom.evaluation.loss_difference import document_losses
from megatron_ledom.evaluation.multiple_choice import chosen, less_prior
from megatron_ledom.inference.language_model import ForwardLM, ReverseLM
from megatron_ledom.inference.reverse_reward.reward import reverse_reward
from megatron_ledom.inference.scoring import SpanScore
from tests.support.evaluation_sets import write_sets
from tests.support.tiny_models import byte_level_json, random_model_folder
from tests.support.tool_runs import run_tool

Weights = dict[str, torch.Tensor]


def id_of(token: str) -> int:
    """Return the id of the word in the byte-level tokenizer."""
    return int(Tokenizer.from_str(byte_level_json()).token_to_id(token))


def one_nan(weights: Weights) -> None:
    weights["model.layers.1.mlp.down_proj.weight"][3, 5] = math.nan


def nan_of_one_token(weights: Weights) -> None:
    weights["model.embed_tokens.weight"][id_of("7")] = math.nan


def infinite_logit(weights: Weights) -> None:
    weights["lm_head.weight"][id_of("x")] = math.inf


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the models `forward` and `reverse` and broken copies such as `forward_one_nan`."""
    root = tmp_path_factory.mktemp("models")
    for direction in ("forward", "reverse"):
        folder = random_model_folder(root / direction, "byte_level", direction)
        for spoil in (one_nan, nan_of_one_token, infinite_logit):
            broken = shutil.copytree(folder, root / f"{direction}_{spoil.__name__}")
            weights = load_file(broken / "model.safetensors")
            spoil(weights)
            save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    write_sets(root / "sets")
    return root


def told_by_tool(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tool: str, *arguments: str | Path
) -> tuple[int, str]:
    """Return the exit code and the messages of a tool in this process."""
    code = run_tool(monkeypatch, tool.removesuffix(".py"), *arguments)
    return code, capsys.readouterr().err


@pytest.mark.parametrize("broken", ["one_nan", "infinite_logit"])
def test_scores_of_a_broken_model_are_refused_with_model_text_and_token(folders: Path, broken: str) -> None:
    model = ForwardLM.from_pretrained(folders / f"forward_{broken}")
    with pytest.raises(
        NotFiniteError, match=rf"forward_{broken} gives logits that are not finite .*token ' Paris' after 'The capital'"
    ):
        model.log_likelihood("The capital", " Paris")
    with pytest.raises(NotFiniteError, match="not finite"):
        document_losses(model, [model.tokenizer.encode("The cat sat")], context=8, batch_size=2)


def test_a_broken_embedding_spoils_only_the_texts_that_have_it(folders: Path) -> None:
    model = ReverseLM.from_pretrained(folders / "reverse_nan_of_one_token")
    sound = ReverseLM.from_pretrained(folders / "reverse")
    pairs = ["The capital of France", "x"], [" is Paris.", " and 42"]
    assert model.log_likelihood(*pairs)[0].logprob == sound.log_likelihood(*pairs)[0].logprob
    with pytest.raises(NotFiniteError, match="token 'x' before ' and 7'"):
        model.log_likelihood(["The capital", "x"], [" is Paris.", " and 7"])


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 3}])
def test_nothing_is_written_by_a_broken_model(folders: Path, options: dict[str, float]) -> None:
    model = ReverseLM.from_pretrained(folders / "reverse_one_nan")
    with pytest.raises(NotFiniteError, match=r"reverse_one_nan gives logits .*next token after"):
        model.generate_preceding(" of Paris", max_new_tokens=4, **options)  # type: ignore[call-overload]
    with pytest.raises(NotFiniteError, match="reverse_one_nan"):
        list(model.stream_preceding(" of Paris", max_new_tokens=4))


def test_every_command_ends_with_1_and_names_the_item(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        {"prompt": "The capital of", "candidates": [" 42", " 漢"]},
        {"prompt": "The capital of", "candidates": [" x", " 7"]},
    ]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    run: Callable[..., tuple[int, str]] = lambda *arguments: told_by_tool(monkeypatch, capsys, *arguments)  # noqa: E731
    rerank = ["rerank.py", "--input", source, "--output", tmp_path / "out.jsonl"]
    code, told = run(*rerank, "--forward", folders / "forward", "--reverse", folders / "reverse_nan_of_one_token")
    assert (code, "in.jsonl:2: the model" in told, (tmp_path / "out.jsonl").exists()) == (1, True, False), told
    sampled = tmp_path / "prompts.jsonl"
    sampled.write_text(json.dumps({"prompt": "The capital of"}) + "\n", encoding="utf-8")
    rerank[2] = sampled
    code, told = run(
        *rerank, "--forward", folders / "forward_one_nan", "--reverse", folders / "reverse", "--sample", "2", "--seed", "1"
    )
    assert (code, "prompts.jsonl:1: the model" in told) == (1, True), told
    evaluate = ["evaluate.py", "--data", folders / "sets", "--max-new-tokens", "4", "--output"]
    code, told = run(*evaluate, tmp_path / "a", "--model", folders / "forward_one_nan", "--tasks", "boolq")
    assert (code, "boolq: item 0: the model" in told) == (1, True), told
    code, told = run(*evaluate, tmp_path / "b", "--model", folders / "reverse_one_nan", "--tasks", "svamp")
    assert (code, "svamp: item 0: the model" in told) == (1, True), told
    assert not list(tmp_path.glob("*/summary.json"))
    code, told = run("generate.py", "--model", folders / "reverse_one_nan", "--following", " of Paris")
    assert (code, "reverse_one_nan gives logits that are not finite" in told) == (1, True), told
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"text": "The cat sat on the mat."}) + "\n", encoding="utf-8")
    losses = ["compare_losses.py", "--data", texts, "--output", tmp_path / "losses"]
    code, told = run(*losses, folders / "forward", folders / "reverse_one_nan")
    assert (code, "reverse_one_nan gives logits" in told) == (1, True), told


def test_the_harness_refuses_a_broken_model(folders: Path) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance

    from megatron_ledom.evaluation.harness.model import LedomLM

    def requests(kind: str, *arguments: tuple[object, ...]) -> list[Instance]:
        return [Instance(kind, {}, one, number, ("task", 0, 1)) for number, one in enumerate(arguments)]  # type: ignore[arg-type]

    for direction in ("forward", "reverse"):
        model = LedomLM(str(folders / f"{direction}_one_nan"))
        with pytest.raises(NotFiniteError, match="one_nan gives logits"):
            model.loglikelihood(requests("loglikelihood", ("The cat", " sat"), ("The cat", " ran")), disable_tqdm=True)
    forward = LedomLM(str(folders / "forward_one_nan"))
    with pytest.raises(NotFiniteError, match="one_nan gives logits"):
        forward.generate_until(requests("generate_until", ("The cat", {"until": ["."], "max_gen_toks": 4})), disable_tqdm=True)


def test_an_impossible_token_has_a_value_and_nan_is_refused() -> None:
    assert SpanScore([1, 2], [-1.0, -math.inf]).logprob == -math.inf
    with pytest.raises(NotFiniteError, match="token 1 of the scored part, id 2"):
        SpanScore([1, 2], [-1.0, math.nan])
    with pytest.raises(NotFiniteError, match="eod is not a number"):
        SpanScore([1], [-1.0], math.nan)
    assert chosen({"logprob": [None, -90.0], "tokens": [1, 1], "bytes": [1, 1]}, "token") == 1
    assert less_prior(-math.inf, -math.inf) == -math.inf
    with pytest.raises(NotFiniteError, match="so their difference is not a score"):
        less_prior(-3.0, -math.inf)
    assert among_choices([-math.inf, -5.0]) == [-math.inf, 0.0]
    with pytest.raises(NotFiniteError, match="all choices"):
        among_choices([-math.inf, -math.inf])
    assert reverse_reward(-math.inf, -3.0, 0.5) == -math.inf
    assert reverse_reward(-math.inf, -3.0, 1.0) == -3.0
