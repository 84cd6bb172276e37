"""Thorough search for how to draft on this machine, and the file that keeps what it finds."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lin_jax.decoding.autotune.costs import COST_TICKS, Costs, measure_costs
from lin_jax.decoding.autotune.plan import PLAN_TICKS, SpeculationPlan, load_plans, make_plan, save_plans
from lin_jax.decoding.drafting.api import Drafter
from lin_jax.decoding.drafting.drafters import DraftParts, build_drafter
from lin_jax.decoding.generator import Generator
from lin_jax.errors import UserError
from lin_jax.models import CausalModel
from lin_jax.progress_bar import progress_bar

PLAN_FILE = "speculation.json"
Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True)
class PlanSearch:
    """Search for the best tree of each drafter at one batch size.

    Attributes:
        parts: the target, and what drafters for it are made of.
        folder: where plans are kept; None keeps none.
        slots: the batch size.
        tokens: length of the texts by which trees are chosen.
        note: told before something takes long.
        shown: show a progress bar on terminals.
    """

    parts: DraftParts
    folder: Path | None
    slots: int
    tokens: int
    note: Callable[[str], None]
    shown: bool

    def found(
        self, kinds: Sequence[str], prompts: Callable[[Generator], Prompts], *, anew: bool = False
    ) -> list[SpeculationPlan]:
        """Finds the plan of each drafter, from the folder or measured and kept there.

        Args:
            kinds: the drafters.
            prompts: gives what the texts go on from by which trees are chosen; called only if something is missing.
            anew: measure what is known, too.
        """
        drafters = {kind: build_drafter(kind, self.parts) for kind in kinds if kind != "none"}
        known, costs = ([], []) if self.folder is None else load_plans(self.folder / PLAN_FILE)
        kept = {(plan.drafter, plan.slots): plan for plan in known if self._stays(plan, drafters)}
        if anew:
            kept = {key: plan for key, plan in kept.items() if key[0] not in kinds or key[1] != self.slots}
            costs = []
        missing = {kind: drafter for kind, drafter in drafters.items() if (kind, self.slots) not in kept}
        if missing:
            plans, costs = self._search(missing, prompts, costs)
            kept |= {(plan.drafter, plan.slots): plan for plan in plans}
            if self.folder is not None and os.access(self.folder, os.W_OK):
                self._keep(self.folder / PLAN_FILE, list(kept.values()), costs)
        plain = SpeculationPlan("none", self.slots, "none")
        return [kept[kind, self.slots] if kind != "none" else plain for kind in kinds]

    def _search(
        self, missing: Mapping[str, Drafter], prompts: Callable[[Generator], Prompts], costs: Sequence[Costs]
    ) -> tuple[list[SpeculationPlan], list[Costs]]:
        """Plans of drafters that have none, and all that is known of what steps cost."""
        self.note(
            f"choosing draft trees for {', '.join(missing)} on this machine, batch {self.slots} (once, some minutes)"
        )
        model, plans = self.parts.target, []
        with progress_bar(shown=self.shown, total=1 + COST_TICKS + PLAN_TICKS * len(missing), desc="choosing") as bar:
            # Without end tokens: a text that ends at once would say nothing about the drafter.
            plain = Generator(model)
            begun = prompts(plain)
            texts = plain.generate(begun, self.tokens).tokens
            bar.update()
            cost = next((each for each in costs if each.slots == self.slots), None)
            cost = cost or measure_costs(model, slots=self.slots, tick=bar.update)
            for number, (kind, drafter) in enumerate(missing.items()):
                # Fewer sizes and candidates than expected may have been timed.
                bar.update(1 + COST_TICKS + PLAN_TICKS * number - bar.n)
                bar.set_postfix_str(kind)
                plans.append(make_plan(model, kind, drafter, begun, texts, cost, tick=bar.update))
                self.note(plans[-1].summary)
            bar.update(bar.total - bar.n)
        return plans, [*(each for each in costs if each.slots != self.slots), cost]

    def _stays(self, plan: SpeculationPlan, drafters: Mapping[str, Drafter]) -> bool:
        """False for a plan of a drafter that is at hand and no longer offers what its tree needs."""
        return plan.drafter not in drafters or fits(plan, self.parts.target, drafters[plan.drafter])

    def _keep(self, file: Path, plans: Sequence[SpeculationPlan], costs: Sequence[Costs]) -> None:
        """Keeps plans in the folder; that it cannot be done is said, and costs only time."""
        try:
            save_plans(file, plans, costs)
        except OSError as error:
            self.note(f"cannot keep the choice in {file} ({error.strerror}); it is made anew next time")


def fits(plan: SpeculationPlan, model: CausalModel, drafter: Drafter) -> bool:
    """False for a plan of other heads or another attention, as when a folder's model was trained anew."""
    try:
        Generator(model, drafter=drafter, tree=plan.shape)
    except UserError:
        return False
    return True
