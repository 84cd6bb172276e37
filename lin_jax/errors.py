"""The one kind of error that a user can mend: shown as a single line, without a traceback."""

import sys
from collections.abc import Callable


class UserError(ValueError):
    """A wrong file, option or value. The message names the value and the remedy, in one line."""


def exit_cleanly(main: Callable[[], int | None]) -> None:
    """Runs a script's `main` and exits: 2 with one line on a `UserError`, 130 on Ctrl-C, else its status."""
    try:
        status = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    sys.exit(status or 0)
