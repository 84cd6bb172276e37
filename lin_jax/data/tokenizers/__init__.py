"""Tokenizers: one class over fast tokenizers, and readers of the formats that models were published with."""
