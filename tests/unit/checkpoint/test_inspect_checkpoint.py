"""`ledom inspect-checkpoint` prints the content of a checkpoint and names every damaged file."""

import json
import shlex
import shutil
from pathlib import Path

import pytest

from megatron_ledom.checkpoint.inspection import inspect_checkpoint
from megatron_ledom.checkpoint.manifest import OWN_HASH, load_manifest
from megatron_ledom.errors import DataError, UsageError, VerificationError
from tests.support.forked import run_forked
from tests.support.paths import ROOT
from tests.support.tiny_runs import TinyData, run_on_ranks, start_ranks

COMMAND = "ledom inspect-checkpoint runs/reverse --verify"
"""As in docs/how_to/resume.md."""


@pytest.fixture(scope="module")
def trained(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run with checkpoints of iterations 2 and 3."""
    run_dir = tmp_path_factory.mktemp("inspected") / "run"
    run_on_ranks(data.config, run_dir, "train.train_iters=3", "checkpoint.save_interval=2")
    return run_dir


@pytest.fixture
def run_dir(trained: Path, tmp_path: Path) -> Path:
    """Return a copy, which a test may damage."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_the_command_lists_the_run_and_verifies_its_latest_checkpoint(trained: Path) -> None:
    assert COMMAND in (ROOT / "docs/how_to/resume.md").read_text(encoding="utf-8")
    words = shlex.split(COMMAND.replace("runs/reverse", str(trained)))
    done = run_forked(["-c", "from megatron_ledom.cli.main import main; main()", *words[1:]])
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[:2]] == ["iter_0000002", "iter_0000003"]
    assert "<- latest" in lines[1]
    text = " ".join(done.stdout.split())
    for words_shown in (
        "iteration 3",
        "consumed 24 samples, 768 tokens",
        "1 ranks: TP 1, PP 1, CP 1, DP 1, ordinary optimizer",
        "direction reverse",
        "weights: decoder",
        "optimizer: exp_avg_sq",
        "verified: 4 files",
    ):
        assert words_shown in text


def test_a_changed_bit_in_any_file_is_named(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = run_dir / "checkpoints/iter_0000003"
    for path in sorted(checkpoint.iterdir()):
        whole = path.read_bytes()
        middle = len(whole) // 2
        path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
        with pytest.raises((VerificationError, DataError)) as caught:
            inspect_checkpoint(str(run_dir), verify=True)
        assert str(path) in capsys.readouterr().err + str(caught.value)
        path.write_bytes(whole)
    inspect_checkpoint(str(run_dir), verify=True)


def test_a_missing_file_is_named_without_reading_the_others(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = next((run_dir / "checkpoints/iter_0000003").glob("*.distcp"))
    missing.unlink()
    with pytest.raises(VerificationError, match="1 problem"):
        inspect_checkpoint(str(run_dir))
    assert f"problem: {missing} is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("subprocess", "run"),
        ("torch.distributed.checkpoint.filesystem", "os.system"),  # an allowed module, and a name that it imports
        ("torch.distributed.checkpoint.filesystem", "pickle"),
        ("torch.distributed.checkpoint.metadata", "os"),
    ],
)
def test_a_list_of_tensors_that_would_run_code_is_refused(
    run_dir: Path, capsys: pytest.CaptureFixture[str], module: str, name: str
) -> None:
    harmful = run_dir / "checkpoints/iter_0000003/.metadata"
    strings = [b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name)]
    harmful.write_bytes(b"\x80\x04" + strings[0] + strings[1] + b"\x93.")  # protocol 4, in which a name may have dots
    with pytest.raises(VerificationError):
        inspect_checkpoint(str(run_dir))
    assert f"it names {module}.{name}" in capsys.readouterr().err


def test_a_checkpoint_without_checksums_loads_with_a_warning(
    data: TinyData, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run_dir / "checkpoints/iter_0000003/manifest.json"
    values = json.loads(path.read_text())
    for name in ("files", "world_size", OWN_HASH):
        del values[name]
    path.write_text(json.dumps({**values, "format_version": 1}))
    inspect_checkpoint(str(run_dir), verify=True)
    assert "nothing to verify: written by a version without checksums" in capsys.readouterr().out
    ranks = start_ranks(data.config, run_dir, "train.train_iters=4")
    assert ranks.wait() == [0], ranks.output()
    assert "was written by a version without checksums: its files cannot be checked" in ranks.output()
    assert len(load_manifest(str(run_dir / "checkpoints/iter_0000004")).files) == 4


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a folder"):
        inspect_checkpoint(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"has no manifest\.json"):
        inspect_checkpoint(str(tmp_path))
