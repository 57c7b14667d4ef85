"""Preprocessing with a search for evaluation items: the shard, its manifest and report, whatever the workers and kills."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_ledom.contamination.items import EvaluationItem
from megatron_ledom.contamination.search import Decontamination
from megatron_ledom.contamination.settings import Action, SearchSettings
from megatron_ledom.data.preprocess.pipeline import preprocess
from megatron_ledom.data.preprocess.task import PreprocessSettings
from megatron_ledom.data.shards.rewriting import MergeSettings, merge_shards
from megatron_ledom.data.shards.shard import load_manifest
from megatron_ledom.errors import DataError, UsageError
from tests.support.legible import legible_documents, legible_tokenizer, write_jsonl
from tests.support.tool_runs import run_tool

PAGES = legible_documents(9, 99)
ITEM = EvaluationItem(set="own", number=0, question=PAGES[4], answer=PAGES[7])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(legible_tokenizer(tmp_path_factory.mktemp("tokenizer") / "legible"))


def settings(folder: Path, tokenizer: str, name: str, action: Action = "drop", **changes: Any) -> PreprocessSettings:
    items = changes.pop("items", [ITEM])
    given = {"input": [f"{folder}/*.jsonl"], "tokenizer": tokenizer, "output_prefix": f"{folder}/out/{name}", "workers": 1}
    search = Decontamination(SearchSettings(action=action, telling_words=0), items) if items else None
    return PreprocessSettings(**{**given, **changes}, decontamination=search)


def shard(prefix: str) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


def test_a_shard_without_contaminated_documents_equals_that_of_the_others(tmp_path: Path, tokenizer: str) -> None:
    write_jsonl(tmp_path / "a.jsonl", PAGES)
    manifest = preprocess(settings(tmp_path, tokenizer, "all"))
    clean = tmp_path / "clean"
    clean.mkdir()
    write_jsonl(clean / "a.jsonl", [page for number, page in enumerate(PAGES) if number not in (4, 7)])
    preprocess(settings(clean, tokenizer, "clean", items=[]))
    assert shard(f"{tmp_path}/out/all") == shard(f"{clean}/out/clean")
    assert manifest is not None
    assert manifest.skipped == {"contaminated": 2}
    assert manifest.decontamination["documents"] == {"searched": 9, "contaminated": 2, "pieces_of_cut_documents": 0}
    assert manifest.decontamination["sets"]["own"]["touched"] == 1
    assert load_manifest(f"{tmp_path}/out/all").decontamination == manifest.decontamination
    report = json.loads(Path(f"{tmp_path}/out/all.contamination").read_text())
    assert [example["where"] for example in report["items"][0]["examples"]] == [
        f"{tmp_path}/a.jsonl:5",
        f"{tmp_path}/a.jsonl:8",
    ]
    assert "decontamination" not in json.loads(Path(f"{clean}/out/clean.json").read_text())


def test_a_report_keeps_all_documents_and_a_cut_keeps_pieces(tmp_path: Path, tokenizer: str) -> None:
    text = " ".join((*PAGES[:4], PAGES[4], PAGES[5], PAGES[6]))
    write_jsonl(tmp_path / "a.jsonl", [PAGES[8], text])
    reported = preprocess(settings(tmp_path, tokenizer, "reported", "report"))
    plain = preprocess(settings(tmp_path, tokenizer, "plain", items=[]))
    cut = preprocess(settings(tmp_path, tokenizer, "cut", "cut"))
    assert reported is not None
    assert plain is not None
    assert cut is not None
    assert reported.bin_sha256 == plain.bin_sha256
    assert reported.decontamination["documents"]["contaminated"] == 1
    assert (cut.num_documents, cut.skipped, cut.decontamination["documents"]["pieces_of_cut_documents"]) == (3, {}, 2)


def test_shard_and_report_do_not_depend_on_the_workers(tmp_path: Path, tokenizer: str) -> None:
    for number in range(3):
        write_jsonl(tmp_path / f"{number}.jsonl", PAGES * 3)
    for name, workers in (("one", 1), ("three", 3)):
        preprocess(settings(tmp_path, tokenizer, name, "cut", workers=workers, part_bytes=3000))
    assert shard(f"{tmp_path}/out/one") == shard(f"{tmp_path}/out/three")
    assert Path(f"{tmp_path}/out/one.contamination").read_bytes() == Path(f"{tmp_path}/out/three.contamination").read_bytes()


def test_stopped_work_resumes_with_its_counts_and_refuses_other_items(tmp_path: Path, tokenizer: str) -> None:
    write_jsonl(tmp_path / "a.jsonl", PAGES * 4)
    quiet = preprocess(settings(tmp_path, tokenizer, "quiet", part_bytes=3000))
    good = (tmp_path / "a.jsonl").read_bytes()
    (tmp_path / "a.jsonl").write_bytes(good + b"{\n")
    with pytest.raises(DataError, match=r"a\.jsonl:37: malformed JSON"):
        preprocess(settings(tmp_path, tokenizer, "a", part_bytes=3000))
    assert list((tmp_path / "out/a.work").glob("part-*.json"))
    other = [EvaluationItem(set="own", number=0, question=PAGES[3])]
    for changes in ({"items": other}, {"items": []}):
        with pytest.raises(UsageError, match=r"was made with different settings \(decontamination"):
            preprocess(settings(tmp_path, tokenizer, "a", part_bytes=3000, **changes))
    with pytest.raises(UsageError, match=r"decontamination\.action was 'drop' and is 'cut'"):
        preprocess(settings(tmp_path, tokenizer, "a", "cut", part_bytes=3000))
    resumed = preprocess(settings(tmp_path, tokenizer, "a", part_bytes=3000, on_error="skip"))
    assert quiet is not None
    assert resumed is not None
    assert resumed.bin_sha256 == quiet.bin_sha256
    assert resumed.decontamination == quiet.decontamination


def test_a_finished_shard_of_other_items_is_refused_and_a_new_one_has_no_old_report(tmp_path: Path, tokenizer: str) -> None:
    write_jsonl(tmp_path / "a.jsonl", PAGES)
    preprocess(settings(tmp_path, tokenizer, "a"))
    preprocess(settings(tmp_path, tokenizer, "a"))
    with pytest.raises(UsageError, match="--overwrite"):
        preprocess(settings(tmp_path, tokenizer, "a", items=[]))
    preprocess(settings(tmp_path, tokenizer, "a", items=[], overwrite=True))
    assert not Path(f"{tmp_path}/out/a.contamination").exists()


def test_merged_shards_keep_the_settings_if_all_have_the_same(tmp_path: Path, tokenizer: str) -> None:
    write_jsonl(tmp_path / "a.jsonl", PAGES * 2)
    for task in range(2):
        preprocess(settings(tmp_path, tokenizer, "a", num_tasks=2, task_id=task))
    merged = merge_shards(MergeSettings(input=[f"{tmp_path}/out/a-*"], output_prefix=f"{tmp_path}/merged"))
    assert merged.decontamination["documents"] == {"searched": 18, "contaminated": 4, "pieces_of_cut_documents": 0}
    assert merged.decontamination["settings"]["action"] == "drop"


def test_merged_shards_of_different_searches_list_them_with_a_warning(
    tmp_path: Path, tokenizer: str, caplog: pytest.LogCaptureFixture
) -> None:
    write_jsonl(tmp_path / "a.jsonl", PAGES)
    other = [EvaluationItem(set="own", number=0, question=PAGES[3])]
    for name, items in (("plain", []), ("dropped", [ITEM]), ("again", [ITEM]), ("other", other)):
        preprocess(settings(tmp_path, tokenizer, name, items=items))

    def merged(target: str, *names: str) -> dict[str, Any]:
        inputs = [f"{tmp_path}/out/{name}" for name in names]
        merge_shards(MergeSettings(input=inputs, output_prefix=f"{tmp_path}/out/{target}"))
        return load_manifest(f"{tmp_path}/out/{target}").decontamination

    assert merged("same", "dropped", "again")["documents"]["contaminated"] == 4
    assert not caplog.text.count("same way")
    parts = merged("mixed", "plain", "dropped", "again")["parts"]
    plain, *searched = (f"{tmp_path}/out/{name}" for name in ("plain", "dropped", "again"))
    assert [(part["shards"], part["num_documents"]) for part in parts] == [([plain], 9), (searched, 14)]
    assert parts[0]["settings"] == parts[0]["documents"] == {}
    assert parts[1]["documents"] == {"searched": 18, "contaminated": 4, "pieces_of_cut_documents": 0}
    assert f"{plain} (9 documents): not searched; {', '.join(searched)} (14 documents): 1 items of hash" in caplog.text
    parts = merged("all", "mixed", "other", "plain")["parts"]
    hashes = [part["settings"].get("items_sha256") for part in parts]
    assert hashes == [
        None,
        Decontamination(SearchSettings(), [ITEM]).items_sha256,
        Decontamination(SearchSettings(), other).items_sha256,
    ]
    assert [part["num_documents"] for part in parts] == [18, 14, 8]


def test_merged_shards_of_equal_names_keep_their_folders_as_given(
    tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(tmp_path / "a.jsonl", PAGES)
    monkeypatch.chdir(tmp_path)
    for folder, items in (("one", []), ("two", [ITEM])):
        preprocess(settings(tmp_path, tokenizer, "a", items=items, output_prefix=f"{folder}/train"))
    merge_shards(MergeSettings(input=["one/train", "two/train"], output_prefix="merged"))
    assert [part["shards"] for part in load_manifest("merged").decontamination["parts"]] == [["one/train"], ["two/train"]]


def test_shards_with_different_counters_are_merged_with_the_sums_of_each(tmp_path: Path, tokenizer: str) -> None:
    write_jsonl(tmp_path / "a.jsonl", PAGES)
    for name in ("new", "old"):
        preprocess(settings(tmp_path, tokenizer, name))
    manifest = json.loads(Path(f"{tmp_path}/out/old.json").read_text())
    manifest["decontamination"]["documents"] = {"searched": 9, "another": 1}
    Path(f"{tmp_path}/out/old.json").write_text(json.dumps(manifest))
    inputs = [f"{tmp_path}/out/new", f"{tmp_path}/out/old"]
    for number, order in enumerate((inputs, inputs[::-1])):
        merged = merge_shards(MergeSettings(input=order, output_prefix=f"{tmp_path}/merged-{number}"))
        expected = {"searched": 18, "contaminated": 2, "pieces_of_cut_documents": 0, "another": 1}
        assert merged.decontamination["documents"] == expected


def test_the_command_takes_a_folder_or_lines_of_items(tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(tmp_path / "a.jsonl", PAGES)
    items = tmp_path / "items.json.jsonl"
    items.write_text(json.dumps({"question": PAGES[2]}) + "\n")
    command = ["--input", f"{tmp_path}/a.jsonl", "--tokenizer", tokenizer, "--output-prefix", f"{tmp_path}/a", "--workers", 1]
    assert (
        run_tool(
            monkeypatch, "preprocess_data", *command, "--decontaminate", items, "--match", "question", "--telling-words", 0
        )
        == 0
    )
    assert load_manifest(f"{tmp_path}/a").skipped == {"contaminated": 1}
    assert run_tool(monkeypatch, "preprocess_data", *command, "--action", "cut") == 2


def test_a_corpus_of_nothing_but_items_and_a_search_for_nothing_are_errors(tmp_path: Path, tokenizer: str) -> None:
    write_jsonl(tmp_path / "a.jsonl", [PAGES[7]])
    with pytest.raises(DataError, match=r"found no document .*; 1 of them have evaluation items"):
        preprocess(settings(tmp_path, tokenizer, "all"))
    short = [EvaluationItem(set="own", number=0, question="Two words")]
    with pytest.raises(UsageError, match="none of the 1 items has 8 words"):
        preprocess(settings(tmp_path, tokenizer, "other", items=short))


def test_options_of_the_search_need_items(tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(tmp_path / "a.jsonl", PAGES)
    command = ["--input", f"{tmp_path}/a.jsonl", "--tokenizer", tokenizer, "--output-prefix", f"{tmp_path}/out/a"]
    assert run_tool(monkeypatch, "preprocess_data", *command, "--action", "drop") == 2
    assert not (tmp_path / "out").exists()
