"""Checkpoints crafted to run code when they are read: no code runs on resume, export or inspection."""

import io
import os
import pickle
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner_helpers import _create_read_item_for_byteio

from megatron_ledom.checkpoint.inspection import inspect_checkpoint
from megatron_ledom.checkpoint.manifest import load_manifest, save_manifest
from megatron_ledom.checkpoint.stored_tensors import read_metadata
from megatron_ledom.convert.hf_export import export_hf
from megatron_ledom.errors import DataError, VerificationError
from megatron_ledom.platform.core_fixes import install_core_fixes
from megatron_ledom.storage.hashes import checksum
from tests.distributed import hazards
from tests.support.tiny_runs import TinyData, run_on_ranks, start_ranks

SHORT = ("train.train_iters=4", "optimizer.lr_warmup_iters=1")


class Harm:
    """An object whose unpickling makes the folder `mark`."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def craft_list(checkpoint: Path, harm: Harm) -> None:
    """Add the object to .metadata."""
    metadata = read_metadata(str(checkpoint))
    metadata.planner_data = {"harm": harm}
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


def craft_settings(checkpoint: Path, harm: Harm) -> None:
    """Add the object to common.pt."""
    content = torch.load(checkpoint / "common.pt", weights_only=True)
    torch.save({**content, "harm": harm}, checkpoint / "common.pt")


def craft_objects(checkpoint: Path, harm: Harm) -> None:
    """Replace each stored object that is not a tensor."""
    metadata = read_metadata(str(checkpoint))
    stored = io.BytesIO()
    torch.save([harm], stored)
    for index, place in list(metadata.storage_data.items()):
        if isinstance(metadata.state_dict_metadata[index.fqn], BytesStorageMetadata):
            file = checkpoint / place.relative_path
            moved = replace(place, offset=file.stat().st_size, length=len(stored.getvalue()))
            file.write_bytes(file.read_bytes() + stored.getvalue())
            metadata.storage_data[index] = moved
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


CRAFTS = {"list": craft_list, "settings": craft_settings, "objects": craft_objects}


@pytest.fixture(scope="module")
def trained(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("crafted") / "run"
    run_on_ranks(data.config, run_dir, *SHORT, "train.exit_interval=2")
    return run_dir


@pytest.fixture(params=list(CRAFTS))
def crafted(request: pytest.FixtureRequest, trained: Path, tmp_path: Path) -> Path:
    """A run whose latest checkpoint would make the folder `mark`; its manifest has the sums of the crafted files."""
    run_dir = Path(shutil.copytree(trained, tmp_path / request.param))
    checkpoint = run_dir / "checkpoints/iter_0000002"
    CRAFTS[request.param](checkpoint, Harm(tmp_path / "mark"))
    manifest = load_manifest(str(checkpoint))
    files = {name: checksum(str(checkpoint / name)) for name in manifest.files}
    save_manifest(replace(manifest, files=files), str(checkpoint))
    return run_dir


def test_resume_runs_no_code_of_a_checkpoint(data: TinyData, crafted: Path) -> None:
    ranks = start_ranks(data.config, crafted, *SHORT)
    assert ranks.wait() == [1], ranks.output()
    assert not (crafted.parent / "mark").exists()
    assert "Traceback" not in ranks.output()
    assert "has a file that needs posix.mkdir. No run writes such a file, and it could run code" in ranks.output()


def test_a_crafted_checkpoint_runs_code_without_the_correction(data: TinyData, crafted: Path) -> None:
    """megatron-core itself loads the settings with torch's `weights_only`."""
    ranks = start_ranks(data.config, crafted, *SHORT, hook=partial(hazards.without, "restricted unpickling"))
    ranks.wait()
    assert (crafted.parent / "mark").exists() == (crafted.name != "settings"), ranks.output()


def test_export_and_inspection_run_no_code_of_a_checkpoint(crafted: Path, tmp_path: Path) -> None:
    for work in (lambda: export_hf(str(crafted), str(tmp_path / "out")), lambda: inspect_checkpoint(str(crafted), verify=True)):
        try:
            work()
        except (DataError, VerificationError) as error:
            assert "posix.mkdir" in str(error) or "problem" in str(error)  # noqa: PT017  neither reads objects
    assert not (tmp_path / "mark").exists()


def test_objects_of_transformer_engines_layers_are_read() -> None:
    """The fp8 state is a BytesIO in the list that megatron-core makes of a rank's objects."""
    install_core_fixes()
    stored = io.BytesIO()
    torch.save([io.BytesIO(b"state")], stored)
    stored.seek(0)
    planner = DefaultLoadPlanner(flatten_state_dict=False)
    planner.state_dict = {}
    index = MetadataIndex("layer._extra_state")
    planner.load_bytes(_create_read_item_for_byteio(index, 0, index, 0, len(stored.getvalue())), stored)
    assert planner.state_dict["layer._extra_state"][0].getvalue() == b"state"
