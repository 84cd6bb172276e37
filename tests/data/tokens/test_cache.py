import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from support.cells import some_of
from support.corpora import PARTS, TOKENIZER, assert_same, corpus, take
from tokenizers import pre_tokenizers

from lin_jax.data import DataConfig, Document, Tokenizer, load_tokenizer, training_batches
from lin_jax.data.tokens import progress
from lin_jax.data.tokens.cache import CachedTokens, cached_tokens
from lin_jax.data.tokens.file import DamagedError, read_tokens, write_tokens
from lin_jax.data.tokens.tokenized import TokenizedDocuments
from lin_jax.errors import UserError

DOCUMENTS = (*PARTS["a"], Document("long", "".join(f"line {number} of a book\n" for number in range(3000))))


def refuse(texts):
    raise AssertionError("tokenized again")


def files(folder):
    return sorted(path.suffix for path in folder.iterdir())


def assert_right(found, documents=DOCUMENTS, tokenizer=TOKENIZER):
    expected = TokenizedDocuments(documents, tokenizer)
    assert (len(found), found.fingerprint) == (len(expected), expected.fingerprint)
    for index in range(len(expected)):
        tokens = found[index]["tokens"]
        assert tokens.dtype == np.int32
        np.testing.assert_array_equal(tokens, expected[index]["tokens"])


def test_documents_are_tokenized_once(tmp_path, monkeypatch):
    folder = tmp_path / "deep" / "tokens"
    assert_right(cached_tokens(str(folder), DOCUMENTS, TOKENIZER))
    assert files(folder) == [".lock", ".tokens"]
    with monkeypatch.context() as patch:
        patch.setattr(TOKENIZER, "encode_batch", refuse)
        assert_right(cached_tokens(str(folder), DOCUMENTS, TOKENIZER))
        # Saved and loaded, a tokenizer is the same.
        TOKENIZER.save(tmp_path / "tokenizer")
        loaded = load_tokenizer(tmp_path / "tokenizer")
        patch.setattr(loaded, "encode_batch", refuse)
        assert_right(cached_tokens(str(folder), DOCUMENTS, loaded))
    assert_right(cached_tokens(str(folder), DOCUMENTS[1:], TOKENIZER), DOCUMENTS[1:])
    assert files(folder) == [".lock", ".lock", ".tokens", ".tokens"]


def test_tokenizers_that_only_cut_words_differently_have_files_of_their_own(tmp_path):
    other = Tokenizer(type(TOKENIZER.backend).from_str(TOKENIZER.backend.to_str()), eos_token="<|endoftext|>")
    other.backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert other.fingerprint == TOKENIZER.fingerprint
    for tokenizer in (TOKENIZER, other, Tokenizer(TOKENIZER.backend)):
        assert_right(cached_tokens(str(tmp_path), DOCUMENTS, tokenizer), tokenizer=tokenizer)
    assert len(list(tmp_path.glob("*.tokens"))) == 3


@pytest.mark.parametrize("kind", ["in memory", "mixture"])
def test_batches_and_positions_do_not_depend_on_the_cache(tmp_path, parts, kind):
    config = DataConfig(sequence_length=24, shards=2)
    plain = training_batches(corpus(kind, parts), TOKENIZER, config, batch_size=4, seed=0)
    expected = take(plain, 60)
    for _ in range(2):
        cached = training_batches(
            corpus(kind, parts), TOKENIZER, replace(config, cache=str(tmp_path)), batch_size=4, seed=0
        )
        assert_same(take(cached, 60), expected)
        assert cached.get_state() == plain.get_state()


def damage(path, kind):
    content = bytearray(path.read_bytes())
    if kind == "truncated":
        content = content[: random.randrange(len(content))]
    elif kind == "longer":
        content += b"\0"
    else:
        place = random.randrange(len(content)) if kind == "changed" else random.randrange(56)
        content[place] ^= 1 << random.randrange(8)
        print(f"byte {place} changed")
    path.unlink()
    path.write_bytes(content)


@pytest.mark.parametrize("kind", some_of(["changed", "truncated", "longer", "header changed"], 1))
def test_a_damaged_file_is_noticed_and_made_anew(tmp_path, caplog, kind):
    cached_tokens(str(tmp_path), DOCUMENTS, TOKENIZER)
    (path,) = tmp_path.glob("*.tokens")
    for _ in range(10):
        damage(path, kind)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert_right(cached_tokens(str(tmp_path), DOCUMENTS, TOKENIZER))
        (message,) = [record.getMessage() for record in caplog.records]
        assert message.startswith(f"{path} is damaged (")
        assert "\n" not in message
        read_tokens(path)


def test_files_hold_any_pieces(tmp_path):
    path = tmp_path / "tokens"
    for dtype, largest in (("<u2", 2**16), ("<i4", 2**31)):
        pieces = [np.random.default_rng(0).integers(0, largest, length) for length in (3, 0, 17, 1, 0)]
        for some in (pieces, pieces[1:2], []):
            write_tokens(path, iter(some), np.dtype(dtype))
            tokens, ends = read_tokens(path)
            assert ends.tolist() == np.cumsum([0, *map(len, some)]).tolist()
            assert tokens.tolist() == np.concatenate([[], *some]).tolist()
    path.write_bytes(b"something else that is longer than the header of a file of tokens")
    with pytest.raises(DamagedError):
        read_tokens(path)


PROGRAM = """
import json, sys, time
from lin_jax.data import Document, Tokenizer, load_tokenizer
from lin_jax.data.tokens.cache import cached_tokens
folder, tokenizer, pause = sys.argv[1:]
class Slow(Tokenizer):
    def encode_batch(self, texts):
        print("tokenizing", flush=True)
        time.sleep(float(pause))
        return super().encode_batch(texts)
documents = [Document(*each) for each in json.load(open(folder + ".json"))]
slow = Slow(load_tokenizer(tokenizer).backend, eos_token="<|endoftext|>")
found = cached_tokens(folder, documents, slow)
print(sum(int(found[index]["tokens"].sum()) for index in range(len(found))))
"""


def test_a_killed_process_leaves_nothing_that_is_read_and_others_wait_for_one(tmp_path):
    documents = [Document(str(number), f"text {number}") for number in range(1000)]
    (tmp_path / "tokens.json").write_text(json.dumps([[each.name, each.text] for each in documents]))
    TOKENIZER.backend.save(str(tmp_path / "tokenizer.json"))

    def launch(pause):
        command = [sys.executable, "-c", PROGRAM, tmp_path / "tokens", tmp_path / "tokenizer.json", str(pause)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    killed = launch(1000)
    assert killed.stdout.readline() == "tokenizing\n"
    waiting = [launch(0.3), launch(0.3)]
    time.sleep(0.5)
    assert files(tmp_path / "tokens") == [".lock", ".partial"]
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    said = [process.communicate(timeout=120)[0].splitlines() for process in waiting]
    assert [process.returncode for process in waiting] == [0, 0]
    total = sum(int(TOKENIZER.encode_document(each.text).sum()) for each in documents)
    assert {lines[-1] for lines in said} == {str(total)}
    # Four times, for a thousand documents, by one of the two.
    assert sorted(len(lines) for lines in said) == [1, 5]
    assert files(tmp_path / "tokens") == [".lock", ".tokens"]


def test_a_folder_that_cannot_be_used_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot keep tokens in ") as error:
        cached_tokens(str(tmp_path / "file"), DOCUMENTS, TOKENIZER)
    assert "\n" not in str(error.value)


def test_long_corpora_show_speed_and_time_left(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lin_jax.data.tokens.cache._TOGETHER", 50)
    cached_tokens(str(tmp_path / "quick"), DOCUMENTS, TOKENIZER)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "_BETWEEN_LINES", 0.0)
    cached_tokens(str(tmp_path / "slow"), DOCUMENTS, TOKENIZER)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" documents")[0] for line in lines] == [f"tokenizing: {done} of 121" for done in (50, 100, 121)]
    assert all(line.endswith("left") and " documents/s, " in line for line in lines)


def test_tokens_are_mapped_not_read(tmp_path):
    found = cached_tokens(str(tmp_path), DOCUMENTS, TOKENIZER)
    assert isinstance(found, CachedTokens)
    assert isinstance(found._tokens.base, np.memmap)
    assert found._tokens.dtype == np.uint16
