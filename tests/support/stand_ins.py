"""Small local stand-ins for what recipes fetch, and the options that put them, and small sizes, in its place."""

import random
import string
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import tokenizers
import yaml
from flax import nnx
from support.llama2c_files import HEADER, write_file
from support.vocabularies import write_vocab

from lin_jax.attention import AttentionConfig
from lin_jax.data import Tokenizer
from lin_jax.data.sources.remote import is_remote, is_remote_file
from lin_jax.data.tokenizers.sentencepiece import SPECIAL, VocabularyPiece
from lin_jax.hub import save_pretrained
from lin_jax.models import T5, Bert, BertConfig, Gpt2, Gpt2Config, Llama, LlamaConfig, T5Config

WORDS = "the a small big cat dog tree house sat ran under over near and then it good bad".split()  # noqa: SIM905
SEPARATOR = "<|endoftext|>"
SIZES = {"hidden_size": 16, "num_layers": 2, "num_heads": 2}
# Sizes of models from scratch, by family.
SCRATCH: dict[str, dict[str, int]] = {
    "llama": {**SIZES, "intermediate_size": 32},
    "bert": {**SIZES, "intermediate_size": 32, "max_positions": 32},
    "flash": {"hidden_size": 16, "num_layers": 2},
}
ATTENTION = {"group_size": 8, "kernel_size": 7, "window": 8, "features": 4}
TRAINING = {"steps": 2, "batch_size": 4, "log_every": 1, "evaluate_every": 2, "checkpoint_every": 2, "plot": "false"}


class StandIns:
    """Texts, tables, models and tokenizers of a few kilobytes in a folder.

    Args:
        folder: an empty folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        chance = random.Random(0)
        self._texts = [" ".join(chance.choices(WORDS, k=chance.randint(5, 40))) for _ in range(200)]
        self.text, self.held_out, self.rows = (folder / name for name in ("text.txt", "held_out.txt", "rows.jsonl"))
        self.text.write_text(f"\n{SEPARATOR}\n".join(self._texts[:150]))
        self.held_out.write_text(f"\n{SEPARATOR}\n".join(self._texts[150:]))
        self.rows.write_text("".join(f'{{"text": "{text}"}}\n' for text in self._texts))
        self.glue = self._write_glue()
        self.words = self._write_words()
        self.llama2c, self.pieces = folder / "model.bin", folder / "pieces.vocab"
        pieces = [*SPECIAL, " ", *string.ascii_lowercase]
        write_vocab(self.pieces, [VocabularyPiece(text, 0.0) for text in pieces])
        write_file(self.llama2c, replace(HEADER, vocab_size=len(pieces)))

    def _write_glue(self) -> Path:
        folder = self.folder / "glue" / "SST-2"
        folder.mkdir(parents=True)
        for file, rows in (("train.tsv", self._texts[:24]), ("dev.tsv", self._texts[24:32])):
            lines = [f"{' '.join(text.split()[:12])}\t{number % 2}" for number, text in enumerate(rows)]
            (folder / file).write_text("\n".join(["sentence\tlabel", *lines]))
        return folder.parent

    def _write_words(self) -> Path:
        special = {"pad_token": "[PAD]", "eos_token": "</s>", "cls_token": "[CLS]", "sep_token": "[SEP]"}
        numbers = {word: number for number, word in enumerate([*special.values(), "[UNK]", *WORDS])}
        backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(numbers, unk_token="[UNK]"))
        backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        Tokenizer(backend, **special).save(self.folder / "words")
        return self.folder / "words"

    def pretrained(self, family: str) -> Path:
        """A Hugging Face folder of softmax attention with random weights."""
        place, softmax = self.folder / family, AttentionConfig("softmax")
        if place.is_dir():
            return place
        inner = {"intermediate_size": 16, "vocab_size": 32}
        rngs = nnx.Rngs(0)
        makers: dict[str, Any] = {
            "llama": lambda: Llama(LlamaConfig(**SIZES, **inner, attention=softmax), rngs=rngs),
            "gpt2": lambda: Gpt2(Gpt2Config(**SIZES, vocab_size=32, max_positions=32, attention=softmax), rngs=rngs),
            "bert": lambda: Bert(BertConfig(**SIZES, **inner, max_positions=32, attention=softmax), rngs=rngs),
            "t5": lambda: T5(
                T5Config(
                    **SIZES, **inner, head_dim=8, encoder_attention=softmax, decoder_attention=softmax, end_token=1
                ),
                rngs=rngs,
            ),
        }
        return save_pretrained(makers[family](), place, tokenizer=self.words)


def options(recipe: Path, places: StandIns, base: Path) -> list[str]:
    """The options with which a recipe runs for two steps in a second, on what is here.

    Args:
        recipe: its file.
        places: the stand-ins.
        base: run folder of a small softmax LLaMA, for recipes that are built on another one.
    """
    content = yaml.safe_load(recipe.read_text())
    changes = dict(_changes(content, places, base))
    stages = content.get("stages", [])
    for stage in stages:
        own = {**_small_attentions(stage.get("model", {})), **_training(stage)}
        changes |= {f"stages.{stage['name']}.{name}": value for name, value in own.items()}
    return [word for name, value in changes.items() for word in (f"--{name}", str(value))]


def _changes(content: Mapping[str, Any], places: StandIns, base: Path) -> Iterator[tuple[str, Any]]:
    data, model, family = content["data"], content.get("model", {}), content.get("family", "llama")
    is_task = "task" in data
    yield "data.sequence_length", 24
    yield "data.validation_batches", 2
    if is_task:
        yield "data.source", places.glue
    elif data.get("streaming"):
        yield from (("data.source", places.rows), ("data.subset", "null"))
    else:
        yield "data.source", places.text
        yield "data.document_separator", SEPARATOR
    if "held_out" in content:
        yield "held_out.source", places.held_out
    init_from = content.get("init_from")
    if init_from is None:
        yield from ((f"model.{name}", size) for name, size in SCRATCH[family].items())
        yield "data.vocab_size", 280
    elif is_remote_file(init_from):
        yield "init_from", places.llama2c
    elif is_remote(init_from):
        yield "init_from", places.pretrained(family)
    else:
        yield "init_from", base
        if "hidden_size" in model:
            yield from ((f"model.{name}", size) for name, size in SCRATCH[family].items())
        if "tie_embeddings" in model:
            yield "model.tie_embeddings", "false"
    if "tokenizer" in data:
        yield "data.tokenizer", places.pieces if is_remote_file(data["tokenizer"]) else places.words
    if "width" in content.get("heads", {}):
        yield "heads.width", 8
    if "unroll" in model:
        yield "model.unroll", 2
    yield from _small_attentions(model).items()
    yield from _training(content).items()


def _small_attentions(model: Mapping[str, Any]) -> dict[str, int]:
    """Smaller numbers for those that an attention is given; it keeps its kind."""
    return {
        f"model.{field}.{name}": ATTENTION[name]
        for field in ("attention", "encoder_attention", "decoder_attention")
        if isinstance(model.get(field), Mapping)
        for name in model[field]
        if name in ATTENTION
    }


def _training(content: Mapping[str, Any]) -> dict[str, Any]:
    training = content.get("training", {})
    own: dict[str, Any] = dict(TRAINING)
    if "epochs" in training:
        own["epochs"] = "null"
    if "gradient_accumulation" in training:
        own["gradient_accumulation"] = 2
    return {f"training.{name}": value for name, value in own.items()}
