"""Errors that a user can correct, and how a command reports them."""

import errno
import sys
from collections.abc import Callable

WITH_RESUME = "the same command with --resume"

NOT_WRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


class UserError(Exception):
    """Something the user can correct; the message is one sentence: the thing, what was found and what to do."""


def run_command(main: Callable[[], None], goes_on: str | None = WITH_RESUME) -> None:
    """Run a command's main function; report a user's error in one line (exit code 2) and Ctrl-C in one line (130).

    Args:
        goes_on: the command that continues from there; None if there is none.
    """
    try:
        return main()
    except UserError as error:
        line, code = f"error: {' '.join(str(error).split())}", 2  # a library's message may run over many lines
    except KeyboardInterrupt:
        line, code = f"interrupted{kept(goes_on)}", 130
    except OSError as error:
        if error.errno not in NOT_WRITABLE:
            raise
        name, code = error.filename or "a file", 2
        line = f"error: {name} cannot be written ({error.strerror}): free disk space or fix permissions{kept(goes_on)}"
    print(line, file=sys.stderr, flush=True)
    sys.exit(code)


def kept(goes_on: str | None) -> str:
    """The end of a message: how an interrupted command is continued."""
    return f"; what was saved is kept: {goes_on} continues from there" if goes_on else ""
