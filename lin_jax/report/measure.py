"""Measurements of a report: every model on the same rows, prompts and machine."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lin_jax.attention import AttentionConfig, has_growing_state, parse_name
from lin_jax.data import Corpus, Tokenizer
from lin_jax.decoding import Generation
from lin_jax.devices import device_kind
from lin_jax.errors import UserError
from lin_jax.evaluation.ablation import ablated, ablations
from lin_jax.evaluation.agreement import agreement
from lin_jax.evaluation.token_losses import TokenLosses, by_position, position_edges, ratio, token_losses
from lin_jax.losses.cross_entropy import Batch
from lin_jax.models import CausalModel
from lin_jax.models.params import params_of
from lin_jax.report.figures import BASELINE, STUDENT, TEACHER, ModelFigures, QualityReport
from lin_jax.session import Session
from lin_jax.training.model_source import with_attention
from lin_jax.training.objectives import NextToken
from lin_jax.training.optimizer import Optimizer, OptimizerConfig, build_optimizer
from lin_jax.training.train_step import TrainState, make_step

Note = Callable[[str], None]
# Characters of a document that prompts are taken from.
_PROMPT_CHARACTERS = 200_000


@dataclass(frozen=True)
class Candidate:
    """A model to be measured.

    Attributes:
        name: of the model; students of several seeds share one.
        place: where it lies.
        kind: teacher, baseline or student.
        model: the model.
        tokenizer: its tokenizer.
        end_tokens: tokens that end its texts.
    """

    name: str
    place: str
    kind: str
    model: CausalModel
    tokenizer: Tokenizer
    end_tokens: tuple[int, ...]

    @cached_property
    def session(self) -> Session:
        """The model laid out for decoding, in a copy."""
        return Session.of(self.model, self.tokenizer, self.end_tokens)

    def continued(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Generation:
        """Greedy continuations by plain decoding, all prompts at a time."""
        plan = self.session.plain_plan()
        return self.session.generator(plan.drafter, plan.shape).generate(prompts, new_tokens)


@dataclass(frozen=True)
class Trial:
    """Held-out text and how long everything is measured.

    Attributes:
        text: its name.
        batches: rows of it, `tokens` and perhaps `segment_ids`, `[B, T+1]`.
        prompts: token ids to go on from; none compares no continuations.
        training_length: tokens of the rows that students were trained on.
        new_tokens: tokens of a continuation.
        rounds: how often each speed is measured, all models in turn; 0 measures none.
        ablate: whether the branches of attention are left out in turn.
    """

    text: str
    batches: Sequence[Batch]
    prompts: Sequence[Sequence[int]]
    training_length: int
    new_tokens: int = 64
    rounds: int = 3
    ablate: bool = True


def baselines(teacher: Candidate, windows: Sequence[int]) -> tuple[list[Candidate], list[str]]:
    """The teacher with a window of softmax over its last tokens, untrained, and notes on what is not to be had.

    A student that is no better than this has learnt nothing that is worth its training.
    """
    config: Any = teacher.model.config
    if parse_name(AttentionConfig.of(config.attention).name).base != "softmax":
        return [], ["no window alone: the teacher has no softmax attention"]
    if not _has_sliding_softmax():
        return [], ["no window alone: softmax over a sliding window is not among the attentions"]
    found = []
    for window in dict.fromkeys(windows):
        model = with_attention(teacher.model, _sliding(window))
        found.append(replace(teacher, name=f"window of {window}, untrained", kind=BASELINE, model=model))
    return found, []


def prompts_of(corpus: Corpus, tokenizer: Tokenizer, count: int, size: int) -> list[list[int]]:
    """Beginnings of documents, and then pieces from further on in them.

    Args:
        corpus: the documents.
        tokenizer: of the models.
        count: prompts at the most.
        size: tokens of each.

    Raises:
        UserError: the text is too short for any.
    """
    texts = []
    for text in (text for part in corpus.parts for text in part.texts()):
        texts.append([*tokenizer.begin_ids, *tokenizer.encode(text[:_PROMPT_CHARACTERS]).tolist()])
        if len(texts) == 8 * count:
            break
    longest = max(map(len, texts), default=0)
    pieces = [text[begin : begin + size] for begin in range(0, longest, 4 * size) for text in texts]
    whole = [piece for piece in pieces if len(piece) == size]
    if not whole:
        raise UserError(
            f"no document has the {size} tokens of a prompt; give shorter prompts (--prompt-tokens), or other text"
        )
    return whole[:count]


def window_of(attention: AttentionConfig) -> int | None:
    """Tokens whose keys and values an attention's state keeps at most: those of its window, or of its group.

    Of a mix, the largest window; layers that keep all tokens do not count, and None is left where all do.
    """
    kinds = getattr(attention, "kinds", (attention,))
    sizes = [_kept_tokens(each) for each in kinds if not has_growing_state(each)]
    return max(sizes, default=None)


def _kept_tokens(attention: AttentionConfig) -> int:
    groups = 1
    if getattr(parse_name(attention.name), "window", False):
        groups += int(getattr(attention, "window_groups", 0))
    return getattr(attention, "window", None) or attention.group_size * groups


def _sliding(window: int) -> AttentionConfig:
    options: Any = {"window": window}
    return AttentionConfig("softmax", **options)


def _has_sliding_softmax() -> bool:
    """True where softmax takes a window, and its state does not grow then."""
    return "window" in {each.name for each in fields(AttentionConfig)} and not has_growing_state(_sliding(1))


def measure(
    teacher: Candidate, others: Sequence[Candidate], trial: Trial, note: Note, notes: Sequence[str] = ()
) -> Any:
    """Measures a teacher and its students on the same text, prompts and machine.

    Args:
        teacher: the teacher.
        others: students and baselines.
        trial: what is measured.
        note: told what is measured next.
        notes: what the report says besides.

    Returns:
        The report.

    Raises:
        UserError: the text has tokens that a model does not know, or the models' tokenizers differ.
    """
    everyone = [teacher, *others]
    _check(everyone, trial)
    note(f"losses of {teacher.name}")
    expected = token_losses(teacher.model, trial.batches)
    own = list[list[int]]()
    if trial.prompts:
        note(f"continuations of {teacher.name}")
        own = teacher.continued(trial.prompts, trial.new_tokens).tokens
    figures = [_figures(each, expected, own, trial, note) for each in everyone]
    if trial.rounds:
        note(f"speeds, {trial.rounds} rounds of all models in turn")
        decoding, training = _decoding_speeds(everyone, trial), _training_speeds(everyone, trial)
        figures = [
            replace(each, decode_tokens_per_second=decoded, training_tokens_per_second=trained)
            for each, decoded, trained in zip(figures, decoding, training, strict=True)
        ]
    return QualityReport(
        teacher=teacher.place,
        text=trial.text,
        tokens=int(np.sum(expected.included)),
        rows=len(expected.losses),
        row_length=expected.losses.shape[1],
        training_length=trial.training_length,
        joined="segment_ids" not in trial.batches[0],
        prompts=len(trial.prompts),
        new_tokens=trial.new_tokens,
        device=device_kind(),
        models=tuple(figures),
        notes=tuple(notes),
    )


def _check(everyone: Sequence[Candidate], trial: Trial) -> None:
    largest = max(int(np.max(batch["tokens"])) for batch in trial.batches)
    length = trial.batches[0]["tokens"].shape[1] - 1
    for each in everyone:
        if each.tokenizer.fingerprint != everyone[0].tokenizer.fingerprint:
            raise UserError(
                f"{each.place} has another tokenizer than {everyone[0].place}; give students of this teacher"
            )
        config: Any = each.model.config
        if largest >= config.vocab_size:
            raise UserError(
                f"the text has a token of id {largest}, and {each.place} knows {config.vocab_size}; give other text, "
                "or put the model's own tokenizer there"
            )
        positions = getattr(config, "max_positions", None)
        if positions is not None and length > positions:
            raise UserError(
                f"rows of {length} tokens do not fit into the {positions} positions of {each.place}; give a smaller "
                "--sequence-length"
            )


def _figures(
    candidate: Candidate, expected: TokenLosses, continued: list[list[int]], trial: Trial, note: Note
) -> ModelFigures:
    model, is_teacher = candidate.model, candidate.kind == TEACHER
    found = expected
    agreed = None
    if not is_teacher:
        named = candidate.place if candidate.kind == STUDENT else candidate.name
        note(f"losses{' and continuations' if trial.prompts else ''} of {named}")
        found = token_losses(model, trial.batches)
        if trial.prompts:
            agreed = agreement(continued, candidate.continued(trial.prompts, trial.new_tokens).tokens)
    without = {}
    if trial.ablate and candidate.kind == STUDENT:
        for branch in ablations(model):
            note(f"{candidate.place} without {branch}")
            without[branch] = ratio(token_losses(ablated(model, branch), trial.batches), expected)
    length = expected.losses.shape[1]
    state = jax.eval_shape(lambda: model.init_state(1, length))
    attention: Any = model.config.attention
    return ModelFigures(
        name=candidate.name,
        place=candidate.place,
        kind=candidate.kind,
        attention=getattr(attention, "label", None) or attention.name,
        perplexity=found.perplexity,
        ratio=ratio(found, expected),
        positions=tuple(by_position(found, expected, position_edges(trial.training_length, length))),
        agreement=agreed,
        ablations=without,
        state_bytes=sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)),
        state_grows=has_growing_state(attention),
    )


def _decoding_speeds(everyone: Sequence[Candidate], trial: Trial) -> list[float]:
    """Median tokens a second of plain decoding, all prompts at a time; programs are compiled by now."""
    rounds = [
        [each.continued(trial.prompts, trial.new_tokens).tokens_per_second for each in everyone]
        for _ in range(trial.rounds)
    ]
    return [median(speeds) for speeds in zip(*rounds, strict=True)]


def _training_speeds(everyone: Sequence[Candidate], trial: Trial) -> list[float]:
    """Median tokens a second of training steps on the next token, on rows of the training length."""
    rows = {name: np.asarray(part)[:, : trial.training_length + 1] for name, part in trial.batches[0].items()}
    tokens = rows["tokens"].shape[0] * (rows["tokens"].shape[1] - 1)
    optimizer = build_optimizer(OptimizerConfig(learning_rate=1e-6), 1000)
    # Seeds of one student share a program.
    programs = {each.model.config: make_step(NextToken(each.model.config), optimizer) for each in everyone}
    steps = [_training_step(programs[each.model.config], optimizer, each.model, rows) for each in everyone]
    rounds = [[tokens / step() for step in steps] for _ in range(trial.rounds)]
    return [median(speeds) for speeds in zip(*rounds, strict=True)]


def _training_step(
    step: Any, optimizer: Optimizer, model: CausalModel, rows: dict[str, np.ndarray]
) -> Callable[[], float]:
    """A function that takes a training step of a copy of a model and returns the seconds; the first is behind it."""
    params = jax.tree.map(jnp.copy, params_of(nnx.merge(*nnx.split(model))))
    state = TrainState.new(params, optimizer, jax.random.key(0))

    def timed() -> float:
        nonlocal state
        begin = time.perf_counter()
        state, metrics = step(state, {}, rows)
        jax.block_until_ready(metrics.loss)
        return time.perf_counter() - begin

    timed()
    return timed
