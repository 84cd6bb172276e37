"""Drafter of plain decoding."""

from typing import Any

from lin_jax.decoding.drafting.api import DraftContext, Guesses, Stateless, TreeLevel, no_guesses


class NoDrafter(Stateless):
    """Never guesses: its tree is the root alone."""

    depth = 0
    width = 0

    def begin(self, context: DraftContext, state: Any) -> tuple[Any, Any]:
        """Shares nothing."""
        del context, state
        return None, None

    def expand(self, shared: Any, carried: Any, level: TreeLevel) -> tuple[Guesses, Any]:
        """Returns no guesses."""
        del shared, carried
        return no_guesses(level), None
