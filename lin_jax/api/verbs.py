"""The package's verbs: load, linearize, compare, choose layers, train, generate, save, and run a configuration."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lin_jax.api.held_out import HeldOut
from lin_jax.api.origins import (
    Origin,
    check_learns,
    check_tokenizer,
    end_tokens_of,
    is_result,
    is_softmax,
    known_teacher,
    open_place,
    origin_of,
    remember,
    teacher_model,
    tokenizer_of,
)
from lin_jax.api.runs import keep_model, recipe_of, say_changes, train_in_folder, train_model
from lin_jax.api.sessions import session_of
from lin_jax.attention import AttentionConfig
from lin_jax.data import Tokenizer
from lin_jax.decoding import Sampling
from lin_jax.errors import UserError
from lin_jax.evaluation.layer_selection import LayerChoice, LayerDivergences, measure_layers
from lin_jax.hub.model_card import is_export
from lin_jax.hub.save import save_pretrained as save_folder
from lin_jax.models import Gpt2, Llama
from lin_jax.models.stored_weights import WeightStorage
from lin_jax.progress_bar import progress_bar
from lin_jax.recipe import IN_MEMORY, Text
from lin_jax.report.figures import STUDENT, TEACHER, QualityReport
from lin_jax.report.measure import Candidate, Trial, baselines, measure, prompts_of, window_of
from lin_jax.session import check_causal
from lin_jax.training.checkpoint.files import saved_steps
from lin_jax.training.checkpoint.selector import CheckpointSelector
from lin_jax.training.model_source import with_attention
from lin_jax.training.run import train as train_run
from lin_jax.training.stages.config import Pipeline, parse_command
from lin_jax.training.stages.run import run_stages

# Tokens of rows that models are compared on, as a multiple of those in training, to show what comes after.
_LONGER = 4
DRAFTERS = ("auto", "ngram", "suffix", "none")


def from_pretrained(
    place: str | Path,
    *,
    attention: str | AttentionConfig | Sequence[Any] | None = None,
    tokenizer: str | Path | Tokenizer | None = None,
    dtype: str | None = None,
    step: CheckpointSelector = None,
    weights: str = "stored",
) -> tuple[Any, Tokenizer | None]:
    """Loads a model and its tokenizer.

    Args:
        place: Hugging Face folder, OWNER/NAME on the Hub, run folder of train.py, or file of llama2.c.
        attention: another attention than the checkpoint's, by name or in full, such as "augmented", or a list of the
            layers' in turn; what it adds is initialized, so that the model is to be trained (`linearize`).
        tokenizer: for a place that holds none, such as a file of llama2.c: its folder or file.
        dtype: type of parameters and activations, such as "bfloat16"; None takes what is stored. A model with int8
            weights is only trained where a type is given, in which it has the numbers that they stand for.
        step: of a run, the checkpoint: None takes the newest, "best" the one with the lowest validation loss.
        weights: of the copy that `generate` writes with: stored keeps their type; int8 rounds those of all linear
            layers, of the head and of the table of tokens. The model itself has those of the checkpoint.

    Returns:
        The model, and its tokenizer, or None if the place holds none.

    Raises:
        UserError: there is no such place, or it cannot be read as a model.
    """
    WeightStorage(weights)
    source = open_place(place, step)
    config = None if attention is None else AttentionConfig.of(attention)
    compute = None if dtype is None else replace(source.config.compute, dtype=dtype, param_dtype=dtype)
    if compute is not None and source.is_run:
        raise UserError(f"{place} is a run, whose model has the type it was trained in; leave dtype out")
    model = source.model(attention=config, compute=compute)
    known = tokenizer_of(source, tokenizer)
    ends = () if known is None else source.end_tokens(known)
    rounded = source.rounded and dtype is None
    remember(model, Origin(source, ends, weights="int8" if rounded else weights, learns=not rounded))
    return model, known


def linearize(
    model: Any,
    tokenizer: Tokenizer,
    data: Text,
    *,
    attention: str | AttentionConfig | Sequence[Any] = "augmented",
    teacher: Any = None,
    steps: int = 600,
    lora: int | None = None,
    output: str | Path | None = None,
    **options: Any,
) -> Any:
    """Trains a linear attention in place of a model's own: attention transfer, then tuning with distillation.

    Args:
        model: a causal model, of softmax attention, or with a linear one already (`from_pretrained(attention=...)`); it
            is not changed.
        tokenizer: its tokenizer.
        data: text: path, list of paths, `hub:OWNER/NAME`, or a `DataConfig`.
        attention: the linear attention, for a model of softmax attention.
        teacher: the model to learn from, or its place; None is the model as it was loaded.
        steps: optimizer steps, two thirds of them for the transfer.
        lora: rank of adapters that the tuning trains, with embeddings, norms and mixers; None trains everything.
        output: folder that keeps checkpoints, metrics and curves; called again, it goes on from there, or loads what is
            finished. None trains in memory.
        options: batch_size (16), sequence_length (256), learning_rate (a multiple of the recipe's, 1), seed (0),
            window_dropout (0: probability with which the transfer narrows a layer's softmax window in a step).

    Returns:
        The linearized model, or after Ctrl-C in memory what it has become by then.

    Raises:
        UserError: the model, its teacher and the text do not go together.
        KeyboardInterrupt: with an output, after Ctrl-C; call it again to go on.
    """
    check_causal(model, "the given model")
    check_learns(model)
    check_tokenizer(tokenizer)
    origin, place = origin_of(model), None if output is None else Path(output)
    if is_result(model, place, steps):
        say_changes(recipe_of(model, data, options).linearize(steps, lora=lora, output=str(place)))
        return model
    ends = end_tokens_of(model, tokenizer)
    if is_softmax(model):
        teacher, model = teacher or model, with_attention(model, AttentionConfig.of(attention))
    elif teacher is None:
        teacher = None if origin is None else origin.teacher
    if teacher is None:
        raise UserError("the teacher of this model is not known; give teacher=, the model before it was linearized")
    learned = teacher_model(teacher, model)
    recipe = recipe_of(model, data, options)
    if place is None:
        runs = recipe.linearize(steps, lora=lora, output=IN_MEMORY)
        for run, name in zip(runs, ("transfer", "tune"), strict=True):
            model, stopped = train_model(run, model, tokenizer, learned, name)
            if stopped:
                break
    else:
        runs = recipe.linearize(steps, lora=lora, output=str(place))
        before = keep_model(place / "teacher", learned, tokenizer, ends)
        runs = [replace(run, teacher=str(before)) for run in runs]
        model = train_in_folder(place, model, tokenizer, runs, ends)
    remember(model, Origin(teacher, ends, place, steps))
    return model


def train(
    model: Any,
    tokenizer: Tokenizer,
    data: Text,
    *,
    steps: int = 100,
    lora: int | None = None,
    output: str | Path | None = None,
    **options: Any,
) -> Any:
    """Trains a model on text; arguments, result and errors as in `linearize`."""
    check_learns(model)
    check_tokenizer(tokenizer)
    origin, place = origin_of(model), None if output is None else Path(output)
    run = recipe_of(model, data, options).train(
        steps, lora=lora, output=IN_MEMORY if place is None else str(place / "train")
    )
    if is_result(model, place, steps):
        say_changes([run])
        return model
    teacher, ends = None if origin is None else origin.teacher, end_tokens_of(model, tokenizer)
    if place is None:
        trained, _ = train_model(run, model, tokenizer, None, "train")
    else:
        trained = train_in_folder(place, model, tokenizer, [run], ends)
    remember(trained, Origin(teacher, ends, place, steps))
    return trained


def compare(
    students: Any,
    tokenizer: Tokenizer,
    data: Text,
    *,
    teacher: Any = None,
    batches: int = 4,
    batch_size: int = 8,
    sequence_length: int | None = None,
    prompts: int = 16,
    rounds: int = 0,
) -> QualityReport:
    """Measures students beside their teacher on the held-out part of a text, as `python -m lin_jax report` does.

    Beside them stands the teacher with nothing but a window of the same size, untrained: what a student has to be
    better than. `lin_jax.notebook.show_report` shows the result as tables and a picture.

    Args:
        students: a causal model, or several by their names.
        tokenizer: theirs.
        data: the text, as in `linearize`; what is held out of it there is measured on here.
        teacher: the model that they learnt from, or its place; None is the first student's, as `linearize` knows it.
        batches: batches of held-out text at the most.
        batch_size: rows of a batch.
        sequence_length: tokens of a row in training, 256 by default; those that are measured on are four times as long.
        prompts: prompts to continue, to see how long student and teacher say the same.
        rounds: how often speeds are measured, all models in turn; 0 measures none.

    Returns:
        Figures of all models.

    Raises:
        UserError: models, tokenizer and text do not go together.
    """
    named = dict(students) if isinstance(students, Mapping) else {"student": students}
    if not named:
        raise UserError("there are no students; give a model, or several by their names")
    first = next(iter(named.values()))
    for name, model in named.items():
        check_causal(model, name)
    check_tokenizer(tokenizer)
    learned, ends = known_teacher(teacher, first), end_tokens_of(first, tokenizer)
    held_out = HeldOut.of(data, learned, sequence_length, batches, longer=_LONGER)
    before = Candidate("teacher", "the teacher", TEACHER, learned, tokenizer, ends)
    others = [Candidate(name, name, STUDENT, model, tokenizer, ends) for name, model in named.items()]
    windows = [window_of(model.config.attention) for model in named.values()]
    windowed, notes = baselines(before, [window for window in windows if window is not None])
    trial = Trial(
        text=held_out.config.name,
        batches=held_out.batches(tokenizer, batch_size),
        prompts=prompts_of(held_out.corpus, tokenizer, prompts, min(32, held_out.training_length)),
        training_length=held_out.training_length,
        rounds=rounds,
    )
    with progress_bar(desc="report", unit="part", bar_format="{desc}: {n_fmt} parts{postfix}") as bar:

        def note(text: str) -> None:
            bar.set_postfix_str(text)
            bar.update()

        return measure(before, [*windowed, *others], trial, note, notes)


def select_layers(
    model: Any,
    tokenizer: Tokenizer,
    data: Text,
    keep: int,
    *,
    teacher: Any = None,
    batches: int = 4,
    batch_size: int = 8,
    sequence_length: int | None = None,
) -> LayerChoice:
    """Chooses the layers of a linearized model whose teacher's attention is worth keeping, on held-out text.

    The teacher's attention comes back in one layer at a time; those that bring the model closest to its teacher are
    chosen. Linearize the teacher once more with the attention that comes out.

    Args:
        model: a linearized LLaMA or GPT-2 (`linearize`).
        tokenizer: its tokenizer.
        data: the text, as in `linearize`.
        keep: how many layers keep the teacher's attention.
        teacher: the model that it learnt from, or its place; None is the one that `linearize` knows.
        batches: batches of held-out text at the most.
        batch_size: rows of a batch.
        sequence_length: tokens of a row; None is as in `linearize`.

    Returns:
        The chosen layers, the attention of the whole model, and the divergences that they were chosen by.

    Raises:
        UserError: the models, or they and the text, do not go together, or there are not so many layers.
    """
    check_tokenizer(tokenizer)
    learned = known_teacher(teacher, model)
    for each in (model, learned):
        if not isinstance(each, Llama | Gpt2):
            raise UserError(f"layers of a {type(each).__name__} are not chosen among; give a LLaMA or GPT-2")
    count = model.config.num_layers
    if learned.config.num_layers != count:
        raise UserError(f"the teacher has {learned.config.num_layers} layers, the model {count}; give its own teacher")
    if not 1 <= keep <= count:
        raise UserError(f"{keep} of {count} layers are to keep the teacher's attention; give keep=1 to {count}")
    held_out = HeldOut.of(data, learned, sequence_length, batches).batches(tokenizer, batch_size)
    found = LayerDivergences.of(range(count))
    with progress_bar(total=len(held_out) * (count + 1), desc="layers", unit="pass") as bar:
        for _ in measure_layers(model, learned, held_out, found, bar.update):
            pass
    chosen = tuple(sorted(found.ranking[:keep]))
    own, theirs = (each.config.attention.of_layers(count) for each in (model, learned))
    mixed = AttentionConfig(pattern=[(theirs if layer in chosen else own)[layer] for layer in range(count)])
    return LayerChoice(chosen, mixed.for_layers(count), found)


def generate(
    model: Any,
    tokenizer: Tokenizer,
    prompts: str | Sequence[str],
    max_new_tokens: int = 100,
    *,
    drafter: str = "auto",
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Sequence[str] = (),
) -> list[str]:
    """Continues prompts; the first call with a model compiles its programs.

    Args:
        model: a causal model; a copy that is laid out for decoding is kept as long as the model is.
        tokenizer: its tokenizer.
        prompts: one prompt or several.
        max_new_tokens: tokens to write for each at the most.
        drafter: none decodes token by token; ngram verifies guesses copied from the text so far; suffix copies from
            what earlier calls with this model wrote, too; auto guesses by both where that pays, by what guesses gave so
            far. The texts are the same.
        temperature: 0 is greedy.
        top_k: sample from the K likeliest tokens; 0 is all.
        top_p: sample from the likeliest tokens up to this probability.
        seed: of the samples.
        stop: strings that end a text.

    Returns:
        The continuations, without the prompts.

    Raises:
        UserError: the model is none that writes texts, or an option has a wrong value.
    """
    if drafter not in DRAFTERS:
        raise UserError(f"drafter '{drafter}' is unknown; choose one of {', '.join(DRAFTERS)}")
    check_tokenizer(tokenizer)
    session = session_of(model, tokenizer)
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if drafter in ("auto", "suffix"):
        generator = session.adaptive_generator(None if drafter == "auto" else drafter, stops=stop)
    else:
        plan = session.plain_plan() if drafter == "none" else session.ngram_plan(len(texts))
        generator = session.generator(plan.drafter, plan.shape, stops=stop)
    sampling = Sampling(temperature, top_k, top_p)
    encoded = [session.encode_prompt(text) for text in texts]
    found = generator.generate(encoded, max_new_tokens, sampling=sampling, seed=seed)
    return [session.decode(tokens, stop, prompt) for tokens, prompt in zip(found.tokens, encoded, strict=True)]


def save_pretrained(
    model: Any,
    folder: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    overwrite: bool = False,
    weights: str = "stored",
) -> Path:
    """Writes a model as a Hugging Face folder, which transformers opens, and returns the folder.

    A folder that this package wrote before is replaced; any other one only with `overwrite`.

    Args:
        model: the model.
        folder: the folder to write.
        tokenizer: the model's.
        overwrite: replace the content of the folder.
        weights: stored keeps the type of the model's; int8 rounds them, to about a quarter of the bytes of float32.

    Raises:
        UserError: the folder holds something else, or cannot be written.
    """
    folder = Path(folder)
    origin = origin_of(model)
    ends = () if origin is None else origin.end_tokens
    overwrite = overwrite or is_export(folder)
    return save_folder(model, folder, tokenizer=tokenizer, end_tokens=ends, overwrite=overwrite, weights=weights)


def run(config: str | Path, *overrides: str, resume: bool = False) -> Path:
    """Trains as a YAML file describes, like train.py.

    Args:
        config: the file.
        overrides: options of the command line, such as "--training.steps=100".
        resume: go on from the newest checkpoint, if there is one; without it, a folder with checkpoints is refused.

    Returns:
        The run's folder.

    Raises:
        UserError: the file or an option is wrong, or the folder is in the way.
        KeyboardInterrupt: after Ctrl-C; the run is saved.
    """
    plan, *_ = parse_command([str(config), *overrides])
    if isinstance(plan, Pipeline):
        begun = any(saved_steps(Path(each.output)) for stage in plan.stages for each in stage.runs)
        status = run_stages(plan, resume=resume and begun)
    else:
        status = train_run(plan, resume=resume and bool(saved_steps(Path(plan.output)))).status
    if status:
        raise KeyboardInterrupt
    return Path(plan.output)
