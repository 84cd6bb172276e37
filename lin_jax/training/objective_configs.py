"""Options of objectives, one dataclass for each section of a run's configuration."""

from dataclasses import dataclass
from enum import Enum

from lin_jax.errors import UserError
from lin_jax.models.adapters import PARTS, check_parts

# Parts of a layer's attention that attention transfer can train.
TRANSFERRED_PARTS = ("mixer", "projections", "norms")
# Targets of draft heads: the tokens of the text, or the model's own distribution in their place.
HEAD_TARGETS = ("text", "model")


class Trains(Enum):
    """The part of a checkpoint that an objective trains: a model, draft heads on a frozen model, or both together."""

    MODEL = "model"
    HEADS = "heads"
    MODEL_AND_HEADS = "model_and_heads"

    @property
    def has_model(self) -> bool:
        """True if a model is trained, so that a run's checkpoints hold one."""
        return self is not Trains.HEADS

    @property
    def has_heads(self) -> bool:
        """True if draft heads are trained."""
        return self is not Trains.MODEL


@dataclass(frozen=True)
class TransferConfig:
    """Layers and parameters that attention transfer trains.

    Attributes:
        learns: parts of each layer's attention that are trained in full, where the run has no adapters: mixer,
            projections (query, key, value, out), norms (of queries and keys, where a model has them).
        layers: the first layer that is trained and the one after the last, from 0; null is all layers.
        blocks: in a stage, train the layers in so many blocks, one after the other, each for its share of the steps
            and with an optimizer of its own.
        progressive: let the input of the trained layers come from the run's own layers before them, as they are by
            now, instead of the teacher's.
        window_dropout: probability with which a layer's softmax window is narrowed in a step, each layer's by a draw of
            its own, so that what is beside the window (a linear memory) learns to do without it. Only in training, and
            only for attentions that have such a window.
        narrowed_window: tokens that a narrowed window holds; 1 is the token itself.
        fit_memory: before the first step, fit memories behind softmax windows to the teacher, from one batch: the
            centres of clustered features, and for every map the balance, so that memories start with as much of the
            attention as does best. Only where mixers are trained, and where nothing has been learnt yet.
        context_length: tokens of the longest texts that memories shall serve, for models with rotary positions: in
            training and in the fit, rows begin at positions drawn at random, so that they end up to there. The teacher
            says the same wherever a row begins, and a memory only where it has learnt to. Null: rows begin at 0.
    """

    learns: tuple[str, ...] = ("mixer", "projections")
    layers: tuple[int, int] | None = None
    blocks: int = 1
    progressive: bool = False
    window_dropout: float = 0.0
    narrowed_window: int = 1
    fit_memory: bool = True
    context_length: int | None = None

    def __post_init__(self) -> None:
        check_parts("transfer.learns", self.learns, TRANSFERRED_PARTS)
        if not self.learns:
            raise UserError(f"transfer.learns is empty; name some of {', '.join(TRANSFERRED_PARTS)}")
        if self.blocks < 1:
            raise UserError(f"transfer.blocks is {self.blocks}; give 1 or more")
        if not 0 <= self.window_dropout <= 1:
            raise UserError(f"transfer.window_dropout is {self.window_dropout}; give a probability between 0 and 1")
        if self.narrowed_window < 1:
            raise UserError(f"transfer.narrowed_window is {self.narrowed_window}; give 1 or more tokens")
        if self.context_length is not None and self.context_length < 1:
            raise UserError(f"transfer.context_length is {self.context_length}; give 1 or more tokens, or null")


@dataclass(frozen=True)
class DistillationConfig:
    """A teacher beside the text, for the objective language_model (Hinton et al. 2015).

    Attributes:
        weight: of the divergence from the teacher; 0 is no teacher.
        temperature: divisor of both models' logits in the divergence.
        text_weight: of the next-token loss beside it; 0 learns from the teacher's distributions alone, which for a
            student of the same weights says more than the text does.
        learns: parts of the model that learn, where the run has no adapters: embeddings, norms, mixer, head,
            projections (of attention), feed_forward; null is all. With mixers alone, a student stays what its teacher
            is wherever a softmax window sees all there is.
    """

    weight: float = 0.0
    temperature: float = 1.0
    text_weight: float = 1.0
    learns: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise UserError(f"distillation.weight is {self.weight}; give 0 or more")
        if not self.temperature > 0:
            raise UserError(f"distillation.temperature is {self.temperature}; give a positive number")
        if self.text_weight < 0:
            raise UserError(f"distillation.text_weight is {self.text_weight}; give 0 or more")
        if self.text_weight != 1 and not self.weight:
            raise UserError(
                f"distillation.text_weight is {self.text_weight} and there is no teacher; give distillation.weight"
            )
        if self.learns is None:
            return
        check_parts("distillation.learns", self.learns, tuple(PARTS))
        if not self.learns:
            raise UserError(f"distillation.learns is empty; name some of {', '.join(PARTS)}, or leave it out")
        if not self.weight:
            raise UserError(
                f"distillation.learns is {list(self.learns)} and there is no teacher; give distillation.weight"
            )


@dataclass(frozen=True)
class HeadsConfig:
    """Draft heads, for the objectives medusa, medusa_joint and path.

    Attributes:
        targets: what heads on a frozen model learn to predict: text (its tokens: for text of the model's own) or model
            (the model's own distribution after each prefix: for any text).
        depth: how many tokens ahead the heads draft: the number of Medusa heads, or the steps that a path head is
            unrolled for; null is 4 Medusa heads, or 5 steps.
        decay: depth d (from 0) has weight `decay^d` in the loss.
        width: width of a path head's state; at most the model's hidden size.
        loss_weight: weight of all heads beside the model in the loss of medusa_joint.
        learning_rate_factor: learning rate of the heads of medusa_joint, as a multiple of the model's.
        warmup_steps: first steps of medusa_joint, in which its heads are trained and its model is not.
        layers: numbers (from 0) of the layers that a path head reads beside the last, as EAGLE-3 does; null takes one
            each at a quarter, a half and three quarters of the model's depth, `[]` reads the last alone.
        self_steps: depths at which a path head learns from its own drafts: what comes after a wrong best guess of one
            of the first so many depths counts nothing, since verification ends a draft there. 0 counts all.
        vocabulary: how many tokens a path head can guess, the most frequent of the training text; null is all. Fewer
            make guesses of a model with a large vocabulary cheaper.
        tokens: these tokens themselves, as ranges such as 0-255,300; a run fills them in by `vocabulary`.
    """

    targets: str = "text"
    depth: int | None = None
    decay: float = 0.8
    width: int = 192
    loss_weight: float = 0.2
    learning_rate_factor: float = 4.0
    warmup_steps: int = 100
    layers: tuple[int, ...] | None = None
    self_steps: int = 0
    vocabulary: int | None = None
    tokens: str | None = None

    def __post_init__(self) -> None:
        if self.targets not in HEAD_TARGETS:
            raise UserError(f"heads.targets is '{self.targets}'; choose one of {', '.join(HEAD_TARGETS)}")
        if self.depth is not None and self.depth < 1:
            raise UserError(f"heads.depth is {self.depth}; give 1 or more")
        if self.self_steps < 0:
            raise UserError(f"heads.self_steps is {self.self_steps}; give 0 or more")
        if self.vocabulary is not None and self.vocabulary < 1:
            raise UserError(f"heads.vocabulary is {self.vocabulary}; give 1 or more tokens")
        for name in ("loss_weight", "learning_rate_factor"):
            if not getattr(self, name) > 0:
                raise UserError(f"heads.{name} is {getattr(self, name)}; give a positive number")
