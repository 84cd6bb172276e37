"""Tokenizers from files, folders and the Hub, and the tokenizer of a data configuration."""

import importlib.util
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import tokenizers

from lin_jax.data.config import DataConfig
from lin_jax.data.sources.corpus import Corpus, CorpusPart
from lin_jax.data.sources.remote import MODEL, fetch_file, fetch_repository, is_remote, is_remote_file
from lin_jax.data.sources.text import Document
from lin_jax.data.tokenizers.formats import original_reader
from lin_jax.data.tokenizers.quiet_transformers import import_transformers
from lin_jax.data.tokenizers.tokenizer import END_OF_TEXT, Tokenizer
from lin_jax.errors import UserError
from lin_jax.files import copy_without_mark, has_mark

if TYPE_CHECKING:
    from datasets import IterableDataset

# A vocabulary settles long before this much text; it bounds what is read ahead of a stream.
_TRAINING_CHARACTERS = 32_000_000
# Looked for, in this order, in a bare tokenizer.json, which does not say what its special tokens are for.
_USUAL_SPECIAL_TOKENS = {
    "bos_token": ("<s>", "<bos>", "<|begin_of_text|>"),
    "eos_token": (END_OF_TEXT, "</s>", "<eos>", "<|end_of_text|>"),
    "cls_token": ("[CLS]",),
    "sep_token": ("[SEP]",),
    "pad_token": ("[PAD]", "<pad>"),
}
# Vocabularies that transformers reads with what it brings; pieces of SentencePiece (*.model) need more.
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt")
# Classes of transformers that take tokenizer.json as it is; what their configurations name, and what changes nothing.
_AS_WRITTEN_CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")
_NAMED_TOKENS = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_WITHOUT_EFFECT = frozenset(
    {"backend", "clean_up_tokenization_spaces", "is_local", "local_files_only", "model_max_length", "tokenizer_class"}
)
# Files of a tokenizer; those of weights are never copied.
_SUFFIXES = (".json", ".txt", ".model", ".bpe", ".jinja")


def load_tokenizer(name_or_path: str | Path) -> Tokenizer:
    """Opens a folder or a tokenizer.json file, on this machine or fetched (`hub:OWNER/NAME`, `hub:OWNER/NAME/FILE`).

    A folder may hold the files that transformers opens, or those that BERT, GPT-2, T5 and LLaMA were first published
    with.

    Raises:
        UserError: it does not exist or cannot be fetched, or no fast tokenizer can be made of it.
    """
    name = str(name_or_path)
    path = Path(name).expanduser()
    if not is_remote(name) and not path.exists():
        raise UserError(f"tokenizer {name!r} does not exist; give a folder, a tokenizer.json, or 'hub:OWNER/NAME'")
    try:
        if is_remote(name):
            path = _fetched(name)
        if path.is_file():
            return _from_json(path)
        with _without_marks(path) as folder:
            read = original_reader(folder)
            if read is not None:
                return read(folder)
            return _as_written(folder) or _from_transformers(str(folder))
    except UserError:
        raise
    except Exception as error:  # each kind of file fails in a way of its own, mostly with plain Exception
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
        # What transformers could have made it of follows in further lines.
        reason = reason.partition(" from one of:")[0]
        raise _unreadable(name, reason) from error


def _fetched(name: str) -> Path:
    """The local copy of a tokenizer: one file, or those files of a repository that may belong to one."""
    if is_remote_file(name):
        return fetch_file(name, MODEL)
    wanted = [f"*{suffix}" for suffix in _SUFFIXES]
    return fetch_repository(name, "a folder with that tokenizer", wanted, ("*/*", "*.index.json"))


def _unreadable(name: str, reason: str) -> UserError:
    return UserError(f"cannot read a tokenizer from {name!r}: {reason}; give a folder with a tokenizer.json")


@contextmanager
def _without_marks(folder: Path) -> Iterator[Path]:
    """Yields a folder whose files begin with no byte-order mark: the given one, or a copy of what a tokenizer is."""
    files = [path for path in folder.iterdir() if path.suffix in _SUFFIXES and path.is_file()]
    if not any(has_mark(path) for path in files):
        yield folder
        return
    with TemporaryDirectory() as place:
        for path in files:
            copy_without_mark(path, Path(place) / path.name)
        yield Path(place)


def prepare_tokenizer(config: DataConfig, documents: "Corpus | Sequence[Document] | IterableDataset") -> Tokenizer:
    """Loads the tokenizer that the configuration names, or trains one on (the beginning of) the documents.

    A tokenizer learns from every part of a mixture, by its weight.

    Raises:
        UserError: the named tokenizer cannot be read.
    """
    if config.tokenizer is not None:
        return load_tokenizer(config.tokenizer)
    parts = Corpus.of(documents).parts
    if config.has_loss_mask:
        raise UserError("instruction data needs a tokenizer that exists; give data.tokenizer, or init_from")
    texts = (text for part in parts for text in _beginning(part, round(_TRAINING_CHARACTERS * part.share)))
    return Tokenizer.train(texts, config.vocab_size)


def _from_json(path: Path) -> Tokenizer:
    backend = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8-sig"))
    found = {
        name: next((token for token in usual if backend.token_to_id(token) is not None), None)
        for name, usual in _USUAL_SPECIAL_TOKENS.items()
    }
    return Tokenizer(backend, **found)


def _as_written(folder: Path) -> Tokenizer | None:
    """The tokenizer of a folder that says all in tokenizer.json, as run folders do; None for any other.

    It is the one that transformers would make, without the seconds that transformers takes to be imported.
    """
    files = [folder / name for name in ("tokenizer.json", "tokenizer_config.json")]
    others = [folder / name for name in ("config.json", "chat_template.jinja", "added_tokens.json")]
    if not all(map(Path.is_file, files)) or any(map(Path.exists, others)):
        return None
    said = json.loads(files[1].read_text(encoding="utf-8"))
    if not isinstance(said, dict) or said.get("tokenizer_class") not in _AS_WRITTEN_CLASSES:
        return None
    special = {name: value for name, value in said.items() if name in _NAMED_TOKENS}
    if said.keys() - special.keys() - _WITHOUT_EFFECT:
        return None
    backend = tokenizers.Tokenizer.from_str(files[0].read_text(encoding="utf-8"))
    added = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    if not all(isinstance(value, str) and value in added for value in special.values()):
        return None
    return Tokenizer(backend, **special)


def _from_transformers(name: str) -> Tokenizer:
    _check_files(Path(name))
    # A trained tokenizer does not need the package.
    pretrained = import_transformers().AutoTokenizer.from_pretrained(
        name,
        trust_remote_code=False,
        local_files_only=True,
        **_neutral_config(Path(name) / "config.json"),
    )
    backend = getattr(pretrained, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"{type(pretrained).__name__} is not a fast tokenizer")
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    if added.issuperset(backend.get_vocab()):
        # As a class makes it of its defaults alone: every text would be unknown tokens, or none.
        files = ", ".join(pretrained.vocab_files_names.values())
        raise ValueError(f"a {type(pretrained).__name__} without a vocabulary ({files})")
    named = pretrained.special_tokens_map.items()
    texts = {name: str(token) for name, token in named if not isinstance(token, list)}
    return Tokenizer(backend, pretrained=pretrained, **texts)


def _check_files(folder: Path) -> None:
    """Refuses pieces of SentencePiece without the package that reads them, which transformers says in five lines."""
    pieces = sorted(path.name for path in folder.glob("*.model"))
    if not pieces or any((folder / name).is_file() for name in _VOCABULARIES):
        return
    if importlib.util.find_spec("sentencepiece") is None:
        raise ValueError(f"{pieces[0]} is read with the package sentencepiece; install it (pip install sentencepiece)")


def _neutral_config(path: Path) -> dict[str, Any]:
    """An empty configuration in place of one of a type that transformers does not know, which it would warn about."""
    transformers = import_transformers()
    known = transformers.CONFIG_MAPPING
    if not path.is_file() or json.loads(path.read_text(encoding="utf-8-sig")).get("model_type") in known:
        return {}
    return {"config": transformers.PretrainedConfig()}


def _beginning(part: CorpusPart, characters: int) -> Iterator[str]:
    """The first characters of a part, text by text."""
    left = characters
    for text in part.texts():
        yield text[:left]
        left -= len(text)
        if left <= 0:
            return
