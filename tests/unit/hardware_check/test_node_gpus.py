"""Verdicts of ledom check-nodes on nvidia-smi's outputs, which are those of its manual and of published outputs of real GPUs."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_ledom.hardware_check import node_gpus
from megatron_ledom.hardware_check.node_gpus import facts_of_gpus

SMI = """#!{python} -ISs
import json, sys
told = json.loads({told!r})
if sys.argv[1] == "-L":
    sys.exit(print(told["list"]))
option, _, fields = sys.argv[1].partition("=")
gpus = told["gpus"] if option == "--query-gpu" else told["rows"]
for field in fields.split(","):
    if field in told["unknown"]:
        sys.exit(print(f'Field "{{field}}" is not a valid field to query.\\n') or 2)
for gpu in gpus:
    print(", ".join(gpu[field] for field in fields.split(",")))
print(told["end"], end="")
sys.exit(told["code"] if option == "--query-gpu" else told["code_of_rows"])
"""
GPU = {
    "index": "0",
    "name": "NVIDIA H100 80GB HBM3",
    "ecc.errors.uncorrected.volatile.total": "0",
    "ecc.mode.current": "Enabled",
    "mig.mode.current": "Disabled",
    "gpu_recovery_action": "None",
}
ROW = {"gpu_bus_id": "00000000:3B:00.0", "remapped_rows.pending": "0", "remapped_rows.failure": "0"}
ERRORS = "ecc.errors.uncorrected.volatile.total"
LOST = "Unable to determine the device handle for GPU 0000:3B:00.0: GPU is lost.  Reboot the system to recover this GPU"
INFOROM = "WARNING: infoROM is corrupted at gpu 0000:3B:00.0"
LISTED = """GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-5c8b8b28-51b2-4a55-a05c-81ac535f3f49)
  MIG 1g.5gb      Device  0: (UUID: MIG-26ad6681-e2a5-5f1e-b346-84af180d02f1)
  MIG 1g.5gb      Device  1: (UUID: MIG-57d90b34-9d15-5ba7-a0a4-4a4ef2c8f0d0)"""


@pytest.fixture(autouse=True)
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")


def write_smi(folder: Path, text: str) -> None:
    (folder / "nvidia-smi").write_text(text)
    (folder / "nvidia-smi").chmod(0o755)


def found(folder: Path, wanted: int = 1, **told: Any) -> tuple[list[str], list[str]]:
    """Return problems and warnings of a nvidia-smi that tells this, and refuses fields as the real one does."""
    defaults = {"gpus": [GPU], "rows": [ROW], "unknown": [], "end": "", "code": 0, "code_of_rows": 0, "list": ""}
    write_smi(folder, SMI.format(python=sys.executable, told=json.dumps(defaults | told)))
    facts = facts_of_gpus(wanted)
    return facts.problems, facts.warnings


@pytest.mark.parametrize(
    ("values", "problem", "warning"),
    [
        ({}, "", ""),
        ({ERRORS: "[N/A]", "ecc.mode.current": "[N/A]", "gpu_recovery_action": "[N/A]", "mig.mode.current": "[N/A]"}, "", ""),
        ({ERRORS: "3"}, "GPU 0 has 3 uncorrected ECC errors since the driver was loaded", ""),
        ({ERRORS: "[N/A]", "ecc.mode.current": "Disabled"}, "", "GPU 0 has ECC disabled"),
        ({ERRORS: "[N/A]"}, "", "the ECC errors of GPU 0 cannot be read: nvidia-smi says '[N/A]'"),
        ({ERRORS: "[Insufficient Permissions]"}, "", "cannot be read: nvidia-smi says '[Insufficient Permissions]'"),
        ({ERRORS: "[Unknown Error]", "name": "[Unknown Error]"}, "GPU 0 does not work", ""),
        ({ERRORS: "[GPU requires reset]"}, "GPU 0 does not work", ""),
        ({ERRORS: "[GPU is lost]"}, "GPU 0 does not work", ""),
        ({"gpu_recovery_action": "Drain and Reset"}, "GPU 0 needs 'Drain and Reset' before new work, says its driver", ""),
        ({"gpu_recovery_action": "Reboot"}, "GPU 0 needs 'Reboot'", ""),
    ],
)
def test_values_of_a_gpu(tmp_path: Path, values: dict[str, str], problem: str, warning: str) -> None:
    problems, warnings = found(tmp_path, gpus=[{**GPU, **values}])
    assert (len(problems), len(warnings)) == (bool(problem), bool(warning)), (problems, warnings)
    assert problem in "".join(problems)
    assert warning in "".join(warnings)


@pytest.mark.parametrize(
    ("values", "problem", "warning"),
    [
        ({"remapped_rows.pending": "1"}, "GPU 00000000:3B:00.0: replacing a row of memory is pending, so it needs a reset", ""),
        ({"remapped_rows.pending": "Yes"}, "is pending", ""),
        ({"remapped_rows.failure": "Yes", "remapped_rows.pending": "No"}, "replacing a row of memory has failed", ""),
        ({"remapped_rows.failure": "[N/A]", "remapped_rows.pending": "[N/A]"}, "", ""),
        ({"remapped_rows.failure": "maybe"}, "", "nvidia-smi says 'maybe' for remapped_rows.failure"),
    ],
)
def test_rows_of_memory(tmp_path: Path, values: dict[str, str], problem: str, warning: str) -> None:
    problems, warnings = found(tmp_path, rows=[{**ROW, **values}])
    assert (len(problems), len(warnings)) == (bool(problem), bool(warning)), (problems, warnings)
    assert problem in "".join(problems)
    assert warning in "".join(warnings)


def test_fields_that_nvidia_smi_does_not_know_are_named_and_the_others_are_checked(tmp_path: Path) -> None:
    unknown = ["gpu_recovery_action", "mig.mode.current", "remapped_rows.failure"]
    problems, warnings = found(
        tmp_path, gpus=[{**GPU, ERRORS: "3"}], rows=[{**ROW, "remapped_rows.pending": "1"}], unknown=unknown
    )
    assert [problem.partition(":")[0] for problem in problems] == [
        "GPU 0 has 3 uncorrected ECC errors since the driver was loaded",
        "GPU 00000000",
    ]
    assert sorted(warnings) == [f"this nvidia-smi does not know the field {name}, so it was not checked" for name in unknown]


def test_query_that_is_refused_without_a_name_is_a_problem(tmp_path: Path) -> None:
    problems, _ = found(tmp_path, unknown=["index"])
    assert problems[0] == 'nvidia-smi ended with 2: Field "index" is not a valid field to query.'


@pytest.mark.parametrize(
    ("told", "problems"),
    [
        (
            {"gpus": [], "rows": [], "end": "No devices were found\n", "code": 6},
            ["ended with 6: No devices were found", "lists 0"],
        ),
        ({"gpus": [], "rows": [], "end": "No devices were found\n"}, ["2 GPUs are wanted, but nvidia-smi lists 0"]),
        ({"end": f"{LOST}\n", "code": 15}, [f"nvidia-smi ended with 15: {LOST}", "2 GPUs are wanted, but nvidia-smi lists 1"]),
        ({"end": f"{LOST}\n", "gpus": [GPU, GPU], "rows": [ROW, ROW]}, [f"nvidia-smi says {LOST!r}"]),
        ({"end": f"{INFOROM}\n", "gpus": [GPU, GPU], "rows": [ROW, ROW], "code": 14}, [f"nvidia-smi ended with 14: {INFOROM}"]),
    ],
)
def test_what_nvidia_smi_says_beside_the_rows(tmp_path: Path, told: dict[str, Any], problems: list[str]) -> None:
    """Two GPUs are wanted. The text of an error may follow the rows of healthy GPUs."""
    given, _ = found(tmp_path, 2, **told)
    assert len(given) == len(problems), given
    assert all(part in whole for part, whole in zip(problems, given, strict=True)), given


@pytest.mark.parametrize(("code", "is_problem"), [(2, False), (3, False), (9, True), (255, True)])
def test_query_of_rows_that_fails_is_never_silent(tmp_path: Path, code: int, is_problem: bool) -> None:
    problems, warnings = found(tmp_path, rows=[], code_of_rows=code)
    assert (len(problems), len(warnings)) == (is_problem, not is_problem)
    assert warnings == ([] if is_problem else ["replaced rows of memory were checked on 0 of 1 GPUs"])


@pytest.mark.parametrize(("wanted", "problems"), [(2, 0), (3, 1)])
def test_devices_of_a_gpu_in_mig_mode_are_counted_and_named(tmp_path: Path, wanted: int, problems: int) -> None:
    divided = {**GPU, "mig.mode.current": "Enabled", ERRORS: "[Insufficient Permissions]"}
    given, warnings = found(tmp_path, wanted, gpus=[divided], list=LISTED)
    assert given == ["3 GPUs are wanted, but nvidia-smi -L lists 2 GPUs and MIG devices"][:problems]
    assert warnings[0].startswith("GPU 0 in MIG mode: its errors are not all visible")


def test_nvidia_smi_that_hangs_is_a_problem_and_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_gpus, "SMI_SECONDS", 0.3)
    write_smi(tmp_path, "#!/bin/bash\nexec sleep 60\n")
    begin = time.monotonic()
    assert facts_of_gpus(8).problems == ["nvidia-smi did not answer in 0.3 s"]
    assert time.monotonic() - begin < 5


def test_nvidia_smi_that_cannot_start_or_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_smi(tmp_path, "#!/no/such/program\n")
    assert facts_of_gpus(1).problems == ["nvidia-smi cannot be started: No such file or directory"]
    monkeypatch.setenv("PATH", "/nowhere")
    assert facts_of_gpus(1).problems == ["1 GPUs are wanted, but there is no nvidia-smi"]
    assert facts_of_gpus(0).warnings == []


def test_gpus_that_nobody_asked_for_are_not_called_healthy(tmp_path: Path) -> None:
    assert found(tmp_path, 0) == ([], ["it has nvidia-smi, but its GPUs were not checked: --gpus N checks them"])
