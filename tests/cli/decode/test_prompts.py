"""Prompts from arguments, files and standard input, and from whatever else comes in their place."""

import io
import json
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lin_jax.cli.decode.prompts import given_prompts, read_prompts
from lin_jax.errors import UserError

TEXTS = ("x", "x\n", "a\r\nb\r\n", "a\rb", "", "\n", "\ta ", "a\u2028b\u2029c\x85d\x0be", "\ufeffx", "日本")


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """The same from an argument, a file and standard input; only a byte-order mark is left out."""
    file, table = tmp_path / "prompt.txt", tmp_path / "prompts.jsonl"
    file.write_bytes(text.encode())
    table.write_text(json.dumps({"prompt": text}) + "\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    expected = [text.removeprefix("\ufeff")]
    assert given_prompts(text, None) == given_prompts("", str(file)) == given_prompts("", "-") == expected
    # In a string of JSON a mark is a character like any other.
    assert read_prompts(table) == [text]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("name", ["p.jsonl", "p.ndjson", "p.JSONL"])
def test_a_line_is_a_prompt(tmp_path: Path, end: str, mark: bytes, name: str) -> None:
    """Lines end where JSON lines do, not at characters inside strings that Python takes for line ends."""
    prompts = ["a\u2028b", "c\u2029d\x85e", "", " "]
    lines = [json.dumps({"prompt": text}, ensure_ascii=False) for text in prompts]
    (tmp_path / name).write_bytes(mark + f"{end}  {end}".join([*lines, ""]).encode())
    assert read_prompts(tmp_path / name) == prompts


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"has no prompts; give a JSON object with the field 'prompt' a line"),
        ("\n  \n\n", "has no prompts"),
        ('{"prompt": null}', r"the prompt in line 1 of .* is null; give a string"),
        ('{"prompt": "x"}\n\n{"prompt": 5}', "the prompt in line 3 of .* is 5; give a string"),
        ('{"prompt": ["x"]}', r'is \["x"\]; give a string'),
        ('{"prompt": NaN}', "is NaN; give a string"),
        ('{"text": "x"}', "line 1 of .*: every line must be a JSON object with the field 'prompt'"),
        ("[1,2]", "every line must be"),
        ('{"prompt": "x"', "every line must be"),
        ("[" * 100_000, "every line must be"),
        ('{"prompt": ' + "9" * 5000 + "}", "every line must be"),
        ("\xff", "cannot be read .it is not UTF-8."),
    ],
    ids=range(12),
)
def test_what_is_no_prompt_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=message) as error:
        read_prompts(path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300 + len(str(path))


@pytest.mark.parametrize("place", ["missing.txt", ".", "a\0b"])
def test_what_is_no_file_is_refused(place: str) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_prompts(place)


def test_a_closed_standard_input_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert read_prompts("-") == [""]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["prompt", "text"]), inner),
    max_leaves=5,
)
LINES = st.one_of(
    VALUES.map(lambda value: json.dumps(value).encode()),
    st.text().map(lambda text: json.dumps({"prompt": text}, ensure_ascii=False).encode("utf-8", "replace")),
    st.binary(max_size=20),
    st.sampled_from([b"", b" ", b"\r", b"\xef\xbb\xbf", b'{"prompt": "\\ud83d"}', b'{"prompt": "a"}']),
)


@settings(deadline=None, max_examples=60)
@given(lines=st.lists(LINES, max_size=4), end=st.sampled_from([b"\n", b"\r\n"]))
def test_any_file_gives_prompts_or_a_line(tmp_path_factory: pytest.TempPathFactory, lines: list, end: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(end.join(lines))
    with suppress(UserError):
        prompts = read_prompts(path)
        assert prompts
        assert all(isinstance(prompt, str) for prompt in prompts)
