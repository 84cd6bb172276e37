"""The tasks of GLUE (Wang et al. 2019): files, columns of sentences and labels, and metrics of each."""

from dataclasses import dataclass

from lin_jax.errors import UserError


@dataclass(frozen=True)
class TaskSplit:
    """A split of a task's examples: for training, validation or test.

    Attributes:
        file: its name in the task's folder, without a suffix of compression.
        hub: its name on the Hub.
        name: tells it from another one of its kind; empty if it is the only one, or the main one.
        labelled: whether its labels are published.
    """

    file: str
    hub: str
    name: str = ""
    labelled: bool = True


TRAIN = TaskSplit("train.tsv", "train")


@dataclass(frozen=True)
class Column:
    """A column of a task's files.

    Attributes:
        header: its name in GLUE's own files.
        index: its index, from 0, in files without a header; -1 is the last.
        hub: its name on the Hub; the name in prompts, too.
    """

    header: str
    index: int
    hub: str


@dataclass(frozen=True)
class Task:
    """One task of GLUE.

    Attributes:
        name: of the task; of the configuration on the Hub, too.
        folder: in GLUE's archive.
        sentences: the columns of the one sentence, or of both.
        label: the column of the label.
        labels: names of the classes in the files, in the order of their numbers on the Hub; empty in a regression task,
            where the label is the number to predict.
        metrics: names of the task's metrics in `lin_jax.evaluation.classification`; the first one decides.
        held_out: the validation splits, the main one first.
        header: whether the files of training and validation begin with the names of their columns.
    """

    name: str
    folder: str
    sentences: tuple[Column, ...]
    label: Column
    labels: tuple[str, ...] = ("0", "1")
    metrics: tuple[str, ...] = ("accuracy",)
    held_out: tuple[TaskSplit, ...] = (TaskSplit("dev.tsv", "validation"),)
    header: bool = True

    @property
    def is_regression(self) -> bool:
        """True if labels are numbers to predict, not classes."""
        return not self.labels

    @property
    def tests(self) -> tuple[TaskSplit, ...]:
        """The test splits, whose labels GLUE does not publish, one for each validation split."""
        return tuple(
            TaskSplit(
                each.file.replace("dev", "test"), each.hub.replace("validation", "test"), each.name, labelled=False
            )
            for each in self.held_out
        )

    @property
    def outputs(self) -> int:
        """Number of model outputs per text: one for each class, one for a regression."""
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
                TaskSplit("dev_matched.tsv", "validation_matched"),
                TaskSplit("dev_mismatched.tsv", "validation_mismatched", "mismatched"),
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
    """The task with a name.

    Raises:
        UserError: there is no such task.
    """
    if name not in TASKS:
        raise UserError(f"data.task '{name}' is unknown; choose one of {', '.join(TASKS)}")
    return TASKS[name]
