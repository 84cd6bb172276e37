"""Tokenizers in the original files of published models, from before there was a `tokenizer.json`.

WordPiece of BERT: `vocab.txt`, a piece a line. Byte-level pairs of GPT-2: `encoder.json` and `vocab.bpe` (for others
`vocab.json` and `merges.txt`). SentencePiece's unigrams of T5: `spiece.model`. Its byte pairs of LLaMA:
`tokenizer.model`.
"""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from lin_jax.data.tokenizers.protobuf import read_fields
from lin_jax.data.tokenizers.sentencepiece import UNIGRAM, read_sentencepiece
from lin_jax.data.tokenizers.tokenizer import END_OF_TEXT, Tokenizer

# Files with which transformers opens a folder itself.
_MODERN = ("tokenizer.json", "tokenizer_config.json")
_CONFIG = "config.json"
# Models of which a file, beside their config.json, is read here: transformers wants further packages for these pieces,
# and does not know the first names of GPT-2's files. Vocabularies of other models look alike and split otherwise.
_BESIDE_CONFIG = {
    "tokenizer.model": ("llama", "mistral"),
    "encoder.json": ("gpt2",),
    "spiece.model": ("t5",),
}
# Linearized models, whose types transformers does not know, with the same files as those that they were made of.
_LINEARIZED = {
    "tokenizer.model": ("lin_jax_llama",),
    "encoder.json": ("lin_jax_gpt2",),
    "merges.txt": ("lin_jax_gpt2",),
    "spiece.model": ("lin_jax_t5",),
    "vocab.txt": ("lin_jax_bert",),
}
_BERT = {name + "_token": f"[{name.upper()}]" for name in ("unk", "sep", "pad", "cls", "mask")}
_T5 = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
# T5's marks for gaps in a text, numbered downwards behind the pieces of the file.
_GAPS = 100


def original_reader(folder: Path) -> Callable[[Path], Tokenizer] | None:
    """The reader for a folder that holds original files alone, or beside them the config.json of one of its models.

    None for any other folder.
    """
    if any((folder / name).is_file() for name in _MODERN):
        return None
    there = {file: read for file, read in _READERS.items() if (folder / file).is_file()}
    if (folder / _CONFIG).is_file():
        kind = _model_type(folder)
        own = [file for table in (_BESIDE_CONFIG, _LINEARIZED) for file, kinds in table.items() if kind in kinds]
        there = {file: there[file] for file in own if file in there}
    return next(iter(there.values()), None)


def _model_type(folder: Path) -> Any:
    content = json.loads((folder / _CONFIG).read_text(encoding="utf-8-sig"))
    return content.get("model_type") if isinstance(content, dict) else None


def _read_word_pieces(folder: Path) -> Tokenizer:
    backend = tokenizers.Tokenizer(models.WordPiece.from_file(str(folder / "vocab.txt"), unk_token=_BERT["unk_token"]))
    # A vocabulary without capitals is of texts that were lowered, and so stripped of accents, too.
    pieces = set(backend.get_vocab()) - set(_BERT.values())
    lower = not any(piece.lower() != piece for piece in pieces if not piece.startswith("[unused"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lower)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    backend.add_special_tokens(list(_BERT.values()))
    cls, sep = _BERT["cls_token"], _BERT["sep_token"]
    # Tokens that transformers adds to a text; `Tokenizer.encode` does not add them.
    backend.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B:1 {sep}:1",
        special_tokens=[(each, backend.token_to_id(each)) for each in (cls, sep)],
    )
    return Tokenizer(backend, **_BERT)


def _read_byte_pairs(vocabulary: str, merges: str) -> Callable[[Path], Tokenizer]:
    def read(folder: Path) -> Tokenizer:
        backend = tokenizers.Tokenizer(models.BPE.from_file(str(folder / vocabulary), str(folder / merges)))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([END_OF_TEXT])
        return Tokenizer(backend, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)

    return read


def _read_unigrams(folder: Path) -> Tokenizer:
    pieces: list[tuple[str, float]] = []
    algorithm, characters = 0, b""
    for number, value in read_fields((folder / "spiece.model").read_bytes()):
        fields: dict[int, Any] = dict(read_fields(value)) if isinstance(value, bytes) and number in (1, 2, 3) else {}
        if number == 1:
            pieces.append((fields[1].decode(), struct.unpack("<f", fields[2])[0] if 2 in fields else 0.0))
        elif number == 2:
            algorithm = fields.get(3, UNIGRAM)
        elif number == 3:
            characters = fields.get(2, b"")
    if algorithm != UNIGRAM or tuple(text for text, _ in pieces[:3]) != tuple(_T5.values()):
        raise ValueError("spiece.model does not hold T5's unigrams")
    gaps = [f"<extra_id_{number}>" for number in reversed(range(_GAPS))]
    backend = tokenizers.Tokenizer(models.Unigram([*pieces, *((gap, 0.0) for gap in gaps)], unk_id=2))
    if characters:
        backend.normalizer = normalizers.Precompiled(characters)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    end = _T5["eos_token"]
    backend.add_special_tokens([*_T5.values(), *gaps])
    backend.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", pair=f"$A {end} $B {end}", special_tokens=[(end, 1)]
    )
    return Tokenizer(backend, **_T5)


_READERS: dict[str, Callable[[Path], Tokenizer]] = {
    "vocab.txt": _read_word_pieces,
    "encoder.json": _read_byte_pairs("encoder.json", "vocab.bpe"),
    "merges.txt": _read_byte_pairs("vocab.json", "merges.txt"),
    "spiece.model": _read_unigrams,
    "tokenizer.model": lambda folder: read_sentencepiece(folder / "tokenizer.model"),
}
