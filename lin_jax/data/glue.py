"""The tasks of GLUE (Wang et al. 2019), each described: where its sentences and labels stand, and how it is scored."""

from dataclasses import dataclass

from lin_jax.errors import UserError


@dataclass(frozen=True)
class Part:
    """A set of examples.

    Attributes:
        file: of the task's folder, without compression's ending.
        split: on the hub.
        name: tells it from another one of its kind; empty if it is the only one, or the main one.
        labelled: whether it says what is right.
    """

    file: str
    split: str
    name: str = ""
    labelled: bool = True


TRAIN = Part("train.tsv", "train")


@dataclass(frozen=True)
class Column:
    """A column of a task's files.

    Attributes:
        header: its name in GLUE's own files.
        place: its number, from 0, in files without a header.
        hub: its name on the hub; the name in prompts, too.
    """

    header: str
    place: int
    hub: str


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: of the task; of the configuration on the hub, too.
        folder: in GLUE's archive.
        sentences: the columns of the one sentence, or of both.
        label: the column of the label.
        labels: what labels are called in the files, in the order of their numbers, as on the hub; empty where the label
            is itself a number to predict.
        metrics: what the task is scored by, as `lin_jax.evaluation.classification` calls it; the first one decides.
        held_out: what to validate on, the main set first.
        header: whether the files of training and validation begin with the names of their columns.
    """

    name: str
    folder: str
    sentences: tuple[Column, ...]
    label: Column
    labels: tuple[str, ...] = ("0", "1")
    metrics: tuple[str, ...] = ("accuracy",)
    held_out: tuple[Part, ...] = (Part("dev.tsv", "validation"),)
    header: bool = True

    @property
    def is_regression(self) -> bool:
        """Whether labels are numbers to predict, not classes."""
        return not self.labels

    @property
    def tests(self) -> tuple[Part, ...]:
        """The sets whose labels GLUE keeps to itself, one beside each held-out one."""
        return tuple(
            Part(each.file.replace("dev", "test"), each.split.replace("validation", "test"), each.name, labelled=False)
            for each in self.held_out
        )

    @property
    def outputs(self) -> int:
        """How many numbers a model says of a text: one for each class."""
        return max(len(self.labels), 1)


def _sentences(first: tuple[str, int, str], second: tuple[str, int, str] | None = None) -> tuple[Column, ...]:
    return tuple(Column(*each) for each in (first, second) if each is not None)


_ENTAILMENT = ("entailment", "not_entailment")
_PAIR = _sentences(("sentence1", 1, "sentence1"), ("sentence2", 2, "sentence2"))

TASKS = {
    task.name: task
    for task in (
        Task(
            name="cola",
            folder="CoLA",
            sentences=_sentences(("sentence", 3, "sentence")),
            label=Column("label", 1, "label"),
            metrics=("matthews", "accuracy"),
            header=False,
        ),
        Task(
            name="sst2",
            folder="SST-2",
            sentences=_sentences(("sentence", 0, "sentence")),
            label=Column("label", 1, "label"),
        ),
        Task(
            name="mrpc",
            folder="MRPC",
            sentences=_sentences(("#1 String", 3, "sentence1"), ("#2 String", 4, "sentence2")),
            label=Column("Quality", 0, "label"),
            metrics=("f1", "accuracy"),
        ),
        Task(
            name="qqp",
            folder="QQP",
            sentences=_sentences(("question1", 3, "question1"), ("question2", 4, "question2")),
            label=Column("is_duplicate", 5, "label"),
            metrics=("f1", "accuracy"),
        ),
        Task(
            name="stsb",
            folder="STS-B",
            sentences=_sentences(("sentence1", 7, "sentence1"), ("sentence2", 8, "sentence2")),
            label=Column("score", 9, "label"),
            labels=(),
            metrics=("pearson", "spearman"),
        ),
        Task(
            name="mnli",
            folder="MNLI",
            sentences=_sentences(("sentence1", 8, "premise"), ("sentence2", 9, "hypothesis")),
            label=Column("gold_label", -1, "label"),
            labels=("entailment", "neutral", "contradiction"),
            held_out=(
                Part("dev_matched.tsv", "validation_matched"),
                Part("dev_mismatched.tsv", "validation_mismatched", "mismatched"),
            ),
        ),
        Task(
            name="qnli",
            folder="QNLI",
            sentences=_sentences(("question", 1, "question"), ("sentence", 2, "sentence")),
            label=Column("label", 3, "label"),
            labels=_ENTAILMENT,
        ),
        Task(name="rte", folder="RTE", sentences=_PAIR, label=Column("label", 3, "label"), labels=_ENTAILMENT),
        Task(name="wnli", folder="WNLI", sentences=_PAIR, label=Column("label", 3, "label")),
    )
}


def glue_task(name: str) -> Task:
    """The task of a name.

    Raises:
        UserError: there is none.
    """
    if name not in TASKS:
        raise UserError(f"data.task '{name}' is unknown; choose one of {', '.join(TASKS)}")
    return TASKS[name]
