"""The one kind of error that a user can mend: shown as a single line, without a traceback."""

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn


class UserError(ValueError):
    """A wrong file, option or value. The message names the value and the remedy, in one line."""


class OptionParser(argparse.ArgumentParser):
    """A parser of command lines whose complaints are a user's errors like all others."""

    def error(self, message: str) -> NoReturn:
        """Raises a UserError that also says where the options are listed."""
        raise UserError(f"{message}; '{self.prog} --help' lists every option")


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
