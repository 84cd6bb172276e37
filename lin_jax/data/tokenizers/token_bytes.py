"""Bytes of every token, for a search for strings in tokens."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers

from lin_jax.data.tokenizers.tokenizer import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def token_bytes(tokenizer: Tokenizer, named: Mapping[int, str] | None = None) -> list[bytes]:
    """The bytes that each id adds in the middle of a text; special tokens and unused ids add none.

    Byte-level and SentencePiece-like vocabularies are read off exactly, so that the bytes of a text's tokens are the
    text's UTF-8 bytes (behind the one space that SentencePiece puts in front of a text). Of any other tokenizer it is
    the text of the token behind another one, where a character that is not whole comes out as U+FFFD.

    Args:
        tokenizer: any.
        named: special tokens that count by their names (`Tokenizer.special_tokens_in`).

    Returns:
        `tokenizer.vocab_size` byte strings, in the order of ids.
    """
    found = _ordinary_bytes(tokenizer)
    for number, name in (named or {}).items():
        found[number] = name.encode()
    return found


def _ordinary_bytes(tokenizer: Tokenizer) -> list[bytes]:
    backend, special = tokenizer.backend, tokenizer.special_tokens
    tokens = [None if number in special else backend.id_to_token(number) for number in range(tokenizer.vocab_size)]
    steps = _steps(json.loads(backend.to_str())["decoder"])
    if [step["type"] for step in steps] == ["ByteLevel"]:
        table = _bytes_of_characters()
        return [b"" if token is None else _of_characters(token, table) for token in tokens]
    if _is_piecewise(steps):
        return [b"" if token is None else _of_piece(token, steps) for token in tokens]
    return _behind_another(backend, tokens)


def _steps(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a decoder from its JSON, with nested sequences flattened."""
    if decoder is None:
        return []
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for each in decoder["decoders"] for step in _steps(each)]


def _is_piecewise(steps: Sequence[dict[str, Any]]) -> bool:
    """True if a decoder, but for the beginning of a text, treats each token alone, in ways that `_of_piece` knows."""
    fused = False
    for step in steps:
        kind = step["type"]
        known = kind in ("ByteFallback", "Metaspace") or (kind == "Replace" and "String" in step["pattern"])
        # Behind Fuse, Strip trims the whole text; before it, every token.
        if not (known or kind == "Fuse" or (kind == "Strip" and fused)):
            return False
        fused = fused or kind == "Fuse"
    # A decoder that fuses nothing and marks no spaces does not count: tokens are joined with spaces then.
    return any(step["type"] in ("Fuse", "Metaspace", "ByteFallback") for step in steps)


def _bytes_of_characters() -> dict[str, int]:
    """The byte of each character of a byte-level vocabulary (GPT-2's table).

    Printable characters of Latin-1 stand for themselves, the other bytes are characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _of_characters(token: str, table: dict[str, int]) -> bytes:
    try:
        return bytes(table[character] for character in token)
    except KeyError:  # a token that was added to the vocabulary is written as it is
        return token.encode()


def _of_piece(token: str, steps: Sequence[dict[str, Any]]) -> bytes:
    for step in steps:
        if step["type"] == "Replace":
            token = token.replace(step["pattern"]["String"], step["content"])
        elif step["type"] == "Metaspace":
            token = token.replace(step["replacement"], " ")
        elif step["type"] == "ByteFallback" and (byte := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(byte[1], 16)])
    return token.encode()


def _behind_another(backend: tokenizers.Tokenizer, tokens: Sequence[str | None]) -> list[bytes]:
    """The text that each token adds after a plain word."""
    known = [number for number, token in enumerate(tokens) if token is not None]
    anchor = [number for number in known if (tokens[number] or "").isalpha()][:1]
    start = backend.decode(anchor, skip_special_tokens=False)
    texts = backend.decode_batch([[*anchor, number] for number in known], skip_special_tokens=False)
    pieces = [b""] * len(tokens)
    for number, text in zip(known, texts, strict=True):
        pieces[number] = text.removeprefix(start).encode()
    return pieces
