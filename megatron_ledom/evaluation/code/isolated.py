"""The two processes that run a model-written program and its tests. Both run this file and nothing else of the package.

The *program process* runs the program. The *test process* runs the tests and calls the program's functions over a pipe.
Only it can report that the tests passed. So the program cannot make a test pass by acting on its own process, such as
by exiting early with status 0, reading stack frames, or returning an object that equals everything.

Messages are lines of JSON. Only plain values are transferred (`encode`); any other object, such as a function, arrives
as an object that equals nothing. A function's changes to its arguments are applied to the caller's.
"""

import builtins
import ctypes
import json
import os
import resource
import sys
from collections import deque
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Any, TextIO

MOST_MESSAGE_CHARACTERS = 2**24
"""Maximum size of a message of the program. A longer one is an error."""
PR_SET_DUMPABLE = 4


def encode(value: Any) -> Any:
    """Return `value` as JSON: None, booleans, text and short integers unchanged, the rest under the name of its type."""
    if type(value).__module__ == "numpy" and hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        value = value.item()
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value) if abs(value) < 2**53 else {"int": hex(value)}
    if isinstance(value, float):
        return {"float": repr(float(value))}
    if isinstance(value, complex):
        return {"complex": [repr(value.real), repr(value.imag)]}
    if isinstance(value, bytes | bytearray):
        return {"bytes": bytes(value).hex()}
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(inner)] for key, inner in value.items()]}
    if isinstance(value, range):
        return {"range": [value.start, value.stop, value.step]}
    if isinstance(value, Fraction | Decimal):
        return {type(value).__name__: str(value)}
    for kind in (list, tuple, set, frozenset, deque, Iterator):
        if isinstance(value, kind):
            return {kind.__name__: [encode(inner) for inner in value]}
    return {"other": type(value).__name__}


def decode(message: Any) -> Any:
    """Return the value that `encode` encoded."""
    if not isinstance(message, dict):
        return message
    (kind, content), *_ = message.items()
    plain: dict[str, Callable[[Any], Any]] = {
        "int": lambda text: int(text, 16),
        "float": float,
        "complex": lambda parts: complex(float(parts[0]), float(parts[1])),
        "bytes": bytes.fromhex,
        "dict": lambda pairs: {decode(key): decode(inner) for key, inner in pairs},
        "list": lambda items: [decode(item) for item in items],
        "tuple": lambda items: tuple(decode(item) for item in items),
        "set": lambda items: {decode(item) for item in items},
        "frozenset": lambda items: frozenset(decode(item) for item in items),
        "deque": lambda items: deque(decode(item) for item in items),
        "Iterator": lambda items: iter([decode(item) for item in items]),
        "range": lambda parts: range(*parts),
        "Fraction": Fraction,
        "Decimal": Decimal,
    }
    return plain[kind](content) if kind in plain else object()


def limit(seconds: int, num_bytes: int) -> None:
    """Limit this process and its children: processor seconds, address space, file size, open files, processes, no core dump."""
    for name, most in (("CPU", seconds), ("AS", num_bytes), ("FSIZE", 2**20), ("NOFILE", 64), ("NPROC", 64), ("CORE", 0)):
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))


def hide() -> None:
    """Keep other processes of the same user from reading or changing the memory of this one (root still may)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)


def send(pipe: TextIO, message: Any) -> None:
    """Write one message."""
    pipe.write(json.dumps(message) + "\n")
    pipe.flush()


def described(error: BaseException) -> str:
    """Return an exception as one line."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def serve() -> None:
    """Run the program process: read the program and run it, then call its functions as requested on standard input."""
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)  # keep the program's output out of the answers
    namespace: dict[str, Any] = {"__name__": "program"}
    try:
        exec(compile(json.loads(requests.readline()), "program.py", "exec"), namespace)
    except BaseException as error:
        send(answers, {"failed": described(error)})
        return
    send(answers, {"names": [name for name, value in namespace.items() if callable(value)]})
    for line in requests:
        name, given, named = json.loads(line)
        args = [decode(argument) for argument in given]
        try:
            value = namespace[name](*args, **{key: decode(inner) for key, inner in named.items()})
            after = [encode(argument) for argument in args]
            changed = {number: after[number] for number in range(len(args)) if after[number] != given[number]}
            send(answers, {"value": encode(value), "changed": changed})
        except BaseException as error:
            send(answers, {"raised": type(error).__name__, "text": str(error)[:1000]})


def change(argument: Any, value: Any) -> None:
    """Give a container that was an argument the contents that the function left in it."""
    if isinstance(argument, list):
        argument[:] = value
    elif isinstance(argument, dict | set):
        argument.clear()
        argument.update(value)


class Program:
    """The program as seen from the test process: its functions, which run in the other process."""

    def __init__(self, source: str) -> None:
        self._answers, self._requests = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
        send(self._requests, source)
        answer = self._receive()
        if "failed" in answer:
            raise RuntimeError(f"the program failed: {answer['failed']}")
        self.names = [str(name) for name in answer["names"]]

    def _receive(self) -> dict[str, Any]:
        line = self._answers.readline(MOST_MESSAGE_CHARACTERS)
        if not line.endswith("\n"):
            raise RuntimeError("the program ended before its tests, or answered too much")
        answer = json.loads(line)
        if not isinstance(answer, dict):
            raise RuntimeError("the program wrote into the pipe of its answers")
        return answer

    def function(self, name: str) -> Callable[..., Any]:
        """Return a function that calls a function of the program."""

        def call(*args: Any, **named: Any) -> Any:
            """Call the function in the program process, and return its value or raise its exception."""
            send(self._requests, [name, list(map(encode, args)), {key: encode(value) for key, value in named.items()}])
            answer = self._receive()
            if "raised" not in answer:
                for number, argument in answer["changed"].items():
                    change(args[int(number)], decode(argument))
                return decode(answer["value"])
            kind = getattr(builtins, str(answer["raised"]), None)
            if isinstance(kind, type) and issubclass(kind, Exception):
                raise kind(answer["text"])
            raise RuntimeError(f"the program raised {answer['raised']}: {answer['text']}")

        return call


def run_tests(given: int, verdict: int) -> None:
    """Run the test process: read the task, run the tests, and write the verdict.

    The file descriptor `given` supplies [source, prelude, tests, entry point]. The verdict, {"passed", "reason"}, goes
    to the file descriptor `verdict`. Only the entry point is taken from the program; helpers come from the prelude.
    Without an entry point all functions of the program are taken, except those that would replace a builtin or a name
    of the tests.
    """
    hide()
    with os.fdopen(given) as pipe:
        source, prelude, tests, entry_point = json.load(pipe)
    result: dict[str, Any] = {"passed": False, "reason": ""}
    try:
        program = Program(source)
        namespace: dict[str, Any] = {"__name__": "tests"}
        try:
            exec(compile(prelude, "prelude.py", "exec"), namespace)
        except Exception as error:
            print(f"the prelude of the tests failed ({described(error)})", file=sys.stderr)
        for name in program.names:
            if name == entry_point or not (entry_point or name in namespace or hasattr(builtins, name)):
                namespace[name] = program.function(name)
        exec(compile(tests, "tests.py", "exec"), namespace)
        result["passed"] = True
    except BaseException as error:
        result["reason"] = described(error)[:1000]
    with os.fdopen(verdict, "w") as pipe:
        json.dump(result, pipe)


if __name__ == "__main__":
    limit(int(sys.argv[2]), int(sys.argv[3]))
    if sys.argv[1] == "program":
        serve()
    else:
        run_tests(int(sys.argv[4]), int(sys.argv[5]))
