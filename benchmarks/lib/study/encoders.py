"""Part 3: the same attentions in an encoder, a decoder, and a model that is both, on tasks of GLUE."""

import json
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import tokenizers
from lib.study.attentions import AUGMENTED, PAPER, both, sized
from lib.study.cells import BROAD, DEEP, FIRST, LAST, Cell, Claim, Part, Results, Setup, Verdict
from lib.study.drawing import draw_bars, grouped, markdown_table, spread, training_seconds
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
# Families that a claim compares: an encoder and a decoder.
COMPARED = ("bert", "gpt2")
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
            training_seconds(seeds),
        ]
        for (family, task, attention), seeds in grouped(results, "family", "task", "attention").items()
    ]
    return markdown_table(head, rows)


def losses(results: Results) -> dict[tuple[str, str], dict[str, float]]:
    """By task and attention: what it loses against softmax in each family, in points of accuracy.

    Families in which softmax itself has learned nothing are left out.
    """
    found = grouped(results, "family", "task", "attention")
    lost: dict[tuple[str, str], dict[str, float]] = {}
    for (family, task, attention), seeds in found.items():
        best = found.get((family, task, "softmax"))
        if attention != "softmax" and best is not None and has_learned(best):
            points = 100 * (mean(each["accuracy"] for each in best) - mean(each["accuracy"] for each in seeds))
            lost.setdefault((task, attention), {})[family] = points
    return lost


def has_learned(seeds: Sequence[Mapping[str, Any]]) -> bool:
    """Whether classifiers are better than the commonest class by more than chance explains: two standard errors."""
    majority, texts = seeds[0]["majority"], seeds[0]["texts"]
    chance = 2 * (majority * (1 - majority) / texts) ** 0.5
    return mean(each["accuracy"] for each in seeds) > majority + chance


def plot(results: Results, file: Path) -> bool:
    """A bar for each family, task and attention."""
    found = grouped(results, "family", "task", "attention").items()
    bars = {", ".join(key): mean(each["accuracy"] for each in seeds) for key, seeds in found}
    commonest = mean(each["majority"] for each in results.values()) if results else 0.5
    augmented = {name for name in bars if "convolution" in name}
    title = "accuracy, augmented in orange; the line: the commonest class"
    return draw_bars(bars, title, file, line=commonest, marked=augmented)


def decoders_lose_more(results: Results) -> tuple[Verdict, str]:
    """Decides whether bare attentions lose more accuracy in GPT-2 than in BERT, those that were tried in both.

    Where neither has learned anything, what it loses is softmax's success, and says nothing of the attention. A
    difference that chance explains decides nothing: twice the standard error of the difference of two means over
    attentions, taken as if each attention were one draw.
    """
    found, told, silent = grouped(results, "family", "task", "attention"), {}, []
    for (task, attention), lost in losses(results).items():
        if attention not in PAPER or not lost.keys() >= set(COMPARED):
            continue
        if any(has_learned(found[family, task, attention]) for family in COMPARED):
            told.setdefault(attention, []).append([lost[family] for family in COMPARED])
        else:
            silent.append(f"{attention} on {task}")
    nothing = f"; no better than the commonest class in either: {', '.join(silent)}" if silent else ""
    if not told:
        return None, nothing.removeprefix("; ")
    pairs = [[mean(each) for each in zip(*tasks, strict=True)] for tasks in told.values()]
    encoder, decoder = (mean(each) for each in zip(*pairs, strict=True))
    figures = f"mean loss of accuracy, {', '.join(told)}: {encoder:.1f} points in BERT, {decoder:.1f} in GPT-2"
    if len(pairs) == 1:
        return None, f"{figures}; one attention decides nothing{nothing}"
    apart = [after - before for before, after in pairs]
    chance = 2 * stdev(apart) / len(apart) ** 0.5
    if abs(decoder - encoder) < chance:
        return None, f"{figures}; chance alone explains a difference of {chance:.1f}{nothing}"
    return decoder > encoder, figures + nothing


PART = Part(
    NAME,
    "Encoders against decoders",
    "BERT, GPT-2 and T5 of equal width, trained here from scratch on tasks of GLUE, with each attention. What the same "
    "attention loses against softmax is compared between them. Classifiers from scratch know little: small differences "
    "say nothing, and where an attention is no better than the commonest class, it has learned nothing at all.",
    cells,
    table,
    plot,
    (Claim("Bare linear attentions lose more in decoders than in encoders.", decoders_lose_more),),
)
