"""Exceptions whose message is for the user: it states what was found, what was expected and what to do.

Exit codes of every command. 0: done. 1: a check failed. 2: wrong usage. 3 (`UNFORESEEN`): a failure that a new start may
overcome, such as a disk or file server that fails for a while, or a killed process that wrote a checkpoint; in training also a
lost rank and every other exception. 75 (`training.watchdog.EXIT_CODE`): a rank of a training run hung. 130: interrupted. 141:
`CLOSED_PIPE`. After 1 or 2 a new start would fail again.
"""

import errno
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

CLOSED_PIPE = 141
"""Exit code if the reader of the output has ended; a shell reports the same code for SIGPIPE."""
UNFORESEEN = 3
"""Exit code of a failure that a new start may overcome. Scripts restart a failed run only after this code."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LASTING = (*FULL, errno.EACCES, errno.EPERM)
"""Errors of a file system that a new start would meet again."""
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)
"""Errors that a file system without locks returns."""
STEERING = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u202a-\\u202e\\u2066-\\u2069\\ud800-\\udfff]")
"""Characters that `visible` escapes."""


class LedomError(ValueError):
    """Base of every error that a user can correct. A command ends with the error's `exit_code`."""

    exit_code = 1


class UsageError(LedomError):
    """Wrong use of a command: a missing file, an unknown option, a folder that exists already."""

    exit_code = 2


class ConfigError(UsageError):
    """A run configuration that cannot work. The message names the dotted key."""


class DataError(LedomError):
    """A file with wrong content: malformed, truncated or out of range."""


class RemoteAnswerError(DataError):
    """A server refused a request, or gave an answer that cannot be used."""


class RedirectError(UsageError, RemoteAnswerError):
    """A server answered with the address of another one, which is not followed."""


class NotFiniteError(DataError):
    """A model returned NaN or infinity as a score, so there is no result to rank by.

    read: the ids that the model had read, in model order, before the position that failed. next_id: the token to score at that
    position; None if a token was to be chosen.
    """

    def __init__(self, message: str, read: Sequence[int] = (), next_id: int | None = None) -> None:
        super().__init__(message)
        self.read, self.next_id = list(read), next_id


class MismatchError(LedomError):
    """Two things that must agree differ in direction, tokenizer or architecture."""


class VerificationError(LedomError):
    """A check of finished work failed, such as the parity check of an export."""


class PlanError(LedomError):
    """A run that cannot work according to its plan: too little device memory or disk space."""


class StoppedError(LedomError):
    """Training stopped itself because more steps would be wasted, for example after a loss that is not finite."""


class TransientError(LedomError):
    """A failure that a new start may overcome: a disk or server that does not answer, a missing rank, a killed checkpoint writer."""

    exit_code = UNFORESEEN


class StoppedWaiting(Exception):
    """A signal came before a run began. Nothing starts and nothing was changed; the command ends with 0."""


def may_pass(error: BaseException) -> bool:
    """Return True for a file system error that a new start may overcome, such as EIO, ESTALE or a lost mount."""
    return isinstance(error, OSError) and error.errno not in LASTING


def cannot_write(error: OSError, path: str) -> LedomError:
    """Return the error for a file that could not be written, in work that the same command can resume."""
    if error.errno in FULL:
        advice = "make room, then run the same command again: finished work is kept"
        return DataError(f"{path} cannot be written: {error.strerror}; {advice}")
    kind = TransientError if may_pass(error) else DataError
    return kind(f"{path} cannot be written ({error.strerror}); check the disk, then run the same command again")


def first_cause(error: BaseException) -> BaseException:
    """Return the OSError that caused `error`, or `error` itself. torch hides it: closing the unwritten file raises another error."""
    context: BaseException | None = error
    while context is not None:
        if isinstance(context, OSError):
            return context
        context = context.__cause__ or context.__context__
    return error


def visible(text: str) -> str:
    """Return a text of unknown origin, safe to print on a terminal.

    Control characters, bidirectional overrides and lone surrogates become escapes such as \\x1b; line breaks and tabs stay.
    """
    return STEERING.sub(lambda found: ascii(found.group())[1:-1], text)


def _check_arguments(arguments: list[str]) -> None:
    """Raise UsageError for an argument that is not UTF-8: manifests and reports contain paths as JSON."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise UsageError(f"the argument {os.fsencode(argument)!r} is not UTF-8; rename the file") from None


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Run the `main` of a command and exit with its code (see the docstring of this module)."""
    try:
        _check_arguments(sys.argv[1:])
        code = main() or 0
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        code = CLOSED_PIPE
    except LedomError as error:
        print(f"error: {visible(str(error))}", file=sys.stderr)
        code = error.exit_code
    except OSError as error:
        if error.filename is None:
            raise
        print(
            f"error: {visible(str(error.filename))}: {error.strerror}; check that it exists and that you may use it",
            file=sys.stderr,
        )
        given_wrongly = (FileNotFoundError, NotADirectoryError, IsADirectoryError, FileExistsError)
        code = UNFORESEEN if may_pass(error) and not isinstance(error, given_wrongly) else 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)
