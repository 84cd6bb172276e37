"""Tokenizers in their first published files: known token numbers, and the same again after saving."""

import importlib.util
import shutil
from pathlib import Path

import pytest

from lin_jax.data import load_tokenizer
from lin_jax.data.tokenizers.formats import original_reader
from lin_jax.errors import UserError

# Token numbers that documentation and papers of the models give for these texts.
KNOWN = {
    "gpt2": ("Hello world", [15496, 995], 50257),
    "bert-base-uncased": ("Hello, my dog is cute", [7592, 1010, 2026, 3899, 2003, 10140], 30522),
    "t5": (
        "translate English to German: The house is wonderful.",
        [13959, 1566, 12, 2968, 10, 37, 629, 19, 1627, 5],
        32100,
    ),
    "llama2": ("Hello world", [15043, 3186], 32000),
}


@pytest.mark.parametrize("name", KNOWN)
def test_published_numbers(name: str, shared_data: Path, tmp_path: Path) -> None:
    text, ids, size = KNOWN[name]
    tokenizer = load_tokenizer(shared_data / "tokenizers" / name)
    assert tokenizer.encode(text).tolist() == ids
    assert tokenizer.vocab_size == size
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint
    for special in ("bos_token", "eos_token", "cls_token", "sep_token", "pad_token"):
        assert again.special_id(special) == tokenizer.special_id(special)
    strange = "Caf\u00e9 \ufb01ne\u3000 \u00bd \u4e2d\u6587 [SEP] it's"
    assert again.encode(strange).tolist() == tokenizer.encode(strange).tolist()


def test_special_tokens(shared_data: Path) -> None:
    bert, t5 = (load_tokenizer(shared_data / "tokenizers" / name) for name in ("bert-base-uncased", "t5"))
    assert [bert.special_id(f"{name}_token") for name in ("pad", "cls", "sep")] == [0, 101, 102]
    assert (t5.eos_id, t5.special_id("pad_token"), t5.bos_id) == (1, 0, None)
    assert t5.encode("<extra_id_0>").tolist() == [32099]
    # Uncased: letters are lowered and lose their accents.
    assert bert.encode("CAF\u00c9").tolist() == bert.encode("cafe").tolist()


def test_damaged_files(shared_data: Path, tmp_path: Path) -> None:
    model = tmp_path / "spiece.model"
    model.write_bytes((shared_data / "tokenizers" / "t5" / "spiece.model").read_bytes()[:1001])
    with pytest.raises(UserError, match="it ends within"):
        load_tokenizer(tmp_path)
    model.write_bytes((shared_data / "tokenizers" / "llama2" / "tokenizer.model").read_bytes())
    with pytest.raises(UserError, match="does not hold T5's unigrams"):
        load_tokenizer(tmp_path)
    shutil.copyfile(shared_data / "tokenizers" / "gpt2" / "encoder.json", tmp_path / "encoder.json")
    model.unlink()
    with pytest.raises(UserError, match="cannot read a tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_pieces_beside_a_configuration(
    model_type: str, tmp_path: Path, shared_data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Transformers wants libraries for such a folder that are not there, and says so in five lines."""
    shutil.copyfile(shared_data / "tokenizers/llama2/tokenizer.model", tmp_path / "tokenizer.model")
    alone = load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(f'\ufeff{{"model_type": "{model_type}"}}', encoding="utf-8")
    beside = load_tokenizer(tmp_path)
    text = "Once upon a time  é\n"
    assert beside.encode(text).tolist() == alone.encode(text).tolist()
    assert (beside.bos_id, beside.eos_id, beside.vocab_size) == (1, 2, 32000)
    assert tuple(capfd.readouterr()) == ("", "")


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("gpt2", "gpt2"),
        ("lin_jax_gpt2", "gpt2"),
        ("t5", "t5"),
        ("lin_jax_t5", "t5"),
        ("lin_jax_bert", "bert-base-uncased"),
        ("lin_jax_llama", "llama2"),
    ],
)
def test_first_files_beside_a_configuration(
    model_type: str, name: str, tmp_path: Path, shared_data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Files that transformers does not know by name, or reads with other packages, or of our linearized models."""
    folder = Path(shutil.copytree(shared_data / "tokenizers" / name, tmp_path / "folder"))
    (folder / "config.json").write_text(f'{{"model_type": "{model_type}"}}')
    text, ids, size = KNOWN[name]
    found = load_tokenizer(folder)
    assert (found.encode(text).tolist(), found.vocab_size) == (ids, size)
    assert tuple(capfd.readouterr()) == ("", "")


@pytest.mark.parametrize(
    ("model_type", "name", "message"),
    [
        ("bert", None, "a BertTokenizer without a vocabulary (vocab.txt, tokenizer.json); give a folder"),
        ("gpt2", None, "a GPT2Tokenizer without a vocabulary (vocab.json, merges.txt); give a folder"),
        ("qwen2", "gpt2", "a Qwen2Tokenizer without a vocabulary (vocab.json, merges.txt, tokenizer.json)"),
        ("llama", "bert-base-uncased", "Couldn't instantiate the backend tokenizer; give a folder"),
        ("mt5", "t5", "spiece.model is read with the package sentencepiece; install it (pip install sentencepiece)"),
        ("gemma", "llama2", "tokenizer.model is read with the package sentencepiece"),
    ],
)
def test_folders_without_a_tokenizer(
    model_type: str,
    name: str | None,
    message: str,
    tmp_path: Path,
    shared_data: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Transformers makes some of these of defaults alone, to which every text is unknown tokens."""
    found = importlib.util.find_spec
    without = lambda name, *rest: None if name == "sentencepiece" else found(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", without)
    folder = tmp_path / "folder"
    folder.mkdir()
    for file in (shared_data / "tokenizers" / name).iterdir() if name is not None else ():
        shutil.copyfile(file, folder / file.name)
    (folder / "config.json").write_text(f'{{"model_type": "{model_type}"}}')
    with pytest.raises(UserError) as caught:
        load_tokenizer(folder)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert tuple(capfd.readouterr()) == ("", "")


def test_a_byte_order_mark_before_pieces(tmp_path: Path, shared_data: Path) -> None:
    """It would be a part of the first piece, which pads."""
    pieces = (shared_data / "tokenizers/bert-base-uncased/vocab.txt").read_text(encoding="utf-8")
    for name, encoding in (("plain", "utf-8"), ("marked", "utf-8-sig")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vocab.txt").write_text(pieces, encoding=encoding)
    plain, marked = (load_tokenizer(tmp_path / name) for name in ("plain", "marked"))
    assert marked.fingerprint == plain.fingerprint
    assert marked.special_id("pad_token") == 0


def test_other_files_beside_a_configuration_are_for_transformers(tmp_path: Path) -> None:
    """Vocabularies of one form belong to models that split texts in different ways."""
    for name in ("vocab.json", "merges.txt", "config.json"):
        (tmp_path / name).write_text('{"model_type": "qwen2"}')
    assert original_reader(tmp_path) is None
    (tmp_path / "tokenizer.model").write_text("")
    assert original_reader(tmp_path) is None
