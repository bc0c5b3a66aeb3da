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
    except UserError as error:
        # What a library says of a damaged file may run over many lines.
        sys.exit(_fail(f"error: {' '.join(str(error).split())}", 2))
    except KeyboardInterrupt:
        kept = "; what was saved is kept: the same command with --resume continues from there" if resumable else ""
        sys.exit(_fail(f"interrupted{kept}", 130))


def _fail(line: str, code: int) -> int:
    print(line, file=sys.stderr, flush=True)
    return code
