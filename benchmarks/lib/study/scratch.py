"""Part 2: decoders of equal size from scratch, with every attention, and sizes of groups and kernels."""

from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from lib.study.attentions import AUGMENTED, PAPER, both, sized
from lib.study.cells import BROAD, DEEP, FIRST, LAST, PARTLY, Cell, Claim, Part, Results, Setup, Verdict
from lib.study.drawing import draw_bars, grouped, markdown_table, spread, training_seconds
from lib.study.models import trained_on

from lin_jax.attention import AttentionConfig
from lin_jax.models import FlashConfig, Gpt2Config, LlamaConfig

NAME = "scratch"
FAMILIES = ("llama", "gpt2", "flash")
TEXTS = ("wikitext", "books")
SEEDS = (0, 1, 2)
# Attentions with three seeds, the sweeps, and the minutes of a cell.
REPEATED = ("softmax", "flash_global", AUGMENTED)
# Of the others, the one that the short study has, too.
LAST_TRIED = "relu"
GROUPS, KERNELS = (16, 32, 128, 256), (7, 15, 31, 127)
MINUTES = 1.5
# Pairs that a claim shows.
SHOWN = 6


def cells(setup: Setup) -> list[Cell]:
    """All attentions on both texts in each family, then the sweeps."""
    if setup.quick:
        return [_cell("flash", "wikitext", AUGMENTED, 0)]
    found = []
    for family in FAMILIES:
        for text in TEXTS:
            for attention in ("softmax", *(name for base in PAPER for name in dict.fromkeys((base, both(base))))):
                repeated = attention in REPEATED and text == "wikitext"
                found += [_cell(family, text, attention, seed) for seed in (SEEDS if repeated else SEEDS[:1])]
    swept = [f"{AUGMENTED}/group_size={size}" for size in GROUPS] + [
        f"{AUGMENTED}/kernel_size={size}" for size in KERNELS
    ]
    return found + [_cell("llama", "wikitext", each, 0) for each in swept]


def _cell(family: str, text: str, attention: str, seed: int) -> Cell:
    run = partial(trained, family=family, text=text, attention=attention, seed=seed)
    return Cell(f"{family}/{text}/{attention}/{seed}", run, MINUTES, (), _turn(family, text, attention, seed))


def _turn(family: str, text: str, attention: str, seed: int) -> int:
    if seed or text != TEXTS[0]:
        return LAST
    if attention in REPEATED:
        return BROAD if attention == "softmax" else FIRST
    return DEEP if family == FAMILIES[0] and attention in (LAST_TRIED, both(LAST_TRIED)) else LAST


def trained(setup: Setup, *, family: str, text: str, attention: str, seed: int) -> dict[str, Any]:
    """Trains one model."""
    model = model_config(setup, family, sized(attention, setup))
    found, _, _ = trained_on(setup, family, model, text, seed=seed)
    return {**found, "family": family, "text": text, "attention": attention, "seed": seed}


def model_config(setup: Setup, family: str, attention: AttentionConfig) -> Any:
    """A model of a family; all have about as many parameters.

    A unit of FLASH, attention and feed-forward layer in one, has fewer than a block of the others: there are more.
    """
    sizes = setup.sizes
    if family == "flash":
        layers = max(round(sizes.layers * 1.7), 1)
        small = {"query_key_size": min(128, 2 * sizes.hidden)}
        return FlashConfig(hidden_size=sizes.hidden, num_layers=layers, attention=attention, **small)
    shared: dict[str, Any] = {
        "hidden_size": sizes.hidden,
        "num_layers": sizes.layers,
        "num_heads": sizes.heads,
        "attention": attention,
    }
    if family == "gpt2":
        return Gpt2Config(**shared, max_positions=sizes.length)
    return LlamaConfig(**shared, intermediate_size=8 * sizes.hidden // 3 // 8 * 8)


def _perplexities(results: Results) -> dict[tuple[Any, ...], list[float]]:
    found = grouped(results, "family", "text", "attention").items()
    return {key: [each["perplexity"] for each in seeds] for key, seeds in found}


def table(results: Results) -> list[str]:
    """A row for each family, text and attention."""
    head = ["family", "text", "attention", "seeds", "perplexity", "parameters", "training, s"]
    rows = []
    for (family, text, attention), seeds in grouped(results, "family", "text", "attention").items():
        rows.append(
            [
                family,
                text,
                f"`{attention}`",
                str(len(seeds)),
                spread([each["perplexity"] for each in seeds], 2),
                f"{seeds[0]['parameters']:,}",
                training_seconds(seeds),
            ]
        )
    return markdown_table(head, rows)


def plot(results: Results, file: Path) -> bool:
    """A bar for each model."""
    bars = {", ".join(key): mean(values) for key, values in _perplexities(results).items()}
    augmented = {name for name in bars if "convolution" in name}
    return draw_bars(bars, "perplexity of held-out text, augmented in orange", file, line=0, marked=augmented)


def augmentation_helps(results: Results) -> tuple[Verdict, str]:
    """Decides whether each augmented attention has a lower perplexity than the bare one, in every family."""
    found = {key: mean(values) for key, values in _perplexities(results).items()}
    pairs = [
        (key, value, found[(*key[:2], both(key[2]))])
        for key, value in found.items()
        if key[2] in PAPER and (*key[:2], both(key[2])) in found
    ]
    if not pairs:
        return None, ""
    better = sum(augmented < bare for _, bare, augmented in pairs)
    shown = [f"{', '.join(key)}: {bare:.1f} to {augmented:.1f}" for key, bare, augmented in pairs]
    figures = f"lower in {better} of {len(pairs)} pairs ({'; '.join(shown[:SHOWN])}{'; ...' * (len(shown) > SHOWN)})"
    missing = [family for family in FAMILIES if family not in {key[0] for key, _, _ in pairs}]
    figures += f"; not yet run: {', '.join(missing)}" if missing else ""
    if better < len(pairs):
        return PARTLY if better else False, figures
    return None if missing else True, figures


PART = Part(
    NAME,
    "From scratch",
    "LLaMA, GPT-2 and FLASH of about the same size learn WikiText-2 and whole novels with each attention; group and "
    "kernel sizes are swept for the augmented LLaMA.",
    cells,
    table,
    plot,
    (Claim("The augmentation lowers perplexity in every family.", augmentation_helps),),
)
