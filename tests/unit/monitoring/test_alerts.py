"""Alerts: one message for each event, whatever is killed or does not answer; secrets stay out of logs and files."""

import logging
import os
import re
import signal
import stat
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ledom.cli import alert
from megatron_ledom.errors import UsageError
from megatron_ledom.monitoring import alert_watch
from megatron_ledom.monitoring.alert_channels import Email, Webhook, open_channels, read_secret, smtp_server
from megatron_ledom.monitoring.alert_events import Event, Known, find_events, message
from megatron_ledom.monitoring.alert_state import load_state
from megatron_ledom.monitoring.alert_watch import Watcher
from megatron_ledom.monitoring.fields import Limits, RunStatus
from megatron_ledom.monitoring.problems import ProblemKind
from megatron_ledom.monitoring.runs import RunReader
from megatron_ledom.monitoring.state import State
from tests.support.alert_receivers import Hook, receiving, receiving_mail
from tests.support.heartbeats import write_heartbeat
from tests.support.tiny_runs import TinyData, start_ranks


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder whose heartbeat says that it runs."""
    folder = tmp_path / "runs/tiny"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("train: {train_iters: 9}\n")
    (folder / "metrics.jsonl").write_text('{"iteration": 7, "lm_loss": 2.5}\n')
    beat(folder)
    return folder


def beat(folder: Path, **changes: Any) -> None:
    write_heartbeat(folder / "heartbeat.json", **changes)


def watcher(run: Path, hook: Hook, form: str = "json", code: Path | None = None) -> Watcher:
    """Return a watcher with the state file beside the runs."""
    return Watcher(
        open_reader=lambda code: RunReader([], Limits(ended_with=code), stages={str(run): ""}),
        channels=[Webhook(f"{hook.address}/secret-path", form)],
        state=load_state(str(run.parent.parent / "state.json")),
        interval_seconds=60,
        end_seconds=3,
        exit_note=None if code is None else str(code),
    )


def look(watcher: Watcher) -> None:
    watcher.poll()
    watcher.deliver()


def status(state: State, **values: Any) -> RunStatus:
    found = RunStatus("runs/tiny", state=state, **{"bad_steps": 0, "launches": 1} | values)
    found.disk_free_bytes, found.disk_needed_bytes = values.get("disk_free_bytes", 100), 50
    if found.disk_free_bytes < 50:
        found.add(ProblemKind.DISK_LOW, "low")
    return found


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        ([status(State.RUNNING)] * 3, [[], [], []]),
        ([status(State.NEW), status(State.RUNNING), status(State.COMPLETE)] , [[], [], ["finished"]]),
        ([status(State.RUNNING), status(State.FAILED), status(State.LOST), status(State.RUNNING)], [[], ["failed"], [], ["recovered"]]),
        ([status(State.RUNNING), status(State.STALLED), status(State.FAILED)], [[], ["stalled"], ["failed"]]),
        ([status(State.RUNNING), status(State.STOPPED), status(State.QUEUED)], [[], ["stopped"], []]),
        ([status(State.RUNNING), status(State.RUNNING, launches=2)] * 1, [[], ["restarted"]]),
        ([status(State.LOST), status(State.LOST)], [["failed"], []]),
        ([status(State.STOPPED), status(State.RUNNING, launches=2)], [[], ["recovered"]]),
        ([status(State.RUNNING), *[status(State.UNREADABLE)] * 4], [[], [], [], ["unreadable"], []]),
        ([status(State.RUNNING), status(State.UNREADABLE), status(State.RUNNING), *[status(State.UNREADABLE)] * 2], [[]] * 5),
        ([status(State.RUNNING, disk_free_bytes=free) for free in (60, 49, 51, 49, 60, 40)],
         [[], ["disk_low"], [], [], ["disk_ok"], ["disk_low"]]),
        ([status(State.RUNNING, bad_steps=count) for count in (4, 4, 5, 9)], [[], [], ["spike"], []]),
        ([status(State.RUNNING, bad_steps=4), status(State.RUNNING, bad_steps=0), status(State.RUNNING, bad_steps=1)], [[], [], ["spike"]]),
    ],
)  # fmt: skip
def test_events_follow_from_changes_of_the_status(statuses: list[RunStatus], expected: list[list[str]]) -> None:
    known = Known()
    found = [[str(event) for event in find_events(known, each, 1000.0 + 60 * n)] for n, each in enumerate(statuses)]
    assert found == expected


def test_bad_steps_between_two_messages_are_counted_in_the_next() -> None:
    known, counts = Known(), []
    for number, bad_steps in enumerate((0, 2, 3, 7)):
        before, found = replace(known), status(State.RUNNING, bad_steps=bad_steps)
        at = 1000.0 + 400 * number
        counts += [message(event, found, before, at)["new_bad_steps"] for event in find_events(known, found, at)]
    assert counts == [2, 5]


def test_an_event_is_sent_once_also_by_a_watcher_that_is_started_again(run: Path) -> None:
    with receiving() as hook:
        first = watcher(run, hook)
        look(first)
        beat(run, state="failed", reason="ValueError: a weight is <!channel>")
        look(first)
        look(first)
        look(watcher(run, hook))
        beat(run, state="running")
        look(watcher(run, hook))
    assert [each["event"] for each in hook.messages] == ["failed", "recovered"]
    failed = hook.messages[0]
    assert failed["reason"] == "ValueError: a weight is <!channel>"
    assert (failed["run"], failed["name"], failed["host"], failed["iteration"]) == (str(run), "tiny", "elsewhere", 7)
    assert failed["train_iters"] == 9
    assert "secret-path" not in (run.parent.parent / "state.json").read_text()


def test_a_message_that_was_not_taken_is_sent_again_until_it_is(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(alert_watch, "FIRST_PAUSE_SECONDS", 0.01)
    caplog.set_level(logging.INFO)
    with receiving(statuses=[503, 302, 200]) as hook:
        first = watcher(run, hook)
        look(first)
        beat(run, state="failed", reason="disk")
        look(first)
        beat(run, state="complete")
        until(lambda: look(first) or len(hook.messages) == 4)
    assert [each["event"] for each in hook.messages] == ["failed", "failed", "failed", "finished"]
    assert len({each["id"] for each in hook.messages}) == 2
    assert "did not take a message (HTTP status 503" in caplog.text
    assert "secret-path" not in caplog.text


def test_a_message_that_is_refused_for_good_keeps_no_later_one(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    with receiving(statuses=[413, 200]) as hook:
        first = watcher(run, hook)
        look(first)
        beat(run, state="failed", reason="no such file: a\udcff")  # no UTF-8
        look(first)
        beat(run, state="complete")
        look(first)
    assert [each["event"] for each in hook.messages] == ["failed", "finished"]
    assert hook.messages[0]["reason"].endswith("a\udcff")
    assert "refuses a message for good (HTTP status 413" in caplog.text
    assert load_state(first.state.path).pending == []


def test_a_killed_watcher_leaves_what_it_has_not_sent_to_the_next(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    with receiving() as hook:
        pass  # nobody listens at this address any more
    first = watcher(run, hook)
    look(first)
    beat(run, state="failed", reason="disk")
    look(first)
    assert "ConnectError" in caplog.text
    with receiving(port=hook.port) as again:
        look(watcher(run, again))
    assert [each["event"] for each in again.messages] == ["failed"]
    assert load_state(first.state.path).pending == []


def test_a_damaged_state_file_is_moved_aside(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = run.parent / "state.json"
    path.write_text('{"version": 1, "runs"')
    assert load_state(str(path)).runs == {}
    assert "is damaged" in caplog.text
    assert path.with_name("state.json.damaged").exists()


def test_a_launch_that_fails_before_its_run_reports_anything_is_told(run: Path, tmp_path: Path) -> None:
    """The heartbeat is that of an earlier launch, which has saved and stopped."""
    beat(run, state="stopped", reason="the time limit")
    note = tmp_path / "note"
    with receiving() as hook:
        watching = watcher(run, hook, code=note)
        look(watching)
        note.write_text("1\nThe job ends\nand is not queued again\n")
        assert watching.watch()
        look(watcher(run, hook))  # the next start
    (failed,) = hook.messages
    assert (failed["event"], failed["reason"]) == ("failed", "the launch ended with code 1; see the log of the job")
    assert failed["note"] == "The job ends and is not queued again"


def test_slack_gets_escaped_text(run: Path) -> None:
    with receiving() as hook:
        watching = watcher(run, hook, "slack")
        look(watching)
        beat(run, state="failed", reason="ValueError: <!channel> & more")
        look(watching)
    (sent,) = hook.messages
    assert list(sent) == ["text"]
    assert "tiny FAILED. ValueError: &lt;!channel&gt; &amp; more. Iteration 7 of 9, loss 2.5000" in sent["text"]


def test_a_mail_has_the_fields_and_its_password_is_not_sent_without_tls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALERT_SMTP_USER", "me")
    monkeypatch.setenv("ALERT_SMTP_PASSWORD", "hidden")
    new = message(Event.STALLED, replace(status(State.STALLED, reason="no progress for 9 s"), iteration=3), Known(), 0.0)
    with receiving_mail() as server:
        plain = smtp_server(f"127.0.0.1:{server.port}", {})
        Email(["me@example.org", "you@example.org"], "ledom@example.org", plain).send(new)
        with pytest.raises(Exception, match="offers no TLS"):
            open_channels(None, "json", ["me@example.org"], None, f"127.0.0.1:{server.port}")[0].send(new)
    (mail,) = server.mails
    assert (mail["To"], mail["Subject"]) == ("me@example.org, you@example.org", "[ledom] tiny: stalled")
    assert mail["Message-ID"] == f"<{new['id']}@ledom>"
    assert "tiny makes NO PROGRESS. no progress for 9 s. Iteration 3" in mail.get_payload()
    assert "hidden" not in "".join(server.lines)


def test_mail_goes_through_the_sendmail_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "sendmail"
    program.write_text(f'#!/bin/bash\necho "$@" > {tmp_path}/options; cat > {tmp_path}/mail\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    Email(["me@example.org"], None, None).send(message(Event.FAILED, status(State.FAILED), Known(), 0.0))
    assert (tmp_path / "options").read_text() == "-i -t\n"
    assert "To: me@example.org" in (tmp_path / "mail").read_text()


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: read_secret("https://hooks/hidden", "--webhook"), "expects env:NAME or file:PATH"),
        (lambda: read_secret("env:NOT_SET_HERE", "--webhook"), "NOT_SET_HERE is not set"),
        (lambda: read_secret("file:/nowhere", "--webhook"), "cannot be read"),
        (lambda: Webhook("hooks.example.org/hidden", "json"), "not one of a web server"),
        (lambda: smtp_server("me:hidden@host", {}), "is not HOST or HOST:PORT"),
        (lambda: Email(["nobody"], None, smtp_server("host", {})), "is not an e-mail address"),
    ],
)
def test_a_place_to_send_to_that_cannot_work_is_refused(call: Callable[[], object], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence) as refused:
        call()
    assert not {"hooks", "hidden"} & set(re.split(r"\W+", str(refused.value)))


def test_the_command_looks_once_and_sends_to_all(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beat(run, state="failed", reason="disk")
    monkeypatch.chdir(tmp_path)
    with receiving() as hook, receiving_mail() as server:
        monkeypatch.setenv("ALERT_WEBHOOK", hook.address)
        places = ["--webhook", "env:ALERT_WEBHOOK", "--email", "me@example.org", "--smtp", f"127.0.0.1:{server.port}"]
        for _ in range(2):
            assert alert.main(["runs", *places, "--once"]) == 0
        assert alert.main(["--check", *places]) == 0  # sends nothing
        assert alert.main(["--test", *places, "--format", "slack"]) == 0
    assert [mail["Subject"] for mail in server.mails] == ["[ledom] tiny: failed", f"[ledom] {tmp_path.name}: test"]
    assert [each.get("event") for each in hook.messages] == ["failed", None]
    assert "alerts arrive" in hook.messages[1]["text"]
    with pytest.raises(UsageError, match="nowhere: no such folder"):
        alert.main(["nowhere", *places, "--once"])


def test_a_message_that_nobody_takes_makes_the_command_fail(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beat(run, state="failed", reason="disk")
    monkeypatch.chdir(tmp_path)
    with receiving(statuses=[404]) as hook:
        (tmp_path / "address").write_text(f"{hook.address}\n")
        assert alert.main(["runs", "--webhook", f"file:{tmp_path}/address", "--once", "--end-seconds", "0.5"]) == 1
    assert len(load_state("ledom_alerts.json").pending) == 1


def until(is_so: Callable[[], Any], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.02)


@pytest.mark.distributed
def test_a_run_that_hangs_recovers_and_is_killed(data: TinyData, tmp_path: Path, python: Path) -> None:
    """The second rank is stopped and continued; then both are killed. The command runs beside them and is ended by SIGTERM."""
    run, log = tmp_path / "run", tmp_path / "alerts.log"
    with receiving() as hook:
        ranks = start_ranks(data.config, run, "train.train_iters=100000", "data.allow_repeats=true", num_ranks=2)
        ranks.wait_until(lambda: (run / "metrics.jsonl").exists() and (run / "heartbeat.json").exists())
        options = ["--interval=1", "--stall-seconds=3", f"--state={tmp_path}/state.json", "--webhook=env:HOOK"]
        command = [str(python.with_name("ledom")), "alert", str(run), *options]
        with open(log, "w") as output:
            variables = {**os.environ, "HOOK": f"{hook.address}/secret-path"}
            process = subprocess.Popen(command, env=variables, stdout=output, stderr=output)
        until(lambda: (tmp_path / "state.json").exists())
        os.kill(ranks.processes[1].pid, signal.SIGSTOP)
        until(lambda: hook.events() == ["stalled"])
        os.kill(ranks.processes[1].pid, signal.SIGCONT)
        until(lambda: hook.events() == ["stalled", "recovered"])
        for process_of_rank in ranks.processes:
            os.killpg(process_of_rank.pid, signal.SIGKILL)
        ranks.wait()
        until(lambda: hook.events() == ["stalled", "recovered", "failed"])
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
    assert "killed, or out of memory" in hook.messages[-1]["reason"]
    assert hook.messages[-1]["host"] == hook.messages[-1]["sent_from"]
    assert "secret-path" not in log.read_text()
