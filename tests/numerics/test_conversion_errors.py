"""Damaged sources, full disks and kills give a clear error, and never a folder that seems finished."""

import errno
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from megatron_ledom.checkpoint.folder import find_checkpoint
from megatron_ledom.checkpoint.stored_tensors import StoredTensors
from megatron_ledom.convert.hf_export import export_hf
from megatron_ledom.convert.hf_folder import parse_size
from megatron_ledom.convert.hf_import import import_hf
from megatron_ledom.direction import Direction
from megatron_ledom.errors import DataError, LedomError, UsageError
from megatron_ledom.storage import hashed_file
from megatron_ledom.storage.folders import new_folder
from tests.support.conversion_checks import check_same_folders, check_same_runs
from tests.support.paths import ROOT
from tests.support.stock_folders import family_folder, stock_config, stock_folder
from tests.support.warm_python import shared_python

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a stock folder with several files."""
    return family_folder(tmp_path_factory.mktemp("stock") / "hf", "Llama", max_shard_size="60KB")


@pytest.fixture(scope="module")
def run(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the stock folder imported as a run."""
    folder = tmp_path_factory.mktemp("run") / "run"
    import_hf(str(source), str(folder), direction=Direction.REVERSE, verify=None)
    return folder


def second_file(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[1]


def truncate(folder: Path) -> None:
    file = second_file(folder)
    file.write_bytes(file.read_bytes()[:-1])


def flip_header(folder: Path) -> None:
    file = second_file(folder)
    content = bytearray(file.read_bytes())
    content[9] ^= 0xFF
    file.write_bytes(bytes(content))


def drop_tensor(folder: Path) -> None:
    file = second_file(folder)
    weights = load_file(file)
    weights.popitem()
    save_file(weights, file)


def add_tensor(folder: Path) -> None:
    file = second_file(folder)
    weights = load_file(file)
    save_file({**weights, "model.layers.0.self_attn.q_proj.bias": weights[next(iter(weights))].clone()}, file)


def edit(name: str, **changed: Any) -> Callable[[Path], None]:
    def edited(folder: Path) -> None:
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**values, **changed}))

    return edited


def config(**changed: Any) -> Callable[[Path], None]:
    return edit("config.json", **changed)


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
DAMAGE: list[tuple[Callable[[Path], None], int, str]] = [
    (truncate, 1, "not a complete safetensors file"),
    (flip_header, 1, "not a complete safetensors file"),
    (lambda folder: second_file(folder).unlink(), 1, "is missing, but"),
    (remove(INDEX), 2, "has neither model.safetensors nor"),
    (edit(INDEX, weight_map={"a": "../b"}), 1, "is not an index of safetensors files"),
    (edit(INDEX, weight_map=3), 1, "is not an index of safetensors files"),
    (drop_tensor, 1, "nor any other file of the index contains it"),
    (add_tensor, 1, "q_proj.bias is not a weight of the model"),
    (remove("config.json"), 2, "has no config.json"),
    (lambda folder: (folder / "generation_config.json").write_text("[]"), 1, "generation_config.json cannot be read"),
    (lambda folder: (folder / "config.json").write_text("{"), 1, "config.json cannot be read"),
    (config(num_hidden_layers=3), 1, "model.layers.2.input_layernorm.weight is missing"),
    (config(num_hidden_layers=1), 1, "model.layers.1.input_layernorm.weight is not a weight of the model"),
    (config(num_key_value_heads=4), 1, "k_proj.weight has shape [16, 32], expected [32, 32]"),
    (config(intermediate_size=40), 1, "gate_proj.weight has shape [48, 32], expected [40, 32]"),
    (config(tie_word_embeddings=True), 1, "lm_head.weight is not model.embed_tokens.weight"),
    (config(hidden_act="gelu"), 1, "hidden_act is 'gelu'"),
    (config(attention_bias=True), 1, "attention_bias adds a bias to the output projection"),
    (config(mlp_bias=True), 1, "mlp_bias"),
    (config(rope_parameters={**ROPE, "partial_rotary_factor": 0.5}), 1, "partial_rotary_factor"),
    (config(rope_parameters={**ROPE, "rope_type": "dynamic", "factor": 2.0}), 1, "rope_type dynamic changes the frequencies"),
    (config(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}), 1, "quantised"),
    (config(model_type="gpt2", architectures=["GPT2LMHeadModel"]), 1, "model_type 'gpt2' is not one of llama, mistral"),
    (config(architectures=["LlamaForSequenceClassification"]), 1, "it is a LlamaForSequenceClassification"),
    (remove("tokenizer.json"), 2, "tokenizer"),
]


@pytest.mark.parametrize("number", range(len(DAMAGE)))
def test_a_folder_that_cannot_be_imported_is_refused_with_the_reason(source: Path, tmp_path: Path, number: int) -> None:
    damage, code, words = DAMAGE[number]
    folder = shutil.copytree(source, tmp_path / "hf")
    damage(folder)
    with pytest.raises(LedomError) as caught:
        import_hf(str(folder), str(tmp_path / "new/run"), direction=Direction.REVERSE)
    assert words in str(caught.value)
    assert caught.value.exit_code == code
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_pickled_weights_are_not_read(source: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(source, tmp_path / "hf", ignore=shutil.ignore_patterns("*.safetensors", INDEX))
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UsageError, match="are not read because they can run code"):
        import_hf(str(folder), str(tmp_path / "run"), direction=Direction.REVERSE)


def test_the_direction_must_be_given_or_recorded(
    source: Path, run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(UsageError, match="does not record the direction of its model"):
        import_hf(str(source), str(tmp_path / "run"))
    export_hf(str(run), str(tmp_path / "out"), verify=None)
    import_hf(str(tmp_path / "out"), str(tmp_path / "same"), verify=None)
    assert json.loads((tmp_path / "same/import.json").read_text())["direction"] == "reverse"
    import_hf(str(tmp_path / "out"), str(tmp_path / "other"), direction=Direction.FORWARD, verify=None)
    assert "is a reverse model" in caplog.text
    assert json.loads((tmp_path / "other/import.json").read_text())["source_direction"] == "reverse"


def test_a_sliding_window_is_refused_where_it_would_matter(tmp_path: Path) -> None:
    folder = stock_folder(tmp_path / "hf", stock_config("Mistral", sliding_window=32))
    with pytest.raises(LedomError, match="set --seq-length to 32 or less"):
        import_hf(str(folder), str(tmp_path / "run"), direction=Direction.REVERSE)
    import_hf(str(folder), str(tmp_path / "run"), direction=Direction.REVERSE, seq_length=32)
    export_hf(str(tmp_path / "run"), str(tmp_path / "out"), architecture="MistralForCausalLM")
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert (written["architectures"], written["sliding_window"]) == (["MistralForCausalLM"], None)
    assert written["max_position_embeddings"] == 32


def test_an_existing_folder_is_not_changed(source: Path, run: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(UsageError, match="exists already"):
        import_hf(str(source), str(tmp_path / "run"), direction=Direction.REVERSE)
    with pytest.raises(UsageError, match="exists already"):
        export_hf(str(run), str(tmp_path / "run"))


def test_an_export_omits_local_paths_that_an_older_run_kept(run: Path, tmp_path: Path) -> None:
    older = shutil.copytree(run, tmp_path / "run")
    edit("tokenizer_config.json", special_tokens_map_file=str(tmp_path / "alice.json"))(older / "tokenizer")
    export_hf(str(older), str(tmp_path / "out"), verify=None)
    kept = json.loads((run / "tokenizer/tokenizer_config.json").read_text())
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text()) == kept


@pytest.mark.parametrize("name", [".", "..", "./", "out/..", "/"])
def test_a_folder_that_cannot_be_renamed_is_refused_before_any_work(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    inside = tmp_path / "above/inside"
    (inside / "out").mkdir(parents=True)
    (inside / "export.json").write_text("{}")
    monkeypatch.chdir(inside)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError, match=f"--save {re.escape(name)} cannot be replaced by a new folder"):
        export_hf(str(run), name, verify=None, overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kind", ["export", "import"])
def test_of_two_conversions_into_one_folder_the_second_is_refused(source: Path, run: Path, tmp_path: Path, kind: str) -> None:
    """The first is not disturbed; files of a killed conversion do not hinder the next one."""
    target = tmp_path / "target"

    def convert() -> None:
        if kind == "export":
            export_hf(str(run), str(target), verify=None)
        else:
            import_hf(str(source), str(target), direction=Direction.REVERSE, verify=None)

    with new_folder(str(target), "written") as part:
        (Path(part) / "written.part").touch()
        with pytest.raises(UsageError, match="is being written by process"):
            convert()
        assert [path.name for path in Path(part).glob("written*")] == ["written.part"]
    assert [path.name for path in target.iterdir()] == ["written"]
    shutil.rmtree(target)
    (tmp_path / "target.part/checkpoints").mkdir(parents=True)
    (tmp_path / "target.part/.lock").touch()
    (tmp_path / "target.part/left").touch()
    convert()
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    assert not [name for name in (".lock", "left") if (target / name).exists()]


def test_an_old_export_stays_if_the_new_one_cannot_replace_it(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    export_hf(str(run), str(target), verify=None)
    before = (target / "export.json").stat().st_ino
    rename = os.rename

    def fails(source: str, to: str) -> None:
        if str(source).endswith("target.part"):
            raise PermissionError(13, "no", str(source))
        rename(source, to)

    monkeypatch.setattr("megatron_ledom.storage.folders.os.rename", fails)
    with pytest.raises(PermissionError):
        export_hf(str(run), str(target), verify=None, overwrite=True)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    assert (target / "export.json").stat().st_ino == before
    rename(str(target), f"{target}.old")  # the state after a kill between both renames
    with pytest.raises(UsageError, match="exists already"):
        export_hf(str(run), str(target), verify=None)
    assert (target / "export.json").stat().st_ino == before
    export_hf(str(run), str(target), verify=None, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("500MB", 500_000_000), ("1.5kb", 1500), ("7", 7)])
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "5 bananas"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size"):
        parse_size(text)


def children(*arguments: Any) -> tuple[list[dict[str, Any]], str]:
    """Return stdout and stderr of tests.support.conversion_child."""
    command = [str(shared_python()), "-m", "tests.support.conversion_child", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


@pytest.mark.parametrize("kind", ["export", "import"])
def test_a_full_disk_leaves_nothing_and_the_message_has_a_remedy(source: Path, run: Path, tmp_path: Path, kind: str) -> None:
    """A limit of the file size causes the same error as a full disk."""
    (found,), errors = children(kind, run if kind == "export" else source, tmp_path / "target", "limit=30000")
    assert found == {"code": 1, "finished": False, "part": False, "part_loads": False}, errors
    assert "make room, then run the command again" in errors


@pytest.mark.parametrize("num_kills", [4, pytest.param(10, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["export", "import"])
def test_killed_at_random_moments_no_output_seems_finished(
    source: Path, run: Path, tmp_path: Path, kind: str, num_kills: int
) -> None:
    """Kill several times: a conversion that had finished is whole; any other left nothing, and starts again."""
    check = check_same_folders if kind == "export" else check_same_runs
    expected = source if kind == "export" else run
    left, _ = children(kind, run if kind == "export" else source, tmp_path / "target", num_kills)
    assert len(left) == num_kills
    assert not all(one["finished"] for one in left)
    for one in left:
        assert not one["part_loads"]
        if one["finished"]:
            check(Path(one["target"]), expected)
    again = next(Path(one["target"]) for one in left if not one["finished"])
    if kind == "export":
        export_hf(str(run), str(again))
    else:
        import_hf(str(source), str(again), direction=Direction.REVERSE)
    check(again, expected)
    assert not Path(f"{again}.part").exists()


def test_an_early_error_of_the_disk_is_reported_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system reports such an error only once, to the next fsync."""

    def refuse(descriptor: int) -> None:
        raise OSError(errno.EDQUOT, "no room")

    monkeypatch.setattr(hashed_file, "SYNCED_BYTES", 10)
    monkeypatch.setattr(os, "fdatasync", refuse)
    with ThreadPoolExecutor(2) as threads:
        file = hashed_file.HashedFile(str(tmp_path / "file"), threads)
        file.write(b"0123456789")
        file.close()
        with pytest.raises(OSError, match="no room"):
            file.sums()


def test_a_checkpoint_with_a_truncated_file_is_refused_on_reading(run: Path, tmp_path: Path) -> None:
    """Sizes are checked before, but the first checkpoints recorded none; a page after the file's end would kill the process."""
    checkpoint = find_checkpoint(str(shutil.copytree(run, tmp_path / "run")))
    file = max(Path(checkpoint).glob("*.distcp"))
    os.truncate(file, file.stat().st_size - 100)
    stored = StoredTensors(checkpoint)
    with pytest.raises(DataError, match="cannot be read at"):
        [stored.read(name) for name in stored.entries]
