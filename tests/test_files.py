"""Files written by rename: whole or not at all, with several writers."""

import threading
from pathlib import Path

import pytest

from lin_jax.files import replacement, write_durably


def test_several_writers_leave_one_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    texts = [f"{number}" * 20_000 for number in range(4)]

    def write(text: str) -> None:
        for _ in range(10):
            write_durably(path, text)

    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() in texts
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_writer_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    write_durably(path, "old\u2028")

    def fail() -> None:
        with replacement(path) as partial:
            partial.write_text("half")
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()
    assert path.read_text(encoding="utf-8") == "old\u2028"
    assert list(tmp_path.iterdir()) == [path]
