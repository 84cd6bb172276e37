"""A text that goes on from a saved state is the text in one go, spaces at the seam included."""

import json
from pathlib import Path

import pytest
from flax import nnx

from lin_jax.cli.decode.command import decode
from lin_jax.cli.decode.options import parse
from lin_jax.data import Tokenizer, load_tokenizer
from lin_jax.data.tokenizers.sentencepiece import SPECIAL, VocabularyPiece, build_tokenizer
from lin_jax.hub import save_pretrained
from lin_jax.models import Llama, LlamaConfig

WORDS = [VocabularyPiece(text, 0.0) for text in (*SPECIAL, " ", *"abcd")]
WORDS += [VocabularyPiece(text, -float(score)) for score, text in enumerate((" a", " b", " c", " d", "ab", "cd"))]
PIECES = build_tokenizer(WORDS)
OPTIONS = ("--max-new-tokens", "12", "--drafter", "none", "--tree", "none", "--temperature", "1")


@pytest.mark.parametrize("kind", ["pieces", "llama2", "bytes"])
def test_continuations_are_encoded_as_in_the_whole_text(kind: str, shared_data: Path) -> None:
    tokenizer = {
        "pieces": lambda: PIECES,
        "llama2": lambda: load_tokenizer(shared_data / "tokenizers/llama2"),
        "bytes": lambda: Tokenizer.train(["the cat sat on the mat"] * 3, 280),
    }[kind]()
    text = "ab cd  a" if kind == "pieces" else "Once upon a time,  there was\nan é  \U0001f600 end. \n x"
    whole = tokenizer.encode(text).tolist()
    seams = [at for at in range(len(text)) if text[at] == " " and text[at - 1 : at] != " "]
    for at in seams:
        parts = [*tokenizer.encode(text[:at]), *tokenizer.encode_continuation(text[at:])]
        # A run of spaces and a line end may be one token.
        assert parts == whole or kind == "bytes"
        assert tokenizer.decode(parts) == text
    assert tokenizer.encode_continuation("").tolist() == []


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=8, intermediate_size=8, num_layers=1, num_heads=2, initializer_range=0.5
    )
    folder = tmp_path_factory.mktemp("model") / "llama"
    return save_pretrained(Llama(config, rngs=nnx.Rngs(0)), folder, tokenizer=Tokenizer(PIECES.backend))


def said(capsys: pytest.CaptureFixture[str], place: Path, *words: str) -> str:
    capsys.readouterr()
    assert decode(parse([str(place), *words, *OPTIONS])) == 0
    return capsys.readouterr().out


@pytest.mark.thorough
def test_the_seam(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With more of the prompt behind the state, or with nothing but the state."""
    state = str(tmp_path / "state.safetensors")
    firsts = set()
    for seed, prompt in enumerate(("ab", "cd a", "d")):
        words = ("--seed", str(seed))
        whole = said(capsys, place, f"{prompt} cd", *words)
        assert whole.startswith(f"{prompt} cd")
        said(capsys, place, prompt, "--save-state", state)
        assert prompt + said(capsys, place, " cd", "--state", state, *words) == whole
        said(capsys, place, f"{prompt} cd", "--save-state", state)
        rest = said(capsys, place, "", "--state", state, *words)
        assert f"{prompt} cd{rest}" == whole
        table = said(capsys, place, "", "--state", state, "--json", *words)
        assert json.loads(table)["text"] == rest.removesuffix("\n")
        firsts.add(rest[0])
    # There were spaces to lose.
    assert " " in firsts
