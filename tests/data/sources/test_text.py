import gzip
import json
import logging
import lzma
import subprocess
import sys
from pathlib import Path

import pytest
from support.processes import SHARED

from lin_jax.data import DataConfig, Document, open_documents, read_documents, split_documents, stream_documents
from lin_jax.errors import UserError

ROWS = [{"text": f"row {number} é", "note": f"note {number}", "count": number} for number in range(30)]


def write_tables(folder: Path) -> dict[str, Path]:
    """One table in every format that is read, with the same rows."""
    from datasets import Dataset

    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    csv = "text,note,count\n" + "".join(f"{row['text']},{row['note']},{row['count']}\n" for row in ROWS)
    (folder / "a.jsonl").write_bytes(lines)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (folder / "a.jsonl.xz").write_bytes(lzma.compress(lines))
    (folder / "a.json").write_text(json.dumps(ROWS))
    (folder / "a.csv").write_text(csv)
    dataset = Dataset.from_list(ROWS)
    dataset.to_parquet(folder / "a.parquet")
    dataset.save_to_disk(folder / "saved")
    (folder / "saved/data-00000-of-00001.arrow").rename(folder / "a.arrow")
    return {path.name: path for path in folder.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    return write_tables(tmp_path_factory.mktemp("tables"))


def message(error: pytest.ExceptionInfo[UserError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_standard_library_is_a_corpus():
    documents = read_documents(DataConfig())
    size = sum(len(document.text) for document in documents)
    assert 3_000_000 < size < 20_000_000
    assert len(documents) > 200
    parts = {part for document in documents for part in document.name.split("/")}
    assert parts.isdisjoint({"site-packages", "dist-packages", "test", "tests", "idle_test"})
    assert documents == read_documents(DataConfig())


def test_folder_is_read_in_order_without_binary_and_hidden_files(tmp_path, caplog):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git/config").write_text("hidden")
    (tmp_path / "b/2.md").write_bytes("\ufeffé\r\n".encode())
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "image.bin").write_bytes(b"\x00\x01")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "broken.gz").write_bytes(b"not gzip")
    (tmp_path / "packed.txt.gz").write_bytes(gzip.compress(b"gzip"))
    (tmp_path / "packed.txt.xz").write_bytes(lzma.compress(b"xz"))
    (tmp_path / "rows.jsonl").write_text('{"text": "row"}\n{"text": null}\n{"text": " "}\n')
    with caplog.at_level(logging.WARNING):
        documents = read_documents(DataConfig(source=str(tmp_path)))
    assert [(document.name, document.text) for document in documents] == [
        ("a.txt", "first"),
        ("b/2.md", "é\r\n"),
        ("packed.txt.gz", "gzip"),
        ("packed.txt.xz", "xz"),
        ("rows.jsonl:0", "row"),
    ]
    assert "left out 3 files" in caplog.text


def test_separator_cuts_text_files_into_documents(tmp_path):
    path = tmp_path / "stories.txt"
    path.write_text("one\n<|endoftext|>\n two\nlines\n<|endoftext|>\n\n<|endoftext|>three")
    documents = read_documents(DataConfig(source=str(path), document_separator="<|endoftext|>"))
    assert [document.text for document in documents] == ["one", " two\nlines", "three"]


def test_end_of_text_is_found(tmp_path, caplog):
    """Files that hold the marker are cut unless nobody is to; code that quotes it, and others, stay whole."""
    stories, quoted, both = tmp_path / "stories.txt", tmp_path / "code.py", tmp_path / "said.txt"
    stories.write_text("one\n<|endoftext|>\ntwo")
    quoted.write_text("end = '<|endoftext|>'\nother = \"<|endoftext|>\"\n")
    both.write_text('"Bye!"<|endoftext|>He said "no" <|endoftext|>"Yes."')
    (tmp_path / "plain.txt").write_text("no marker")
    documents = read_documents(DataConfig(str(tmp_path)))
    assert [each.text for each in documents if each.name.startswith("stories")] == ["one", "two"]
    assert [each.text for each in documents if each.name.startswith("said")] == ['"Bye!"', 'He said "no" ', '"Yes."']
    assert [each.name for each in documents if "<|" in each.text or "no marker" in each.text] == [
        "code.py",
        "plain.txt",
    ]
    assert caplog.text.count(f"2 files (said.txt first) of {tmp_path} cut into documents at <|endoftext|>") == 1
    assert len(read_documents(DataConfig(str(stories), document_separator=None))) == 1
    read_documents(DataConfig(str(tmp_path)))
    assert caplog.text.count("cut into documents") == 1


@pytest.mark.parametrize("limit", [1, 2, 5, 8, 100])
def test_max_bytes_caps_the_text_between_characters(tmp_path, limit):
    (tmp_path / "a.txt").write_text("aéi", encoding="utf-8")
    (tmp_path / "b.txt").write_text("long text", encoding="utf-8")
    documents = read_documents(DataConfig(source=str(tmp_path), max_bytes=limit))
    data = "".join(document.text for document in documents).encode()
    assert len(data) <= limit
    assert "aéilong text".encode().startswith(data)
    assert len(data) >= min(limit, 13) - 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the CSV reader leaves its file open
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.xz", "a.json", "a.csv", "a.parquet", "a.arrow"])
def test_tables_of_every_format(tables, name):
    assert name in tables
    config = DataConfig(source=str(tables[name]), text_field="note")
    assert [document.text for document in read_documents(config)] == [row["note"] for row in ROWS]
    streamed = open_documents(DataConfig(source=str(tables[name]), streaming=True))
    assert list(streamed) == [{"text": row["text"]} for row in ROWS]
    with pytest.raises(UserError) as error:
        read_documents(DataConfig(source=str(tables[name]), text_field="missing"))
    assert "'missing'" in message(error)
    assert "count, note, text" in message(error)
    counted = DataConfig(source=str(tables[name]), streaming=True, text_field="count")
    if name == "a.csv":
        assert [row["text"] for row in stream_documents(counted)] == [str(row["count"]) for row in ROWS]
    else:
        with pytest.raises(UserError) as error:
            stream_documents(counted)
        assert "text_field" in message(error)


def test_folder_of_tables_streams_file_after_file(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.jsonl").write_text(f'{{"text": "{number}"}}\n')
    stream = stream_documents(DataConfig(source=str(tmp_path), streaming=True))
    assert [row["text"] for row in stream] == ["0", "1", "2"]


def test_local_tables_are_read_without_network(tables):
    program = f"""
import socket
def refuse(*arguments, **options): raise SystemExit("network")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from lin_jax.data import DataConfig, read_documents
print(len(read_documents(DataConfig(source={str(tables["a.jsonl"])!r}))))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout.strip()) == (0, "30"), result.stderr


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_data_sets_are_opened_by_name(monkeypatch, streaming):
    import datasets

    def load(name, subset, *, split, streaming):
        if split != "train":
            raise ValueError(f"Unknown split {split!r}.\nShould be one of ['train'].")
        assert (name, subset) == ("owner/name", "raw")
        rows = datasets.Dataset.from_list(ROWS)
        return rows.to_iterable_dataset() if streaming else rows

    monkeypatch.setattr(datasets, "load_dataset", load)
    config = DataConfig(source="hub:owner/name", subset="raw", text_field="note", streaming=streaming)
    found = [row["text"] if streaming else row.text for row in open_documents(config)]
    assert found == [row["note"] for row in ROWS]
    with pytest.raises(UserError, match="cannot read hub:owner/name: Unknown split"):
        open_documents(DataConfig(source="hub:owner/name", split="tests", streaming=streaming))


def test_unreadable_sources_say_what_to_do(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "blank.txt").write_text("\n")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\x00")
    (tmp_path / "torn.gz").write_bytes(gzip.compress(b"text" * 100)[:-9])
    (tmp_path / "torn.jsonl").write_text('{"text": "a"\n{{{')
    (tmp_path / "none.jsonl").write_text("")
    for name, expected in [
        ("missing.txt", "does not exist"),
        ("empty", "holds no text"),
        ("blank.txt", "holds no text"),
        ("image.png", "not readable as UTF-8"),
        ("torn.gz", "not readable as UTF-8"),
        ("torn.jsonl", "cannot read"),
        ("none.jsonl", "none.jsonl"),
    ]:
        with pytest.raises(UserError) as error:
            read_documents(DataConfig(source=str(tmp_path / name)))
        assert expected in message(error)
        assert name in message(error)
    for name in ("empty", "blank.txt"):
        with pytest.raises(UserError) as error:
            stream_documents(DataConfig(source=str(tmp_path / name), streaming=True))
        assert "leave streaming off" in message(error)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"vocab_size": 256}, "257"),
        ({"sequence_length": 0}, "sequence_length 0"),
        ({"validation_batches": 0}, "validation_batches 0"),
        ({"validation_fraction": 0.0}, "validation_fraction 0.0"),
        ({"validation_fraction": 1.0}, "validation_fraction 1.0"),
        ({"max_bytes": 0}, "max_bytes 0"),
        ({"document_separator": ""}, "document_separator"),
        ({"source": ""}, "is empty"),
        ({"source": "hub:"}, "is empty"),
        ({"subset": "raw"}, "subset 'raw'"),
        ({"streaming": True}, "streaming"),
        ({"source": "x.jsonl", "streaming": True, "max_bytes": 5}, "max_bytes 5"),
    ],
)
def test_bad_options_are_refused_at_once(options, expected):
    with pytest.raises(UserError) as error:
        DataConfig(**options)
    assert expected in message(error)


def texts(documents) -> list[str]:
    return [document.text for document in documents]


@pytest.mark.parametrize("fraction", [0.001, 0.05, 0.3, 0.999])
@pytest.mark.parametrize("count", [2, 3, 10, 500])
def test_split_is_disjoint_complete_and_never_empty(fraction, count):
    documents = [Document(f"{number}", f"text {number % max(2, count // 2)}") for number in range(count)]
    train, validation = split_documents(documents, fraction)
    assert train
    assert validation
    assert set(texts(train)).isdisjoint(texts(validation))
    assert sorted(texts(train) + texts(validation)) == sorted(texts(documents))
    if count == 500:
        share = len(validation) / count
        assert abs(share - fraction) < 0.08


def test_split_does_not_depend_on_order_or_company():
    documents = [Document(str(number), f"text {number}") for number in range(200)]
    _, validation = split_documents(documents, 0.2)
    _, again = split_documents(documents[::-1], 0.2)
    assert set(validation) == set(again)
    _, of_half = split_documents(documents[:100], 0.2)
    assert set(of_half) == {document for document in validation if document in documents[:100]}


@pytest.mark.parametrize("copies", [1, 3])
def test_the_only_text_loses_its_tail(copies):
    text = "".join(f"line {number}\n" for number in range(100))
    train, validation = split_documents([Document("book", text)] * copies, 0.1)
    assert train[0].text + validation[0].text == text
    assert 0.05 * len(text) < len(validation[0].text) < 0.2 * len(text)
    assert validation[0].text.startswith("line")
    with pytest.raises(UserError):
        split_documents([Document("letter", "a")], 0.1)
    with pytest.raises(UserError):
        split_documents([], 0.1)


def test_stream_splits_like_documents_in_memory(tables):
    source = str(tables["a.parquet"])
    held_out = split_documents(read_documents(DataConfig(source=source)), 0.3)
    streams = split_documents(stream_documents(DataConfig(source=source, streaming=True)), 0.3)
    for documents, stream in zip(held_out, streams, strict=True):
        assert texts(documents) == [row["text"] for row in stream]


def test_published_files():
    if not SHARED.exists():
        pytest.skip("the folder of public data is not here")
    config = DataConfig(source=str(SHARED / "human_eval/HumanEval.jsonl.gz"), text_field="prompt")
    assert len(read_documents(config)) == 164
    books = read_documents(DataConfig(source=str(SHARED / "books")))
    assert len(books) >= 10
    assert all(len(book.text) > 500_000 for book in books)
    stories = SHARED / "tinystories/v2_train_head.txt.xz"
    config = DataConfig(source=str(stories), document_separator="<|endoftext|>")
    assert len(read_documents(config)) > 1000
