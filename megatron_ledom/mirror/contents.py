"""The contents of a mirror, and the run that it belongs to.

run.json                              the run: its id, and the settings that cannot change
owner.json                            the launch that writes to the mirror
latest                                the name of the newest checkpoint; later ones do not count, the run was set back
checkpoints/iter_0001000/             the files of a checkpoint, `manifest.json` last: without it the copy is not whole
checkpoints/iter_0001000/run/         other files of the run folder at that time
checkpoints/iter_0001000/run_files.json   their sizes and sha256
"""

import hashlib
import json
import logging
import os
import re
import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import PurePosixPath
from queue import Empty, Queue
from threading import Thread
from typing import Any

from megatron_ledom.checkpoint.branches import abandoned
from megatron_ledom.checkpoint.folder import NAME, saved_iteration
from megatron_ledom.checkpoint.manifest import ARCHITECTURE_KEYS, MANIFEST
from megatron_ledom.config.derived import checkpoint_folder
from megatron_ledom.config.load import to_dict
from megatron_ledom.config.schema import RunConfig
from megatron_ledom.data.readers.remote import described, root_of
from megatron_ledom.errors import DataError, LedomError, MismatchError
from megatron_ledom.mirror.store import KEY, MirrorStore, address_of
from megatron_ledom.storage.files import withdraw, write_whole
from megatron_ledom.storage.hashes import FileSums
from megatron_ledom.storage.jobs import differences
from megatron_ledom.storage.locks import this_process
from megatron_ledom.storage.records import BAD_STEPS, LAUNCHES, METRICS, SAVES, STEPS, Record

log = logging.getLogger(__name__)

RUN, OWNER, LATEST, CHECKPOINTS = "run.json", "owner.json", "latest", "checkpoints"
RUN_FOLDER, RUN_FILES = "run", "run_files.json"
OWN_HASH = "sha256_of_the_rest"
SHA256 = re.compile("[0-9a-f]{64}")
LOCAL_ID = "mirror_run_id"
"""File of the run folder with the id of the run."""
ANSWER_SECONDS = 60.0
COPIED = (
    *(METRICS, STEPS, BAD_STEPS, LAUNCHES, SAVES),
    *(
        "config.yaml",
        "init_from.json",
        "skip_iterations.json",
        "held_out.json",
        "data_changes.jsonl",
        "wandb_run_id",
        "tracking_id",
    ),
)
"""Files of the run folder that are copied with each checkpoint, if they exist."""
FETCH_NOTE = "fetch.json"
"""File of the run folder that lists what an unfinished fetch puts into it."""
COPIED_FOLDERS = ("tokenizer",)


def folder_of(name: str) -> str:
    """Return the folder of a checkpoint on the mirror."""
    return f"{CHECKPOINTS}/{name}"


def whole_checkpoints(store: MirrorStore) -> dict[int, str]:
    """Return iteration -> name of every checkpoint on the mirror that is whole, in order."""
    names = [name for name in store.names(CHECKPOINTS) if NAME.fullmatch(name)]
    whole = [name for name in names if store.exists(f"{folder_of(name)}/{MANIFEST}")]
    return {number(name): name for name in sorted(whole, key=number)}


def unfinished_checkpoints(store: MirrorStore, whole: dict[int, str]) -> list[str]:
    """Return the names of the copies that a kill interrupted."""
    return [name for name in store.names(CHECKPOINTS) if NAME.fullmatch(name) and number(name) not in whole]


def abandoned_copies(store: MirrorStore, whole: dict[int, str], launches: Sequence[Record]) -> list[int]:
    """Return the iterations of the whole copies of a branch that the run has abandoned, by the records of its launches."""

    def created_at(iteration: int) -> str | None:
        """Return the time in the manifest of a copy; None without one."""
        try:
            value = (_read_object(store, f"{folder_of(whole[iteration])}/{MANIFEST}") or {}).get("created_at")
        except DataError:
            return None
        return value if isinstance(value, str) else None

    return abandoned(launches, whole, created_at)


def launches_with(store: MirrorStore, name: str) -> list[Record]:
    """Return the records of launches.jsonl that were copied with a checkpoint, without those that are damaged."""
    found = []
    for line in (store.read(f"{folder_of(name)}/{RUN_FOLDER}/{LAUNCHES}") or b"").splitlines():
        with suppress(ValueError, RecursionError):
            record = json.loads(line)
            found += [record] if isinstance(record, dict) else []
    return found


def number(name: str) -> int:
    """Return the iteration of a checkpoint by its name."""
    return int(name.removeprefix("iter_"))


def read_latest(store: MirrorStore) -> int | None:
    """Return the iteration of the newest checkpoint that counts; None before the first one is whole. Raises DataError."""
    content = store.read(LATEST)
    if content is None:
        return None
    name = content.decode(errors="replace").strip()
    if not NAME.fullmatch(name):
        raise DataError(
            f"{store.address}/{LATEST} has {name[:100]!r}, not the name of a checkpoint; write the name of one into it"
        )
    return number(name)


def write_latest(store: MirrorStore, name: str) -> None:
    """Let `latest` name a checkpoint."""
    store.write(LATEST, f"{name}\n".encode())


def sums_text(files: FileSums) -> bytes:
    """Return the content of `run_files.json`, with its own hash."""
    return json.dumps({"files": files, OWN_HASH: _hash(files)}, indent=1).encode()


def read_sums(content: bytes, where: str) -> FileSums:
    """Return the sizes and hashes in `run_files.json`. Raises DataError if it is damaged."""
    try:
        values = json.loads(content)
        files: FileSums = values["files"]
        if values[OWN_HASH] == _hash(files):
            return checked_sums(files, where)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass
    raise DataError(f"{where} is damaged")


def checked_sums(files: FileSums, where: str) -> FileSums:
    """Return the sizes and hashes of files on the mirror. Raises DataError for another form, and for a name outside of its folder:
    whoever can write to the mirror must not be able to write anywhere else on this machine."""
    for name, sums in files.items():
        path = PurePosixPath(name)
        is_inside = path.parts and not path.is_absolute() and ".." not in path.parts and str(path) == name
        if not is_inside or "\\" in name or "\0" in name:
            raise DataError(f"{where} names the file {name!a}, which is not inside its folder")
        if type(sums["bytes"]) is not int or sums["bytes"] < 0 or not SHA256.fullmatch(sums["sha256"]):
            raise DataError(f"{where} has no size and sha256 of {name!a}")
    return files


def _hash(files: FileSums) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def identity_of(config: RunConfig) -> dict[str, Any]:
    """Return the settings that tell one run from another, by their keys."""
    values = to_dict(config)
    return {
        "run_dir": config.run_dir,
        "data.direction": values["data"]["direction"],
        "data.seq_length": config.data.seq_length,
        "train.seed": config.train.seed,
        **{f"model.{key}": values["model"][key] for key in ARCHITECTURE_KEYS},
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """The right of one launch to write to the mirror."""

    run_dir: str
    identity: dict[str, Any]
    launch: str
    """A random name of the launch."""

    @classmethod
    def of(cls, config: RunConfig) -> "Claim":
        """Return the claim of a new launch."""
        return cls(run_dir=os.path.abspath(config.run_dir), identity=identity_of(config), launch=secrets.token_hex(8))

    def check(self, store: MirrorStore, *, may_adopt: bool) -> None:
        """Raise MismatchError if the mirror belongs to another run; a mirror without a run becomes this one's.

        may_adopt: the run folder has no checkpoint, so it may continue a run of equal settings whose id it does not have.
        """
        mine, theirs = self._own_id(), _read_object(store, RUN)
        if theirs is None:
            if mine is not None:
                log.warning(
                    "%s=%s has had this run, and has no %s any more: is its disk mounted, its address right? It is filled again from now on",
                    *(KEY, store.address, RUN),
                )
            mine = mine or secrets.token_hex(16)
            self._keep(mine)
            made = {"format_version": 1, "run_id": mine, "identity": self.identity, "created_at": _now()}
            store.write(RUN, json.dumps(made, indent=1).encode())
            theirs = _read_object(store, RUN) or {}
        if theirs.get("run_id") == mine:
            return
        changed = differences(theirs.get("identity", {}), self.identity)
        if mine is None and may_adopt and not changed:
            self._keep(str(theirs.get("run_id")))
            return
        found = "; ".join(changed) or f"this run folder has {'another id' if mine else 'checkpoints, but not its id'}"
        raise MismatchError(
            f"{KEY}={store.address} belongs to another run ({found}): two runs would replace each other's checkpoints. Set another"
            f" {KEY}. If it is the same run, and no other launch continues it: echo {theirs.get('run_id')} >"
            f" {os.path.join(self.run_dir, LOCAL_ID)}"
        )

    def take(self, store: MirrorStore) -> None:
        """Let this launch be the one that writes; the launch before it then stops writing."""
        store.write(OWNER, json.dumps({"launch": self.launch, "by": this_process()}, indent=1).encode())

    def check_owner(self, store: MirrorStore) -> None:
        """Raise MismatchError if a later launch of the run, on another machine, writes to the mirror."""
        owner = _read_object(store, OWNER) or {}
        if owner.get("launch") != self.launch:
            raise MismatchError(
                f"{KEY}={store.address} is written by another launch of this run ({owner.get('by', 'unknown')}), on a copy of the run"
                " folder; this launch copies nothing more. Stop one of the two"
            )

    def _own_id(self) -> str | None:
        try:
            with open(os.path.join(self.run_dir, LOCAL_ID), encoding="utf-8") as file:
                return file.read().strip() or None
        except FileNotFoundError:
            return None

    def _keep(self, run_id: str) -> None:
        os.makedirs(self.run_dir, exist_ok=True)
        write_whole(os.path.join(self.run_dir, LOCAL_ID), f"{run_id}\n".encode())


def end_fetch(run_dir: str) -> None:
    """Remove the note of a fetch, whose checkpoint is in place."""
    if os.path.exists(os.path.join(run_dir, FETCH_NOTE)):
        withdraw(os.path.join(run_dir, FETCH_NOTE))


def check_mirror(config: RunConfig, *, may_adopt: bool) -> None:
    """Raise MismatchError if the mirror of the config, if any, belongs to another run. Warn if it does not answer, or has more.

    A mirror that does not answer within ANSWER_SECONDS is asked again by the process that copies.
    """
    if config.checkpoint.mirror is None:
        return
    if not may_adopt:
        end_fetch(config.run_dir)  # it was killed after it had put the checkpoint in place
    store, answer = MirrorStore(address_of(config)), Queue[BaseException | int | None]()

    def ask() -> None:
        """Put the iteration of the latest checkpoint, or the error, into `answer`."""
        try:
            Claim.of(config).check(store, may_adopt=may_adopt)
            answer.put(read_latest(store))
        except Exception as error:
            answer.put(error)

    Thread(target=ask, name="mirror", daemon=True).start()
    try:
        found = answer.get(timeout=ANSWER_SECONDS)
    except Empty:
        found = TimeoutError(f"no answer within {ANSWER_SECONDS:.0f} s")
    if isinstance(found, LedomError):
        raise found
    if isinstance(found, BaseException):
        log.warning("the mirror %s does not answer (%s): training starts without it", store.address, described(root_of(found)))
        return
    saved = saved_iteration(checkpoint_folder(config))
    if found is not None and saved < found:
        log.warning(
            "the mirror %s has checkpoints up to iteration %d, after iteration %d from which the run resumes, as `latest` in the run"
            " folder says; the run will replace them: copy those you want to keep",
            *(store.address, found, saved),
        )


def _read_object(store: MirrorStore, name: str) -> dict[str, Any] | None:
    """Return the JSON object of a file; None if it does not exist. Raises DataError."""
    content = store.read(name)
    if content is None:
        return None
    try:
        values = json.loads(content)
        if isinstance(values, dict):
            return values
    except (ValueError, RecursionError):
        pass
    raise DataError(f"{store.address}/{name} is damaged: restore it, or set another {KEY}")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
