"""Checks that pass, fail, hang, crash and write rubbish, for the tests of the runner."""

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path
from threading import Event

from megatron_ledom.errors import MismatchError
from megatron_ledom.hardware_check.check import Check, Outcome, Setting, failed, passed, skipped

CHILD = "import threading; threading.Event().wait(600)"


def catalogue(*names: str) -> list[Check]:
    """Return the check `machine`, with a large share for slow machines, and those of other functions of this module."""
    shares = {"machine": 10.0, **dict.fromkeys(names, 1.0)}
    return [Check(name, f"The planted check {name}.", share, f"{__name__}:{name}") for name, share in shares.items()]


def machine(setting: Setting) -> Outcome:
    return passed(device="cpu", ranks=setting.num_gpus or 2)


def no_machine(setting: Setting) -> Outcome:
    return failed("the driver does not answer")


def good(setting: Setting) -> Outcome:
    Path(setting.folder, "kept").write_text("kept")
    return passed("all is well", num_gpus=setting.num_gpus, device=setting.device, speed=float("nan"), parts=[1, float("inf")])


def missing(setting: Setting) -> Outcome:
    return skipped("there is no such device")


def wrong(setting: Setting) -> Outcome:
    print("the losses follow")
    return failed("the losses differ by 3.0", loss_difference=3.0)


def refuses(setting: Setting) -> Outcome:
    raise MismatchError(f"{setting.folder}/shard has another direction")


def breaks(setting: Setting) -> Outcome:
    raise ZeroDivisionError("no tokens")


def hangs(setting: Setting) -> Outcome:
    """Hang together with a child in a session of its own, as a rank of torchrun has."""
    child = subprocess.Popen([sys.executable, "-c", CHILD], start_new_session=True)
    Path(setting.folder, "child").write_text(str(child.pid))
    Event().wait(600)
    return passed()


def leaves_a_child(setting: Setting) -> Outcome:
    child = subprocess.Popen([sys.executable, "-c", CHILD], start_new_session=True)
    Path(setting.folder, "child").write_text(str(child.pid))
    return passed()


def crashes(setting: Setting) -> Outcome:
    ctypes.string_at(0)
    return passed()


def is_killed(setting: Setting) -> Outcome:
    os.kill(os.getpid(), signal.SIGKILL)
    return passed()


def exits(setting: Setting) -> Outcome:
    os._exit(0)


def returns_nothing(setting: Setting) -> Outcome:
    return None  # type: ignore[return-value]


def writes_rubbish(setting: Setting) -> Outcome:
    """Write bytes that are neither text nor JSON to the log and in place of the outcome."""
    os.write(1, b"\xff\xfe\x1b[2J\n")
    Path(setting.folder).parent.joinpath("outcome.json").write_bytes(b'{"status": "passed"\xff')
    os._exit(0)


def crashes_at_its_end(setting: Setting) -> Outcome:
    import atexit

    atexit.register(os.kill, os.getpid(), signal.SIGABRT)
    return passed("all is well")


def tells_of_its_machine(setting: Setting) -> Outcome:
    import getpass
    import socket

    raise RuntimeError(f"{socket.gethostname()} of {getpass.getuser()} cannot read /data/own/secret/shard.bin")


def sees_no_launcher(setting: Setting) -> Outcome:
    return passed(variables=sorted(name for name in os.environ if name.startswith("SLURM_") or name == "RANK"))


def multiplies_in_fp32(setting: Setting) -> Outcome:
    import torch

    return passed(tf32=torch.backends.cuda.matmul.allow_tf32, cublas=os.environ["NVIDIA_TF32_OVERRIDE"])


def imported_slowly(setting: Setting) -> Outcome:
    """Return the time that is left; a test plants an import that takes PLANTED_IMPORT_SECONDS."""
    return passed(left=setting.seconds)


Event().wait(float(os.environ.get("PLANTED_IMPORT_SECONDS", "0")))
