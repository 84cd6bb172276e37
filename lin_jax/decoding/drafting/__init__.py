"""Drafting: the drafter protocol, static and dynamic draft trees, n-gram lookup."""
