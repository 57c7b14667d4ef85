"""Fetch the newest whole checkpoint of a mirror into a run folder without checkpoints, with the other files of the run.

The first rank fetches, before there is a process group, and the others wait for its result. A fetch that was killed resumes with the
next start: files that have arrived whole are not read again, and the checkpoint gets its name last.
"""

import json
import logging
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_ledom.checkpoint.folder import PART, latest_checkpoint, put_in_place
from megatron_ledom.checkpoint.manifest import MANIFEST, CheckpointManifest, load_manifest
from megatron_ledom.config.derived import checkpoint_folder
from megatron_ledom.config.schema import RunConfig
from megatron_ledom.errors import DataError
from megatron_ledom.mirror.contents import (
    FETCH_NOTE,
    RUN_FILES,
    RUN_FOLDER,
    Claim,
    abandoned_copies,
    checked_sums,
    end_fetch,
    folder_of,
    launches_with,
    read_latest,
    read_sums,
    whole_checkpoints,
)
from megatron_ledom.mirror.store import MirrorStore, address_of
from megatron_ledom.storage.files import publish, sync, write_synced, write_whole
from megatron_ledom.storage.hashes import FileSums, checksum

log = logging.getLogger(__name__)

FILES_AT_ONCE = 4
FETCHED = "fetched.part"
"""Folder of the run's files until they are whole."""
POLL_SECONDS, ASK_SECONDS = 0.5, 60.0
GIB = 1 << 30


def fetch_newest(config: RunConfig) -> None:
    """Fetch the newest whole checkpoint, unless the run folder has one or the mirror has none. Call it with the lock of the run.

    A damaged one is logged, and the next older one is fetched. Raises DataError if all are damaged, TransientError if the mirror does
    not answer: the run must not start again at 0 for that reason.
    """
    folder, store, claim = checkpoint_folder(config), MirrorStore(address_of(config)), Claim.of(config)
    if latest_checkpoint(folder) is not None:
        end_fetch(config.run_dir)
        return
    store.patient(lambda: claim.check(store, may_adopt=True))
    candidates = candidates_of(store)
    if not candidates:
        log.warning("the mirror %s has no checkpoint: the run starts from its beginning", store.address)
        return
    for name in candidates:
        started = time.monotonic()
        try:
            num_bytes = _fetch(store, config.run_dir, folder, name)
        except DataError as error:
            log.error("%s of the mirror %s is damaged: %s; the next older one is taken", name, store.address, error)
            continue
        seconds = time.monotonic() - started
        log.info("fetched %s from %s (%.2f GiB in %.1f s)", name, store.address, num_bytes / GIB, seconds)
        return
    raise DataError(
        f"{folder} has no checkpoint, and all of the mirror {store.address} are damaged ({', '.join(candidates)}): restore one, or set"
        " another run_dir and checkpoint.mirror for a new run"
    )


def candidates_of(store: MirrorStore) -> list[str]:
    """Return the names of the whole checkpoints that count, newest first. Raises DataError if all of them are gone.

    Those of a branch that the run has abandoned do not count; the launches that came with the newest one tell.
    """
    latest = store.patient(lambda: read_latest(store))
    whole = store.patient(lambda: whole_checkpoints(store))
    whole = {iteration: name for iteration, name in whole.items() if latest is None or iteration <= latest}
    if whole:
        launches = store.patient(lambda: launches_with(store, whole[max(whole)]))
        others = store.patient(lambda: abandoned_copies(store, whole, launches))
        if others:
            log.warning(
                "the mirror %s has %s of a branch that the run has abandoned",
                store.address,
                ", ".join(whole[one] for one in others),
            )
        whole = {iteration: name for iteration, name in whole.items() if iteration not in others}
    counted = [*reversed(whole.values())]
    if latest is not None and not counted:
        raise DataError(
            f"the mirror {store.address} had checkpoints up to iteration {latest}, but has no whole one any more: restore one, or set"
            " another checkpoint.mirror for a new run"
        )
    return counted


def wait_for_fetch(config: RunConfig) -> None:
    """Wait on another rank until the first one has fetched a checkpoint, if there is any to fetch.

    The launcher ends this rank if the first one fails.
    """
    folder, store = checkpoint_folder(config), MirrorStore(address_of(config))
    asked = -ASK_SECONDS
    while latest_checkpoint(folder) is None:
        if time.monotonic() - asked >= ASK_SECONDS:
            asked = time.monotonic()
            if not candidates_of(store):
                return
        time.sleep(POLL_SECONDS)


def _fetch(store: MirrorStore, run_dir: str, folder: str, name: str) -> int:
    """Fetch and verify one checkpoint and the files of the run, then put them in place. Returns the bytes of the checkpoint."""
    part, there = os.path.join(folder, name + PART), folder_of(name)
    os.makedirs(part, exist_ok=True)
    write_synced(os.path.join(part, MANIFEST), _read(store, f"{there}/{MANIFEST}"))
    files = _files_of(load_manifest(part), f"{store.address}/{there}/{MANIFEST}")
    num_bytes: int = sum(sums["bytes"] for sums in files.values())
    there_already = sum(found.stat().st_size for found in Path(part).iterdir() if found.name in files)
    free = shutil.disk_usage(part).free + there_already
    if num_bytes > free:
        raise OSError(28, f"{name} of the mirror needs {num_bytes / GIB:.1f} GiB, {free / GIB:.1f} GiB are free", folder)
    run_sums = read_sums(_read(store, f"{there}/{RUN_FILES}"), f"{store.address}/{there}/{RUN_FILES}")
    wanted = {file: (f"{there}/{file}", os.path.join(part, file), sums) for file, sums in files.items()}
    fetched = os.path.join(run_dir, FETCHED)
    shutil.rmtree(fetched, ignore_errors=True)
    for file, sums in _absent(run_dir, run_sums).items():
        os.makedirs(os.path.dirname(os.path.join(fetched, file)), exist_ok=True)
        wanted[f"{RUN_FOLDER}/{file}"] = f"{there}/{RUN_FOLDER}/{file}", os.path.join(fetched, file), sums
    _fetch_files(store, wanted, name)
    for left in set(os.listdir(part)) - {MANIFEST, *files}:
        os.unlink(os.path.join(part, left))
    sync(part)
    _place_run_files(run_dir, fetched, _absent(run_dir, run_sums))
    put_in_place(folder, name)
    end_fetch(run_dir)
    return num_bytes


def _files_of(manifest: CheckpointManifest, where: str) -> FileSums:
    """Return the files of a checkpoint on the mirror. Raises DataError for a list of another form."""
    try:
        return checked_sums(manifest.files, where)
    except (AttributeError, KeyError, TypeError) as error:
        raise DataError(f"{where} has no list of files with size and sha256") from error


def _read(store: MirrorStore, name: str) -> bytes:
    content = store.patient(lambda: store.read(name))
    if content is None:
        raise DataError(f"{store.address}/{name} is missing")
    return content


def _absent(run_dir: str, sums: FileSums) -> FileSums:
    """Return the files that the run folder lacks, or has from an unfinished fetch. Its own files are newer than those of the mirror."""
    try:
        placed = json.loads(Path(run_dir, FETCH_NOTE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        placed = []
    return {file: one for file, one in sums.items() if file in placed or not os.path.exists(os.path.join(run_dir, file))}


def _place_run_files(run_dir: str, fetched: str, files: FileSums) -> None:
    """Move the files of the run into its folder, after a note of their names for the case of a kill."""
    write_whole(os.path.join(run_dir, FETCH_NOTE), json.dumps(sorted(files)).encode())
    for file in files:
        os.makedirs(os.path.dirname(os.path.join(run_dir, file)), exist_ok=True)
        publish(os.path.join(fetched, file), os.path.join(run_dir, file))
    shutil.rmtree(fetched, ignore_errors=True)


def _fetch_files(store: MirrorStore, wanted: dict[str, tuple[str, str, dict[str, object]]], name: str) -> None:
    """Fetch several files at a time and compare them with their sha256. The first error ends the others."""
    is_stopping, count, reported = threading.Event(), 0, time.monotonic()

    def fetch(source: str, target: str, sums: dict[str, object]) -> None:
        """Fetch one file, unless it is there."""
        if os.path.exists(target) and checksum(target) == sums:
            return
        digest = store.patient(lambda: store.get(source, target, is_stopping))
        if digest != sums["sha256"]:
            os.unlink(target)
            raise DataError(f"{store.address}/{source} does not have the sha256 of its manifest")

    with ThreadPoolExecutor(FILES_AT_ONCE) as threads:
        try:
            for result in [threads.submit(fetch, *one) for one in wanted.values()]:
                result.result()
                count += 1
                if time.monotonic() - reported > ASK_SECONDS:
                    reported = time.monotonic()
                    log.info("fetching %s: %d of %d files", name, count, len(wanted))
        except BaseException:
            is_stopping.set()
            threads.shutdown(wait=False, cancel_futures=True)
            raise
