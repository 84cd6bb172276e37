"""Files below a folder, with links and loops, and compressed ones."""

import bz2
import gzip
import logging
import lzma
import os
import socket
from pathlib import Path

import pyarrow
import pytest

from lin_jax.data import DataConfig, read_documents, stream_documents
from lin_jax.data.sources.files import list_files
from lin_jax.errors import UserError


def zstandard(content: bytes) -> bytes:
    out = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(out, "zstd") as file:
        file.write(content)
    return out.getvalue().to_pybytes()


PACKERS = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress, ".zst": zstandard}


def found(folder: Path) -> dict[str, str]:
    return {document.name: document.text for document in read_documents(DataConfig(source=str(folder)))}


def test_linked_folders_are_read_once_each(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    corpus, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
    for folder in (corpus / "inner", elsewhere / "deep"):
        folder.mkdir(parents=True)
    (corpus / "b.txt").write_text("own")
    (corpus / "inner/c.txt").write_text("inner")
    (elsewhere / "a.txt").write_text("linked")
    (elsewhere / "deep/d.txt").write_text("deeper")
    (corpus / "link").symlink_to(elsewhere)
    expected = {"b.txt": "own", "inner/c.txt": "inner", "link/a.txt": "linked", "link/deep/d.txt": "deeper"}
    assert found(corpus) == expected
    assert caplog.text == ""

    # A loop, a second link, a link to what has a place of its own, and one back from elsewhere.
    (corpus / "self").symlink_to(corpus)
    (corpus / "again").symlink_to(elsewhere / "deep")
    (corpus / "a_link").symlink_to("inner")
    (elsewhere / "back").symlink_to(corpus)
    (corpus / "gone.txt").symlink_to("nowhere")
    os.mkfifo(corpus / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(corpus / "socket"))
        # "again" comes before "link", and so its folder is read under that name.
        assert found(corpus) == {
            "again/d.txt" if name == "link/deep/d.txt" else name: text for name, text in expected.items()
        }
    assert [record.getMessage().removeprefix(f"{corpus}: left out ") for record in caplog.records] == [
        "4 linked folders that are read already, a_link first",
        "1 links that lead nowhere, gone.txt first",
        "2 sockets, pipes and devices, pipe first",
    ]


def test_a_folder_of_links_alone(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/a.jsonl").write_text('{"text": "row"}\n')
    (tmp_path / "only").mkdir()
    (tmp_path / "only/link").symlink_to("../elsewhere")
    assert found(tmp_path / "only") == {"link/a.jsonl:0": "row"}
    stream = stream_documents(DataConfig(source=str(tmp_path / "only"), streaming=True))
    assert list(stream) == [{"text": "row"}]
    (tmp_path / "root").symlink_to("only")
    assert list_files(tmp_path / "root") == [tmp_path / "root/link/a.jsonl"]


def test_a_folder_that_cannot_be_opened_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.txt").write_text("text")
    real = os.listdir

    def listdir(folder: Path) -> list[str]:
        if folder.name == "closed":
            raise PermissionError(13, "Permission denied")
        return real(folder)

    monkeypatch.setattr(os, "listdir", listdir)
    assert found(tmp_path) == {"a.txt": "text"}
    assert "left out 1 folders that cannot be opened, closed first" in caplog.text


@pytest.mark.parametrize("ending", [*PACKERS, *map(str.upper, PACKERS)])
def test_compressed_texts_and_tables(ending: str, tmp_path: Path) -> None:
    pack = PACKERS[ending.lower()]
    (tmp_path / f"a.txt{ending}").write_bytes(pack("\ufeffé".encode()))
    # Packed in two parts, as logs are.
    (tmp_path / f"b.JSONL{ending}").write_bytes(pack(b'{"text": "one"}\n{"text": "tw') + pack(b'o"}\n'))
    assert list(found(tmp_path).values()) == ["é", "one", "two"]
    table = str(tmp_path / f"b.JSONL{ending}")
    assert list(stream_documents(DataConfig(source=table, streaming=True))) == [{"text": "one"}, {"text": "two"}]


@pytest.mark.parametrize("ending", PACKERS)
@pytest.mark.parametrize("name", ["torn.txt", "torn.jsonl"])
def test_torn_files_are_refused(ending: str, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / f"{name}{ending}"
    path.write_bytes(PACKERS[ending](b'{"text": "text"}\n' * 10 + os.urandom(200))[:-40])
    with pytest.raises(UserError) as error:
        found(path)
    assert path.name in str(error.value)
    assert "\n" not in str(error.value)
    assert caplog.text == ""
    # Damaged in the middle.
    content = bytearray(PACKERS[ending](bytes(range(256)) * 40))
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    path.write_bytes(content)
    with pytest.raises(UserError):
        found(path)


def test_a_torn_file_in_a_folder_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for ending, pack in PACKERS.items():
        (tmp_path / f"torn.txt{ending}").write_bytes(pack(os.urandom(400))[:-90])
    (tmp_path / "whole.txt").write_text("text")
    with caplog.at_level(logging.WARNING):
        assert found(tmp_path) == {"whole.txt": "text"}
    assert "left out 4 files that are not UTF-8 text" in caplog.text
