"""Rows of tables that are text: the right words, or one line that says where the table is wrong."""

import json
import logging
from pathlib import Path

import pandas
import pytest
from datasets import Dataset, IterableDataset
from support.processes import ROOT

from lin_jax.data import DataConfig, Tokenizer, open_documents, read_documents, stream_documents
from lin_jax.errors import UserError


def found(path: Path, column: str = "text") -> list[str]:
    """Texts of a file, the same in memory and as a stream."""
    texts = [document.text for document in read_documents(DataConfig(source=str(path), text_field=column))]
    stream = stream_documents(DataConfig(source=str(path), text_field=column, streaming=True))
    assert [row["text"] for row in stream] == texts
    return texts


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


WORDS = [
    "NA",
    "hello there world",
    "null",
    "None",
    "nan",
    "N/A",
    "real row",
    "007",
    "42",
    "1e5",
    "true",
    "#N/A",
    "-inf",
]


@pytest.mark.parametrize("words", [WORDS, ["007", "42"], ["007", "hello"]])
def test_every_cell_is_text(words: list[str], tmp_path: Path) -> None:
    assert found(write(tmp_path, "words.csv", "\n".join(["text", *words]))) == words
    assert found(write(tmp_path, "words.tsv", "\n".join(["n\ttext", *(f"1\t{word}" for word in words)]))) == words


@pytest.mark.parametrize(
    "content",
    [
        'text,n\n"a,b",1\n"x\ny",2\n,3\n"d""q",4\n\n"  ",5\nlast,6',
        "\ufefftext,n\r\na,1\r\nb,2\r\n",
        'n,text\n1\n2,x\n3,"y" z\n',
        "text,text\nfirst,second\n",
        "text,n\né😀\u2028é,1\n",
        "text\n" + "long " * 100_000,
    ],
)
def test_cells_are_those_of_pandas(content: str, tmp_path: Path) -> None:
    path = write(tmp_path, "table.csv", content)
    cells = pandas.read_csv(path, dtype=str, keep_default_na=False)["text"].fillna("")
    assert found(path) == [cell for cell in cells if cell.strip()]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.ndjson", "rows.json", "ROWS.NDJSON"])
@pytest.mark.parametrize(
    "content",
    [
        '{"text": "a", "n": 1}\n{"n": 2, "text": "b"}\n{"text": null}\n{"n": 3}\n{"text": "\\u2028é"}\n',
        '{"n": 1}\r\n{"text": "late"}\r\n',
        '[\n{"text": "a"},\n{"text": "b"}\n]\n',
        '[{"text": "a"}, {"text": "b"}]',
        '{\n"text": "a",\n"n": 1\n}',
    ],
)
def test_objects_are_those_of_datasets(name: str, content: str, tmp_path: Path) -> None:
    path = write(tmp_path, name, content)
    rows = IterableDataset.from_json(str(path))
    assert found(path) == [row["text"] for row in rows if row["text"] is not None]


def test_byte_order_marks_are_no_text(tmp_path: Path) -> None:
    rows = '{"text": "one"}\n'
    assert found(write(tmp_path, "one.jsonl", "\ufeff" + rows)) == ["one"]
    assert found(write(tmp_path, "two.jsonl", ("\ufeff" + rows) * 2)) == ["one", "one"]
    assert found(write(tmp_path, "list.json", '\ufeff[\n{"text": "one"}]')) == ["one"]
    assert found(write(tmp_path, "cells.csv", "\ufefftext\none\n")) == ["one"]
    plain = write(tmp_path, "plain.txt", "\ufeffone")
    assert [document.text for document in read_documents(DataConfig(source=str(plain)))] == ["one"]


def test_half_a_character_is_mended_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"text": f"row {number}"} for number in range(1000)]
    rows[500] = {"text": "bad \ud83d here, good \ud83d\ude00 there, \ude00\ud83d"}
    path = write(tmp_path, "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    with caplog.at_level(logging.DEBUG):
        texts = [document.text for document in read_documents(DataConfig(source=str(path)))]
    assert len(texts) == 1000
    assert texts[500] == "bad \ufffd here, good 😀 there, \ufffd\ufffd"
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert said == [f"{path}: 1 rows have half a character, now U+FFFD; row 501 is the first"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text":\n', "line 2 is no JSON"),
        ("a.jsonl", '{"text": "a"\n{{{', "line 1 is no JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "line 2 is no JSON ('utf-8' codec can't decode"),
        ("a.jsonl", '{"text": "a"}\n5\n', "line 2 of"),
        ("a.jsonl", '{"text": "a"}\n{"text": 7}\n', "holds 7 in line 2, not text; set text_field"),
        ("a.jsonl", '{"text": [{"role": "user"}]}\n', "holds a list in line 1, not text; set text_field"),
        ("a.jsonl", '{"messages": []}\n', "one of its columns: messages (docs/data.md says how conversations"),
        ("a.jsonl", '{"text": ' + "[" * 100_000 + "\n", "line 1 is no JSON"),
        ("a.jsonl", "\n \n", "has no rows"),
        ("a.jsonl", "", "has no rows"),
        ("a.json", "[]", "has no rows"),
        ("a.json", "[1]", "row 1 of"),
        ("a.json", '{\n"text": ["a", "b"]\n}', "holds a list in row 1, not text"),
        ("a.csv", 'text,n\n"a,b,1\nfoo,2\n', "a quote that begins in line 2 is not closed"),
        ("a.csv", "text,n\na,b,1\n", "line 2 has 3 cells, and the first line 2"),
        ("a.csv", "a,b\n1,2\n", "has no column 'text'; set text_field to one of its columns: a, b"),
        ("a.csv", "text\né\n".encode("latin-1"), "'utf-8' codec can't decode"),
        ("a.csv", "text\n", "has no rows"),
        ("a.csv", "", "has no rows"),
        ("a.parquet", "PAR1 and more", "Parquet"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_what_is_wrong_is_named(
    name: str,
    content: str | bytes,
    message: str,
    streaming: bool,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(UserError) as error:
        list(open_documents(DataConfig(source=str(path), streaming=streaming)))
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert (caplog.text, *capfd.readouterr()) == ("", "", "")


def test_trailing_separators_are_no_cells(tmp_path: Path) -> None:
    """The reader of datasets takes the first column of such a table for row names, and shifts the others."""
    assert found(write(tmp_path, "a.csv", "text,n\r\na,1,\r\nb,2,\r\n")) == ["a", "b"]


def test_the_documentation_turns_conversations_into_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs/data.md").read_text().split("## Conversations")[1]
    tokenizer = Tokenizer.train(["hello"], 300)
    tokenizer.save(tmp_path / "path/to/model")
    template = "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    (tmp_path / "path/to/model/chat_template.jinja").write_text(template)
    write(
        tmp_path, "chat.jsonl", '{"messages": [{"role": "user", "content": "hi"}, {"role": "bot", "content": "é"}]}\n'
    )
    monkeypatch.chdir(tmp_path)
    exec(page.split("```python")[1].split("```")[0], {})
    assert found(tmp_path / "texts.jsonl") == ["<user>hi\n<bot>é\n"]


def test_an_empty_table_beside_others_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, content in (("0.jsonl", ""), ("1.jsonl", '{"text": "row"}\n'), ("2.jsonl", "\n")):
        write(tmp_path, name, content)
    Dataset.from_dict({"text": []}).to_parquet(tmp_path / "3.parquet")
    assert found(tmp_path) == ["row"]
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"{tmp_path / name}: left out, it has no rows" for name in ("0.jsonl", "2.jsonl", "3.parquet")] * 2
    (tmp_path / "1.jsonl").unlink()
    with pytest.raises(UserError, match="holds no text"):
        read_documents(DataConfig(source=str(tmp_path)))
    with pytest.raises(UserError, match=r"3\.parquet has no rows"):
        stream_documents(DataConfig(source=str(tmp_path), streaming=True))
