"""The blend of a recipe: config lines that draw what the recipe wants, checked against what the shards have."""

from pathlib import Path

import pytest

from megatron_ledom.cli.main import run
from megatron_ledom.config.load import load_config
from megatron_ledom.corpus.blend import CorpusBlendSettings, corpus_blend
from megatron_ledom.corpus.build import BuildSettings, build
from megatron_ledom.errors import MismatchError, UsageError, VerificationError
from tests.support.corpus_recipes import source, two_sources, write_recipe
from tests.support.legible import write_jsonl


def built(folder: Path, tokenizer: str, *overrides: str) -> str:
    """Build both sources of a recipe: web has 210 tokens, code 100."""
    recipe = two_sources(folder, tokenizer)
    build(BuildSettings(recipe=recipe, overrides=list(overrides), workers=1))
    return recipe


def test_the_lines_are_a_config_that_draws_the_wanted_tokens(tmp_path: Path, tokenizer: str) -> None:
    recipe, lines = built(tmp_path, tokenizer), tmp_path / "blend.yaml"
    run(["corpus", "blend", recipe, "--output", str(lines), "--seq-length", "8", "--global-batch-size", "5"])
    own = tmp_path / "run.yaml"
    own.write_text(
        "base: blend.yaml\nrun_dir: run\nmodel: {num_layers: 2, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 4}\n"
        "train: {micro_batch_size: 1}\n"
    )
    config = load_config(str(own))
    assert config.data.train_blend == [(120, str(tmp_path / "out/web")), (40, str(tmp_path / "out/code"))]
    assert (config.train.train_iters, config.train.global_batch_size, config.data.seq_length) == (4, 5, 8)
    assert (config.data.direction, config.data.tokenizer) == ("reverse", tokenizer)


def test_the_tokens_of_a_source_are_divided_among_its_shards(tmp_path: Path, tokenizer: str) -> None:
    recipe = built(tmp_path, tokenizer, "sources.web.tasks=3")
    plan = corpus_blend(CorpusBlendSettings(recipe=recipe, overrides=["sources.web.tasks=3"]))
    web = [one for one in plan.sources if "web" in one.name]
    assert sum(one.weight for one in web) == 120
    assert all(abs(one.weight - 120 * (one.tokens or 0) / 210) < 1 for one in web)


def test_shards_without_documents_are_not_drawn_from(tmp_path: Path, tokenizer: str) -> None:
    (tmp_path / "web").mkdir()
    write_jsonl(tmp_path / "web/0.jsonl", ["1 2 3"])
    recipe = write_recipe(tmp_path / "recipe.yaml", tokenizer, {"web": source(str(tmp_path / "web"), ["*.jsonl"], tasks=4)})
    build(BuildSettings(recipe=recipe, workers=1))
    plan = corpus_blend(CorpusBlendSettings(recipe=recipe))
    assert [(one.tokens, one.weight) for one in plan.sources] == [(4, 4)]


def test_a_source_with_too_few_tokens_is_refused_with_both_numbers(
    tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = built(tmp_path, tokenizer)
    change = ["sources.web.tokens=211", "sources.code.tokens=100"]
    with pytest.raises(VerificationError, match=r"  sources\.web: 211 tokens wanted, 210 stored\nlower their tokens"):
        corpus_blend(CorpusBlendSettings(recipe=recipe, overrides=change))
    corpus_blend(CorpusBlendSettings(recipe=recipe, overrides=change, allow_repeats=True))
    assert "allow_repeats: true" in capsys.readouterr().out


def test_shares_and_whole_sources_become_tokens(tmp_path: Path, tokenizer: str) -> None:
    recipe = built(tmp_path, tokenizer)
    by_share = [
        "tokens=200",
        "sources.web.tokens=null",
        "sources.web.share=0.8",
        "sources.code.tokens=null",
        "sources.code.share=0.2",
    ]
    plan = corpus_blend(CorpusBlendSettings(recipe=recipe, overrides=by_share))
    assert ([one.weight for one in plan.sources], plan.tokens) == ([160, 40], 200)
    everything = corpus_blend(
        CorpusBlendSettings(recipe=recipe, overrides=["sources.web.tokens=null", "sources.code.tokens=null"])
    )
    assert ([one.weight for one in everything.sources], everything.tokens) == ([210, 100], 310)


def test_missing_shards_and_shards_of_two_directions_are_refused(tmp_path: Path, tokenizer: str) -> None:
    recipe = two_sources(tmp_path, tokenizer)
    build(BuildSettings(recipe=recipe, workers=1, source=["web"]))
    with pytest.raises(UsageError, match=r"sources\.code is not built: .*out/code\.json is missing \(1 of 1 shards\)"):
        corpus_blend(CorpusBlendSettings(recipe=recipe))
    build(BuildSettings(recipe=recipe, workers=1, source=["code"], overrides=["direction=forward"]))
    with pytest.raises(MismatchError, match=r"out/code is forward, the shard .*out/web is reverse"):
        corpus_blend(CorpusBlendSettings(recipe=recipe))
