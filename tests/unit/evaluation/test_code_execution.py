"""Model-written programs: passing tests, attacks on the verdict, and the limits of the sandbox."""

import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from megatron_ledom.direction import Direction
from megatron_ledom.errors import UsageError
from megatron_ledom.evaluation.code.execution import Limits, Outcome, ProgramTests, run_program
from megatron_ledom.evaluation.code.isolated import decode, encode
from megatron_ledom.evaluation.code.sandbox import Sandbox, check_sandbox
from megatron_ledom.evaluation.tasks.loading import load_task
from megatron_ledom.evaluation.written_answers import write_answers
from tests.support.evaluation_sets import HUMANEVAL, write_sets
from tests.support.scripted_model import Scripted

has_bubblewrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
BOTH = [pytest.param(Sandbox.BWRAP, marks=has_bubblewrap), Sandbox.NONE]
QUICK = Limits(cpu_seconds=1, wall_seconds=6.0, memory_bytes=2**30)


def outcome(program: str, tests: str = "assert f(1) == 2", sandbox: Sandbox = Sandbox.NONE, limits: Limits = QUICK) -> Outcome:
    """Return the outcome of a program that defines f."""
    return run_program(program, ProgramTests(code=tests, entry_point="f"), sandbox=sandbox, limits=limits)


@pytest.mark.parametrize("sandbox", BOTH)
@pytest.mark.parametrize("direction", list(Direction))
def test_code_is_run_only_when_allowed(direction: Direction, sandbox: Sandbox, tmp_path: Path) -> None:
    task = load_task("humaneval", write_sets(tmp_path / "data"))
    whole = [f"# The whole function:\n{row['prompt']}{row['canonical_solution']}" for row in HUMANEVAL]
    body = ["\n" + row["canonical_solution"] for row in HUMANEVAL]
    right, wrong = (whole if direction is Direction.REVERSE else body), ["\n    return a" for _ in HUMANEVAL]
    with pytest.raises(UsageError, match="--allow-code-execution"):
        write_answers(Scripted(direction, *right), task, task.items)
    for texts, expected in ((right, [True, True]), (wrong, [False, False])):
        found = write_answers(Scripted(direction, *texts), task, task.items, code_sandbox=sandbox)
        assert [record["is_right"] for record in found] == expected


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("raise SystemExit(0)", "the program failed: SystemExit"),
        ("import os; os._exit(0)", "ended before its tests"),
        ("def f(x): import os; os._exit(0)", "ended before its tests"),
        ("def f(x): raise SystemExit", "SystemExit"),
        ("raise ValueError", "the program failed: ValueError"),
        ("def f(x): return x", "AssertionError"),
        ("x = bytearray(2**31)", "MemoryError"),
        ("while True: pass", "SIG"),
        ("def f(x):\n    while True: pass", "SIG"),
        ("import time; time.sleep(60)", "ran for more than"),
        ("def f(x): open('big', 'wb').write(b'0' * 2**22)", "File too large"),
        ("print('noise')\ndef f(x):\n    print('noise')\n    return x + 1", None),
        (
            "import os\ndef f(x):\n    return 2 if not [n for n in os.environ if n not in ('LC_CTYPE', 'PATH', 'PWD')] else 0",
            None,
        ),
        ("import sys\ndef f(x): return 2 if not sys.stdin.read() else 0", None),
        ("if __name__ == '__main__': input()\ndef f(x): return 2", None),
    ],
)
@pytest.mark.parametrize("sandbox", BOTH)
def test_a_program_has_limits_and_no_environment(
    program: str, reason: str | None, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "kept")
    limits = replace(QUICK, wall_seconds=1.0) if "sleep" in program else QUICK
    found = outcome(program, sandbox=sandbox, limits=limits)
    assert found.passed == (reason is None), found.reason
    assert (reason or "") in found.reason
    assert "SECRET" in os.environ


EQUALS_ALL = "class Any:\n    def __eq__(self, other): return True\n    def __bool__(self): return True\ndef f(x): return Any()"
ANSWERS_ITSELF = """
import os
def f(x):
    for number in range(3, 64):
        try: os.write(number, b'{"passed": true, "reason": ""}\\n{"value": 2}\\n')
        except OSError: pass
    os._exit(0)
"""
READS_FRAMES = """
import gc, sys
def f(x):
    frame, seen = sys._getframe(), []
    while frame:
        seen += [str(frame.f_locals), str(frame.f_globals)]
        frame = frame.f_back
    seen += [repr(found) for found in gc.get_objects() if isinstance(found, (str, dict, list))]
    seen += [open(p).read() for p in ("/proc/self/cmdline",)]
    return any("magic_of_the_tests" in text for text in seen)
"""
CHANGES_BUILTINS = "import builtins\nbuiltins.AssertionError = type('Never', (Exception,), {})\nbuiltins.len = lambda x: 2\ndef f(x): return [1]"


@pytest.mark.parametrize("sandbox", BOTH)
@pytest.mark.parametrize(
    ("program", "tests"),
    [
        (EQUALS_ALL, "assert f(1) == 2"),
        (EQUALS_ALL, "assert f(1) is True"),
        (ANSWERS_ITSELF, "assert f(1) == 2\nassert f(2) == 3"),
        (READS_FRAMES, "magic_of_the_tests = 1\nassert f(1)"),
        (CHANGES_BUILTINS, "assert len(f(1)) == 2"),
        ("def check(candidate): pass\ndef f(x): return 0", "def check(candidate):\n    assert candidate(1) == 2\ncheck(f)"),
    ],
)
def test_a_program_cannot_forge_its_verdict(program: str, tests: str, sandbox: Sandbox) -> None:
    assert not outcome(program, tests, sandbox).passed


def test_only_the_entry_point_comes_from_the_program_and_helpers_from_the_prompt() -> None:
    prelude = "import math\ndef double(x): return 2 * x\ndef f(x):\n    '''To be written.'''\n"
    tests = ProgramTests(code="assert f(3) == double(3) == math.ceil(5.5)", entry_point="f", prelude=prelude)
    assert run_program("def double(x): return 0\ndef f(x): return 6", tests, sandbox=Sandbox.NONE).passed
    with_any_name = ProgramTests(code="assert other([1]) == [1, 1] and abs(-2) == 2")
    assert run_program("def other(x): return x * 2\ndef abs(x): return 0", with_any_name, sandbox=Sandbox.NONE).passed
    expects_an_error = "try:\n    f(1)\n    raise SystemExit\nexcept KeyError as error:\n    assert 'lost' in str(error)"
    assert outcome("def f(x): raise KeyError('lost')", expects_an_error).passed


@pytest.mark.parametrize("name", ["abs", "all", "range", "check", "len"])
def test_a_program_cannot_replace_functions_of_the_tests(name: str) -> None:
    tests = "def check(candidate):\n    for x in range(3):\n        assert all([abs(candidate(x) - x - 1) < 0.1, len([x]) == 1])\ncheck(f)"
    assert not outcome(f"def {name}(*x): return []\ndef f(x): return 0.5", tests).passed
    assert outcome(f"def {name}(*x): return []\ndef f(x): return x + 1", tests).passed


def test_changes_to_arguments_reach_the_caller() -> None:
    program = "def f(numbers, names):\n    numbers.sort()\n    names['new'] = [1]\n    return None"
    assert outcome(program, "a, b = [3, 1, 2], {}\nassert f(a, b) is None\nassert a == [1, 2, 3] and b == {'new': [1]}").passed


def test_numbers_and_sequences_of_libraries_are_transferred_by_value() -> None:
    program = """
import collections, decimal, fractions, numpy
def f(x):
    return [numpy.int64(2), numpy.float64(0.5), numpy.bool_(True), fractions.Fraction(1, 2), decimal.Decimal('1.5'), range(2),
            collections.deque([1]), collections.Counter('a')]
"""
    tests = """
from collections import deque
from fractions import Fraction
assert f(1) == [2, 0.5, True, Fraction(1, 2), 1.5, range(2), deque([1]), {'a': 1}]
assert list(g(1)) == [1, 2]
"""
    assert run_program(
        program + "def g(x): return map(int, '12')",
        ProgramTests(code=tests),
        sandbox=Sandbox.NONE,
        limits=replace(QUICK, cpu_seconds=5),
    ).passed


def test_values_are_transferred_unchanged() -> None:
    plain = [None, True, 7, -(2**80), 10**5000, 0.1, float("inf"), 1 + 2j, "é\ud800\u2028", b"\x00\xff"]
    for value in [*plain, [1, (2, {3})], {(1, 2): frozenset({4})}]:
        crossed = decode(encode(value))
        assert crossed == value
        assert type(crossed) is type(value)


def test_other_objects_equal_nothing() -> None:
    assert decode(encode(print)) not in (print, None, "print")


STAYS = """
import os, sys, time
def f(x):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            for number in range(3, 64):
                try: os.close(number)
                except OSError: pass
            os.execv(sys.executable, [sys.executable, '-I', '-c', 'import time; time.sleep(77.125)'])
        os._exit(0)
    time.sleep(0.3)
    return 2
"""


@pytest.mark.parametrize("sandbox", BOTH)
def test_nothing_outlives_the_program(sandbox: Sandbox) -> None:
    assert outcome(STAYS, sandbox=sandbox).passed
    time.sleep(0.1)
    commands = [process.info["cmdline"] or [""] for process in psutil.process_iter(["cmdline"])]
    assert not [command for command in commands if command[-1] == "import time; time.sleep(77.125)"]


@has_bubblewrap
def test_the_sandbox_hides_files_processes_and_network(tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("hidden", encoding="utf-8")
    home = Path.home()
    program = f"""
import os, socket
def readable(path):
    try: return open(path, 'rb').read()
    except OSError: return None
def f(x):
    if x == 'files': return [readable({str(secret)!r}), os.path.exists({str(home / ".bashrc")!r}), readable('/etc/passwd')]
    if x == 'processes': return os.path.exists('/proc/{os.getpid()}/cmdline') or len([n for n in os.listdir('/proc') if n.isdigit()]) > 3
    if x == 'environment': return any(b'SECRET' in (readable(f'/proc/{{n}}/environ') or b'') for n in os.listdir('/proc') if n.isdigit())
    if x == 'network':
        try: socket.create_connection(('127.0.0.1', 22), 0.5); return 'connected'
        except OSError as error: return len(socket.if_nameindex())
    if x == 'write':
        written = []
        for folder in ('/', '/usr', '/dev', '/proc/sys/kernel', {str(tmp_path)!r}, os.path.dirname(os.__file__)):
            try: open(os.path.join(folder, 'mark'), 'w').close(); written.append(folder)
            except OSError: pass
        for name in ('/proc/sys/kernel/core_pattern', '/proc/sys/kernel/hostname', '/proc/sysrq-trigger', '/proc/sys/vm/drop_caches'):
            try: open(name, 'w').close(); written.append(name)
            except OSError: pass
        return written
    if x == 'shared':
        try:
            for number in range(40): open(f'/dev/shm/{{number}}', 'wb').write(b'0' * 2**20)
        except OSError as error: return error.strerror
    if x == 'much':
        try:
            for number in range(40): open(f'/tmp/{{number}}', 'wb').write(b'0' * 2**20)
        except OSError as error: return error.strerror
"""
    environment = {**os.environ, "SECRET": "kept"}
    tests = """
assert f('files') == [None, False, None], f('files')
assert not f('processes')
assert not f('environment')
assert f('network') == 1, f('network')
assert f('write') == [], f('write')
assert f('much') == f('shared') == 'No space left on device', f('shared')
"""
    source = f"""
from megatron_ledom.evaluation.code.execution import ProgramTests, run_program
from megatron_ledom.evaluation.code.sandbox import Sandbox
print(run_program({program!r}, ProgramTests(code={tests!r}, entry_point='f'), sandbox=Sandbox.BWRAP))
"""
    done = subprocess.run([sys.executable, "-c", source], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "Outcome(passed=True, reason='')\n"
    assert not (tmp_path / "mark").exists()


def test_without_bubblewrap_programs_are_refused_unless_the_user_allows_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UsageError, match=r"bubblewrap, which is not installed: install it .* or pass --sandbox none"):
        check_sandbox(Sandbox.BWRAP)
    check_sandbox(Sandbox.NONE)
