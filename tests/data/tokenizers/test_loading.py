"""Tokenizers opened from what was saved, and the one that a configuration names or has trained."""

import json
import shutil
from pathlib import Path

import pytest
import tokenizers

from lin_jax.data import DataConfig, Document, Tokenizer, load_tokenizer, prepare_tokenizer
from lin_jax.data.tokenizers import loading
from lin_jax.errors import UserError

TEXTS = ["def add(a, b):\n    return a + b\n" * 5, "The café is open — naïve 😀 日本語.", Path(__file__).read_text()]


@pytest.fixture(scope="module")
def trained():
    return Tokenizer.train(TEXTS, 400)


def test_saved_folder_opens_here_and_in_transformers(trained, tmp_path):
    from transformers import AutoTokenizer

    trained.save(tmp_path)
    assert {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"} <= {
        path.name for path in tmp_path.iterdir()
    }
    assert json.loads((tmp_path / "special_tokens_map.json").read_text())["eos_token"] == "<|endoftext|>"
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for loaded in (load_tokenizer(tmp_path), load_tokenizer(tmp_path / "tokenizer.json")):
        assert (loaded.eos_id, loaded.bos_id) == (trained.eos_id, None)
        assert loaded.fingerprint == trained.fingerprint
        for text in [*TEXTS, " two  spaces <|endoftext|> . n't"]:
            assert loaded.encode(text).tolist() == trained.encode(text).tolist() == theirs(text)["input_ids"]
            assert theirs.decode(theirs(text)["input_ids"]) == text
    again = tmp_path / "again"
    load_tokenizer(tmp_path).save(again)
    assert load_tokenizer(again).fingerprint == trained.fingerprint


def test_a_saved_folder_needs_no_transformers(trained, tmp_path, monkeypatch):
    """What is read without transformers is what transformers reads; what it would read otherwise is left to it."""
    trained.save(tmp_path)
    read = loading._from_transformers
    theirs = read(str(tmp_path))
    monkeypatch.setattr(loading, "_from_transformers", None)
    ours = load_tokenizer(tmp_path)
    monkeypatch.setattr(loading, "_from_transformers", read)
    assert ours.backend.to_str() == theirs.backend.to_str()
    assert (ours.eos_id, ours.bos_id, ours.begin_ids) == (theirs.eos_id, theirs.bos_id, theirs.begin_ids)
    assert ours.encoding_fingerprint == theirs.encoding_fingerprint == trained.encoding_fingerprint
    file = tmp_path / "tokenizer_config.json"
    said = json.loads(file.read_text())
    for change in ({"add_bos_token": True}, {"tokenizer_class": "LlamaTokenizerFast"}, {"bos_token": "<new>"}):
        file.write_text(json.dumps(said | change))
        assert loading._as_written(tmp_path) is None
    file.write_text(json.dumps(said))
    assert loading._as_written(tmp_path) is not None
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert loading._as_written(tmp_path) is None


def test_truncation_in_a_file_does_not_cut_texts(trained, tmp_path):
    backend = tokenizers.Tokenizer.from_str(trained.backend.to_str())
    backend.enable_truncation(4)
    backend.enable_padding(length=9)
    backend.save(str(tmp_path / "tokenizer.json"))
    text = TEXTS[0]
    assert load_tokenizer(tmp_path / "tokenizer.json").decode(trained.encode(text)) == text


def test_unreadable_tokenizers_say_what_to_do(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "missing", tmp_path / "tokenizer.json", tmp_path / "folder"):
        with pytest.raises(UserError) as error:
            load_tokenizer(path)
        assert str(path) in str(error.value)
        assert "tokenizer.json" in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name",
    ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json"],
)
def test_byte_order_marks(name, trained, tmp_path):
    """Some editors put one in front; the tokenizer is the same, and saves files without it."""
    plain, marked = tmp_path / "plain", tmp_path / "marked"
    trained.save(plain)
    (plain / "config.json").write_text('{"model_type": "llama"}')
    (plain / "added_tokens.json").write_text(json.dumps({"<more>": trained.vocab_size}))
    shutil.copytree(plain, marked)
    (marked / name).write_text((plain / name).read_text(), encoding="utf-8-sig")
    before = (marked / name).read_bytes()
    found, expected = load_tokenizer(marked), load_tokenizer(plain)
    assert (found.fingerprint, found.eos_id) == (expected.fingerprint, expected.eos_id)
    if name == "tokenizer.json":
        assert load_tokenizer(marked / name).fingerprint == trained.fingerprint
    found.save(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").fingerprint == expected.fingerprint
    assert str(marked) not in (tmp_path / "again" / "tokenizer_config.json").read_text()
    assert (marked / name).read_bytes() == before


def test_configuration_chooses_the_tokenizer(trained, tmp_path):
    documents = [Document(str(number), text) for number, text in enumerate(TEXTS)]
    assert prepare_tokenizer(DataConfig(vocab_size=400), documents).fingerprint == trained.fingerprint
    trained.save(tmp_path)
    config = DataConfig(tokenizer=str(tmp_path))
    assert prepare_tokenizer(config, documents).fingerprint == trained.fingerprint
