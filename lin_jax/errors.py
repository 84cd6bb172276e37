"""The one kind of error that a user can mend: shown as a single line, without a traceback."""

import argparse
import contextlib
import errno
import io
import logging
import os
import sys
from collections.abc import Callable
from typing import NoReturn


class UserError(ValueError):
    """A wrong file, option or value. The message names the value and the remedy, in one line."""


# What a shell reports of a program that a closed pipe ended.
CLOSED_PIPE = 141
# A full disk behind a redirection, or a file that may not grow.
_NO_OUTPUT = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# JAX's keys are made of so many bits.
SEED_BITS = 32


def check_seed(seed: int, name: str = "seed") -> None:
    """Refuses a seed that random numbers cannot be made from.

    Args:
        seed: the seed.
        name: of the option or argument, for the message.

    Raises:
        UserError: it is negative, or has more than 32 bits.
    """
    if not 0 <= seed < 2**SEED_BITS:
        raise UserError(f"{name} is {seed}; give a number from 0 to {2**SEED_BITS - 1}")


class OptionParser(argparse.ArgumentParser):
    """A parser of command lines whose complaints are a user's errors like all others."""

    def error(self, message: str) -> NoReturn:
        """Raises a UserError that also says where the options are listed."""
        raise UserError(f"{message}; '{self.prog} --help' lists every option")


def exit_cleanly(main: Callable[[], int | None]) -> None:
    """Runs a script's `main` and exits with its status, 2 with one line on a `UserError`, or 130 on Ctrl-C.

    Warnings are single lines, too. A closed pipe, as `| head` leaves it, ends the script without a word, with 141 like
    other programs.
    """
    _prepare_streams()
    # Some library would set a form with names of modules in it.
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    try:
        status = _run(main)
        sys.stdout.flush()
    except BrokenPipeError:
        status = CLOSED_PIPE
        _close_output()
    except OSError as error:
        if error.errno not in _NO_OUTPUT:
            raise
        print(f"error: cannot write the output: {error.strerror}", file=sys.stderr)
        status = 2
        _close_output()
    sys.exit(status)


def _run(main: Callable[[], int | None]) -> int:
    try:
        return main() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except SystemExit as asked:
        # Help was printed.
        if asked.code is None or isinstance(asked.code, int):
            return asked.code or 0
        raise


def _prepare_streams() -> None:
    """Makes output possible whatever the terminal: without one, and in an encoding that lacks characters."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - as long as the process
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _close_output() -> None:
    """Sends what still waits nowhere, so that the interpreter does not complain about it at its end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
