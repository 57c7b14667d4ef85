"""Shards of other units than the token and with markers: the same bytes from text and from a forward shard, and back."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken

from megatron_ledom.data.preprocess.pipeline import preprocess
from megatron_ledom.data.preprocess.task import PreprocessSettings
from megatron_ledom.data.shards.inspection import InspectSettings, inspect_shards, text_of
from megatron_ledom.data.shards.model_order import OrderSettings
from megatron_ledom.data.shards.rewriting import MergeSettings, ReverseSettings, merge_shards, reverse_shards
from megatron_ledom.data.shards.shard import ShardReader, check_shard, load_manifest
from megatron_ledom.data.shards.verification import check_direction, verify_shard
from megatron_ledom.direction import Direction, Unit
from megatron_ledom.errors import DataError, MismatchError, UsageError
from megatron_ledom.tokenizers.corpus_tokenizer import load_tokenizer
from tests.support.byte_level_bpe import write_byte_level_bpe
from tests.support.forked import run_forked
from tests.support.legible import EOD_TOKEN, file_bytes, foreign_shard, legible_tokenizer, write_jsonl
from tests.support.paths import ROOT

TEXTS = [
    "Barack Obama went to New York. Then He left for the U.S. Army",
    " begins with a space, and spells <rev> and <b> as text",
    "\n\nTwo lines\tand  spaces   東京 Ünï\n",
    "x",
    "def reverse(values):\n    return list(values) # Def Class New York\n" * 3,
]
WORD = OrderSettings(unit=Unit.WORD, marker="<rev>", boundary_token="<b>")
ENTITY = OrderSettings(unit=Unit.ENTITY, boundary_token="<b>")
SEGMENT = OrderSettings(unit=Unit.SEGMENT, marker="<rev>", boundary_token="<b>", segment_tokens=4, segment_seed=9)
MARKED = OrderSettings(marker="<rev>")
ORDERS = pytest.mark.parametrize("order", [WORD, ENTITY, SEGMENT, MARKED], ids=["word", "entity", "segment", "marked"])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    added = [AddedToken(token, special=True) for token in (EOD_TOKEN, "<rev>", "<fwd>", "<b>")]
    return write_byte_level_bpe(tmp_path_factory.mktemp("bpe") / "bpe", 400, added)


@pytest.fixture(scope="module")
def forward(tokenizer: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return made(tmp_path_factory.mktemp("forward"), tokenizer, Direction.FORWARD, OrderSettings())


def made(folder: Path, tokenizer: str, direction: Direction, order: OrderSettings, **settings: object) -> str:
    """Write the shard of TEXTS and return its prefix."""
    prefix = folder / f"{direction}_{order.unit}_{order.marker}"
    source = write_jsonl(folder / "texts.jsonl", TEXTS)
    options = {"eod_token": EOD_TOKEN, "workers": 1, **settings}
    preprocess(
        PreprocessSettings(
            input=[str(source)], tokenizer=tokenizer, output_prefix=str(prefix), direction=direction, order=order, **options
        )  # type: ignore[arg-type]
    )
    return str(prefix)


def converted(prefix: str, output: Path, **settings: object) -> str:
    reverse_shards(ReverseSettings(input=[prefix], output_prefix=str(output), **settings))  # type: ignore[arg-type]
    return str(output)


def facts(prefix: str) -> dict[str, object]:
    """Return the manifest without what differs between two ways to make the same shard."""
    stored = json.loads(Path(f"{prefix}.json").read_text())
    return {name: value for name, value in stored.items() if name not in OF_ONE_RUN}


OF_ONE_RUN = ("created_at", "elapsed_seconds", "request_sha256", "inputs_sha256", "input_files")


@ORDERS
def test_a_converted_forward_shard_is_the_one_preprocessing_writes_and_converting_back_is_exact(
    tmp_path: Path, tokenizer: str, forward: str, order: OrderSettings
) -> None:
    direct = made(tmp_path, tokenizer, Direction.REVERSE, order)
    from_forward = converted(forward, tmp_path / "converted", order=order)
    assert file_bytes(from_forward) == file_bytes(direct)
    assert facts(from_forward) == facts(direct)
    back = converted(from_forward, tmp_path / "back")
    assert file_bytes(back) == file_bytes(forward)
    assert facts(back) == facts(forward)
    plain = converted(from_forward, tmp_path / "plain", to_direction=Direction.REVERSE)
    assert file_bytes(plain) == file_bytes(converted(forward, tmp_path / "reverse"))


@ORDERS
def test_a_shard_says_its_order_shows_its_texts_and_verifies(
    tmp_path: Path, tokenizer: str, order: OrderSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = made(tmp_path, tokenizer, Direction.REVERSE, order)
    reader, loaded = ShardReader(prefix), load_tokenizer(tokenizer, EOD_TOKEN)
    assert [text_of(reader, number, loaded) for number in range(len(TEXTS))] == TEXTS
    reading = reader.manifest.model_order
    assert (reading.unit, reading.marker_id) == (order.unit, order.marker and loaded.token_id("<rev>"))
    assert json.loads(Path(f"{prefix}.json").read_text())["format_version"] == 2
    for number in range(len(TEXTS)):
        document = reader.document(number).tolist()
        assert document[-1] == loaded.eod_id
        assert (document[0] == loaded.token_id("<rev>")) is (order.marker is not None)
    assert verify_shard(prefix) == []
    assert not check_direction(reader, loaded).is_wrong
    inspect_shards(InspectSettings(prefixes=[prefix], verify=True))
    shown = capsys.readouterr().out
    assert f"unit       {order.unit}" in shown
    assert ("marker     <rev> = " in shown) is (order.marker is not None)
    assert (", of 1 to 4 tokens, seed 9" in shown) is (order.unit is Unit.SEGMENT)


def test_both_commands_take_the_options(tmp_path: Path, tokenizer: str, forward: str) -> None:
    order = [
        "--unit",
        "segment",
        "--marker",
        "<rev>",
        "--boundary-token",
        "<b>",
        "--segment-tokens",
        "4",
        "--segment-seed",
        "9",
    ]
    source = write_jsonl(tmp_path / "texts.jsonl", TEXTS)
    from_text = ["--input", str(source), "--tokenizer", tokenizer, "--eod-token", EOD_TOKEN, "--workers", "1"]
    from_shard = ["--input", forward, "--to-direction", "reverse"]
    for tool, options in (("preprocess_data", from_text), ("reverse_shards", from_shard)):
        done = run_forked([ROOT / f"tools/{tool}.py", *options, *order, "--output-prefix", str(tmp_path / tool)])
        assert done.returncode == 0, done.stderr
    expected = file_bytes(converted(forward, tmp_path / "expected", order=SEGMENT))
    assert file_bytes(str(tmp_path / "preprocess_data")) == file_bytes(str(tmp_path / "reverse_shards")) == expected


def test_words_are_in_reverse_order_and_names_stay_together(tmp_path: Path, tokenizer: str) -> None:
    loaded = load_tokenizer(tokenizer, EOD_TOKEN)

    def first_document(order: OrderSettings) -> str:
        reader = ShardReader(made(tmp_path, tokenizer, Direction.REVERSE, order))
        stored = [id_ for id_ in reader.document(0).tolist() if id_ != loaded.token_id("<b>")]
        return loaded.decode(stored)

    assert first_document(WORD) == " Army U.S. the for left He Then York. New to went ObamaBarack"
    assert first_document(ENTITY) == " Army U.S. the for left Then He New York. to wentBarack Obama"


def test_a_forward_shard_gets_a_marker_and_a_foreign_shard_any_order(tmp_path: Path, tokenizer: str, forward: str) -> None:
    marked = OrderSettings(marker="<fwd>")
    direct = made(tmp_path, tokenizer, Direction.FORWARD, marked)
    from_forward = converted(forward, tmp_path / "marked", to_direction=Direction.FORWARD, order=marked)
    assert file_bytes(from_forward) == file_bytes(direct)
    reader = ShardReader(forward)
    foreign = foreign_shard(tmp_path / "foreign", [[reader.document(number).tolist()] for number in range(len(reader))])
    options = {"tokenizer": tokenizer, "eod_token": EOD_TOKEN}
    assert file_bytes(converted(foreign, tmp_path / "words", order=WORD, **options)) == file_bytes(
        made(tmp_path, tokenizer, Direction.REVERSE, WORD)
    )


def test_merged_shards_keep_the_order_and_only_equal_orders_are_merged(tmp_path: Path, tokenizer: str, forward: str) -> None:
    segments = converted(forward, tmp_path / "segments", order=SEGMENT)
    again = converted(forward, tmp_path / "again", order=SEGMENT)
    merged = merge_shards(MergeSettings(input=[segments, again], output_prefix=str(tmp_path / "merged")))
    assert (merged.reading, merged.reading_tokens) == (check_shard(segments).reading, check_shard(segments).reading_tokens)
    longer = OrderSettings(unit=Unit.SEGMENT, marker="<rev>", boundary_token="<b>", segment_tokens=5)
    other = converted(forward, tmp_path / "longer", order=longer)
    words = converted(forward, tmp_path / "words", order=WORD)
    for prefix, message in ((other, "same --segment-tokens"), (words, "reverse by segment, boundary 403, marker 401")):
        with pytest.raises(MismatchError, match=message):
            merge_shards(MergeSettings(input=[segments, prefix], output_prefix=str(tmp_path / "x")))


def test_a_text_with_an_id_of_marker_or_boundary_is_a_bad_record(tmp_path: Path, tokenizer: str, forward: str) -> None:
    """A token of the vocabulary that is not special occurs in texts."""
    with pytest.raises(DataError, match=r"the text contains the marker 'a' = .* \(--marker names another\)"):
        made(tmp_path, tokenizer, Direction.REVERSE, OrderSettings(marker="a"))
    order = OrderSettings(unit=Unit.WORD, boundary_token="B")
    manifest = load_manifest(made(tmp_path, tokenizer, Direction.REVERSE, order, on_error="skip", overwrite=True))
    assert (manifest.num_documents, manifest.skipped) == (len(TEXTS) - 1, {"marker_in_text": 1})
    with pytest.raises(DataError, match=r"contains the id .* of --boundary-token"):
        converted(forward, tmp_path / "x", order=order)
    assert not list(tmp_path.glob("x*"))


def test_a_document_without_its_marker_is_found(tmp_path: Path, tokenizer: str, forward: str) -> None:
    marked = converted(forward, tmp_path / "marked", order=MARKED)
    reader = ShardReader(marked)
    place = int(reader.lengths[0]) + 2
    ids = np.array(reader.ids)
    ids[place - 2 : place] = ids[place - 2 : place][[1, 0]]
    Path(f"{marked}.bin").write_bytes(ids.tobytes())
    problems = "; ".join(verify_shard(marked))
    assert "document 1 has not its marker 401 at its beginning alone; see its id 0" in problems
    with pytest.raises(DataError, match=r"begins with id \d+, expected the marker 401"):
        converted(marked, tmp_path / "x")


@pytest.mark.parametrize(
    ("direction", "order", "bos_token", "words"),
    [
        (Direction.FORWARD, WORD, None, "use --direction reverse, or omit --unit"),
        (Direction.REVERSE, OrderSettings(unit=Unit.WORD), None, "needs --boundary-token"),
        (Direction.REVERSE, OrderSettings(boundary_token="<b>"), None, "has no effect with --unit token"),
        (Direction.REVERSE, OrderSettings(segment_tokens=3), None, "no effect without --unit segment"),
        (Direction.REVERSE, OrderSettings(unit=Unit.SEGMENT, boundary_token="<b>", segment_tokens=0), None, "at least 1"),
        (Direction.REVERSE, MARKED, "<b>", "--marker and --bos-token both name"),
        (Direction.REVERSE, OrderSettings(marker=EOD_TOKEN), None, "expected different ones"),
        (Direction.REVERSE, OrderSettings(unit=Unit.WORD, marker="<b>", boundary_token="<b>"), None, "expected different ones"),
        (Direction.REVERSE, OrderSettings(marker="<none>"), None, "has no token '<none>'"),
    ],
)
def test_options_that_exclude_each_other_are_refused_before_any_work(
    tmp_path: Path, tokenizer: str, direction: Direction, order: OrderSettings, bos_token: str | None, words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        made(tmp_path, tokenizer, direction, order, bos_token=bos_token)
    assert [path.name for path in tmp_path.iterdir()] == ["texts.jsonl"]


def test_a_tokenizer_that_does_not_show_where_words_begin_is_refused(tmp_path: Path) -> None:
    legible = str(legible_tokenizer(tmp_path / "legible"))
    order = OrderSettings(unit=Unit.WORD, boundary_token="999")
    with pytest.raises(UsageError, match="needs a tokenizer whose pieces begin with the space before a word"):
        made(tmp_path, legible, Direction.REVERSE, order)
    assert not list(tmp_path.glob("reverse_*"))


def test_a_shard_of_the_same_order_and_a_missing_tokenizer_are_refused(tmp_path: Path, tokenizer: str, forward: str) -> None:
    with pytest.raises(UsageError, match="is forward already"):
        converted(forward, tmp_path / "x", to_direction=Direction.FORWARD)
    manifest = json.loads(Path(f"{forward}.json").read_text())
    moved = tmp_path / "moved"
    for suffix in (".bin", ".idx"):
        Path(f"{moved}{suffix}").write_bytes(Path(forward + suffix).read_bytes())
    Path(f"{moved}.json").write_text(json.dumps({**manifest, "tokenizer_path": "/nowhere"}))
    with pytest.raises(UsageError, match="is not at '/nowhere'; name it by --tokenizer"):
        converted(str(moved), tmp_path / "x", order=WORD)
    assert file_bytes(converted(str(moved), tmp_path / "words", order=WORD, tokenizer=tokenizer)) == file_bytes(
        converted(forward, tmp_path / "same", order=WORD)
    )


def test_old_manifests_read_as_tokens_without_a_marker_and_old_versions_refuse_new_ones(tmp_path: Path, forward: str) -> None:
    stored = json.loads(Path(f"{forward}.json").read_text())
    assert stored["format_version"] == 1
    assert not {"reading", "reading_tokens", "readings"} & set(stored)
    assert check_shard(forward).model_order.is_plain
    words = converted(forward, tmp_path / "words", order=WORD)
    manifest = json.loads(Path(f"{words}.json").read_text())
    for changes, message in (
        ({"format_version": 1}, "in format version 1"),
        ({"reading": {}}, "in format version 2"),
        ({"reading": {"unit": "line"}}, "expected a list of direction"),
        ({"direction": "both"}, "both"),
    ):
        Path(f"{words}.json").write_text(json.dumps({**manifest, **changes}))
        with pytest.raises(DataError, match=message):
            load_manifest(words)
