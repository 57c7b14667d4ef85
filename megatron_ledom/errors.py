"""Mistakes of the user, as exceptions: each message says what was found, what was expected and what to do.

Exit codes of every command line: 0 done; 1 a check failed, and 2 wrong usage: a new start would fail again; 3 (`UNFORESEEN`)
what a new start may overcome: a disk or file server that fails for a while, a helper that was killed, in training also a lost
rank and every other exception. Training also ends with 75 when a rank hangs (`training.watchdog.EXIT_CODE`).
"""

import errno
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

CLOSED_PIPE = 141
"""Exit code where the output's reader has left, as a shell tells it of SIGPIPE."""
UNFORESEEN = 3
"""Exit code of a failure that a new start may overcome: scripts start such a run again, and no other that failed."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LASTING = (*FULL, errno.EACCES, errno.EPERM)
"""Errors of a file system that a new start meets as well."""
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)
"""What a file system without locks answers."""


STEERING = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u202a-\\u202e\\u2066-\\u2069\\ud800-\\udfff]")
"""Characters that `visible` escapes."""


class LedomError(ValueError):
    """Base of every error a user can cause and cure; `exit_code` is what a command line returns for it."""

    exit_code = 1


class UsageError(LedomError):
    """The command was asked wrongly: a missing file, an unknown option, a folder that is in the way."""

    exit_code = 2


class ConfigError(UsageError):
    """The run configuration cannot work; the message names the dotted key."""


class DataError(LedomError):
    """A file's content is not what it should be: malformed, truncated, out of range."""


class NotFiniteError(DataError):
    """A model gave NaN or infinity where a score was expected: this is no result, and nothing may be ranked by it.

    read: what the model had read, model order, before the position that failed; next_id: the token that was to be scored there,
    None where one was to be chosen.
    """

    def __init__(self, message: str, read: Sequence[int] = (), next_id: int | None = None) -> None:
        super().__init__(message)
        self.read, self.next_id = list(read), next_id


class MismatchError(LedomError):
    """Two things that must agree do not: direction, tokenizer, architecture."""


class VerificationError(LedomError):
    """A check of finished work failed, such as the logits gate of an export."""


class PlanError(LedomError):
    """The plan of a run says that it cannot work: the memory of a device, or the disk, is not enough."""


class StoppedError(LedomError):
    """Training stopped by itself because going on would waste the machine, for example a loss that is not finite."""


class TransientError(LedomError):
    """The machine failed, not the user: a disk or file server that does not answer, a helper that was killed."""

    exit_code = UNFORESEEN


class StoppedWaiting(Exception):
    """A signal came before a run began: nothing starts, and nothing was changed. No error: the command ends with 0."""


def may_pass(error: BaseException) -> bool:
    """Whether this is an error of the file system that a new start may overcome, such as EIO, ESTALE or a vanished mount."""
    return isinstance(error, OSError) and error.errno not in LASTING


def cannot_write(error: OSError, path: str) -> LedomError:
    """What to say when writing a file failed in the middle of work that can be taken up again."""
    if error.errno in FULL:
        advice = "make room, then run the same command again: what is finished is kept"
        return DataError(f"{path} cannot be written: {error.strerror}; {advice}")
    kind = TransientError if may_pass(error) else DataError
    return kind(f"{path} cannot be written ({error.strerror}); check the disk, then run the same command again")


def first_cause(error: BaseException) -> BaseException:
    """The disk's own error: torch meets a second one when it closes the file that could not be written."""
    context: BaseException | None = error
    while context is not None:
        if isinstance(context, OSError):
            return context
        context = context.__cause__ or context.__context__
    return error


def visible(text: str) -> str:
    """Return a text of unknown origin for a terminal: control characters, which could steer it, become escapes such as \\x1b.

    So do bidirectional overrides and lone surrogates; line breaks and tabs stay.
    """
    return STEERING.sub(lambda found: ascii(found.group())[1:-1], text)


def _check_arguments(arguments: list[str]) -> None:
    """Refuse what is not UTF-8: paths are written into manifests and reports, which are JSON."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise UsageError(f"the argument {os.fsencode(argument)!r} is not UTF-8; rename the file") from None


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Run a command line's `main` and exit the process with its code, see the top of this file."""
    try:
        _check_arguments(sys.argv[1:])
        code = main() or 0
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still to be flushed at the exit goes there
        code = CLOSED_PIPE
    except LedomError as error:
        print(f"error: {visible(str(error))}", file=sys.stderr)
        code = error.exit_code
    except OSError as error:
        if error.filename is None:
            raise
        print(
            f"error: {visible(str(error.filename))}: {error.strerror}; check that it is there and may be used", file=sys.stderr
        )
        given_wrongly = (FileNotFoundError, NotADirectoryError, IsADirectoryError, FileExistsError)
        code = UNFORESEEN if may_pass(error) and not isinstance(error, given_wrongly) else 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)
