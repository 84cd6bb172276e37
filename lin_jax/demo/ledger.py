"""Results of the demo's parts, on disk as soon as a part is finished: an interrupted demo goes on from there."""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lin_jax.errors import UserError
from lin_jax.files import write_durably

LEDGER_FILE = "parts.json"


class TrainingStoppedError(Exception):
    """A signal has ended a training run, which is saved.

    Attributes:
        status: exit status of a script that stops for it.
    """

    def __init__(self, status: int) -> None:
        super().__init__(f"stopped with status {status}")
        self.status = status


class Ledger:
    """Finished parts with their results, and the seconds spent on each part, those before an interruption included.

    Args:
        path: the JSON file.
        settings: what the results depend on.
        results: by part.
        seconds: by part, also of parts that are not finished.
    """

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, Any],
        results: dict[str, dict[str, Any]] | None = None,
        seconds: dict[str, float] | None = None,
    ) -> None:
        self.path = path
        self.settings = dict(settings)
        self.results = results or {}
        self.seconds = seconds or {}

    @classmethod
    def open(cls, folder: Path, settings: Mapping[str, Any]) -> "Ledger":
        """Opens the ledger of a folder, or begins one.

        Args:
            folder: of the demo, which is made if need be.
            settings: of this call, as JSON has them.

        Raises:
            UserError: the folder was begun with other settings, or its ledger cannot be read or written.
        """
        path = folder / LEDGER_FILE
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                found = cls(path, settings)
                found._save()
                return found
            content = json.loads(path.read_text(encoding="utf-8"))
            before, results, seconds = (dict(content[name]) for name in ("settings", "results", "seconds"))
        except OSError as error:
            raise UserError(f"cannot write to {folder}: {error.strerror}; give another --output") from error
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path} is damaged; give --fresh to begin anew, or another --output") from None
        now = json.loads(json.dumps(dict(settings)))
        # Those that say most come first.
        for name in dict.fromkeys((*now, *before)):
            if before.get(name) != now.get(name):
                raise UserError(
                    f"{folder} was begun with another {name}: {_short(before.get(name))}, now "
                    f"{_short(now.get(name))}; give --fresh to begin anew, or another --output"
                )
        return cls(path, settings, results, seconds)

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Adds the time of a block to a part's, also if it is left by an exception."""
        began, before = time.perf_counter(), self.seconds.get(part, 0.0)
        try:
            yield
        finally:
            self.seconds[part] = before + time.perf_counter() - began
            self._save()

    def finish(self, part: str, result: dict[str, Any]) -> None:
        """Keeps the result of a part."""
        self.results[part] = result
        self._save()

    def _save(self) -> None:
        content = {"settings": self.settings, "results": self.results, "seconds": self.seconds}
        write_durably(self.path, json.dumps(content, indent=1) + "\n")


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
