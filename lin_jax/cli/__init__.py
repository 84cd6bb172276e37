"""Command lines: the only place that parses arguments. `python -m lin_jax` lists them."""
