"""Mistakes of the user, as exceptions: each message says what was found, what was expected and what to do."""

import errno
import sys
from collections.abc import Callable
from typing import NoReturn


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


class MismatchError(LedomError):
    """Two things that must agree do not: direction, tokenizer, architecture."""


class VerificationError(LedomError):
    """A check of finished work failed, such as the logits gate of an export."""


class StoppedError(LedomError):
    """Training stopped by itself because going on would waste the machine, for example a loss that is not finite."""


def cannot_write(error: OSError, path: str) -> DataError:
    """What to say when writing a file failed in the middle of work that can be taken up again."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        advice = "make room, then run the same command again: what is finished is kept"
        return DataError(f"{path} cannot be written: {error.strerror}; {advice}")
    return DataError(f"{path} cannot be written ({error.strerror}); check the disk, then run the same command again")


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Run a command line's `main` and exit the process: 0 done, 1 a check failed, 2 wrong usage."""
    try:
        code = main() or 0
    except LedomError as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}; check that it is there and may be used", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)
