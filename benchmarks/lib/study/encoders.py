"""Part 3: the same attentions in an encoder, a decoder, and a model that is both, on tasks of GLUE."""

import json
from functools import cache, partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import tokenizers
from lib.study.attentions import AUGMENTED, PAPER, both, sized
from lib.study.cells import BROAD, DEEP, FIRST, LAST, Cell, Claim, Part, Results, Setup
from lib.study.drawing import draw_bars, grouped, markdown_table, spread
from lib.study.training import resolve_from_scratch, save_tokenizer, train_resolved

from lin_jax.attention import AttentionConfig
from lin_jax.data import DataConfig, Tokenizer, load_tokenizer
from lin_jax.data.glue.files import read_examples
from lin_jax.data.glue.tasks import TRAIN, glue_task
from lin_jax.models import T5Config
from lin_jax.models.bert import BertConfig
from lin_jax.models.gpt2 import Gpt2Config
from lin_jax.recipe import IN_MEMORY
from lin_jax.training import OptimizerConfig, RunConfig, TrainingConfig
from lin_jax.training.objectives.classification import REPORT_FILE

NAME = "encoders"
FAMILIES, TASKS = ("bert", "gpt2", "t5"), ("sst2", "mrpc", "rte")
SEEDS = (0, 1, 2)
MINUTES = 1.0
# In this order: T5's padding is 0 and its end 1.
SPECIAL = {"pad_token": "[PAD]", "eos_token": "</s>", "cls_token": "[CLS]", "sep_token": "[SEP]"}
LENGTH = 128
# A quick trial's examples.
GOOD, BAD = (
    ("a good tree", "the good cat ran", "good small house"),
    ("a bad tree", "the bad cat ran", "bad small house"),
)


def cells(setup: Setup) -> list[Cell]:
    """Each family and task with softmax and every attention, bare and augmented; the phrases with three seeds."""
    if setup.quick:
        return [_cell("t5", "sst2", AUGMENTED, 0)]
    attentions = ("softmax", *dict.fromkeys(name for base in PAPER for name in (base, both(base))))
    return [
        _cell(family, task, each, seed)
        for family in FAMILIES
        for task in TASKS
        for each in attentions
        for seed in (SEEDS if task == TASKS[0] else SEEDS[:1])
    ]


def _cell(family: str, task: str, attention: str, seed: int) -> Cell:
    run = partial(classified, family=family, task=task, attention=attention, seed=seed)
    return Cell(f"{family}/{task}/{attention}/{seed}", run, MINUTES, (), _turn(family, task, attention, seed))


def _turn(family: str, task: str, attention: str, seed: int) -> int:
    if task != TASKS[0] or attention not in ("softmax", *PAPER, AUGMENTED):
        return LAST
    early = attention in ("softmax", "flash_global", "relu")
    if family == "t5":
        return DEEP if early and not seed else LAST
    if seed:
        return DEEP if seed == 1 and attention != AUGMENTED else LAST
    return FIRST if early else BROAD


def classified(setup: Setup, *, family: str, task: str, attention: str, seed: int) -> dict[str, Any]:
    """Trains a classifier from scratch, and scores it on the task's held-out examples."""
    sizes, folder = setup.sizes, setup.folder(NAME, f"{family}/{task}/{attention}/{seed}")
    source = str(_quick_examples(setup)) if setup.quick else setup.places["glue"].source
    config = RunConfig(
        output=IN_MEMORY,
        objective="classification",
        family=family,
        model=_model(setup, family, sized(attention, setup)),
        data=DataConfig(source, task=task, sequence_length=min(LENGTH, sizes.length)),
        optimizer=OptimizerConfig(
            learning_rate=0.001, warmup_steps=max(sizes.task_steps // 10, 1), min_lr_ratio=0.0, weight_decay=0.05
        ),
        training=TrainingConfig(steps=sizes.task_steps, batch_size=4 * sizes.batch, seed=seed),
    )
    run = resolve_from_scratch(config, _tokenizer(setup, source, task))
    params, seconds = train_resolved(run, "a task")
    folder.mkdir(parents=True, exist_ok=True)
    run.objective.report(params, run.frozen, run.validation, folder)
    found = next(iter(json.loads((folder / REPORT_FILE).read_text())["sets"].values()))
    return {
        "family": family,
        "task": task,
        "attention": attention,
        "seed": seed,
        "accuracy": found["metrics"]["accuracy"],
        "metrics": found["metrics"],
        "majority": found["majority"],
        "texts": found["texts"],
        "seconds_of_training": seconds,
    }


def _model(setup: Setup, family: str, attention: AttentionConfig) -> Any:
    sizes = setup.sizes
    shared: dict[str, Any] = {
        "hidden_size": sizes.hidden // 2,
        "num_layers": max(sizes.layers // 2, 1),
        "num_heads": sizes.heads,
    }
    if family == "t5":
        both_sides = {"encoder_attention": attention, "decoder_attention": attention}
        return T5Config(
            **shared, **both_sides, head_dim=sizes.hidden // 2 // sizes.heads, intermediate_size=2 * sizes.hidden
        )
    if family == "bert":
        return BertConfig(**shared, attention=attention, max_positions=LENGTH, intermediate_size=2 * sizes.hidden)
    return Gpt2Config(**shared, attention=attention, max_positions=LENGTH)


@cache
def _tokenizer(setup: Setup, source: str, task: str) -> Tokenizer:
    """Bytes and merges learnt on the task's training examples, with the special tokens of all families."""
    folder = setup.folder("tokenizers", task)
    if folder.is_dir():
        return load_tokenizer(folder)
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=setup.sizes.vocabulary,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    examples = read_examples(source, glue_task(task), TRAIN)
    backend.train_from_iterator((text for each in examples for text in each.sentences), trainer)
    save_tokenizer(Tokenizer(backend, **SPECIAL), folder)
    return load_tokenizer(folder)


def _quick_examples(setup: Setup) -> Path:
    folder = setup.folder(NAME, "examples") / "SST-2"
    folder.mkdir(parents=True, exist_ok=True)
    rows = [f"{text}\t{label}" for label, texts in enumerate((BAD, GOOD)) for text in texts]
    for name, times in (("train.tsv", 4), ("dev.tsv", 1)):
        (folder / name).write_text("\n".join(["sentence\tlabel", *(times * rows)]) + "\n")
    return folder.parent


def table(results: Results) -> list[str]:
    """A row for each family, task and attention."""
    head = ["family", "task", "attention", "accuracy", "commonest class", "training, s"]
    rows = [
        [
            family,
            task,
            f"`{attention}`",
            spread([each["accuracy"] for each in seeds]),
            f"{seeds[0]['majority']:.3f}",
            f"{mean(each['seconds_of_training'] for each in seeds):,.0f}",
        ]
        for (family, task, attention), seeds in grouped(results, "family", "task", "attention").items()
    ]
    return markdown_table(head, rows)


def losses(results: Results) -> dict[str, dict[str, float]]:
    """By family and attention: mean over the tasks of what it loses against softmax, in points of accuracy."""
    found = {
        key: mean(each["accuracy"] for each in seeds)
        for key, seeds in grouped(results, "family", "task", "attention").items()
    }
    lost: dict[str, dict[str, list[float]]] = {}
    for (family, task, attention), value in found.items():
        if attention != "softmax" and (family, task, "softmax") in found:
            points = 100 * (found[family, task, "softmax"] - value)
            lost.setdefault(family, {}).setdefault(attention, []).append(points)
    return {family: {name: mean(each) for name, each in names.items()} for family, names in lost.items()}


def plot(results: Results, file: Path) -> bool:
    """A bar for each family, task and attention."""
    found = grouped(results, "family", "task", "attention").items()
    bars = {", ".join(key): mean(each["accuracy"] for each in seeds) for key, seeds in found}
    return draw_bars(bars, "accuracy", file, line=0.5)


def decoders_lose_more(results: Results) -> tuple[bool | None, str]:
    """Decides whether bare attentions lose more accuracy in GPT-2 than in BERT, those that were tried in both.

    A difference that chance explains decides nothing: twice the standard error of the difference of two means over
    attentions, taken as if each attention were one draw.
    """
    found = losses(results)
    common = [name for name in PAPER if name in found.get("bert", {}) and name in found.get("gpt2", {})]
    if not common:
        return None, ""
    pairs = [(found["bert"][name], found["gpt2"][name]) for name in common]
    encoder, decoder = (mean(each) for each in zip(*pairs, strict=True))
    figures = f"mean loss of accuracy of {len(common)} attentions: {encoder:.1f} points in BERT, {decoder:.1f} in GPT-2"
    if len(pairs) == 1:
        return None, f"{figures}; one attention decides nothing"
    apart = [after - before for before, after in pairs]
    chance = 2 * stdev(apart) / len(apart) ** 0.5
    if abs(decoder - encoder) < chance:
        return None, f"{figures}; chance alone explains a difference of {chance:.1f}"
    return decoder > encoder, figures


PART = Part(
    NAME,
    "Encoders against decoders",
    "BERT, GPT-2 and T5 of equal width, trained here from scratch on tasks of GLUE, with each attention. What the same "
    "attention loses against softmax is compared between them. Classifiers from scratch know little: small differences "
    "say nothing.",
    cells,
    table,
    plot,
    (Claim("Bare linear attentions lose more in decoders than in encoders.", decoders_lose_more),),
)
