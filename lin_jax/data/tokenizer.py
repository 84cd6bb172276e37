"""Text to token ids and back: one thin class over a fast tokenizer, loaded from anywhere or trained here."""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from lin_jax.data.config import HUB_PREFIX, SMALLEST_BPE, DataConfig
from lin_jax.data.corpus import Corpus, Part
from lin_jax.data.sources import Document
from lin_jax.errors import UserError

if TYPE_CHECKING:
    from datasets import IterableDataset

log = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"

# A vocabulary settles long before this much text; it bounds what is read ahead of a stream.
_TRAINING_CHARACTERS = 32_000_000
# Texts that are encoded together, on all processor cores.
_TOGETHER = 4096
# Looked for, in this order, in a bare tokenizer.json, which does not say what its special tokens are for.
_USUAL = {
    "bos_token": ("<s>", "<bos>", "<|begin_of_text|>"),
    "eos_token": (END_OF_TEXT, "</s>", "<eos>", "<|end_of_text|>"),
    "cls_token": ("[CLS]",),
    "sep_token": ("[SEP]",),
    "pad_token": ("[PAD]", "<pad>"),
}


class Tokenizer:
    """A fast tokenizer with the ids of its first and last special token.

    Special tokens that are spelled out in a text become their ids; none is added, except by
    `encode_document`.

    Attributes:
        backend: The `tokenizers.Tokenizer` that does the work.
        bos_id: Id of the token that begins a document, or None.
        eos_id: Id of the token that ends a document and a generated text, or None.

    Args:
        backend: As above.
        pretrained: The transformers object that the backend came with, if there was one.
        special_tokens: Texts of special tokens by transformers' names: bos_token, eos_token, cls_token, sep_token, ...
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        pretrained: Any = None,
        **special_tokens: str | None,
    ):
        # Truncation and padding are settings of the file that the tokenizer came from; here texts stay whole.
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self._tokens = {name: token for name, token in special_tokens.items() if token is not None}
        self.bos_id, self.eos_id = self.special_id("bos_token"), self.special_id("eos_token")
        # The transformers object, where there was one: it saves more (chat template, other special tokens).
        self._pretrained = pretrained

    @classmethod
    def load(cls, name_or_path: str | Path) -> "Tokenizer":
        """Opens a folder, a tokenizer.json file, or "hub:OWNER/NAME"; only the last uses the network.

        Raises:
            UserError: it does not exist, or no fast tokenizer can be made of it.
        """
        name = str(name_or_path)
        path = Path(name).expanduser()
        if not name.startswith(HUB_PREFIX) and not path.exists():
            raise UserError(f"tokenizer {name!r} does not exist: give a folder, a tokenizer.json, or 'hub:OWNER/NAME'")
        try:
            if path.is_file():
                return cls._from_file(path)
            from lin_jax.data.original_tokenizers import original_reader

            read = original_reader(path)
            return cls._from_transformers(name) if read is None else read(path)
        except UserError:
            raise
        except Exception as error:  # each kind of file fails in a way of its own, mostly with plain Exception
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
            raise UserError(
                f"cannot read a tokenizer from {name!r}: {reason}; give a folder with a tokenizer.json"
            ) from error

    @classmethod
    def _from_file(cls, path: Path) -> "Tokenizer":
        backend = tokenizers.Tokenizer.from_file(str(path))
        found = {
            name: next((token for token in usual if backend.token_to_id(token) is not None), None)
            for name, usual in _USUAL.items()
        }
        return cls(backend, **found)

    @classmethod
    def _from_transformers(cls, name: str) -> "Tokenizer":
        # Imported here because it takes more than a second, and a trained tokenizer does not need it.
        from transformers import AutoTokenizer

        pretrained = AutoTokenizer.from_pretrained(
            name.removeprefix(HUB_PREFIX),
            trust_remote_code=False,
            local_files_only=not name.startswith(HUB_PREFIX),
            **_neutral_config(Path(name) / "config.json"),
        )
        backend = getattr(pretrained, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(f"{type(pretrained).__name__} is not a fast tokenizer")
        named = pretrained.special_tokens_map.items()
        texts = {name: str(token) for name, token in named if not isinstance(token, list)}
        return cls(backend, pretrained=pretrained, **texts)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Trains a byte-level BPE: any text has ids, and they decode to exactly that text.

        The same texts give the same tokenizer. A small corpus may yield fewer than `vocab_size` entries.

        Raises:
            UserError: `vocab_size` has no room for the 256 bytes and the end-of-text token.
        """
        if vocab_size < SMALLEST_BPE:
            raise UserError(f"vocab_size {vocab_size} is too small: a byte-level BPE needs {SMALLEST_BPE} or more")
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            special_tokens=[END_OF_TEXT],
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        if backend.get_vocab_size() < vocab_size:
            log.info("the text yields %d vocabulary entries of %d", backend.get_vocab_size(), vocab_size)
        return cls(backend, eos_token=END_OF_TEXT)

    def special_id(self, name: str) -> int | None:
        """Id of the special token of a name that transformers has for it, such as `sep_token`; None without one."""
        token = self._tokens.get(name)
        return None if token is None else self.backend.token_to_id(token)

    @property
    def vocab_size(self) -> int:
        """The number of ids, holes included: one more than the largest id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def fingerprint(self) -> str:
        """Stands for vocabulary and merges: tells that a checkpoint was trained with another tokenizer."""
        model = json.loads(self.backend.to_str())["model"]
        vocabulary = sorted(self.backend.get_vocab(with_added_tokens=True).items())
        content = json.dumps([model["type"], vocabulary, model.get("merges")])
        return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()

    @property
    def encoding_fingerprint(self) -> str:
        """Stands for all that decides which ids a document gets: normalisation and cutting into words, too."""
        content = json.loads(self.backend.to_str())
        parts = [content.get(name) for name in ("normalizer", "pre_tokenizer", "model", "added_tokens")]
        whole = json.dumps([parts, self.bos_id, self.eos_id], sort_keys=True)
        return hashlib.blake2b(whole.encode(), digest_size=8).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """Returns the ids of a text, int32 `[N]`."""
        return np.asarray(self.backend.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the ids of each text, int32 `[N]`, on all processor cores."""
        encoded = self.backend.encode_batch(list(texts), add_special_tokens=False)
        return [np.asarray(each.ids, dtype=np.int32) for each in encoded]

    def encode_document(self, text: str) -> np.ndarray:
        """Returns the ids of a whole document, int32 `[N]`: first token, text, last token, as far as there are such.

        Where one token serves as both (GPT-2), it comes last only, so that one stands between documents.
        """
        return self.marked(self.encode(text))

    def marked(self, ids: np.ndarray, *, begins: bool = True, ends: bool = True) -> np.ndarray:
        """Returns ids of a part of a document, `[N]`, with the first and last token where it begins and ends it."""
        bos = [self.bos_id] if begins and self.bos_id is not None and self.bos_id != self.eos_id else []
        eos = [self.eos_id] if ends and self.eos_id is not None else []
        return np.concatenate([bos, ids, eos]).astype(np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray, *, skip_special_tokens: bool = False) -> str:
        """Returns the text of ids `[N]`; bytes that are not UTF-8 become U+FFFD."""
        return self.backend.decode([int(token) for token in ids], skip_special_tokens=skip_special_tokens)

    def save(self, folder: str | Path) -> None:
        """Writes the files that `Tokenizer.load` and `transformers.AutoTokenizer` open into a folder."""
        pretrained = self._pretrained
        if pretrained is None:
            from transformers import PreTrainedTokenizerFast

            pretrained = PreTrainedTokenizerFast(
                tokenizer_object=self.backend, clean_up_tokenization_spaces=False, **self._tokens
            )
        pretrained.save_pretrained(folder)
        # transformers 5 keeps these in tokenizer_config.json; readers of other languages look for this file.
        named = {name: str(token) for name, token in pretrained.special_tokens_map.items() if isinstance(token, str)}
        (Path(folder) / "special_tokens_map.json").write_text(json.dumps(named, indent=2) + "\n")


def _neutral_config(path: Path) -> dict[str, Any]:
    """An empty configuration in place of one of a type that transformers does not know, which it would warn about."""
    from transformers import CONFIG_MAPPING, PretrainedConfig

    if not path.is_file() or json.loads(path.read_text(encoding="utf-8")).get("model_type") in CONFIG_MAPPING:
        return {}
    return {"config": PretrainedConfig()}


def prepare_tokenizer(config: DataConfig, documents: "Corpus | Sequence[Document] | IterableDataset") -> Tokenizer:
    """Loads the tokenizer that the configuration names, or trains one on (the beginning of) the documents.

    A tokenizer learns from every part of a mixture, by its weight.

    Raises:
        UserError: the named tokenizer cannot be read.
    """
    if config.tokenizer is not None:
        return Tokenizer.load(config.tokenizer)
    parts = Corpus.of(documents).parts
    texts = (text for part in parts for text in _beginning(part, round(_TRAINING_CHARACTERS * part.share)))
    return Tokenizer.train(texts, config.vocab_size)


def _beginning(part: Part, characters: int) -> Iterator[str]:
    left = characters
    for text in part.texts():
        yield text[:left]
        left -= len(text)
        if left <= 0:
            return
