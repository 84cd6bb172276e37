"""The folder that an export is written to: it stays the one that it is, and is whole or as it was."""

import errno
import os
import tempfile
from pathlib import Path

import pytest

from lin_jax.errors import UserError
from lin_jax.hub.save import atomic_folder, check_output_folder


def fill(folder: Path, *, overwrite: bool = False) -> None:
    with atomic_folder(folder, overwrite=overwrite) as partial:
        for name in ("config.json", "model.safetensors"):
            (partial / name).write_text("new")


def content(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() if path.is_file() else "" for path in folder.iterdir()}


NEW = {"config.json": "new", "model.safetensors": "new"}


def test_the_working_folder_is_written_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    monkeypatch.chdir(folder)
    before = folder.stat().st_ino
    fill(Path())
    # A shell that is at work there still is.
    assert folder.stat().st_ino == before
    assert sorted(os.listdir()) == sorted(NEW)
    assert content(folder) == NEW
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_mount_or_a_closed_parent_is_written_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither can be renamed, and beside them nothing can be made; a new file system has a folder of its own."""
    folder = tmp_path / "parent/out"
    (folder / "lost+found").mkdir(parents=True)
    mkdir, replace = os.mkdir, os.replace

    def refusing(path: str | Path, *rest: object) -> None:
        if Path(path).parent == folder.parent:
            raise PermissionError(errno.EACCES, "Permission denied")
        mkdir(path)

    def busy(source: Path, target: Path) -> None:
        if folder in (source, target):
            raise OSError(errno.EBUSY, "Device or resource busy")
        replace(source, target)

    monkeypatch.setattr(os, "mkdir", refusing)
    monkeypatch.setattr(os, "replace", busy)
    fill(folder)
    assert content(folder) == {**NEW, "lost+found": ""}


def test_a_parent_that_cannot_be_written_is_found_out_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(prefix: str, dir: Path) -> str:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "mkdtemp", refusing)
    with pytest.raises(UserError) as error:
        check_output_folder(tmp_path / "new/out", overwrite=False)
    assert str(error.value) == f"cannot write to {tmp_path}: Read-only file system; give another folder"


def test_other_places_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/old").write_text("old")
    for name, message in (
        ("file", "is a file"),
        ("file/out", "cannot write to"),
        ("link", "is a link that leads nowhere"),
        ("full", "is not empty; give another folder, or --overwrite"),
    ):
        with pytest.raises(UserError, match=message):
            fill(tmp_path / name)
    check_output_folder(tmp_path / "full", overwrite=True)
    check_output_folder(tmp_path / "new/out", overwrite=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full", "link"]


def test_a_linked_folder_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "out").symlink_to("far")
    fill(tmp_path / "out")
    assert (tmp_path / "out").is_symlink()
    assert content(tmp_path / "far") == NEW


def test_overwriting_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = {"config.json": "old", "other.txt": "old"}
    for name, text in old.items():
        (tmp_path / name).write_text(text)
    replace, moved = os.replace, []

    def failing(source: Path, target: Path) -> None:
        moved.append(source)
        if len(moved) == 4:
            raise OSError(errno.EIO, "Input/output error")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing)
        with pytest.raises(UserError, match="Input/output error; give another folder"):
            fill(tmp_path, overwrite=True)
    assert content(tmp_path) == old
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path, overwrite=True) as partial:
        (partial / "config.json").write_text(str(1 / 0))
    assert content(tmp_path) == old
    moved.clear()
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda source, target: (moved.append(source), replace(source, target)))
        fill(tmp_path, overwrite=True)
    assert content(tmp_path) == NEW
    # What readers look for first comes last.
    assert [path.name for path in moved[-2:]] == ["model.safetensors", "config.json"]
