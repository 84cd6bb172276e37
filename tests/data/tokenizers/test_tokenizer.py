import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from support.processes import SHARED
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lin_jax.data import StreamDecoder, Tokenizer, load_tokenizer
from lin_jax.errors import UserError

TEXTS = ["def add(a, b):\n    return a + b\n" * 5, "The café is open — naïve 😀 日本語.", Path(__file__).read_text()]


@pytest.fixture(scope="module")
def trained():
    return Tokenizer.train(TEXTS, 400)


def with_metaspace() -> tokenizers.Tokenizer:
    """A SentencePiece-like tokenizer: word-start marks, and bytes for what the vocabulary lacks."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcde."]
    model = tokenizers.models.BPE(
        {piece: number for number, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True
    )
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    backend.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


@given(text=st.text())
def test_text_round_trips_exactly(trained, text):
    ids = trained.encode(text)
    assert ids.dtype == np.int32
    assert ids.ndim == 1
    assert trained.decode(ids) == text


def test_documents_end_with_the_end_of_text(trained):
    ids = trained.encode_document("a")
    assert ids.dtype == np.int32
    assert ids.tolist() == [*trained.encode("a"), trained.eos_id]
    assert trained.bos_id is None
    assert trained.decode(ids) == "a<|endoftext|>"
    assert trained.decode(ids, skip_special_tokens=True) == "a"
    assert trained.encode_document("").tolist() == [trained.eos_id]


def test_one_token_for_both_ends_comes_once(trained):
    both = Tokenizer(trained.backend, bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    assert both.encode_document("a").tolist() == [*both.encode("a"), both.eos_id]
    spiece = Tokenizer(with_template(with_metaspace(), "<s> $A"), bos_token="<s>", eos_token="</s>")
    assert spiece.encode_document("a").tolist() == [1, *spiece.encode("a"), 2]


def with_template(backend: tokenizers.Tokenizer, template: str) -> tokenizers.Tokenizer:
    named = [(name, backend.token_to_id(name)) for name in template.split() if name != "$A"]
    backend.post_processor = tokenizers.processors.TemplateProcessing(single=template, special_tokens=named)
    return backend


@pytest.mark.parametrize(
    ("template", "special", "begin", "document"),
    [
        ("$A", {"bos_token": "<s>", "eos_token": "</s>"}, [], [[], [2]]),
        ("<s> $A", {"bos_token": "<s>", "eos_token": "</s>"}, [1], [[1], [2]]),
        ("<s> $A </s>", {"bos_token": "<s>", "eos_token": "</s>"}, [1], [[1], [2]]),
        ("$A </s>", {"eos_token": "</s>"}, [], [[], [2]]),
        ("<s> $A </s>", {"cls_token": "<s>", "sep_token": "</s>"}, [1], [[], []]),
        ("</s> $A", {"bos_token": "</s>", "eos_token": "</s>"}, [2], [[], [2]]),
        ("<s> <s> $A", {"bos_token": "<s>"}, [1, 1], [[1, 1], []]),
    ],
)
@pytest.mark.parametrize("flag", [None, False])
def test_a_text_begins_as_in_transformers(tmp_path, template, special, begin, document, flag):
    """What the post-processor puts in front of it, in prompts and documents, whatever tokens have names."""
    theirs = PreTrainedTokenizerFast(tokenizer_object=with_template(with_metaspace(), template), **special)
    theirs.save_pretrained(tmp_path)
    if flag is not None:
        # Yi names a beginning token, and says that none is added.
        path = tmp_path / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"add_bos_token": flag}))
    opened, again = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in ("a", "b c", "<s>a"):
        whole = [*opened.begin_ids, *opened.encode(text).tolist()]
        assert again(text)["input_ids"][: len(whole)] == whole
        assert len(again(text)["input_ids"]) - len(whole) == template.endswith("</s>")
    if flag is None:
        assert list(opened.begin_ids) == begin
        assert opened.encode_document("a").tolist() == [*document[0], *opened.encode("a").tolist(), *document[1]]


def test_half_characters_are_mended(trained):
    assert trained.decode(trained.encode("bad \ud83d here")) == "bad \ufffd here"
    assert trained.decode(trained.encode("\ud83d\ude00")) == "\U0001f600"
    assert [trained.decode(ids) for ids in trained.encode_batch(["\udc80", "a"])] == ["\ufffd", "a"]


def test_training_is_deterministic_and_sized(trained):
    assert trained.vocab_size == 400
    program = f"from lin_jax.data import Tokenizer; print(Tokenizer.train({TEXTS!r}, 400).fingerprint)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == trained.fingerprint
    assert Tokenizer.train(TEXTS, 399).fingerprint != trained.fingerprint
    assert Tokenizer.train(["aaaa"], 5000).vocab_size < 300
    with pytest.raises(UserError, match="257"):
        Tokenizer.train(TEXTS, 256)


def stream(tokenizer: Tokenizer, ids: list[int], cuts: list[int], skip: bool = False) -> list[str]:
    decoder = StreamDecoder(tokenizer, skip_special_tokens=skip)
    edges = [0, *sorted(cut for cut in cuts if cut < len(ids)), len(ids)]
    pieces = [decoder.push(ids[start:end]) for start, end in itertools.pairwise(edges)]
    return [*pieces, decoder.flush()]


@settings(deadline=None)
@given(text=st.text(), cuts=st.lists(st.integers(0, 40)))
def test_stream_of_a_text_never_shows_half_a_character(trained, text, cuts):
    ids = trained.encode(text).tolist()
    pieces = stream(trained, ids, cuts)
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)
        assert pieces[-1] == ""


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, 399)), cuts=st.lists(st.integers(0, 40)), skip=st.booleans())
def test_stream_of_any_tokens_equals_decode(trained, ids, cuts, skip):
    expected = trained.decode(ids, skip_special_tokens=skip)
    assert "".join(stream(trained, ids, cuts, skip)) == expected


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, 265)), cuts=st.lists(st.integers(0, 40)), skip=st.booleans())
def test_stream_of_sentence_pieces_equals_decode(ids, cuts, skip):
    tokenizer = Tokenizer(with_metaspace(), bos_token="<s>", eos_token="</s>")
    expected = tokenizer.decode(ids, skip_special_tokens=skip)
    assert "".join(stream(tokenizer, ids, cuts, skip)) == expected


def test_stream_starts_afresh_after_a_flush(trained):
    decoder = StreamDecoder(trained)
    ids = trained.encode("日").tolist()
    assert len(ids) > 1
    assert decoder.push(ids[:-1]) == ""
    assert decoder.flush() == "\ufffd"
    assert decoder.push(ids) == "日"


def test_published_vocabularies():
    if not SHARED.exists():
        pytest.skip("the folder of public data is not here")
    gpt2 = tokenizers.ByteLevelBPETokenizer.from_file(
        str(SHARED / "tokenizers/gpt2/encoder.json"), str(SHARED / "tokenizers/gpt2/vocab.bpe")
    )
    gpt2 = Tokenizer(tokenizers.Tokenizer.from_str(gpt2.to_str()), eos_token="<|endoftext|>")
    assert (gpt2.vocab_size, gpt2.eos_id) == (50257, 50256)
    assert gpt2.encode("Hello world").tolist() == [15496, 995]
    bert = tokenizers.BertWordPieceTokenizer(str(SHARED / "tokenizers/bert-base-uncased/vocab.txt"))
    bert = Tokenizer(tokenizers.Tokenizer.from_str(bert.to_str()))
    for tokenizer in (gpt2, bert):
        ids = tokenizer.encode("It isn't unaffable, naïve 😀 .").tolist()
        for cut in range(len(ids)):
            assert "".join(stream(tokenizer, ids, [cut, cut + 2])) == tokenizer.decode(ids)
