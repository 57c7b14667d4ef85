"""Several fields of a record as one text: the template, its errors, its part in resuming and in the manifest."""

import json
import re
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from megatron_ledom.data.preprocess.task import PreprocessSettings, PreprocessTask
from megatron_ledom.data.readers.input_files import expand_inputs
from megatron_ledom.data.readers.records import ReadSettings, read_texts
from megatron_ledom.data.readers.text_template import TextTemplate, from_command_line, template_of
from megatron_ledom.errors import DataError, UsageError
from megatron_ledom.storage.jobs import differences
from tests.support.legible import legible_tokenizer
from tests.support.source_texts import TEXTS
from tests.support.tool_runs import preprocess_by_command, preprocessed, train_by_command

RECORDS = [{"question": "101 102", "meta": {"answer": "103"}}, {"question": "201", "meta": {"answer": "202 203"}}]
TEMPLATE = "{question}\n{meta.answer}"


def texts(path: Path, template: str = TEMPLATE) -> list[str]:
    read = ReadSettings(template=TextTemplate(template, "--text-template"))
    return list(read_texts(expand_inputs([str(path)]), read=read))


def write_records(path: Path) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return path


def test_fields_of_lines_and_of_tables_are_joined_alike(tmp_path: Path) -> None:
    lines, table = write_records(tmp_path / "a.jsonl"), tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(RECORDS), table)
    assert texts(lines) == texts(table) == ["101 102\n103", "201\n202 203"]
    assert texts(lines, "{{{question}}}") == ["{101 102}", "{201}"]


def test_a_record_without_a_field_is_a_bad_one_named_by_line_and_key(tmp_path: Path) -> None:
    path = write_records(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match=r"a\.jsonl:1: no key 'title' among question, meta .*--text-template"):
        texts(path, "{title}\n{question}")
    with pytest.raises(DataError, match="key 'meta' has type dict, expected a string"):
        texts(path, "{meta}")
    (tmp_path / "b.txt").write_text("plain")
    with pytest.raises(DataError, match="no key 'question' among text"):
        texts(tmp_path / "b.txt")


@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_a_column_that_the_template_does_not_use_costs_no_record(tmp_path: Path, form: str) -> None:
    """A byte that is not UTF-8, or two columns with one name, which only a filter reads."""
    broken = pyarrow.array([b"a", b"\xff"]).view(pyarrow.string())
    meta = pyarrow.array([record["meta"] for record in RECORDS])
    columns = {"question": ["101 102", "201"], "meta": meta, "url": broken}
    path, table = tmp_path / f"a.{form}", pyarrow.Table.from_pydict(columns)
    table = table.append_column("id", pyarrow.array([1, 2])).append_column("id", pyarrow.array([1, 2]))
    if form == "parquet":
        parquet.write_table(table, path)
    else:
        with pyarrow.ipc.new_file(path, table.schema) as file:
            file.write_table(table)
    assert texts(path) == ["101 102\n103", "201\n202 203"]
    assert texts(path, "{question}") == ["101 102", "201"]
    filtered = ReadSettings(template=TextTemplate(TEMPLATE, "--text-template"), keep_records=True)
    with pytest.raises(DataError, match="more than one column 'id'"):
        list(read_texts(expand_inputs([str(path)]), read=filtered))
    with pytest.raises(DataError, match="row 2: column 'url' cannot be read"):
        texts(path, "{question}{url}")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{title}\n{question}", "no column 'title', only question, meta"),
        ("{question}\n{title}", "no column 'title', only question, meta"),
        ("{meta.a}", "column 'meta' has no field 'a', only answer"),
        ("{question}{meta.a}", "column 'meta' has no field 'a', only answer"),
        ("{meta}", "column 'meta' has type struct"),
    ],
)
def test_a_field_that_a_table_lacks_is_named_with_the_option_that_asked_for_it(
    tmp_path: Path, template: str, words: str
) -> None:
    parquet.write_table(pyarrow.Table.from_pylist(RECORDS), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=rf"a\.parquet.*{words}.* by --text-template"):
        texts(tmp_path / "a.parquet", template)


@pytest.mark.parametrize("template", ["{question", "}", "{}", "{question!r}", "{question:>9}", "no key at all"])
def test_an_invalid_template_is_refused(template: str) -> None:
    with pytest.raises(UsageError, match=r"--text-template .* is not a template"):
        template_of(template, "text")


def test_a_template_with_a_text_key_is_refused() -> None:
    with pytest.raises(UsageError, match="--text-key body and --text-template"):
        template_of(TEMPLATE, "body")


def test_backslashes_of_the_shell() -> None:
    assert from_command_line(r"{a}\n\t{b}\\n\frac\\") == "{a}\n\t{b}\\n\\frac\\"


def test_the_command_joins_records_it_in_the_manifest_and_a_changed_template_is_another_request(tmp_path: Path) -> None:
    tokenizer = str(legible_tokenizer(tmp_path / "tokenizer"))
    write_records(tmp_path / "a.jsonl")
    done = preprocess_by_command(
        tmp_path, tokenizer, "--input", "a.jsonl", "--text-template", r"{question}\n{meta.answer}", "--workers", "1"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out/data.json").read_bytes())["text_template"] == TEMPLATE
    with pytest.raises(UsageError, match="exists already"):
        preprocessed(tmp_path, tokenizer, "out/data", text_template="{question} {meta.answer}")

    def request(template: str | None) -> dict[str, object]:
        settings = PreprocessSettings(
            input=[str(tmp_path / "a.jsonl")], tokenizer=tokenizer, output_prefix="p", text_template=template
        )
        return PreprocessTask(settings).reading_request()

    assert differences(request(TEMPLATE), request(TEMPLATE)) == []
    for before, now in ((TEMPLATE, "{question}"), (TEMPLATE, None), (None, TEMPLATE)):
        (told,) = differences(request(before), request(now))
        assert told.startswith("text_template was ")


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({"text_template": "{qestion}"}, "{'missing_text_key': 3}); check the keys of --text-template '{qestion}'"),
        ({"text_template": "{text}{id}"}, "{'text_is_not_a_string': 3}); check the keys of --text-template '{text}{id}'"),
        ({"text_key": "txt"}, "{'missing_text_key': 3}); check --text-key txt"),
        ({"min_tokens": 100}, "{'too_short': 3}); check --input"),
    ],
)
def test_an_input_of_bad_records_alone_names_the_option_to_check(
    tmp_path: Path, changes: dict[str, object], advice: str
) -> None:
    tokenizer = str(legible_tokenizer(tmp_path / "tokenizer"))
    (tmp_path / "a.jsonl").write_text('{"text": "101", "id": 1}\n' * 3)
    with pytest.raises(DataError, match=re.escape(advice)):
        preprocessed(tmp_path, tokenizer, "out/data", on_error="skip", **changes)


def test_a_tokenizer_learns_from_joined_fields_and_skips_bad_records_by_the_option_that_the_message_names(
    tmp_path: Path,
) -> None:
    good = [json.dumps({"a": line, "b": "more"}) for text in TEXTS for line in text.splitlines()]
    (tmp_path / "a.jsonl").write_text("\n".join([*good, "no JSON", *good]))
    arguments = ["--input", "a.jsonl", "--vocab-size", 400, "--text-template", r"{a}\n{b}"]
    failed = train_by_command(tmp_path, *arguments, "--output", "failed")
    assert (failed.returncode, f"a.jsonl:{len(good) + 1}: malformed JSON" in failed.stderr) == (1, True)
    assert "--on-error skip" in failed.stderr
    skipped = train_by_command(tmp_path, *arguments, "--output", "skipped", "--on-error", "skip")
    assert skipped.returncode == 0, skipped.stderr
    assert "skipped 1 records: malformed_json" in skipped.stderr
