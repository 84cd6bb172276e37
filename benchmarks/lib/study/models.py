"""Models of the study: softmax teachers, students linearized from them, and what both are measured on."""

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from lib.quick_model import load_leaves, save_leaves
from lib.study.attentions import sized
from lib.study.cells import Setup
from lib.study.training import (
    linearize_in_memory,
    resolve_from_scratch,
    save_tokenizer,
    stories,
    text_tokenizer,
    train_recipe,
    train_resolved,
)

from lin_jax.attention import AttentionConfig
from lin_jax.data import Corpus, Tokenizer, load_tokenizer, validation_batches
from lin_jax.errors import UserError
from lin_jax.evaluation.agreement import agreement
from lin_jax.evaluation.perplexity import evaluate
from lin_jax.evaluation.token_losses import TokenLosses, by_position, position_edges, ratio, token_losses
from lin_jax.losses.cross_entropy import Batch
from lin_jax.models import CausalModel, LlamaConfig
from lin_jax.models.params import abstract_model, filled, params_of
from lin_jax.recipe import IN_MEMORY, Recipe
from lin_jax.report.figures import STUDENT
from lin_jax.report.measure import Candidate
from lin_jax.training import OptimizerConfig, RunConfig, TrainingConfig
from lin_jax.training.model_source import ModelSource

# The teacher that is trained here.
OWN = "own"
REAL = ("stories260K", "babyllama105", "babyllama361")
# The held-out stories are measured nearly whole.
MEASURED = 0.99
# The file of a model's parameters in a cell's folder.
WEIGHTS = "weights.npz"


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


@cache
def load_teacher(setup: Setup, name: str) -> Model:
    """A softmax LLaMA, pretrained or trained by the cell `linearize/teacher`; a process reads each once."""
    if name == OWN:
        folder = _own_folder(setup)
        tokenizer = load_tokenizer(folder / "tokenizer")
        config = replace(_own_config(setup), vocab_size=tokenizer.vocab_size)
        ends = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
        return Model(load_weights(config, folder), tokenizer, ends)
    source = ModelSource.open(setup.places[name].source)
    tokenizer = source.tokenizer(setup.places[f"{name}-tokenizer"].source)
    return Model(source.model(), tokenizer, source.end_tokens(tokenizer))


def load_student(setup: Setup, part: str, name: str, teacher: Model, attention: str) -> Model:
    """A student that a cell has linearized from a teacher."""
    config = replace(teacher.model.config, attention=sized(attention, setup))
    return replace(teacher, model=load_weights(config, setup.folder(part, name)))


def save_weights(model: Any, folder: Path) -> None:
    """Keeps the parameters of a model for cells that need it."""
    folder.mkdir(parents=True, exist_ok=True)
    save_leaves(params_of(model), folder / WEIGHTS)


def load_weights(config: Any, folder: Path) -> Any:
    """The causal model of a configuration with the parameters that `save_weights` kept.

    Raises:
        UserError: there are none, or those of another model.
    """
    if not (folder / WEIGHTS).exists():
        raise UserError(f"{folder / WEIGHTS} is not there; remove the result of the cell that writes it")
    model = abstract_model(config)
    return filled(model, load_leaves(params_of(model), folder / WEIGHTS))


def _own_folder(setup: Setup) -> Path:
    return setup.folder("linearize", "teacher")


def _own_config(setup: Setup) -> LlamaConfig:
    sizes = setup.sizes
    return LlamaConfig(
        hidden_size=sizes.hidden,
        intermediate_size=8 * sizes.hidden // 3 // 8 * 8,
        num_layers=sizes.layers,
        num_heads=sizes.heads,
        attention=AttentionConfig("softmax"),
    )


def train_teacher(setup: Setup) -> dict[str, Any]:
    """Trains the study's own softmax LLaMA on stories, and keeps it."""
    found, model, tokenizer = trained_on(setup, "llama", _own_config(setup), "stories", seed=0)
    save_weights(model, _own_folder(setup))
    if not (_own_folder(setup) / "tokenizer").is_dir():
        save_tokenizer(tokenizer, _own_folder(setup) / "tokenizer")
    return found


def trained_on(setup: Setup, family: str, model: Any, text: str, *, seed: int) -> tuple[dict[str, Any], Any, Tokenizer]:
    """Trains a language model from scratch, and measures it on the text's held-out part.

    Args:
        setup: of the study.
        family: of the model.
        model: its configuration, without the vocabulary's size.
        text: name of the text's place.
        seed: of everything random.

    Returns:
        The figures, the model and its tokenizer.
    """
    sizes = setup.sizes
    data = setup.places[text].data(sizes.length, sizes.held_out, most=sizes.text_bytes)
    data = replace(data, vocab_size=sizes.vocabulary)
    tokenizer = text_tokenizer(setup, text, data)
    config = RunConfig(
        output=IN_MEMORY,
        family=family,
        model=model,
        data=data,
        optimizer=OptimizerConfig(learning_rate=0.0015, warmup_steps=max(sizes.scratch_steps // 10, 1)),
        training=TrainingConfig(steps=sizes.scratch_steps, batch_size=sizes.batch, seed=seed),
    )
    run = resolve_from_scratch(config, tokenizer)
    params, seconds = train_resolved(run, "from scratch")
    trained = run.objective.parts(params, run.frozen)[0]
    found = evaluate(trained, run.validation)
    figures = {
        "perplexity": found.perplexity,
        "tokens": found.tokens,
        "parameters": parameters(trained),
        "seconds_of_training": seconds,
    }
    return figures, trained, tokenizer


def linearized(setup: Setup, *, part: str, name: str, model: str, attention: str, seed: int) -> dict[str, Any]:
    """Linearizes a teacher, keeps the student, and compares both.

    Args:
        setup: of the study.
        part: of the cell.
        name: of the cell.
        model: name of the teacher.
        attention: of the student.
        seed: of everything random.
    """
    teacher = load_teacher(setup, model)
    config = sized(attention, setup)
    student, seconds = linearize_in_memory(setup, teacher.model, teacher.tokenizer, config, seed)
    save_weights(student, setup.folder(part, name))
    return {
        **compared(setup, model, replace(teacher, model=student)),
        "model": model,
        "attention": attention,
        "seed": seed,
        "seconds_of_training": seconds,
    }


def train_on_text(setup: Setup, student: Model) -> Model:
    """Trains a student on the next token of stories.

    It takes twice the steps of a model from scratch, at four times the rate of the recipe: filters that were of no use
    to the student so far are to find what they can read.
    """
    sizes = setup.sizes
    recipe = Recipe(student.model.config, stories(setup), batch_size=sizes.batch, learning_rate=4.0)
    run = recipe.train(2 * sizes.scratch_steps, lora=None, output=IN_MEMORY)
    return replace(student, model=train_recipe([run], student.model, student.tokenizer)[0])


def compared(setup: Setup, teacher: str, student: Model) -> dict[str, Any]:
    """Ratio of perplexities with its interval, by position, and agreement of texts written freely."""
    sizes, batches = setup.sizes, held_out(setup, teacher)
    expected, found = teacher_losses(setup, teacher), token_losses(student.model, batches)
    edges = position_edges(sizes.length, sizes.length)
    return {
        "teacher_perplexity": expected.perplexity,
        "perplexity": found.perplexity,
        "ratio": vars(ratio(found, expected)),
        "positions": [{**vars(each), "ratio": each.ratio} for each in by_position(found, expected, edges)],
        "agreement": vars(agreement(teacher_texts(setup, teacher), texts(setup, student, teacher))),
        "state_bytes": state_bytes(student.model, sizes.length),
    }


@cache
def teacher_losses(setup: Setup, teacher: str) -> TokenLosses:
    """A teacher's losses on the held-out stories; a process measures them once."""
    return token_losses(load_teacher(setup, teacher).model, held_out(setup, teacher))


@cache
def teacher_texts(setup: Setup, teacher: str) -> list[list[int]]:
    """A teacher's own continuations; a process writes them once."""
    return texts(setup, load_teacher(setup, teacher), teacher)


def texts(setup: Setup, model: Model, teacher: str) -> list[list[int]]:
    """Greedy continuations of the beginnings that a teacher's students continue."""
    return model.candidate.continued(prompts(setup, teacher), setup.sizes.new_tokens).tokens


@cache
def held_out(setup: Setup, teacher: str) -> list[Batch]:
    """Rows of stories that nothing was trained on, in a teacher's tokens."""
    sizes, tokenizer = setup.sizes, load_teacher(setup, teacher).tokenizer
    data = setup.places["stories-held-out"].data(sizes.length, sizes.held_out, fraction=MEASURED, most=sizes.text_bytes)
    _, documents = Corpus.open(data).split(data.validation_fraction)
    return list(validation_batches(documents, tokenizer, data, batch_size=sizes.batch))


def prompts(setup: Setup, teacher: str) -> list[list[int]]:
    """Beginnings of held-out rows, an eighth of a row each, in a teacher's tokens."""
    rows = np.concatenate([np.asarray(batch["tokens"]) for batch in held_out(setup, teacher)])
    return rows[: setup.sizes.prompts, : max(setup.sizes.length // 8, 4)].tolist()


def state_bytes(model: CausalModel, length: int) -> int:
    """Bytes of the decode state of one text with room for `length` tokens."""
    state = jax.eval_shape(lambda: model.init_state(1, length))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def parameters(model: Any) -> int:
    """Number of parameters."""
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
