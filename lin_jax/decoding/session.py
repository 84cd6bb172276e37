"""A trained run or a Hugging Face folder, ready to decode: model, tokenizer, heads, and this machine's draft tree."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lin_jax.data import Tokenizer
from lin_jax.data.config import HUB_PREFIX
from lin_jax.decoding.drafters import KINDS, build_drafter
from lin_jax.decoding.generator import Generator
from lin_jax.decoding.plan import Plan, choose_plan, load_plan, measure_costs, measure_hits, save_plans
from lin_jax.decoding.sampling import Sampling
from lin_jax.decoding.tree import DraftTree
from lin_jax.errors import UserError
from lin_jax.hub.files import generation_ends, is_checkpoint_folder, resolve
from lin_jax.hub.medusa import has_heads
from lin_jax.hub.medusa import load_heads as load_published_heads
from lin_jax.hub.pretrained import from_pretrained
from lin_jax.models import CausalModel, MedusaHeads

PLAN_FILE = "speculation.json"


@dataclass(frozen=True)
class Session:
    """What decoding needs of a model.

    Attributes:
        folder: a run's folder, or a Hugging Face folder; plans are kept there.
        model: the target.
        tokenizer: the model's.
        heads: Medusa heads, if there are any.
        end_tokens: tokens that end a text.
    """

    folder: Path
    model: CausalModel
    tokenizer: Tokenizer
    heads: MedusaHeads | None
    end_tokens: tuple[int, ...]

    @classmethod
    def load(cls, place: str | Path, heads_folder: str | Path | None = None) -> "Session":
        """Opens a run folder or a Hugging Face folder, with heads from `heads_folder` or from inside the folder.

        Args:
            place: output of a train.py run, a folder with a `config.json`, or `hub:owner/name`.
            heads_folder: run folder of heads, or a folder with heads in the published layout.

        Raises:
            UserError: there is no such folder, or its parts do not belong together.
        """
        folder = resolve(place) if str(place).startswith(HUB_PREFIX) else Path(place)
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder}; give the output of a train.py run, or a Hugging Face folder")
        if is_checkpoint_folder(folder):
            return _load_checkpoint(folder, heads_folder)
        return _load_run(folder, heads_folder)

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a prompt; an empty one is the start of a document."""
        ids = self.tokenizer.encode(text).tolist()
        first = self.tokenizer.bos_id
        if first is not None and (not ids or first != self.tokenizer.eos_id):
            ids = [first, *ids]
        if not ids:
            ids = list(self.end_tokens)
        if not ids:
            raise UserError("the prompt is empty and the tokenizer has no token to start a text with; give a prompt")
        return ids

    def generator(self, kind: str, tree: DraftTree) -> Generator:
        """A generator with the given drafter and tree."""
        drafter = build_drafter(kind, self.heads, tree=tree)
        return Generator(self.model, drafter=drafter, tree=tree, end_tokens=self.end_tokens)

    def plan(self, kind: str, note: Callable[[str], None] = lambda line: None) -> Plan:
        """The tree for this machine: that of an earlier measurement, or of one that is made now and kept."""
        if kind == "none":
            return Plan(kind, (), "", 1.0, 1.0)
        build_drafter(kind, self.heads)
        found = load_plan(self.folder / PLAN_FILE, kind)
        if found is None:
            note("choosing draft trees for this machine (once, about half a minute)")
            found = next(plan for plan in self.measure_plans() if plan.drafter == kind)
        return found

    def measure_plans(self, prompts: Sequence[Sequence[int]] | None = None, *, tokens: int = 192) -> list[Plan]:
        """Chooses a tree for every drafter, by this machine's costs and by texts that the model writes; keeps them.

        Args:
            prompts: what the texts go on from; None samples the beginnings of a few documents.
            tokens: length of the texts.
        """
        # Without end tokens: a text that ends at once would say nothing about the drafter.
        plain = Generator(self.model)
        if prompts is None:
            empty = [self.encode_prompt("")] * 8
            prompts = plain.generate(empty, 32, sampling=Sampling(1.0)).tokens
        texts = plain.generate(prompts, tokens).tokens
        costs = measure_costs(self.model, self.heads)
        plans = []
        for kind in KINDS[1:]:
            if self.heads is None and "medusa" in kind:
                continue
            drafter = build_drafter(kind, self.heads)
            # A path must be shorter than a group.
            hits = measure_hits(self.model, drafter, prompts, texts)[:, : self.model.config.attention.group_size - 1]
            heads = self.heads.count if self.heads is not None and "medusa" in kind else 0
            plans.append(choose_plan(kind, hits, costs, drafter.width - ("ngram" in kind), heads))
        if os.access(self.folder, os.W_OK):
            save_plans(self.folder / PLAN_FILE, plans, costs)
        return plans


def _load_run(folder: Path, heads_folder: str | Path | None) -> Session:
    from lin_jax.training.checkpoints import read_about
    from lin_jax.training.loading import load_model

    model, _, step = load_model(folder)
    # Training may unroll the layer loop for speed; one step of decoding has too little work for that to pay.
    model.layers.unroll = 1
    tokenizer = Tokenizer.load(str(folder / "tokenizer"))
    if tokenizer.fingerprint != read_about(folder, step).tokenizer:
        raise UserError(
            f"the tokenizer in {folder / 'tokenizer'} is not the one that the model was trained with; "
            "put that one there"
        )
    inside = folder / "heads"
    heads = _load_heads(heads_folder or (inside if inside.is_dir() else None), model)
    return Session(folder, model, tokenizer, heads, _ends(tokenizer))


def _load_checkpoint(folder: Path, heads_folder: str | Path | None) -> Session:
    model = from_pretrained(folder)
    if not isinstance(model, CausalModel):
        raise UserError(f"{folder} holds a {type(model).__name__}, which does not write texts; give a causal model")
    tokenizer = Tokenizer.load(folder)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"the tokenizer in {folder} has {tokenizer.vocab_size} entries, the model {model.config.vocab_size}; "
            "put the model's own there"
        )
    heads = _load_heads(heads_folder or (folder if has_heads(folder) else None), model)
    return Session(folder, model, tokenizer, heads, generation_ends(folder) or _ends(tokenizer))


def _load_heads(folder: str | Path | None, model: Any) -> MedusaHeads | None:
    from lin_jax.training.loading import load_heads

    if folder is None:
        return None
    return load_published_heads(Path(folder), model) if has_heads(Path(folder)) else load_heads(folder, model=model)


def _ends(tokenizer: Tokenizer) -> tuple[int, ...]:
    return () if tokenizer.eos_id is None else (tokenizer.eos_id,)


def read_prompts(path: str | Path) -> list[str]:
    """Prompts from a file: the field `prompt` of each line of a .jsonl file, else the whole file as one.

    Raises:
        UserError: there is no such file, or it does not hold prompts.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"the prompt file {path} cannot be read ({error.__class__.__name__}); give a text file"
        ) from None
    if path.suffix != ".jsonl":
        return [text]
    try:
        return [json.loads(line)["prompt"] for line in text.splitlines() if line.strip()]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: every line must be a JSON object with the field 'prompt'") from None


def check_length(prompts: Sequence[Sequence[int]], longest: int) -> None:
    """Refuses prompts that are longer than allowed."""
    length = int(np.max([len(prompt) for prompt in prompts]))
    if length > longest:
        raise UserError(
            f"a prompt has {length} tokens, {longest} are allowed; shorten it, or raise --max-prompt-tokens"
        )
