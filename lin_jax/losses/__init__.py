"""Losses as sums and counts over tokens, whole or in chunks."""
