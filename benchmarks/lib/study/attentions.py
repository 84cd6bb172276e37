"""Attentions that the study compares, by names as on a command line."""

from dataclasses import replace

from lib.attention_names import attention_of
from lib.study.cells import Setup

from lin_jax.attention import REGISTRY, AttentionConfig, parse_name

# The seven of You et al., ICML 2024.
PAPER = ("flash_local", "flash_global", "linformer", "performer", "transnormer", "yoso", "relu")
NEWER = ("elu", "hedgehog", "exponential", "rfa")
WINDOWED = ("hedgehog+window", "exponential+window")
AUGMENTED = "flash_global+local+convolution"
# What makes the augmentation: nothing, one part of it, or both.
ADDED = ("", "+local", "+convolution", "+local+convolution")


def variants(base: str) -> list[str]:
    """An attention bare and with each part of the augmentation that it can have."""
    fixed = "window" in base or REGISTRY[base].has_local
    return [base + added for added in ADDED if not (fixed and "local" in added)]


def both(base: str) -> str:
    """The attention with as much of the augmentation as it can have."""
    return variants(base)[-1]


def grid() -> list[str]:
    """Every attention in all of its variants."""
    return [name for base in (*PAPER, *NEWER, *WINDOWED) for name in variants(base)]


def main_rows() -> list[str]:
    """The paper's seven, bare and augmented, and the attention that loses least here."""
    return [*(name for base in PAPER for name in (base, both(base))), "exponential+window"]


def sized(name: str, setup: Setup) -> AttentionConfig:
    """The configuration of a name, with the study's sizes where it says no others."""
    sizes = setup.sizes
    config = attention_of(name, group_size=sizes.group, kernel_size=sizes.kernel)
    if parse_name(config.name).window and config.window is None:
        return replace(config, window=config.group_size)
    return config
