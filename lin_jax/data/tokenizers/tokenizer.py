"""Text to token ids and back: one thin class over a fast tokenizer of the `tokenizers` library."""

import copy
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

from lin_jax.data.tokenizers.quiet_transformers import import_transformers
from lin_jax.errors import UserError

log = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"
# A byte-level vocabulary holds every byte and the end-of-text token, before any merge.
SMALLEST_BPE = 257
# Texts in front of a continuation, one of which makes no tokens together with it.
_TEXTS_BEFORE = ("\n", ".", "a")


class Tokenizer:
    """A fast tokenizer with the ids of its beginning and end tokens; `load_tokenizer` opens one from files.

    Special tokens that are spelled out in a text become their ids; none is added, except by
    `encode_document`. A text begins with what the tokenizer's own post-processor puts there, as transformers has it: a
    tokenizer may know a beginning token and add none (`add_bos_token: false`).

    Attributes:
        backend: the `tokenizers.Tokenizer` that does the work.
        bos_id: id of the token for the beginning of a text, or None.
        eos_id: id of the token that ends a document and a generated text, or None.
        limit: ids from here on are refused, as a model has no embedding for them; None allows all.

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
        self.limit: int | None = None
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

    def within(self, size: int | None) -> "Tokenizer":
        """The tokenizer for a model that knows `size` tokens, which may be fewer: it refuses texts with one beyond."""
        limited = copy.copy(self)
        limited.limit = None if size is None or size >= self.vocab_size else size
        return limited

    def check(self, ids: np.ndarray) -> np.ndarray:
        """Returns the ids `[N]`.

        Raises:
            UserError: one of them is beyond the limit.
        """
        if self.limit is not None and len(ids) and ids.max() >= self.limit:
            beyond = int(ids[ids >= self.limit][0])
            raise UserError(
                f"the text has the token {self.backend.id_to_token(beyond)!r} of id {beyond}, and the model knows "
                f"{self.limit}; take it out of the text, or give the model a row for it with transformers: "
                "resize_token_embeddings, then save_pretrained"
            )
        return ids

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
        """Returns the ids of a text, int32 `[N]`; half a character counts as `whole_characters` has it.

        Raises:
            UserError: one of them is beyond the limit.
        """
        encoded = self.backend.encode(whole_characters(text), add_special_tokens=False)
        return self.check(np.asarray(encoded.ids, dtype=np.int32))

    def encode_continuation(self, text: str) -> np.ndarray:
        """Returns the ids of a text that goes on from another, int32 `[N]`; errors as in `encode`.

        Tokenizers that mark where words begin (SentencePiece) take a text alone for a new one, and put a space in
        front. The ids are those of the whole text where its tokens do not span the seam, as before a space.
        """
        if not self._marks_beginnings:
            return self.encode(text)
        for before in _TEXTS_BEFORE:
            ids = self._behind(before, text)
            if ids is not None:
                return ids
        return self.encode(text)

    @cached_property
    def _marks_beginnings(self) -> bool:
        behind = self._behind(_TEXTS_BEFORE[0], "a")
        return behind is not None and not np.array_equal(behind, self.encode("a"))

    def _behind(self, before: str, text: str) -> np.ndarray | None:
        """The ids of a text behind another; None if the two are not parted by tokens."""
        front, whole = self.encode(before), self.encode(before + text)
        return whole[len(front) :] if np.array_equal(whole[: len(front)], front) else None

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the ids of each text, int32 `[N]`, on all processor cores; errors as in `encode`."""
        encoded = self.backend.encode_batch(list(map(whole_characters, texts)), add_special_tokens=False)
        return [self.check(np.asarray(each.ids, dtype=np.int32)) for each in encoded]

    def encode_document(self, text: str) -> np.ndarray:
        """Returns the ids of a whole document, int32 `[N]`: beginning, text, end token, as far as they exist.

        The beginning is `begin_ids`, but for an encoder's classification token, which has no place there. Where one
        token serves as both (GPT-2), it comes last only, so that one stands between documents.
        """
        return self.marked(self.encode(text))

    @property
    def _document_begin(self) -> tuple[int, ...]:
        return () if self.bos_id is None or self.eos_id in self.begin_ids else self.begin_ids

    def marked(self, ids: np.ndarray, *, ends: bool = True) -> np.ndarray:
        """Adds a document's beginning to the ids `[N]` of a part of one, and its end where the part ends it."""
        eos = [self.eos_id] if ends and self.eos_id is not None else []
        return self.check(np.concatenate([self._document_begin, ids, eos]).astype(np.int32))

    @property
    def chat_template(self) -> str:
        """The template that writes conversations.

        Raises:
            UserError: there is none.
        """
        template = getattr(self._pretrained, "chat_template", None)
        if not isinstance(template, str):
            raise UserError("the tokenizer has no chat template; give one that has, or rows of prompt and completion")
        return template

    def chat_text(self, messages: Sequence[Any], *, asks: bool = False, continues: bool = False) -> str:
        """The text of a conversation, as the tokenizer's chat template writes it.

        Args:
            messages: each with `role` and `content`.
            asks: end with what an answer of the assistant follows.
            continues: end within the last message, which goes on.

        Raises:
            UserError: there is no template, or it does not take these messages.
        """
        ending = {"continue_final_message": True} if continues else {}
        return str(self._chat(messages, tokenize=False, add_generation_prompt=asks, **ending))

    def chat_tokens(self, messages: Sequence[Any]) -> tuple[list[int], list[int]]:
        """Ids of a conversation, and 1 for those that the template says the assistant generates.

        Raises:
            UserError: there is no template, or it does not take these messages.
        """
        found = self._chat(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        return list(found["input_ids"]), list(found["assistant_masks"])

    def _chat(self, messages: Sequence[Any], **options: Any) -> Any:
        assert self.chat_template
        try:
            return self._pretrained.apply_chat_template(list(messages), **options)
        except Exception as error:  # templates raise whatever they like
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
            raise UserError(f"the tokenizer's chat template does not take a conversation: {reason}; mend it") from error

    def decode(self, ids: Sequence[int] | np.ndarray, *, skip_special_tokens: bool = False) -> str:
        """Returns the text of ids `[N]`; bytes that are not UTF-8 become U+FFFD."""
        return self.backend.decode([int(token) for token in ids], skip_special_tokens=skip_special_tokens)

    def save(self, folder: str | Path) -> None:
        """Writes the files that `load_tokenizer` and `transformers.AutoTokenizer` open into a folder."""
        pretrained = self._pretrained
        if pretrained is None:
            pretrained = import_transformers().PreTrainedTokenizerFast(
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
