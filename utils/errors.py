"""Errors that a user can mend, and how a command reports them."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """Something the user can put right; the message is one sentence: the thing, what was found and the cure."""


def run_command(main: Callable[[], None], resumable: bool = True) -> None:
    """Run a command's main function; report a user's error in one line (exit code 2) and Ctrl-C in one line (130).

    Args:
        resumable: whether the command takes --resume.
    """
    try:
        main()
    except (UserError, KeyboardInterrupt) as error:
        sys.exit(report_error(error, resumable))


def report_error(error: UserError | KeyboardInterrupt, resumable: bool = True) -> int:
    """Report an error in one line on standard error; the exit code that goes with it."""
    if isinstance(error, UserError):
        # What a library says of a damaged file may run over many lines.
        line, code = f"error: {' '.join(str(error).split())}", 2
    else:
        kept = "; what was saved is kept: the same command with --resume continues from there" if resumable else ""
        line, code = f"interrupted{kept}", 130
    print(line, file=sys.stderr, flush=True)
    return code
