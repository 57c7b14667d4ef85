"""The two processes in which a program that a model wrote meets its tests; both run this file's text and nothing else of the package.

The *program process* holds the program; the *test process* holds the tests, calls the program's functions over a pipe, and alone
can tell the evaluation that the tests came to their end. So nothing that the program does to its own process, such as leaving
early with status 0, reading frames, or returning an object that equals everything, makes a test pass.

Messages are lines of JSON. Only plain values cross (`encode`); other objects, functions among them, arrive as one that equals
nothing. What a function does to its arguments is done to the caller's.
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
"""Of one message of the program: more is an error of it."""
PR_SET_DUMPABLE = 4


def encode(value: Any) -> Any:
    """Return `value` as JSON: plain values as they are, containers and long integers under the name of their kind."""
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
    """Return the value of what `encode` made."""
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
    """Limit this process and its children: processor seconds, address space, file size, open files, processes, no core."""
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
    """Return an exception in a line."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def serve() -> None:
    """Be the program process: run the program that comes first, then its functions, as asked on standard input."""
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)  # what the program prints is no answer
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
    """Make a container that was an argument what the function has made of it."""
    if isinstance(argument, list):
        argument[:] = value
    elif isinstance(argument, dict | set):
        argument.clear()
        argument.update(value)


class Program:
    """The program as the test process sees it: functions that are called in the other process."""

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
        """Return what calls a function of the program."""

        def call(*args: Any, **named: Any) -> Any:
            """Call it over there, and return or raise what it does."""
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
    """Be the test process: read [source, prelude, tests, entry point] from the file descriptor `given`, run the tests, and write
    {"passed", "reason"} to `verdict`.

    Only the entry point is the program's; its helpers are those of the prelude. Without an entry point all functions of the
    program are taken that are named like nothing of the tests' own and no builtin, which the program would else replace.
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
