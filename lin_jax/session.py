"""A trained model, ready to decode: tokenizer, drafters, and this machine's plans."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from lin_jax.attention import max_draft_depth
from lin_jax.data import DataConfig, Tokenizer
from lin_jax.data.tokenizers.token_bytes import token_bytes
from lin_jax.decoding.autotune.costs import Costs, measure_costs
from lin_jax.decoding.autotune.plan import SpeculationPlan, load_plans, make_plan, save_plans
from lin_jax.decoding.autotune.prompts import calibration_prompts
from lin_jax.decoding.drafting.api import Drafter
from lin_jax.decoding.drafting.drafters import DraftParts, available, build_drafter
from lin_jax.decoding.drafting.tree import AnyTree
from lin_jax.decoding.engine.slots import bucket
from lin_jax.decoding.engine.stop_strings import stop_automaton
from lin_jax.decoding.generator import MAX_SLOTS, Generator
from lin_jax.decoding.streamed_text import StreamedText
from lin_jax.errors import UserError
from lin_jax.hub.medusa import has_heads, load_medusa_heads
from lin_jax.models import CausalModel, LayerStack, MedusaHeads, PathHead, SeparateLayers
from lin_jax.training.checkpoint.selector import CheckpointSelector
from lin_jax.training.model_source import ModelSource, check_tokenizer, holds_heads

log = logging.getLogger(__name__)

# Tokens that n-gram drafts guess ahead where no tree is chosen.
NGRAM_LENGTH = 7
PLAN_FILE = "speculation.json"
# Folders inside a run's where heads for its model are looked for.
HEAD_FOLDERS = ("heads", "path")


@dataclass(frozen=True)
class Session:
    """A model ready to decode.

    Attributes:
        parts: the target, and what drafters for it are made of.
        tokenizer: the model's.
        end_tokens: tokens that end a text.
        folder: where plans are kept; None keeps none.
        data: the text that a run was trained on, whose held-out part drafters are chosen by; None if it is not known.
    """

    parts: DraftParts
    tokenizer: Tokenizer
    end_tokens: tuple[int, ...]
    folder: Path | None = None
    data: DataConfig | None = None
    _costs: dict[int, float] = field(default_factory=dict, repr=False, compare=False)

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
        step: CheckpointSelector = None,
        tokenizer: str | None = None,
    ) -> "Session":
        """Opens a trained model, with heads from elsewhere or from inside its folder.

        Args:
            place: output of a train.py run, Hugging Face folder, `hub:OWNER/NAME`, or file of llama2.c.
            heads: run folders of heads, or a folder with heads in the published layout.
            draft_model: a small model with the same tokenizer; a place like `place`.
            draft_layers: numbers of the model's layers that draft for it.
            step: which checkpoint of a run: None takes the newest, "best" the one with the lowest validation loss;
                heads elsewhere are the newest.
            tokenizer: folder or file of the tokenizer, for a file of llama2.c.

        Raises:
            UserError: there is no such place, or its parts do not belong together.
        """
        source = ModelSource.open(place, step)
        model = source.model()
        check_causal(model, str(place))
        known = source.tokenizer(tokenizer)
        _check_tokenizer(source, known, model)
        found = _load_heads([heads] if isinstance(heads, str | Path) else heads, source, model)
        small = None
        if draft_model is not None:
            other = Session.load(draft_model, tokenizer=tokenizer)
            if other.tokenizer.fingerprint != known.fingerprint:
                raise UserError(f"the draft model {draft_model} has another tokenizer; give one trained with the same")
            small = other.model
        return cls(
            draft_parts(model, found, small, draft_layers),
            known,
            source.end_tokens(known),
            source.place if source.place.is_dir() else None,
            source.run.data if source.is_run else None,
        )

    @classmethod
    def of(cls, model: CausalModel, tokenizer: Tokenizer, end_tokens: Sequence[int] | None = None) -> "Session":
        """Wraps a model in memory; the session has a copy of it, laid out for decoding.

        Args:
            model: the model, which is not changed.
            tokenizer: its tokenizer.
            end_tokens: tokens that end a text; None is the tokenizer's own.

        Raises:
            UserError: the model is none that writes texts, or there is no tokenizer.
        """
        check_causal(model, "the given model")
        if tokenizer is None:
            raise UserError("the tokenizer is None; name the model's with from_pretrained(..., tokenizer=PATH)")
        if end_tokens is None:
            end_tokens = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
        return cls(draft_parts(nnx.clone(model)), tokenizer, tuple(end_tokens))

    def encode_prompt(self, text: str, *, begins: bool = True) -> list[int]:
        """Encodes a prompt as token ids, behind what the tokenizer itself puts in front of a text.

        An empty one is the start of a document: the beginning token, or else the token that ended the one before.

        Args:
            text: the prompt; half a character (a surrogate on its own) counts as U+FFFD.
            begins: whether nothing comes before it; otherwise it is just its tokens, perhaps none.

        Raises:
            UserError: the prompt is empty and no token begins a text, or it has a token that the model does not know.
        """
        ids = self.tokenizer.encode(text).tolist()
        if not begins:
            return self._known(ids)
        ids = [*self.tokenizer.begin_ids, *ids]
        if not ids:
            known = (self.tokenizer.bos_id, self.tokenizer.eos_id, *self.end_tokens)
            ids = [token for token in known if token is not None][:1]
        if not ids:
            raise UserError("the prompt is empty and the tokenizer has no token to start a text with; give a prompt")
        return self._known(ids)

    def _known(self, ids: list[int]) -> list[int]:
        """The ids, none of which is beyond the model's embedding."""
        size = self.model.config.vocab_size
        if beyond := [number for number in ids if number >= size]:
            token = self.tokenizer.backend.id_to_token(beyond[0])
            raise UserError(
                f"the prompt has the token {token!r} of id {beyond[0]}, and the model knows {size}; take it out of "
                "the prompt, or put the model's own tokenizer there"
            )
        return ids

    def generator(
        self,
        kind: str,
        tree: AnyTree | None,
        *,
        break_even_tokens: float | None = None,
        stops: Sequence[str] = (),
        acceptance: str = "exact",
    ) -> Generator:
        """Builds a generator with the given drafter and tree, whose texts end at any of some strings."""
        named = self.tokenizer.special_tokens_in(stops)
        automaton = stop_automaton(stops, token_bytes(self.tokenizer, named)) if stops else None
        return Generator(
            self.model,
            drafter=build_drafter(kind, self.parts),
            tree=tree,
            break_even_tokens=break_even_tokens,
            end_tokens=self.end_tokens,
            stops=automaton,
            acceptance=acceptance,
        )

    def plan(
        self, kind: str | None = None, slots: int = 1, note: Callable[[str], None] = lambda line: None
    ) -> SpeculationPlan:
        """Chooses how to draft on this machine at a batch size: as measured earlier, or measured now and kept.

        Args:
            kind: the drafter; None takes the best of all there are.
            slots: the batch size.
            note: told before something takes long.
        """
        kinds = [kind] if kind is not None else available(self.parts)
        plans = self.plans(kinds, slots, note=note)
        return max(plans, key=lambda plan: plan.measured_speedup)

    def plain_plan(self) -> SpeculationPlan:
        """Plain decoding, token by token."""
        return SpeculationPlan("none", 1, "none")

    def ngram_plan(self, slots: int = 1, *, measured: bool = True) -> SpeculationPlan:
        """Drafts a chain from the text so far, without any choice of trees; it is ready at once.

        Args:
            slots: the batch size.
            measured: fall back to plain decoding while drafts do not pay, by the cost of a step on this machine.
        """
        longest = max_draft_depth(self.model.config.attention)
        length = NGRAM_LENGTH if longest is None else min(NGRAM_LENGTH, longest)
        if not length:
            return self.plain_plan()
        plan = SpeculationPlan("ngram", slots, f"chain:{length}")
        if not measured:
            return plan
        size = min(bucket(slots), MAX_SLOTS)
        if size not in self._costs:
            costs = measure_costs(self.model, slots=size, sizes=(1, length + 1), max_cost=float("inf"), steps=16)
            self._costs[size] = costs.verify(length + 1) / costs.verify(1)
        return replace(plan, break_even_tokens=self._costs[size])

    def decode(self, tokens: Sequence[int], stops: Sequence[str] = (), after: Sequence[int] = ()) -> str:
        """Decodes new tokens as text, without special tokens, up to a stop string.

        Args:
            tokens: the new tokens.
            stops: stop strings.
            after: tokens that they follow, such as the prompt's.
        """
        text = StreamedText(self.tokenizer, stops, after)
        return text.push(tokens) + text.flush()

    def plans(
        self,
        kinds: Sequence[str],
        slots: int = 1,
        *,
        prompts: Sequence[Sequence[int]] | None = None,
        tokens: int = 128,
        note: Callable[[str], None] = lambda line: None,
    ) -> list[SpeculationPlan]:
        """Finds the plan for each drafter at a batch size, from the folder or measured and kept there.

        Args:
            kinds: the drafters.
            slots: the batch size.
            prompts: what the texts go on from by which trees are chosen, measuring everything anew; None takes
                `calibration_prompts`, and measures only what is not known yet.
            tokens: length of the texts.
            note: told before something takes long.
        """
        drafters = {kind: build_drafter(kind, self.parts) for kind in kinds}
        known, costs = ([], []) if self.folder is None else load_plans(self.folder / PLAN_FILE)
        kept = {(plan.drafter, plan.slots): plan for plan in known if self._fits(plan, drafters)}
        if prompts is not None:
            kept, costs = {key: plan for key, plan in kept.items() if key[0] not in kinds or key[1] != slots}, []
        missing = [kind for kind in kinds if kind != "none" and (kind, slots) not in kept]
        if missing:
            names = ", ".join(missing)
            note(f"choosing draft trees for {names} on this machine, batch {slots} (once, a minute or two)")
            # Without end tokens: a text that ends at once would say nothing about the drafter.
            plain = Generator(self.model)
            if prompts is None:
                prompts = calibration_prompts(self.data, plain, self.tokenizer, self.encode_prompt(""))
            texts = plain.generate(prompts, tokens).tokens
            cost = next((each for each in costs if each.slots == slots), None) or measure_costs(self.model, slots=slots)
            costs = [*(each for each in costs if each.slots != slots), cost]
            for kind in missing:
                kept[kind, slots] = make_plan(self.model, kind, drafters[kind], prompts, texts, cost)
            if self.folder is not None and os.access(self.folder, os.W_OK):
                self._keep(list(kept.values()), costs, note)
        return [kept[kind, slots] if kind != "none" else SpeculationPlan(kind, slots, "none") for kind in kinds]

    def _fits(self, plan: SpeculationPlan, drafters: Mapping[str, Drafter]) -> bool:
        """False for a plan of other heads or another attention, as when a folder's model was trained anew."""
        try:
            Generator(self.model, drafter=drafters.get(plan.drafter), tree=plan.shape)
        except UserError:
            return plan.drafter not in drafters
        return True

    def _keep(self, plans: Sequence[SpeculationPlan], costs: Sequence[Costs], note: Callable[[str], None]) -> None:
        """Keeps plans in the folder; that it cannot be done is said, and costs only time."""
        assert self.folder is not None, "checked by the caller"
        try:
            save_plans(self.folder / PLAN_FILE, plans, costs)
        except OSError as error:
            note(f"cannot keep the choice in {self.folder / PLAN_FILE} ({error.strerror}); it is made anew next time")


def draft_parts(
    model: CausalModel,
    heads: Sequence[MedusaHeads | PathHead] = (),
    small: CausalModel | None = None,
    layers: Sequence[int] | None = None,
) -> DraftParts:
    """Gathers what drafters are made of; the model's layers are taken apart for decoding."""
    if isinstance(model.layers, LayerStack):
        model.layers = SeparateLayers.of(model.layers)
    return DraftParts(
        target=model,
        medusa=next((each for each in heads if isinstance(each, MedusaHeads)), None),
        path=next((each for each in heads if isinstance(each, PathHead)), None),
        model=small,
        layers=None if layers is None else tuple(layers),
    )


def check_causal(model: Any, name: str) -> None:
    """Refuses a model that does not write texts.

    Raises:
        UserError: it is none.
    """
    if not isinstance(model, CausalModel):
        raise UserError(f"{name} holds a {type(model).__name__}, which does not write texts; give a causal model")


def _check_tokenizer(source: ModelSource, tokenizer: Tokenizer, model: CausalModel) -> None:
    if source.is_run:
        check_tokenizer(source, tokenizer)
    elif tokenizer.vocab_size > model.config.vocab_size:
        # Often an added token, such as one for padding, that no text holds.
        log.warning(
            "the tokenizer in %s has %d entries, the model %d: a prompt with one of those beyond is refused",
            source.place,
            tokenizer.vocab_size,
            model.config.vocab_size,
        )


def _load_heads(places: Sequence[str | Path], source: ModelSource, model: Any) -> list[MedusaHeads | PathHead]:
    """Reads heads from the given places first, then those that lie in the model's own folder."""
    folder = source.place
    inside = [ModelSource(folder / name) for name in HEAD_FOLDERS if (folder / name).is_dir()]
    if has_heads(folder) or holds_heads(folder):
        inside.insert(0, source)
    sources = [*(ModelSource(Path(place)) for place in places), *inside]
    return [load_medusa_heads(each.place, model) if has_heads(each.place) else each.heads(model) for each in sources]


def check_length(prompts: Sequence[Sequence[int]], longest: int) -> None:
    """Refuses prompts that are longer than allowed."""
    length = int(np.max([len(prompt) for prompt in prompts]))
    if length > longest:
        raise UserError(
            f"a prompt has {length} tokens, {longest} are allowed; shorten it, or raise --max-prompt-tokens"
        )
