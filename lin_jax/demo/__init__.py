"""The demo: train a small model on real text, decode it with and without speculation, and show the result."""
