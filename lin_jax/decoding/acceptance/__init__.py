"""Acceptance rules, which decide which drafted tokens are kept."""
