"""Texts up to stop strings that name special tokens, and the space that parts a text from its prompt."""

import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast, StopStringCriteria

from lin_jax.data import Tokenizer
from lin_jax.data.tokenizers.sentencepiece import SPECIAL, VocabularyPiece, build_tokenizer
from lin_jax.data.tokenizers.token_bytes import token_bytes
from lin_jax.decoding.engine.stop_strings import stop_automaton
from lin_jax.decoding.streamed_text import StreamedText

END = "<|im_end|>"


def chat_tokenizer(special: bool = True) -> Tokenizer:
    """Byte-level, with a token for the end of a turn that is not the end of the text."""
    tokenizer = Tokenizer.train(["the cat sat on the mat\nuser: hi\n"] * 3, 280)
    tokenizer.backend.add_tokens([AddedToken(END, special=special, normalized=False)])
    return tokenizer


def shown(tokenizer: Tokenizer, tokens: list[int], stops: list[str], size: int = 1) -> str:
    text = StreamedText(tokenizer, stops)
    return "".join(text.push(tokens[at : at + size]) for at in range(0, len(tokens), size)) + text.flush()


def first_stop(tokenizer: Tokenizer, tokens: list[int], stops: list[str]) -> int:
    """Index of the token at which the loop stops."""
    automaton = stop_automaton(stops, token_bytes(tokenizer, tokenizer.special_tokens_in(stops)))
    first, _ = automaton.find(jnp.zeros(1, jnp.int32), jnp.asarray([tokens]), jnp.asarray([len(tokens)]))
    return int(first[0])


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        (f"the cat{END}\nuser: hi", [END], "the cat"),
        (f"the cat{END}\nuser: hi", [f"{END}\nuser"], "the cat"),
        (f"the cat{END}\nuser: hi", [f"cat{END}"], "the "),
        (f"the cat{END}\nuser: hi", [f"{END}{END}", "hi"], f"the cat{END}\nuser: "),
        (f"the{END}{END} cat", [f"{END}{END}"], "the"),
        (f"{END}the cat", [END], ""),
        ("the mat", [END], "the mat"),
        (f"the{END} cat", ["cat"], f"the{END} "),
        ("日本日本", ["本日"], "日"),
    ],
)
def test_special_tokens_stop_by_name(special: bool, text: str, stops: list[str], expected: str) -> None:
    """Wherever transformers stops, and without the marker; it is shown only where it is a token like any other."""
    tokenizer = chat_tokenizer(special)
    tokens = tokenizer.encode(text).tolist()
    expected = expected.replace(END, "") if special else expected
    assert {shown(tokenizer, tokens, stops, size) for size in (1, 2, len(tokens))} == {expected}
    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend)
    criteria = StopStringCriteria(tokenizer=theirs, stop_strings=stops)
    import torch

    ends = [bool(criteria(torch.tensor([tokens[: count + 1]]), None)[0]) for count in range(len(tokens))]
    found = first_stop(tokenizer, tokens, stops)
    assert found == (ends.index(True) if True in ends else len(tokens))


def test_a_name_spelled_by_ordinary_tokens_stops_too() -> None:
    tokenizer = chat_tokenizer()
    tokens = [int(token) for letter in f"the {END} cat" for token in tokenizer.encode(letter)]
    assert shown(tokenizer, tokens, [END]) == "the "
    assert first_stop(tokenizer, tokens, [END]) == len("the " + END) - 1
    # Where it does not stop anything, it is text, unlike the token.
    assert shown(tokenizer, tokens, [f"{END}\n"]) == f"the {END} cat"


def test_what_no_stop_string_names_parts_nothing() -> None:
    """A special token shows no text, and so the text around it may be a stop string."""
    tokenizer = chat_tokenizer()
    tokens = tokenizer.encode(f"the c{END}at").tolist()
    assert shown(tokenizer, tokens, ["cat"]) == "the "
    assert first_stop(tokenizer, tokens, ["cat"]) == len(tokens) - 1


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_pieces_do_not_matter(data: st.DataObject) -> None:
    tokenizer = CHAT
    tokens = data.draw(st.lists(st.sampled_from([*tokenizer.encode(f"cat{END}\n日").tolist(), 5]), max_size=12))
    stops = data.draw(st.lists(st.sampled_from([END, f"{END}\n", f"t{END}", "a", "日", f"{END}{END}c"]), max_size=3))
    whole = shown(tokenizer, tokens, stops, max(len(tokens), 1))
    assert {shown(tokenizer, tokens, stops, size) for size in (1, 2, 3)} == {whole}


def test_half_a_character_before_a_name_stays_half() -> None:
    """Its other bytes, behind a special token that a stop string names, do not make it whole."""
    half, *rest = CHAT.encode("日").tolist()
    name = CHAT.encode(END).tolist()
    for size in (1, 2, 4):
        assert shown(CHAT, [half, *name, *rest], [f"{END}\n"], size) == "\ufffd" * (1 + len(rest))


CHAT = chat_tokenizer()


def test_the_space_behind_a_prompt_is_kept() -> None:
    """A piece with a space in front loses it only where a text begins."""
    words = [" Once", " upon", " a", "!"]
    letters = sorted(set("".join(words)))
    pieces = [VocabularyPiece(text, 0.0) for text in (*SPECIAL, *letters)]
    merges = [VocabularyPiece(word[:end], float(end)) for word in words for end in range(2, len(word) + 1)]
    tokenizer = build_tokenizer([*pieces, *dict.fromkeys(merges)])
    whole = tokenizer.encode("Once upon a!").tolist()
    for cut in range(len(whole) + 1):
        prompt, new = whole[:cut], whole[cut:]
        text = StreamedText(tokenizer, after=[1, *prompt])
        before = tokenizer.decode(prompt)
        assert before + "".join(text.push([token]) for token in new) + text.flush() == "Once upon a!"
