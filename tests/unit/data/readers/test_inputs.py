"""The files that a task reads, and its byte ranges of them."""

import os
from itertools import pairwise
from pathlib import Path

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ledom.data.readers import byte_ranges
from megatron_ledom.data.readers.byte_ranges import InputPath, byte_ranges_of_task, parts_of
from megatron_ledom.data.readers.input_files import expand_inputs, find_inputs
from megatron_ledom.errors import UsageError


def names(patterns: list[str]) -> list[str]:
    return [os.path.basename(source.path) for source in expand_inputs(patterns)]


def test_inputs_are_sorted_and_read_once(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.txt", "[x].jsonl"):
        (tmp_path / name).touch()
    found = names([str(tmp_path / "*.jsonl"), str(tmp_path / "a.jsonl"), str(tmp_path / "[x].jsonl")])
    assert found == ["[x].jsonl", "a.jsonl", "b.jsonl"]


def test_a_file_with_several_paths_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").touch()
    Path("b.jsonl").symlink_to("a.jsonl")
    assert len(expand_inputs(["a.jsonl", "./a.jsonl", str(tmp_path / "a.jsonl"), "b.jsonl"])) == 1


def test_a_folder_stands_for_all_its_files_of_known_formats_and_a_list_for_its_lines(tmp_path: Path) -> None:
    (tmp_path / "deep/er").mkdir(parents=True)
    for name in ("deep/a.jsonl.zst", "deep/er/b.parquet", "deep/README.md", "c.wet.gz"):
        (tmp_path / name).touch()
    assert names([str(tmp_path / "deep")]) == ["a.jsonl.zst", "b.parquet"]
    (tmp_path / "list").write_text(f"{tmp_path}/deep\n\n{tmp_path}/*.gz\n")
    assert names([f"@{tmp_path}/list"]) == ["c.wet.gz", "a.jsonl.zst", "b.parquet"]


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("n*.jsonl", "matches no file"),
        ("a.csv", "an unknown ending"),
        ("a.parquet.gz", "an unknown ending"),
        ("notes", "a folder without a file of a known format"),
        (".", "gone.jsonl cannot be read .No such file"),
        ("@absent", "input list .*absent cannot be read"),
        ("pipe.jsonl", "not a regular file"),
        ("gone.jsonl", "cannot be read .No such file"),
        ("nosuch://x/a.jsonl", "Protocol not known"),
    ],
)
def test_inputs_that_cannot_be_used_are_refused(tmp_path: Path, pattern: str, words: str) -> None:
    (tmp_path / "a.csv").touch()
    (tmp_path / "a.parquet.gz").touch()
    touched(tmp_path, "notes/a.md", "notes/.hidden.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    at, rest = ("@", pattern[1:]) if pattern[0] == "@" else ("", pattern)
    with pytest.raises(UsageError, match=words):
        expand_inputs([pattern if "://" in pattern else at + os.path.join(tmp_path, rest)])


def reasons(patterns: list[str], root: Path) -> dict[str, str]:
    """Return the reason of each skipped path below `root`."""
    return {entry.path.replace(f"{root}/", ""): entry.reason.replace(f"{root}/", "") for entry in find_inputs(patterns)[1]}


def touched(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


@pytest.mark.parametrize("pattern", ["in", "in/**/*.jsonl"])
def test_links_are_followed_and_one_file_is_read_once(tmp_path: Path, pattern: str) -> None:
    touched(tmp_path, "elsewhere/q.jsonl", "blobs/1.jsonl", "in/p.jsonl")
    (tmp_path / "in/folder").symlink_to("../elsewhere")
    (tmp_path / "in/snapshot.jsonl").symlink_to("../blobs/1.jsonl")
    (tmp_path / "in/twice.jsonl").symlink_to("p.jsonl")
    os.link(tmp_path / "in/p.jsonl", tmp_path / "in/hard.jsonl")
    assert names([str(tmp_path / pattern)]) == ["q.jsonl", "hard.jsonl", "snapshot.jsonl"]
    assert reasons([str(tmp_path / pattern)], tmp_path) == {
        "in/p.jsonl": "the same file as in/hard.jsonl",
        "in/twice.jsonl": "the same file as in/hard.jsonl",
    }


def test_a_folder_reached_twice_is_read_once(tmp_path: Path) -> None:
    touched(tmp_path, "in/real/q.jsonl", "in/z.jsonl")
    (tmp_path / "in/link").symlink_to("real")
    assert names([str(tmp_path / "in")]) == ["q.jsonl", "z.jsonl"]
    assert reasons([str(tmp_path / "in")], tmp_path) == {"in/real": "the same folder as in/link"}
    assert names([str(tmp_path / "in/link"), str(tmp_path / "in/real")]) == ["q.jsonl"]


@pytest.mark.parametrize("pattern", ["in", "in/**/*.jsonl"])
@pytest.mark.parametrize(
    ("link", "target", "words"),
    [
        ("in/deep/up", "..", "is a link to .*, a folder above it"),
        ("in/gone.jsonl", "nowhere", "cannot be read .No such file|which does not exist"),
        ("in/gone", "nowhere", "a link to nowhere, which does not exist"),
        ("in/README.md", "nowhere", "a link to nowhere, which does not exist"),
        ("in/self", "self", "Too many levels of symbolic links|does not exist"),
    ],
)
def test_a_loop_and_a_dangling_link_are_refused(tmp_path: Path, pattern: str, link: str, target: str, words: str) -> None:
    touched(tmp_path, "in/a.jsonl", "in/deep/b.jsonl")
    (tmp_path / link).symlink_to(target)
    with pytest.raises(UsageError, match=words):
        expand_inputs([str(tmp_path / pattern)])


def test_a_loop_over_two_folders_is_refused(tmp_path: Path) -> None:
    touched(tmp_path, "a/1.jsonl", "b/2.jsonl")
    (tmp_path / "a/to_b").symlink_to("../b")
    (tmp_path / "b/to_a").symlink_to("../a")
    for pattern in ("a", "**"):
        with pytest.raises(UsageError, match="a loop"):
            expand_inputs([str(tmp_path / pattern)])


@pytest.mark.parametrize(
    ("pattern", "skipped"),
    [
        ("in", {"in/.ipynb_checkpoints": "hidden", "in/.a.jsonl": "hidden", "in/**/*.md": "unknown ending"}),
        ("in/*.jsonl", {"in/.a.jsonl": "hidden"}),
        ("in/**/*.jsonl", {"in/.ipynb_checkpoints": "hidden", "in/.a.jsonl": "hidden"}),
        ("in/*/*.jsonl", {"in/.ipynb_checkpoints/c.jsonl": "hidden"}),
    ],
)
def test_hidden_files_are_skipped_and_listed(tmp_path: Path, pattern: str, skipped: dict[str, str]) -> None:
    touched(tmp_path, "in/.ipynb_checkpoints/c.jsonl", "in/.a.jsonl", "in/.gitattributes", "in/README.md", "in/s/a.jsonl")
    touched(tmp_path, "in/b.jsonl")
    assert all(not name.startswith((".", "c")) for name in names([str(tmp_path / pattern)]))
    assert reasons([str(tmp_path / pattern)], tmp_path) == skipped
    assert names([str(tmp_path / "in/.ipynb_checkpoints")]) == ["c.jsonl"]


def test_at_most_1000_skipped_inputs_are_listed_one_by_one(tmp_path: Path) -> None:
    touched(tmp_path, "a.jsonl", *(f".{number:04}.jsonl" for number in range(1003)))
    skipped = find_inputs([str(tmp_path)])[1]
    assert (len(skipped), skipped[-1].num_files) == (1001, 3)


def test_a_name_that_is_not_utf8_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"latin_\xe9.jsonl")).touch()
    for pattern in (str(tmp_path), str(tmp_path / "*.jsonl")):
        with pytest.raises(UsageError, match=r"latin_\\xe9\.jsonl' has a name that is not UTF-8"):
            expand_inputs([pattern])


def test_a_list_may_begin_with_a_byte_order_mark_and_must_not_be_empty(tmp_path: Path) -> None:
    touched(tmp_path, "a.jsonl")
    (tmp_path / "list").write_text(f"{tmp_path}/a.jsonl\r\n", encoding="utf-8-sig")
    assert names([f"@{tmp_path}/list"]) == ["a.jsonl"]
    (tmp_path / "list").write_text("\n \n")
    with pytest.raises(UsageError, match="is empty"):
        expand_inputs([f"@{tmp_path}/list"])


def test_an_object_store_is_read_like_a_folder() -> None:
    memory = fsspec.filesystem("memory")
    for name in ("a.jsonl", ".hidden.jsonl", ".ipynb_checkpoints/a.jsonl", "deep/b.jsonl", "README.md"):
        memory.pipe(f"/corpus/{name}", b"{}")
    for pattern, found in (("memory://corpus", ["a.jsonl", "b.jsonl"]), ("memory://corpus/**/*.jsonl", ["a.jsonl", "b.jsonl"])):
        assert names([pattern]) == found
        assert [entry.path for entry in find_inputs([pattern])[1] if entry.reason == "hidden"] == [
            "memory:///corpus/.hidden.jsonl",
            "memory:///corpus/.ipynb_checkpoints/a.jsonl",
        ]
    assert names(["memory://corpus/.ipynb_checkpoints", "memory://corpus/.hidden.jsonl"]) == [".hidden.jsonl", "a.jsonl"]
    memory.pipe("/hidden/.a.jsonl", b"{}")
    with pytest.raises(UsageError, match="matches no file"):
        expand_inputs(["memory://hidden"])


def test_a_file_address_is_a_local_path(tmp_path: Path) -> None:
    touched(tmp_path, "elsewhere/a.jsonl")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/link").symlink_to("../elsewhere")
    assert names([f"file://{tmp_path}/in"]) == ["a.jsonl"]


ENDINGS = st.sampled_from(["jsonl", "jsonl.gz", "txt", "parquet"])
FILES = st.lists(st.tuples(ENDINGS, st.integers(0, 1 << 20)), min_size=1, max_size=12)


@given(files=FILES, num_tasks=st.integers(1, 9), part_bytes=st.integers(1 << 14, 1 << 20))
def test_every_byte_belongs_to_one_task_and_in_order(files: list[tuple[str, int]], num_tasks: int, part_bytes: int) -> None:
    sources = [InputPath(f"{number:02}.{ending}", size, "") for number, (ending, size) in enumerate(files)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(byte_ranges, "COMPRESSED_PART_BYTES", 1 << 17)
        tasks = [parts_of(byte_ranges_of_task(sources, task, num_tasks), part_bytes) for task in range(num_tasks)]
    owned = [piece for parts in tasks for part in parts for piece in part]
    for source in sources:
        own = [(piece.start, piece.end) for piece in owned if piece.source == source]
        assert own[0][0] == 0
        assert own[-1][1] == source.num_bytes
        assert all(before[1] == after[0] for before, after in pairwise(own))
    assert [piece.source.path for piece in owned] == sorted(piece.source.path for piece in owned)


def test_one_large_file_and_many_small_ones_divide_alike() -> None:
    tasks = 64
    large = [InputPath("large.jsonl", 500 * 10**9, "")]
    small = [InputPath(f"{number:06}.jsonl", 10**6, "") for number in range(50_000)]
    for sources, total in ((large, 500 * 10**9), (small, 50_000 * 10**6)):
        for task in (0, 31, 63):
            owned = byte_ranges_of_task(sources, task, tasks)
            assert sum(piece.num_bytes for piece in owned) == pytest.approx(total / tasks, rel=1e-3)
            sizes = [sum(piece.num_bytes for piece in part) for part in parts_of(owned)]
            aim = min(byte_ranges.PART_BYTES, total // tasks // byte_ranges.PARTS_OF_A_TASK)
            assert max(sizes) <= 1.01 * aim
            assert sum(sizes) / len(sizes) > 0.9 * aim


def test_a_huge_compressed_file_is_not_decompressed_too_often() -> None:
    """Every part decompresses the file from its start: 64 parts of 500 GB cost 32 times the file, 2,000 would cost 1,000 times."""
    source = InputPath("a.jsonl.gz", 500 * 10**9, "")
    pieces = [piece for part in parts_of(byte_ranges_of_task([source], 0, 1)) for piece in part]
    assert len(pieces) == 64
    assert all(piece.start % byte_ranges.COMPRESSED_BLOCK == 0 for piece in pieces)
    assert sum(piece.end for piece in pieces) < 33 * source.num_bytes


@pytest.mark.parametrize(("task_id", "num_tasks"), [(3, 3), (-1, 3), (0, 0)])
def test_a_task_that_does_not_exist_is_refused(task_id: int, num_tasks: int) -> None:
    with pytest.raises(UsageError, match=r"--task-id|--num-tasks"):
        byte_ranges_of_task([InputPath("a.jsonl", 1, "")], task_id, num_tasks)


def test_little_input_is_cut_into_many_parts_for_many_workers() -> None:
    for total, num_parts in ((100 * 10**6, 24), (10 * 10**6, 3), (10**6, 1)):
        [*parts] = parts_of(byte_ranges_of_task([InputPath("a.jsonl", total, "")], 0, 1))
        assert len(parts) == num_parts
