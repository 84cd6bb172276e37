"""Text to token ids and back: one thin class over a fast tokenizer of the `tokenizers` library."""

import hashlib
import itertools
import json
import logging
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from lin_jax.errors import UserError

log = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"
# A byte-level vocabulary holds every byte and the end-of-text token, before any merge.
SMALLEST_BPE = 257


class Tokenizer:
    """A fast tokenizer with the ids of its beginning and end tokens; `load_tokenizer` opens one from files.

    Special tokens that are spelled out in a text become their ids; none is added, except by
    `encode_document`. A text begins with what the tokenizer's own post-processor puts there, as transformers has it: a
    tokenizer may know a beginning token and add none (`add_bos_token: false`).

    Attributes:
        backend: the `tokenizers.Tokenizer` that does the work.
        bos_id: id of the token for the beginning of a text, or None.
        eos_id: id of the token that ends a document and a generated text, or None.

    Args:
        backend: as above.
        pretrained: the transformers object that the backend came with, if there was one.
        special_tokens: texts of special tokens by transformers' names: bos_token, eos_token, cls_token, sep_token, ...
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        pretrained: Any = None,
        **special_tokens: str | None,
    ):
        # Truncation and padding are settings of the file that the tokenizer came from; texts are never cut here.
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self._tokens = {name: token for name, token in special_tokens.items() if token is not None}
        self.bos_id, self.eos_id = self.special_id("bos_token"), self.special_id("eos_token")
        # The transformers object, if there was one, saves more: chat template, other special tokens.
        self._pretrained = pretrained

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Trains a byte-level BPE, which encodes any text and decodes to exactly that text.

        The same texts give the same tokenizer. A small corpus may yield fewer than `vocab_size` entries.

        Raises:
            UserError: `vocab_size` has no room for the 256 bytes and the end-of-text token.
        """
        if vocab_size < SMALLEST_BPE:
            raise UserError(f"vocab_size {vocab_size} is too small for a byte-level BPE; give {SMALLEST_BPE} or more")
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
        """Id of a special token by transformers' name for it, such as `sep_token`; None if there is none."""
        token = self._tokens.get(name)
        return None if token is None else self.backend.token_to_id(token)

    @cached_property
    def begin_ids(self) -> tuple[int, ...]:
        """Ids in front of every text: those that `AutoTokenizer(text)` adds there."""
        text = self.backend.encode("a")
        added = itertools.takewhile(lambda pair: pair[1], zip(text.ids, text.special_tokens_mask, strict=True))
        return tuple(token for token, _ in added)

    @property
    def special_tokens(self) -> dict[int, str]:
        """Texts of all special tokens, by id."""
        added = self.backend.get_added_tokens_decoder()
        return {number: token.content for number, token in added.items() if token.special}

    def special_tokens_in(self, texts: Iterable[str]) -> dict[int, str]:
        """Special tokens whose texts occur in any of some texts, by id."""
        whole = list(texts)
        return {number: name for number, name in self.special_tokens.items() if any(name in text for text in whole)}

    @property
    def vocab_size(self) -> int:
        """Number of ids, unused ones included: one more than the largest id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def fingerprint(self) -> str:
        """Digest of vocabulary and merges, by which a checkpoint recognizes the tokenizer that it was trained with."""
        model = json.loads(self.backend.to_str())["model"]
        vocabulary = sorted(self.backend.get_vocab(with_added_tokens=True).items())
        content = json.dumps([model["type"], vocabulary, model.get("merges")])
        return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()

    @property
    def encoding_fingerprint(self) -> str:
        """Digest of all that decides the ids of a document: normalization and splitting into words, too."""
        content = json.loads(self.backend.to_str())
        parts = [content.get(name) for name in ("normalizer", "pre_tokenizer", "model", "added_tokens")]
        begin = self._document_begin
        usual = self.bos_id in (None, self.eos_id) or begin == (self.bos_id,)
        whole = json.dumps([parts, self.bos_id if usual else begin, self.eos_id], sort_keys=True)
        return hashlib.blake2b(whole.encode(), digest_size=8).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """Returns the ids of a text, int32 `[N]`; half a character counts as `whole_characters` has it."""
        encoded = self.backend.encode(whole_characters(text), add_special_tokens=False)
        return np.asarray(encoded.ids, dtype=np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the ids of each text, int32 `[N]`, on all processor cores."""
        encoded = self.backend.encode_batch(list(map(whole_characters, texts)), add_special_tokens=False)
        return [np.asarray(each.ids, dtype=np.int32) for each in encoded]

    def encode_document(self, text: str) -> np.ndarray:
        """Returns the ids of a whole document, int32 `[N]`: beginning, text, end token, as far as they exist.

        The beginning is `begin_ids`, but for an encoder's classification token, which has no place there. Where one
        token serves as both (GPT-2), it comes last only, so that one stands between documents.
        """
        return self.marked(self.encode(text))

    @property
    def _document_begin(self) -> tuple[int, ...]:
        return () if self.bos_id is None or self.eos_id in self.begin_ids else self.begin_ids

    def marked(self, ids: np.ndarray, *, begins: bool = True, ends: bool = True) -> np.ndarray:
        """Adds beginning and end to the ids `[N]` of a part of a document, where it begins and ends that."""
        begin = self._document_begin if begins else ()
        eos = [self.eos_id] if ends and self.eos_id is not None else []
        return np.concatenate([begin, ids, eos]).astype(np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray, *, skip_special_tokens: bool = False) -> str:
        """Returns the text of ids `[N]`; bytes that are not UTF-8 become U+FFFD."""
        return self.backend.decode([int(token) for token in ids], skip_special_tokens=skip_special_tokens)

    def save(self, folder: str | Path) -> None:
        """Writes the files that `load_tokenizer` and `transformers.AutoTokenizer` open into a folder."""
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


def whole_characters(text: str) -> str:
    """The text with U+FFFD for each half of a character (a surrogate on its own, which JSON can spell)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        # Two halves that belong together become the character.
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text
