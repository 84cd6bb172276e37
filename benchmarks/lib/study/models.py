"""Models of the study: softmax teachers, students linearized from them, and what both are measured on."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from lib.study.attentions import sized
from lib.study.cells import Setup

import lin_jax
from lin_jax.attention import AttentionConfig
from lin_jax.data import Corpus, DataConfig, Tokenizer, validation_batches
from lin_jax.errors import UserError
from lin_jax.evaluation.agreement import agreement
from lin_jax.evaluation.perplexity import evaluate
from lin_jax.evaluation.token_losses import by_position, position_edges, ratio, token_losses
from lin_jax.losses.cross_entropy import Batch
from lin_jax.models import CausalModel, LlamaConfig
from lin_jax.report.figures import STUDENT
from lin_jax.report.measure import Candidate
from lin_jax.training import OptimizerConfig, RunConfig, TrainingConfig
from lin_jax.training.checkpoint.files import saved_steps
from lin_jax.training.inputs import held_out_batches
from lin_jax.training.model_source import ModelSource
from lin_jax.training.monitoring.trackers import read_metrics
from lin_jax.training.run import train

# The teacher that is trained here.
OWN = "own"
REAL = ("stories260K", "babyllama105", "babyllama361")
# The held-out stories are measured nearly whole.
MEASURED = 0.99


@dataclass(frozen=True)
class Model:
    """A model with its tokenizer, and tokens that end its texts."""

    model: CausalModel
    tokenizer: Tokenizer
    ends: tuple[int, ...] = ()

    @property
    def candidate(self) -> Candidate:
        """The model as a report measures it."""
        return Candidate("model", "model", STUDENT, self.model, self.tokenizer, self.ends)


def teachers(setup: Setup) -> tuple[str, ...]:
    """Names of the teachers that can be had: the study's own, and pretrained ones whose places are known."""
    if setup.quick:
        return (OWN,)
    return (*(name for name in REAL if {name, f"{name}-tokenizer"} <= setup.places.keys()), OWN)


def load_teacher(setup: Setup, name: str) -> Model:
    """A softmax LLaMA, pretrained or trained by the cell `linearize/teacher`."""
    if name == OWN:
        return load_run(setup.folder("linearize", "teacher"))
    source = ModelSource.open(setup.places[name].source)
    tokenizer = source.tokenizer(setup.places[f"{name}-tokenizer"].source)
    return Model(source.model(), tokenizer, source.end_tokens(tokenizer))


def load_run(folder: Path) -> Model:
    """The model of a run's newest checkpoint."""
    source = ModelSource.open(folder)
    tokenizer = source.tokenizer()
    return Model(source.model(), tokenizer, source.end_tokens(tokenizer))


def load_student(setup: Setup, part: str, name: str) -> Model:
    """A student that a cell has linearized."""
    return load_run(setup.folder(part, name) / "tune")


def train_teacher(setup: Setup) -> dict[str, Any]:
    """Trains the study's own softmax LLaMA on stories."""
    sizes = setup.sizes
    model = LlamaConfig(
        hidden_size=sizes.hidden,
        intermediate_size=8 * sizes.hidden // 3 // 8 * 8,
        num_layers=sizes.layers,
        num_heads=sizes.heads,
        attention=AttentionConfig("softmax"),
    )
    return trained_run(setup, "linearize", "teacher", "llama", model, "stories", seed=0)


def trained_run(setup: Setup, part: str, name: str, family: str, model: Any, text: str, *, seed: int) -> dict[str, Any]:
    """Trains a language model from scratch, or goes on with it, and measures it on the text's held-out part."""
    sizes = setup.sizes
    data = setup.places[text].data(sizes.length, sizes.held_out, most=sizes.text_bytes)
    config = RunConfig(
        output=str(setup.folder(part, name)),
        family=family,
        model=model,
        data=DataConfig(**{**vars(data), "vocab_size": sizes.vocabulary}),
        optimizer=OptimizerConfig(learning_rate=0.0015, warmup_steps=max(sizes.scratch_steps // 10, 1)),
        training=TrainingConfig(
            steps=sizes.scratch_steps,
            batch_size=sizes.batch,
            seed=seed,
            evaluate_every=sizes.scratch_steps,
            checkpoint_every=max(sizes.scratch_steps // 4, 1),
            plot=False,
        ),
    )
    run_to_end(config)
    source = ModelSource.open(config.output)
    found = evaluate(source.model(), held_out_batches(source.run, source.tokenizer()))
    return {
        "perplexity": found.perplexity,
        "tokens": found.tokens,
        "parameters": parameters(source.model()),
        "seconds_of_training": seconds_of(Path(config.output)),
    }


def run_to_end(config: RunConfig) -> None:
    """Runs a configuration, or what is left of it.

    Raises:
        KeyboardInterrupt: it was stopped; called again, it goes on.
    """
    steps = saved_steps(Path(config.output))
    if steps and steps[-1] >= config.training.steps:
        return
    if train(config, resume=bool(steps)).stopped_by is not None:
        raise KeyboardInterrupt


def linearized(setup: Setup, *, part: str, name: str, model: str, attention: str, seed: int) -> dict[str, Any]:
    """Linearizes a teacher, or goes on with it, and compares it with the teacher.

    Args:
        setup: of the study.
        part: of the cell.
        name: of the cell.
        model: name of the teacher.
        attention: of the student.
        seed: of everything random.
    """
    teacher, config = load_teacher(setup, model), sized(attention, setup)
    student, folder = train_student(setup, part, name, teacher, config, seed)
    return {
        **compared(setup, teacher, student),
        "model": model,
        "attention": attention,
        "seed": seed,
        "seconds_of_training": sum(seconds_of(folder / stage) for stage in ("transfer", "tune")),
    }


def train_student(
    setup: Setup, part: str, name: str, teacher: Model, attention: AttentionConfig, seed: int
) -> tuple[Model, Path]:
    """Linearizes a teacher in the cell's folder with the budget of all students: the student, and the folder."""
    sizes, folder = setup.sizes, setup.folder(part, name)
    data = setup.places["stories"].data(sizes.length, max(sizes.held_out // 4, 1), most=sizes.text_bytes)
    model = lin_jax.linearize(
        teacher.model,
        teacher.tokenizer,
        data,
        attention=attention,
        steps=sizes.steps,
        output=folder,
        batch_size=sizes.batch,
        seed=seed,
    )
    return Model(model, teacher.tokenizer, teacher.ends), folder


def train_on_text(setup: Setup, student: Model, folder: Path) -> Model:
    """Trains a student on the next token of stories, or goes on with it.

    It takes twice the steps of a model from scratch, at four times the rate of the recipe: filters that were of no use
    to the student so far are to find what they can read.
    """
    sizes = setup.sizes
    data = setup.places["stories"].data(sizes.length, max(sizes.held_out // 4, 1), most=sizes.text_bytes)
    options: dict[str, Any] = {"output": folder, "batch_size": sizes.batch, "learning_rate": 4.0, "seed": 0}
    steps = 2 * sizes.scratch_steps
    return replace(student, model=lin_jax.train(student.model, student.tokenizer, data, steps=steps, **options))


def compared(setup: Setup, teacher: Model, student: Model) -> dict[str, Any]:
    """Ratio of perplexities with its interval, by position, and agreement of texts written freely."""
    sizes, batches = setup.sizes, held_out(setup, teacher.tokenizer)
    expected, found = token_losses(teacher.model, batches), token_losses(student.model, batches)
    edges = position_edges(sizes.length, sizes.length)
    return {
        "teacher_perplexity": expected.perplexity,
        "perplexity": found.perplexity,
        "ratio": vars(ratio(found, expected)),
        "positions": [{**vars(each), "ratio": each.ratio} for each in by_position(found, expected, edges)],
        "agreement": vars(agreement(*(texts(setup, each, batches) for each in (teacher, student)))),
        "state_bytes": state_bytes(student.model, sizes.length),
    }


def texts(setup: Setup, model: Model, batches: Sequence[Batch]) -> list[list[int]]:
    """Greedy continuations of held-out beginnings."""
    return model.candidate.continued(prompts(setup, batches), setup.sizes.new_tokens).tokens


def held_out(setup: Setup, tokenizer: Tokenizer) -> list[Batch]:
    """Rows of stories that nothing was trained on."""
    sizes = setup.sizes
    data = setup.places["stories-held-out"].data(sizes.length, sizes.held_out, fraction=MEASURED, most=sizes.text_bytes)
    _, documents = Corpus.open(data).split(data.validation_fraction)
    return list(validation_batches(documents, tokenizer, data, batch_size=sizes.batch))


def prompts(setup: Setup, batches: Sequence[Batch]) -> list[list[int]]:
    """Beginnings of held-out rows, an eighth of a row each."""
    rows = np.concatenate([np.asarray(batch["tokens"]) for batch in batches])
    return rows[: setup.sizes.prompts, : max(setup.sizes.length // 8, 4)].tolist()


def seconds_of(folder: Path) -> float:
    """Seconds that a run has trained, all of its pieces together."""
    return max((line.get("seconds", 0.0) for line in read_metrics(folder / "metrics.jsonl")), default=0.0)


def state_bytes(model: CausalModel, length: int) -> int:
    """Bytes of the decode state of one text with room for `length` tokens."""
    state = jax.eval_shape(lambda: model.init_state(1, length))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def parameters(model: Any) -> int:
    """Number of parameters."""
    from flax import nnx

    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def novel(setup: Setup, tokenizer: Tokenizer, tokens: int) -> list[int]:
    """The beginning of whole books, one after the other.

    Raises:
        UserError: they are shorter.
    """
    found: list[int] = []
    corpus = Corpus.open(setup.places["books"].data(setup.sizes.length, 1))
    for text in (each for part in corpus.parts for each in part.texts()):
        found += tokenizer.encode(text[: 8 * tokens]).tolist()
        if len(found) >= tokens:
            return found[:tokens]
    raise UserError(f"the books have {len(found):,} tokens; give {tokens:,} with --data books=FOLDER")
