"""Session: a model with tokenizer and drafters, and generators made of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Float

from lin_jax.attention import max_draft_depth
from lin_jax.data import DataConfig, Tokenizer
from lin_jax.data.tokenizers.token_bytes import token_bytes
from lin_jax.decoding.autotune.evidence import Evidence
from lin_jax.decoding.autotune.plan import SpeculationPlan, load_plans
from lin_jax.decoding.autotune.prompts import calibration_prompts
from lin_jax.decoding.autotune.shapes import DraftShapes, draft_shapes
from lin_jax.decoding.autotune.steering import recorded_evidence
from lin_jax.decoding.autotune.step_costs import CostFile, StepCosts, size_key
from lin_jax.decoding.drafting.drafters import DraftParts, available, build_drafter, reads_memory
from lin_jax.decoding.drafting.tree import AnyTree, tree_text
from lin_jax.decoding.engine.programs import ProgramCompiler
from lin_jax.decoding.engine.stop_strings import stop_automaton
from lin_jax.decoding.generator import Generator
from lin_jax.decoding.streamed_text import StreamedText
from lin_jax.errors import UserError
from lin_jax.models import CausalModel
from lin_jax.models.stored_weights import WeightStorage
from lin_jax.session.loading import (
    check_causal,
    check_entries,
    draft_parts,
    head_sources,
    heads_are_near,
    load_for_decoding,
    load_heads,
    recorded_accuracy,
    storage_of,
)
from lin_jax.session.plan_search import PLAN_FILE, PlanSearch, fits
from lin_jax.training.checkpoint.selector import CheckpointSelector
from lin_jax.training.model_source import ModelSource

# Tokens that n-gram drafts guess ahead where no tree is chosen.
NGRAM_LENGTH = 7
# Of several kinds of heads, the one that guesses where nothing is asked for.
BEST_DRAFTERS = ("path", "medusa", "model", "self")
# Drafters that copy: from the text so far, and from all that the session wrote.
MEMORY_DRAFTER = "copy"
DEFAULT_COPIES = f"ngram+{MEMORY_DRAFTER}"
# Tokens of a prompt that are read at a time; with the same bits for all batches there is this one size.
PREFILL_CHUNK, SAME_BITS_CHUNK = 256, 32


@dataclass(frozen=True)
class Session:
    """A model ready to decode.

    Attributes:
        parts: the target, and what drafters for it are made of.
        tokenizer: the model's.
        end_tokens: tokens that end a text.
        folder: where plans are kept; None keeps none.
        data: the text that a run was trained on, whose held-out part drafters are chosen by; None if it is not known.
        accuracy: shares of right guesses `[K, R]` by depth and rank that training recorded of heads, by drafter.
    """

    parts: DraftParts
    tokenizer: Tokenizer
    end_tokens: tuple[int, ...]
    folder: Path | None = None
    data: DataConfig | None = None
    accuracy: Mapping[str, Float[np.ndarray, "K R"]] = field(default_factory=dict, compare=False)
    _costs: dict[tuple[str, int], tuple[list[str], StepCosts]] = field(default_factory=dict, repr=False, compare=False)
    _shared: dict[Any, tuple[ProgramCompiler, Evidence]] = field(default_factory=dict, repr=False, compare=False)

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
        dtype: str | None = None,
        weights: str = "stored",
        same_bits: bool = False,
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
            dtype: type that is computed in: float32, bfloat16 or float64; None is the stored one, but float32 for
                bfloat16 on a CPU, which has weights of any type at hand.
            weights: stored keeps their type; int8 rounds those of all linear layers, of the head and of the table of
                tokens. A folder with int8 weights is decoded with those.
            same_bits: add up in one order for any number of nodes and rows, so that speculation gives plain
                decoding's tokens in float32 and bfloat16 too.

        Raises:
            UserError: there is no such place, or its parts do not belong together.
        """
        source = ModelSource.open(place, step)
        source.check_holds_no_tokenizer(tokenizer)
        storage = storage_of(source, WeightStorage(weights, same_bits))
        places = [heads] if isinstance(heads, str | Path) else list(heads)
        model = load_for_decoding(source, dtype, storage, whole=bool(places) or heads_are_near(source.place))
        known = source.tokenizer(tokenizer)
        check_entries(source, known, model)
        beside = head_sources(places, source)
        found = load_heads(beside, model)
        small = None
        if draft_model is not None:
            own = ModelSource.open(draft_model)
            named = tokenizer if own.place.is_file() else None
            other = Session.load(draft_model, tokenizer=named, dtype=dtype, weights=weights)
            if other.tokenizer.fingerprint != known.fingerprint:
                raise UserError(f"the draft model {draft_model} has another tokenizer; give one trained with the same")
            small = other.model
        return cls(
            draft_parts(model, found, small, draft_layers, storage),
            known,
            source.end_tokens(known),
            source.place if source.place.is_dir() else None,
            source.run.data if source.is_run else None,
            recorded_accuracy(beside, found),
        )

    @classmethod
    def of(
        cls,
        model: CausalModel,
        tokenizer: Tokenizer,
        end_tokens: Sequence[int] | None = None,
        *,
        weights: str = "stored",
        same_bits: bool = False,
    ) -> "Session":
        """Wraps a model in memory; the session has a copy of it, laid out for decoding.

        Args:
            model: the model, which is not changed.
            tokenizer: its tokenizer.
            end_tokens: tokens that end a text; None is the tokenizer's own.
            weights: as in `load`.
            same_bits: as in `load`.

        Raises:
            UserError: the model is none that writes texts, or there is no tokenizer.
        """
        check_causal(model, "the given model")
        if tokenizer is None:
            raise UserError("the tokenizer is None; name the model's with from_pretrained(..., tokenizer=PATH)")
        if end_tokens is None:
            end_tokens = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
        storage = WeightStorage(weights, same_bits)
        return cls(draft_parts(nnx.clone(model), storage=storage), tokenizer, tuple(end_tokens))

    def encode_prompt(self, text: str, *, begins: bool = True) -> list[int]:
        """Encodes a prompt as token ids, behind what the tokenizer itself puts in front of a text.

        An empty one is the start of a document: the beginning token, or else the token that ended the one before.

        Args:
            text: the prompt; half a character (a surrogate on its own) counts as U+FFFD.
            begins: whether nothing comes before it; otherwise it is just its tokens, perhaps none, as they are in the
                middle of a text.

        Raises:
            UserError: the prompt is empty and no token begins a text, or it has a token that the model does not know.
        """
        if not begins:
            return self._known(self.tokenizer.encode_continuation(text).tolist())
        ids = [*self.tokenizer.begin_ids, *self.tokenizer.encode(text).tolist()]
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
        shapes: DraftShapes | None = None,
        costs: Callable[[int], StepCosts] | None = None,
    ) -> Generator:
        """Builds a generator with the given drafter, and a tree or shapes; any of some strings ends its texts."""
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
            shapes=shapes,
            costs=costs,
            # One size of chunks, whatever the other prompts of a batch.
            prefill_chunk_size=SAME_BITS_CHUNK if self.model.same_bits else PREFILL_CHUNK,
            memory=self.parts.memory if reads_memory(kind) else None,
        )

    def plan(
        self,
        kind: str | None = None,
        slots: int = 1,
        note: Callable[[str], None] = lambda line: None,
        *,
        shown: bool = False,
    ) -> SpeculationPlan:
        """Searches thoroughly how to draft on this machine at a batch size: measured earlier, or now and kept.

        That takes minutes; `adaptive_generator` begins at once.

        Args:
            kind: the drafter; None takes the best of all there are.
            slots: the batch size.
            note: told before something takes long.
            shown: show a progress bar on terminals.
        """
        kinds = [kind] if kind is not None else available(self.parts)
        plans = self.plans(kinds, slots, note=note, shown=shown)
        return max(plans, key=lambda plan: plan.measured_speedup)

    def plain_plan(self) -> SpeculationPlan:
        """Plain decoding, token by token."""
        return SpeculationPlan("none", 1, "none")

    def ngram_plan(self, slots: int = 1) -> SpeculationPlan:
        """Drafts a chain from the text so far, whether that pays or not.

        Args:
            slots: the batch size.
        """
        longest = max_draft_depth(self.model.config.attention)
        length = NGRAM_LENGTH if longest is None else min(NGRAM_LENGTH, longest)
        return SpeculationPlan("ngram", slots, f"chain:{length}") if length else self.plain_plan()

    @property
    def default_drafter(self) -> str:
        """Name of the drafter that guesses where none is asked for.

        That is the model's heads if it has some, n-grams of the text, and what the session wrote before.
        """
        heads = next((name for name in BEST_DRAFTERS if name in available(self.parts)), None)
        return DEFAULT_COPIES if heads is None else f"{heads}+{DEFAULT_COPIES}"

    def adaptive_generator(
        self,
        kind: str | None = None,
        slots: int = 1,
        *,
        stops: Sequence[str] = (),
        background: bool = True,
    ) -> Generator:
        """Builds a generator that begins at once, and finds out while it decodes which drafts pay.

        The text is that of plain decoding. The shapes are those of `draft_shapes` and, if a thorough search on this
        machine was kept for the batch size (`plan`), the tree that it found; `save_costs` keeps what steps cost.

        Args:
            kind: the drafter; None takes that of the kept plan, or `default_drafter`.
            slots: the batch size.
            stops: strings that end a text.
            background: compile shapes in a thread while decoding goes on; False does so when they are first tried.
        """
        kind, plan = self.adaptive_drafter(kind, slots)
        drafter = build_drafter(kind, self.parts)
        deepest = max_draft_depth(self.model.config.attention)
        shapes = draft_shapes(drafter, deepest, None if plan is None else plan.shape, self.parts.memory)
        generator = self.generator(
            kind, None, stops=stops, shapes=shapes, costs=partial(self._step_costs, kind, shapes, plan)
        )
        # What was compiled and learned serves later calls of the session, too.
        key = (kind, shapes.trees, tuple(stops), background)
        if key not in self._shared:
            names = enumerate(kind.split("+"))
            known = {index: self.accuracy[name] for index, name in names if name in self.accuracy}
            self._shared[key] = ProgramCompiler(background=background), recorded_evidence(shapes, known)
        generator.compiler, generator.learned = self._shared[key]
        return generator

    def adaptive_drafter(self, kind: str | None = None, slots: int = 1) -> tuple[str, SpeculationPlan | None]:
        """Name of the drafter of `adaptive_generator`, and the plan with drafts that was kept for it, if any."""
        kept = [] if self.folder is None else load_plans(self.folder / PLAN_FILE)[0]
        fitting = [
            plan
            for plan in kept
            if plan.slots == slots and plan.drafts and kind in (None, plan.drafter) and self._has(plan)
        ]
        best = max(fitting, key=lambda plan: plan.measured_speedup, default=None)
        if kind is None and best is not None:
            # Its ranks come last, so that the plan's tree stays what it is.
            kind = best.drafter if reads_memory(best.drafter) else f"{best.drafter}+{MEMORY_DRAFTER}"
        return kind or self.default_drafter, best

    def save_costs(self) -> None:
        """Keeps what draft shapes cost on this machine in the user's cache folder, for later calls."""
        for names, costs in self._costs.values():
            CostFile().save(names, costs.measured)

    @property
    def step_costs(self) -> dict[str, float]:
        """Cost of a step of each draft shape used so far, in plain steps, as known by now."""
        known = self._costs.values()
        return {name: costs.cost(shape) for names, costs in known for shape, name in enumerate(names)}

    def _step_costs(self, kind: str, shapes: DraftShapes, plan: SpeculationPlan | None, slots: int) -> StepCosts:
        """Costs of shapes as known on this machine, measured further by every text of the session."""
        if (kind, slots) not in self._costs:
            key = f"{size_key(self.model)}, batch {slots}, {kind}, "
            names = [key + tree_text(tree) for tree in shapes.trees]
            sizes = [tree.size for tree in shapes.trees]
            costs = StepCosts.of_model(self.model, sizes, CostFile().load(names))
            if plan is not None and plan.break_even_tokens is not None and plan.slots == slots:
                costs.assumed[shapes.trees.index(plan.shape)] = plan.break_even_tokens
            self._costs[kind, slots] = names, costs
        return self._costs[kind, slots][1]

    def _has(self, plan: SpeculationPlan) -> bool:
        """True if the session has the plan's drafter, and that still offers what the plan's tree needs."""
        names = set(plan.drafter.split("+"))
        return names <= set(available(self.parts)) and fits(plan, self.model, build_drafter(plan.drafter, self.parts))

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
        shown: bool = False,
    ) -> list[SpeculationPlan]:
        """Finds the plan for each drafter at a batch size, from the folder or measured and kept there.

        Args:
            kinds: the drafters.
            slots: the batch size.
            prompts: what the texts go on from by which trees are chosen, measuring everything anew; None takes
                `calibration_prompts`, and measures only what is not known yet.
            tokens: length of the texts.
            note: told before something takes long.
            shown: show a progress bar on terminals.
        """
        search = PlanSearch(self.parts, self.folder, slots, tokens, note, shown)
        if prompts is not None:
            return search.found(kinds, lambda plain: prompts, anew=True)

        def calibration(plain: Generator) -> Sequence[Sequence[int]]:
            return calibration_prompts(self.data, plain, self.tokenizer, self.encode_prompt(""))

        return search.found(kinds, calibration)


def check_length(prompts: Sequence[Sequence[int]], longest: int) -> None:
    """Refuses prompts that are longer than allowed."""
    length = int(np.max([len(prompt) for prompt in prompts]))
    if length > longest:
        raise UserError(
            f"a prompt has {length} tokens, {longest} are allowed; shorten it, or raise --max-prompt-tokens"
        )
