"""FLASH (Hua et al. 2022): configuration, gated attention unit, language model and encoder."""
