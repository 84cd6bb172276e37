"""A trained run or a Hugging Face folder, ready to decode: model, tokenizer, drafters, and this machine's plans."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lin_jax.data import Tokenizer
from lin_jax.data.config import HUB_PREFIX
from lin_jax.data.token_bytes import token_bytes
from lin_jax.decoding.calibration import calibration_prompts
from lin_jax.decoding.costs import measure_costs
from lin_jax.decoding.drafters import DraftParts, available, build_drafter
from lin_jax.decoding.generator import Generator, Tree
from lin_jax.decoding.plan import Plan, load_plans, make_plan, save_plans
from lin_jax.decoding.stops import stop_automaton
from lin_jax.errors import UserError
from lin_jax.hub.files import generation_ends, is_checkpoint_folder, resolve
from lin_jax.hub.medusa import has_heads
from lin_jax.hub.medusa import load_heads as load_published_heads
from lin_jax.hub.pretrained import from_pretrained
from lin_jax.models import CausalModel, LayerStack, MedusaHeads, PathHead, SeparateLayers
from lin_jax.which_step import Step

PLAN_FILE = "speculation.json"
# Folders inside a run's where heads for its model are looked for.
HEAD_FOLDERS = ("heads", "path")


@dataclass(frozen=True)
class Session:
    """What decoding needs of a model.

    Attributes:
        folder: a run's folder, or a Hugging Face folder; plans are kept there.
        parts: the target, and what drafters for it are made of.
        tokenizer: the model's.
        end_tokens: tokens that end a text.
    """

    folder: Path
    parts: DraftParts
    tokenizer: Tokenizer
    end_tokens: tuple[int, ...]

    @property
    def model(self) -> CausalModel:
        """The target."""
        return self.parts.target

    @classmethod
    def load(
        cls,
        place: str | Path,
        heads: str | Path | Sequence[str | Path] = (),
        *,
        draft_model: str | Path | None = None,
        draft_layers: Sequence[int] | None = None,
        step: Step = None,
    ) -> "Session":
        """Opens a run folder or a Hugging Face folder, with heads from elsewhere or from inside the folder.

        Args:
            place: output of a train.py run, a folder with a `config.json`, or `hub:owner/name`.
            heads: run folders of heads, or a folder with heads in the published layout.
            draft_model: a small model with the same tokenizer; a folder like `place`.
            draft_layers: numbers of the model's layers that draft for it.
            step: which checkpoint of a run: None takes the newest, "best" the one with the lowest validation loss;
                heads elsewhere are the newest.

        Raises:
            UserError: there is no such folder, or its parts do not belong together.
        """
        folder = resolve(place) if str(place).startswith(HUB_PREFIX) else Path(place)
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder}; give the output of a train.py run, or a Hugging Face folder")
        if is_checkpoint_folder(folder):
            if step is not None:
                raise UserError(f"{place} is a Hugging Face folder, which has no steps; leave --step out")
            model, tokenizer, ends = _load_checkpoint(folder)
        else:
            model, tokenizer, ends = _load_run(folder, step)
        found = _load_heads([heads] if isinstance(heads, str | Path) else heads, folder, model, step)
        if isinstance(model.layers, LayerStack):
            model.layers = SeparateLayers.of(model.layers)
        small = None
        if draft_model is not None:
            other = Session.load(draft_model)
            if other.tokenizer.fingerprint != tokenizer.fingerprint:
                raise UserError(f"the draft model {draft_model} has another tokenizer; give one trained with the same")
            small = other.model
        parts = DraftParts(
            target=model,
            medusa=next((each for each in found if isinstance(each, MedusaHeads)), None),
            path=next((each for each in found if isinstance(each, PathHead)), None),
            model=small,
            layers=None if draft_layers is None else tuple(draft_layers),
        )
        return cls(folder, parts, tokenizer, ends)

    def encode_prompt(self, text: str, *, begins: bool = True) -> list[int]:
        """Token ids of a prompt; an empty one is the start of a document.

        Args:
            text: the prompt.
            begins: whether nothing comes before it; otherwise it is just its tokens, perhaps none.
        """
        ids = self.tokenizer.encode(text).tolist()
        if not begins:
            return ids
        first = self.tokenizer.bos_id
        if first is not None and (not ids or first != self.tokenizer.eos_id):
            ids = [first, *ids]
        if not ids:
            ids = list(self.end_tokens)
        if not ids:
            raise UserError("the prompt is empty and the tokenizer has no token to start a text with; give a prompt")
        return ids

    def generator(
        self,
        kind: str,
        tree: Tree | None,
        *,
        worth: float | None = None,
        stops: Sequence[str] = (),
        acceptance: str = "exact",
    ) -> Generator:
        """A generator with the given drafter and tree, whose texts end at any of some strings."""
        automaton = stop_automaton(stops, token_bytes(self.tokenizer)) if stops else None
        return Generator(
            self.model,
            drafter=build_drafter(kind, self.parts),
            tree=tree,
            worth=worth,
            end_tokens=self.end_tokens,
            stops=automaton,
            acceptance=acceptance,
        )

    def plan(self, kind: str | None = None, slots: int = 1, note: Callable[[str], None] = lambda line: None) -> Plan:
        """How to draft on this machine at a batch size: as measured earlier, or as is measured now and kept.

        Args:
            kind: the drafter; None takes the best of all there are.
            slots: the batch size.
            note: told before something takes long.
        """
        kinds = [kind] if kind is not None else available(self.parts)
        plans = self.plans(kinds, slots, note=note)
        return max(plans, key=lambda plan: plan.measured_speedup)

    def plans(
        self,
        kinds: Sequence[str],
        slots: int = 1,
        *,
        prompts: Sequence[Sequence[int]] | None = None,
        tokens: int = 128,
        note: Callable[[str], None] = lambda line: None,
    ) -> list[Plan]:
        """The plan for each drafter at a batch size, from the folder or measured and kept there.

        Args:
            kinds: the drafters.
            slots: the batch size.
            prompts: what the texts go on from by which trees are chosen, measuring everything anew; None takes
                `calibration_prompts`, and measures only what is not known yet.
            tokens: length of the texts.
            note: told before something takes long.
        """
        drafters = {kind: build_drafter(kind, self.parts) for kind in kinds}
        known, costs = load_plans(self.folder / PLAN_FILE)
        kept = {(plan.drafter, plan.slots): plan for plan in known}
        if prompts is not None:
            kept, costs = {key: plan for key, plan in kept.items() if key[0] not in kinds or key[1] != slots}, []
        missing = [kind for kind in kinds if kind != "none" and (kind, slots) not in kept]
        if missing:
            names = ", ".join(missing)
            note(f"choosing draft trees for {names} on this machine, batch {slots} (once, a minute or two)")
            # Without end tokens: a text that ends at once would say nothing about the drafter.
            plain = Generator(self.model)
            if prompts is None:
                prompts = calibration_prompts(self.folder, plain, self.tokenizer, self.encode_prompt(""))
            texts = plain.generate(prompts, tokens).tokens
            cost = next((each for each in costs if each.slots == slots), None) or measure_costs(self.model, slots=slots)
            costs = [*(each for each in costs if each.slots != slots), cost]
            for kind in missing:
                kept[kind, slots] = make_plan(self.model, kind, drafters[kind], prompts, texts, cost)
            if os.access(self.folder, os.W_OK):
                save_plans(self.folder / PLAN_FILE, list(kept.values()), costs)
        return [kept[kind, slots] if kind != "none" else Plan(kind, slots, "none") for kind in kinds]


def _load_run(folder: Path, step: Step) -> tuple[CausalModel, Tokenizer, tuple[int, ...]]:
    from lin_jax.training.checkpoint_files import read_about
    from lin_jax.training.loading import load_model

    model, _, found = load_model(folder, step)
    _check_causal(model, folder)
    tokenizer = Tokenizer.load(str(folder / "tokenizer"))
    if tokenizer.fingerprint != read_about(folder, found).tokenizer:
        raise UserError(
            f"the tokenizer in {folder / 'tokenizer'} is not the one that the model was trained with; "
            "put that one there"
        )
    return model, tokenizer, _ends(tokenizer)


def _load_checkpoint(folder: Path) -> tuple[CausalModel, Tokenizer, tuple[int, ...]]:
    model = from_pretrained(folder)
    _check_causal(model, folder)
    tokenizer = Tokenizer.load(folder)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"the tokenizer in {folder} has {tokenizer.vocab_size} entries, the model {model.config.vocab_size}; "
            "put the model's own there"
        )
    return model, tokenizer, generation_ends(folder) or _ends(tokenizer)


def _check_causal(model: Any, folder: Path) -> None:
    if not isinstance(model, CausalModel):
        raise UserError(f"{folder} holds a {type(model).__name__}, which does not write texts; give a causal model")


def _load_heads(places: Sequence[str | Path], folder: Path, model: Any, step: Step) -> list[MedusaHeads | PathHead]:
    """Heads from the given places first, then those that lie in the model's own folder."""
    from lin_jax.training.loading import holds_heads, load_heads

    found = []
    inside: list[Path] = [folder / name for name in HEAD_FOLDERS if (folder / name).is_dir()]
    if has_heads(folder) or holds_heads(folder):
        inside.insert(0, folder)
    for place in [*map(Path, places), *inside]:
        if has_heads(place):
            found.append(load_published_heads(place, model))
        else:
            found.append(load_heads(place, step if place == folder else None, model=model))
    return found


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
