"""Verdicts of ledom check-nodes on the kernel's log and on folders. The lines are those of the driver's source and of util-linux's dmesg."""

import os
from datetime import UTC, datetime
from pathlib import Path

import pytest

from megatron_ledom.hardware_check.node_facts import facts_of_folders, facts_of_kernel_log, problems_of_kernel_log

NOW = datetime(2026, 3, 2, 12, tzinfo=UTC)
WHEN = "2026-03-02T11:00:00,500000+00:00"
LINK = "XC0 i0 Link 01 (0x021425c6 0x00000000 0x00000000 0x00000000 0x00000000 0x00000000)"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (
            f"{WHEN} NVRM: Xid (PCI:0000:3b:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.",
            "3b:00 had Xid 79",
        ),
        (f"{WHEN} NVRM: Xid (PCI:0000:3b:00 GPU-I:01): 95, pid=7, name=python, x", "GPU 0000:3b:00 had Xid 95"),
        (f"{WHEN} NVRM: Xid (PCI:0000:3b:00 GPU-I:01 GPU-CI:00): 48, pid=7, name=python, x", "GPU 0000:3b:00 had Xid 48"),
        (f"{WHEN} NVRM: Xid (PCI:000d:00:00): 140, pid=7, name=python, x", "GPU 000d:00:00 had Xid 140"),
        (
            f"{WHEN} NVRM: Xid (PCI:0009:01:00): 149, NETIR_LINK_EVT  Fatal   {LINK}",
            "had Xid 149 at " + WHEN + ": fatal NVLink",
        ),
        (f"{WHEN} NVRM: Xid (PCI:0009:01:00): 145, RLW_SRC_TRACK Nonfatal {LINK}", None),
        ("2026-03-02T11:00:00,500000+0000 NVRM: Xid (PCI:0000:3b:00): 79, x", "had Xid 79"),  # older util-linux
        ("2026-03-01T11:00:00,500000+00:00 NVRM: Xid (PCI:0000:3b:00): 79, x", None),  # older than a day
        ("[Mon_Mar_2] NVRM: Xid (PCI:0000:3b:00): 79, x", "had Xid 79 at [Mon_Mar_2]"),  # a time that cannot be read
        *(
            (f"{WHEN} NVRM: Xid (PCI:0000:3b:00): {xid}, pid=7, name=python, x", None)
            for xid in (13, 31, 43, 45, 63, 94, 109, 154)
        ),
    ],
)
def test_xids_of_the_hardware(line: str, says: str | None) -> None:
    problems = problems_of_kernel_log(f"{WHEN} Linux version 6\n{line}\n", NOW)
    assert len(problems) == (says is not None)
    assert (says or "") in "".join(problems)


@pytest.mark.parametrize(
    ("script", "says"),
    [
        (
            "echo 'dmesg: read kernel buffer failed: Operation not permitted' >&2; exit 1",
            "(dmesg: read kernel buffer failed: Operation",
        ),
        ("exit 1", "(dmesg ended with 1)"),
        (None, "(dmesg cannot be started: No such file or directory)"),
    ],
)
def test_log_that_cannot_be_read_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, says: str
) -> None:
    if script:
        (tmp_path / "dmesg").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "dmesg").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    facts = facts_of_kernel_log(NOW)
    assert (facts.problems, len(facts.warnings)) == ([], 1)
    assert says in facts.warnings[0]


def test_folder_that_does_not_exist_yet_is_checked_where_it_will_be(tmp_path: Path) -> None:
    new = f"{tmp_path}/runs/new"
    facts = facts_of_folders([new], 0.0)
    assert (facts.problems, facts.absent, facts.warnings) == ([], [new], [])
    assert facts_of_folders([new], 1e9).problems[0].startswith(f"{new} has ")
    assert list(tmp_path.iterdir()) == []


def test_folders_that_cannot_be_made_are_problems(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("/not/mounted")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    names = ("file", "file/below", "link/run", "loop/run")
    problems = facts_of_folders([f"{tmp_path}/{name}" for name in names], 0.0).problems
    assert [problem.rpartition(": ")[2] for problem in problems] == [
        "Not a directory (ENOTDIR)",
        "Not a directory (ENOTDIR)",
        f"{tmp_path}/link is a link to /not/mounted, which does not exist (ENOENT)",
        "Too many levels of symbolic links (ELOOP)",
    ]


def test_temporary_folder_that_does_not_exist_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", f"{tmp_path}/gone")
    facts = facts_of_folders([], 0.0)
    assert (facts.problems, facts.warnings) == ([], [f"its temporary folder {tmp_path}/gone does not exist"])
    assert facts.absent == [f"{tmp_path}/gone"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_folder_that_another_user_may_not_enter_is_a_problem(tmp_path: Path) -> None:
    """Python's Path.exists raises an error here, which ended the rank without a reason."""
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    os.seteuid(65534)
    try:
        problems = facts_of_folders([f"{closed}/run"], 0.0).problems
    finally:
        os.seteuid(0)
    assert problems == [f"{closed}/run cannot be written: Permission denied (EACCES)"]
