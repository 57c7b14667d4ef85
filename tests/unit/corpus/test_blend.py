"""The blend of a recipe: config lines that draw what the recipe wants, checked against what the shards have."""

import contextlib
from pathlib import Path

import pytest

from megatron_ledom.cli.main import run
from megatron_ledom.config.load import load_config
from megatron_ledom.corpus.blend import CorpusBlendSettings, built_shards, corpus_blend
from megatron_ledom.corpus.build import BuildSettings, build
from megatron_ledom.corpus.recipe import load_recipe
from megatron_ledom.errors import MismatchError, UsageError, VerificationError
from tests.support.corpus_recipes import source, two_sources, write_recipe
from tests.support.legible import legible_documents, write_jsonl


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


def test_shards_of_one_source_from_different_files_are_refused(tmp_path: Path, tokenizer: str) -> None:
    recipe, tasks = two_sources(tmp_path, tokenizer), ["sources.web.tasks=2"]
    build(BuildSettings(recipe=recipe, workers=1, overrides=tasks, source=["code"]))
    build(BuildSettings(recipe=recipe, workers=1, overrides=tasks, source=["web"], task_id=0))
    write_jsonl(tmp_path / "web/9.jsonl", legible_documents(10, 5))
    build(BuildSettings(recipe=recipe, workers=1, overrides=tasks, source=["web"], task_id=1, overwrite=True))
    with pytest.raises(MismatchError, match=r"web-00001-of-00002 and .*web-00000-of-00002 were made from different inputs"):
        built_shards(load_recipe(recipe, tasks))


def test_an_empty_source_is_refused(tmp_path: Path, tokenizer: str) -> None:
    recipe = two_sources(tmp_path, tokenizer)
    wrong = ["sources.web.text_key=other", "sources.web.filters.on_error=skip", "sources.web.tasks=2"]
    with contextlib.suppress(VerificationError):
        build(BuildSettings(recipe=recipe, workers=1, overrides=wrong))
    for more in ([], ["sources.web.tokens=null"]):
        with pytest.raises(VerificationError, match=r"these sources are empty:\n  sources\.web: 0 tokens stored, .*\ncheck"):
            corpus_blend(CorpusBlendSettings(recipe=recipe, overrides=[*wrong, *more], allow_repeats=True))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("sources.code.licence=GPL-3.0", "sources.code.licence: built with 'MIT', the recipe has 'GPL-3.0'"),
        ("sources.code.terms=pay", "sources.code.terms: built with 'none', the recipe has 'pay'"),
        ("sources.code.address=elsewhere", "sources.code.address: built with .*/code', the recipe has 'elsewhere'"),
        ("sources.code.filters.min_tokens=9", "sources.code.filters.min_tokens: built with None, the recipe has 9"),
        ("sources.code.sample=0.5", "sources.code.sample: built with None, the recipe has 0.5"),
        ("shuffle_seed=3", "shuffle_seed: built with None, the recipe has 3"),
        ("bos_token=<b>", "bos_token: built with '', the recipe has '<b>'"),
        ("dtype=int32", "dtype: built with 'uint16', the recipe has 'int32'"),
        ("name=other", "name: built with 'test', the recipe has 'other'"),
        ("direction=forward", "is reverse, the recipe is forward"),
        ("tokenizer=nowhere direction=forward", "direction: built with 'reverse', the recipe has 'forward'"),
    ],
)
def test_shards_of_another_recipe_are_refused(change: str, line: str, shared: str) -> None:
    with pytest.raises(MismatchError, match=line):
        built_shards(load_recipe(shared, change.split()))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, tokenizer: str) -> str:
    """Return a recipe whose sources are built, for tests that write nothing."""
    return built(tmp_path_factory.mktemp("shared") / "corpus", tokenizer)


def test_the_same_recipe_and_one_without_the_tokenizer_are_accepted(shared: str) -> None:
    assert list(built_shards(load_recipe(shared))) == ["web", "code"]
    assert list(built_shards(load_recipe(shared, ["tokenizer=nowhere", "sources.web.tokens=7"]))) == ["web", "code"]


def test_a_whole_source_beside_tokens_of_the_run_must_fit(shared: str) -> None:
    whole = ["sources.web.tokens=null", "tokens=200"]
    with pytest.raises(VerificationError, match=r"want 250 tokens \(web 210, code 40\), tokens=200 .*; web without tokens"):
        corpus_blend(CorpusBlendSettings(recipe=shared, overrides=whole))
    plan = corpus_blend(CorpusBlendSettings(recipe=shared, overrides=[whole[0], "tokens=250"]))
    assert [(one.weight, one.drawn) for one in plan.sources] == [(210, 210), (40, 40)]


def test_the_advice_about_whole_samples_works(shared: str) -> None:
    whole = ["sources.web.tokens=null", "sources.code.tokens=null"]
    size = {"seq_length": 10, "global_batch_size": 1}
    message = r"sources\.code: all wanted, at most 90 can be drawn \(.*out/code 1\.\d+ times\)\nset their tokens to less in the recipe"
    with pytest.raises(VerificationError, match=message):
        corpus_blend(CorpusBlendSettings(recipe=shared, overrides=whole, **size))
    less = ["sources.web.tokens=200", "sources.code.tokens=90"]
    plan = corpus_blend(CorpusBlendSettings(recipe=shared, overrides=less, **size))
    assert [one.drawn for one in plan.sources] == [200, 90]
