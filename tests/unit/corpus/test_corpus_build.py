"""Building the shards of a recipe: what preprocessing writes, one source or task at a time, and what is refused."""

import errno
import json
import logging
import os
import re
from pathlib import Path

import pytest

from megatron_ledom.cli.main import run
from megatron_ledom.corpus.build import BuildSettings, _output_lock, build
from megatron_ledom.corpus.listing import list_sources, lock_path, write_listing
from megatron_ledom.corpus.recipe import load_recipe
from megatron_ledom.data.preprocess.pipeline import preprocess
from megatron_ledom.data.preprocess.task import PreprocessSettings
from megatron_ledom.data.shards.shard import check_shard
from megatron_ledom.data.shards.verification import verify_shard
from megatron_ledom.errors import ConfigError, DataError, MismatchError, TransientError, UsageError, VerificationError
from megatron_ledom.storage.locks import output_folder_lock
from tests.support.corpus_recipes import source, two_sources, write_recipe
from tests.support.legible import legible_documents, write_jsonl


def pin(recipe: str) -> None:
    """Store the listing of a recipe beside it."""
    loaded = load_recipe(recipe)
    write_listing(list_sources(loaded, list(loaded.sources), {}), lock_path(recipe), "--write-listing")


def settings(recipe: str, *overrides: str, **keys: object) -> BuildSettings:
    """Return the settings of a build with one worker."""
    return BuildSettings(recipe=recipe, overrides=list(overrides), workers=1, **keys)  # type: ignore[arg-type]


def file_bytes(prefix: Path) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


def test_a_build_writes_what_preprocess_data_writes(tmp_path: Path, tokenizer: str) -> None:
    recipe = two_sources(tmp_path, tokenizer, filters={"min_tokens": 6})
    build(settings(recipe))
    preprocess(
        PreprocessSettings(
            input=[str(tmp_path / "web/*.jsonl")],
            tokenizer=tokenizer,
            output_prefix=str(tmp_path / "once"),
            min_tokens=6,
            workers=1,
        )
    )
    assert file_bytes(tmp_path / "out/web") == file_bytes(tmp_path / "once")
    assert check_shard(str(tmp_path / "out/web")).skipped == {"too_short": 10}
    assert not verify_shard(str(tmp_path / "out/code"))


def test_every_manifest_records_source_licence_and_revision(tmp_path: Path, tokenizer: str) -> None:
    build(settings(two_sources(tmp_path, tokenizer)))
    found = check_shard(str(tmp_path / "out/code")).source
    assert found == {
        "recipe": "test",
        "name": "code",
        "address": str(tmp_path / "code"),
        "revision": None,
        "licence": "MIT",
        "terms": "none",
        "domain": "code",
        "origin": "ours",
        "language": None,
        "settings": {
            "files": ["**/*.jsonl"],
            "text_key": "text",
            "text_template": None,
            "sample": None,
            "most_bytes": None,
            "shuffle_seed": None,
            "filters": {},
        },
    }
    assert len(check_shard(str(tmp_path / "out/web")).input_files) == 3


def test_the_same_build_again_has_nothing_to_do_and_a_changed_one_is_refused(
    tmp_path: Path, tokenizer: str, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = two_sources(tmp_path, tokenizer)
    build(settings(recipe))
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    with caplog.at_level(logging.INFO):
        build(settings(recipe))
    assert caplog.text.count("the same request has finished it before; nothing to do") == 2
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    with pytest.raises(VerificationError, match=r"2 of 2 sources failed \(web, code\).*web\.bin exists already"):
        build(settings(recipe, "direction=forward"))


def test_two_builds_into_one_output_are_refused(tmp_path: Path, tokenizer: str) -> None:
    recipe = two_sources(tmp_path, tokenizer)
    with output_folder_lock(tmp_path / "out"):  # as a build of all sources
        for chosen in ([], ["web"]):
            with pytest.raises(UsageError, match=f"out is being written by process {os.getpid()}"):
                build(settings(recipe, source=chosen))
    with _output_lock(str(tmp_path / "out"), is_shared=True):  # as the build of one source in a task of an array
        build(settings(recipe, source=["web"]))
        with pytest.raises(UsageError, match=r"out is being written by"):
            build(settings(recipe))
    build(settings(recipe))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"{name}{ending}" for name in ("web", "code") for ending in (".bin", ".idx", ".json")
    }


def test_a_task_of_an_array_builds_its_part_of_one_source(
    tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = two_sources(tmp_path, tokenizer)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    with pytest.raises(UsageError, match=r"SLURM_ARRAY_TASK_ID=1 is a task of one source; name it with --source NAME"):
        build(settings(recipe))
    with pytest.raises(UsageError, match=r"sources\.web\.tasks=1; use 0 to 0"):
        build(settings(recipe, source=["web"]))
    build(settings(recipe, "sources.web.tasks=2", source=["web"]))
    assert {path.name for path in (tmp_path / "out").glob("web*")} == {
        f"web-00001-of-00002{ending}" for ending in (".bin", ".idx", ".json")
    }
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID")
    made = build(settings(recipe, "sources.web.tasks=2"))
    assert sum(manifest.num_documents for manifest in made["web"]) == 30
    assert sum(manifest.num_tokens for manifest in made["web"]) == 10 * (6 + 7 + 8)


def test_equal_texts_are_removed_across_the_tasks_of_a_source(tmp_path: Path, tokenizer: str) -> None:
    recipe = two_sources(tmp_path, tokenizer, filters={"deduplicate": True})
    (tmp_path / "web/9.jsonl").write_bytes((tmp_path / "web/0.jsonl").read_bytes())
    made = build(settings(recipe, "sources.web.tasks=3"))
    assert sum(manifest.num_documents for manifest in made["web"]) == 30
    assert sum(manifest.skipped.get("duplicate", 0) for manifest in made["web"]) == 10


def test_a_file_that_vanished_or_changed_since_the_listing_is_named(tmp_path: Path, tokenizer: str) -> None:
    recipe = two_sources(tmp_path, tokenizer)
    pin(recipe)
    write_jsonl(tmp_path / "web/new.jsonl", legible_documents(3, 3))
    build(settings(recipe, source=["web"]))
    assert check_shard(str(tmp_path / "out/web")).num_documents == 30  # the new file is not in the listing
    gone = (tmp_path / "web/1.jsonl").read_bytes()
    (tmp_path / "web/1.jsonl").unlink()
    message = r"sources\.web: 1\.jsonl \([\d,]+ bytes in .*recipe\.lock\.json\) is not in .*/web any more; bring it back"
    with pytest.raises(DataError, match=message):
        build(settings(recipe, source=["web"]))
    (tmp_path / "web/1.jsonl").write_bytes(gone + b"\n")
    with pytest.raises(DataError, match=r"sources\.web: 1\.jsonl has [\d,]+ bytes, .*recipe\.lock\.json has"):
        build(settings(recipe, source=["web"]))


def test_a_listing_of_another_address_or_of_other_patterns_is_refused(tmp_path: Path, tokenizer: str) -> None:
    recipe = two_sources(tmp_path, tokenizer)
    pin(recipe)
    with pytest.raises(MismatchError, match=r"sources\.web\.files was \['\*\.jsonl'\] when .*lock\.json was made and is \['0"):
        build(settings(recipe, "sources.web.files=['0.jsonl']", source=["web"]))
    lock_path(recipe).write_text(lock_path(recipe).read_text(encoding="utf-8")[:-40], encoding="utf-8")
    with pytest.raises(DataError, match=r"recipe\.lock\.json is not a listing of this package, or it is damaged"):
        build(settings(recipe))


def test_a_hub_source_without_a_commit_is_refused(tmp_path: Path, tokenizer: str) -> None:
    recipe = write_recipe(
        tmp_path / "recipe.yaml", tokenizer, {"web": source("hf://datasets/o/n", ["*.jsonl"], revision="main")}
    )
    with pytest.raises(ConfigError, match=r"sources\.web\.revision is main, not a commit .* run `ledom corpus pin RECIPE`"):
        build(settings(recipe))


def test_a_source_that_fails_does_not_stop_the_others(tmp_path: Path, tokenizer: str) -> None:
    recipe = two_sources(tmp_path, tokenizer)
    (tmp_path / "web/0.jsonl").write_text('{"text": "1 2"}\n{"text": 3}\n', encoding="utf-8")
    with pytest.raises(
        VerificationError, match=r"1 of 2 sources failed \(web\); code are built\. The first: sources\.web: .*0\.jsonl:2"
    ):
        build(settings(recipe))
    assert check_shard(str(tmp_path / "out/code")).num_documents == 10
    assert run(["corpus", "build", recipe, "--set", "sources.web.filters.on_error=skip", "--workers", "1"]) is None
    assert check_shard(str(tmp_path / "out/web")).skipped == {"text_is_not_a_string": 1}


def test_a_source_without_any_stored_document_is_refused_by_the_task_that_ends_last(tmp_path: Path, tokenizer: str) -> None:
    recipe = two_sources(tmp_path, tokenizer)
    wrong = ("sources.web.text_key=body", "sources.web.filters.on_error=skip", "sources.web.tasks=2")
    message = r"sources\.web has no document in any of its 2 shards \(skipped: 30 .*\); check sources\.web\.text_key='body'"
    build(settings(recipe, *wrong, source=["web"], task_id=1))
    for _ in range(2):  # and again, when nothing is left to do
        with pytest.raises(VerificationError, match=message):
            build(settings(recipe, *wrong, source=["web"], task_id=0))
    with pytest.raises(VerificationError, match=rf"1 of 2 sources failed \(web\).*{message}"):
        build(settings(recipe, *wrong))


def test_an_error_of_the_file_system_is_one_of_its_source(
    tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    recipe = two_sources(tmp_path, tokenizer)
    for chosen in ([], ["web"]):
        with pytest.raises(UsageError, match=r"output .*file/out cannot be made.*name a folder that you may write to"):
            build(settings(recipe, f"output={tmp_path}/file/out", source=chosen))

    def preprocess_or_fail(given: PreprocessSettings) -> object:
        if given.output_prefix.endswith("web"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), "/disk/file")
        return preprocess(given)

    monkeypatch.setattr("megatron_ledom.corpus.build.preprocess", preprocess_or_fail)
    with pytest.raises(TransientError, match=r"1 of 2 sources failed \(web\).*sources\.web: /disk/file: Input/output error"):
        build(settings(recipe))
    assert check_shard(str(tmp_path / "out/code")).num_documents == 10


def test_messages_name_keys_of_the_recipe_and_not_options_of_preprocessing(tmp_path: Path, tokenizer: str) -> None:
    recipe = two_sources(tmp_path, tokenizer)
    with pytest.raises(VerificationError, match=r"2 of 2 sources failed \(web, code\)\. The first") as both:
        build(settings(recipe, "sources.web.files=[none.jsonl]", "sources.code.text_key=body"))
    assert "sources.web.address and sources.web.files" in str(both.value)
    with pytest.raises(DataError, match=r"sources\.code: .*sources\.code\.text_key.*sources\.code\.filters\.on_error") as wrong:
        build(settings(recipe, "sources.code.text_key=body", source=["code"]))
    build(settings(recipe))
    with pytest.raises(UsageError, match=r"sources\.web: .*choose another output, or replace it with --overwrite") as changed:
        build(settings(recipe, "sources.web.filters.min_tokens=7", source=["web"]))
    for error in (both, wrong, changed):
        assert not re.search(r"--(input|text-key|on-error|output-prefix)", str(error.value))


def test_an_output_with_shards_of_another_recipe_is_refused(tmp_path: Path, tokenizer: str) -> None:
    recipe = two_sources(tmp_path, tokenizer)
    build(settings(recipe, source=["code"]))
    with pytest.raises(UsageError, match=r"has code\.json of the recipe test, this one is other; name another output"):
        build(settings(recipe, "name=other", source=["web"]))
    build(settings(recipe))


def test_all_sources_share_one_index_of_the_evaluation_items(tmp_path: Path, tokenizer: str) -> None:
    questions = tmp_path / "own.jsonl"
    recipe = two_sources(tmp_path, tokenizer, filters={"decontaminate": [str(questions)]})
    with pytest.raises(UsageError, match=r"own\.jsonl does not exist"):
        build(settings(recipe))
    assert not (tmp_path / "out").exists()
    questions.write_text(
        json.dumps({"question": "a question of more than eight words that no text has"}) + "\n", encoding="utf-8"
    )
    build(settings(recipe))
    assert [path.suffix for path in (tmp_path / "out/.evaluation_items").iterdir()] == [".items"]
    assert check_shard(str(tmp_path / "out/web")).decontamination["documents"]


def test_unknown_sources_and_a_missing_tokenizer_are_refused_at_once(tmp_path: Path, tokenizer: str) -> None:
    recipe = two_sources(tmp_path, tokenizer)
    with pytest.raises(UsageError, match="--source wbe is not in the recipe; it has web, code"):
        build(settings(recipe, source=["wbe"]))
    with pytest.raises(UsageError, match="nowhere"):
        build(settings(recipe, "tokenizer=nowhere"))
    assert not (tmp_path / "out").exists()


def test_files_are_sampled_by_a_hash_of_their_names(tmp_path: Path, tokenizer: str) -> None:
    (tmp_path / "web").mkdir()
    for number in range(20):
        write_jsonl(tmp_path / f"web/{number}.jsonl", legible_documents(1, 5))
    recipe = write_recipe(tmp_path / "recipe.yaml", tokenizer, {"web": source(str(tmp_path / "web"), ["*.jsonl"])})
    num_bytes = (tmp_path / "web/0.jsonl").stat().st_size
    read = {}
    for name, change in {"sample": "sources.web.sample=0.25", "bytes": f"sources.web.most_bytes={5 * num_bytes}"}.items():
        build(settings(recipe, change, f"output={tmp_path / name}"))
        read[name] = [Path(file.path).name for file in check_shard(str(tmp_path / name / "web")).input_files]
    assert read["sample"] == read["bytes"]
    assert len(read["sample"]) == 5
    assert read["sample"] != [f"{number}.jsonl" for number in range(5)]
