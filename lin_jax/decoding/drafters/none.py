"""Plain decoding."""

from typing import Any

from lin_jax.decoding.draft import DraftContext, Guesses, Layer, Stateless, no_guesses


class NoDrafter(Stateless):
    """Never guesses."""

    depth = 0
    width = 0

    def begin(self, context: DraftContext, state: Any) -> tuple[Any, Any]:
        """Nothing is known."""
        del context, state
        return None, None

    def expand(self, shared: Any, carried: Any, layer: Layer) -> tuple[Guesses, Any]:
        """No guess."""
        del shared, carried
        return no_guesses(layer), None
