"""Tokens of documents: in memory, as a stream, or cached on disk."""
