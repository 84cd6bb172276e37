"""The demo's training runs: the teacher, its students one attention each, and a draft head on the last of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lin_jax.attention import AttentionConfig
from lin_jax.data import DataConfig
from lin_jax.demo.ledger import TrainingStoppedError
from lin_jax.errors import UserError
from lin_jax.hub.config_json import attentions_of, is_softmax
from lin_jax.hub.llama2c import read_header
from lin_jax.models.registry import family_of_config
from lin_jax.session import default_dtype
from lin_jax.training import RunConfig
from lin_jax.training.checkpoint.files import saved_steps
from lin_jax.training.config_file import load_run_config
from lin_jax.training.model_source import ModelSource
from lin_jax.training.run import train
from lin_jax.training.stages.config import Pipeline, parse_command

# The students: a plain linear attention, the paper's, and the one that is closest to softmax at a constant state.
BARE, AUGMENTED, BEST = "hedgehog", "augmented", "clustered+window"
STUDENTS = (BARE, AUGMENTED, BEST)
# A path head lies where sessions look for it, and exports, which have no form for it, do not.
TEACHER_FOLDER, HEAD_FOLDER = "teacher", "path"
# Learning rate with a window, as a multiple of the others': it begins near the teacher. Of 2.8% of the attention's
# square missed, 60 steps at their rate (0.005 at a width of 256) left 2.5%, after 5% on the way, and at this one 2.2%.
WINDOW_RATE = 0.2
# Layers of a small model that a program has one after the other, not in a loop.
MOST_UNROLLED = 8


@dataclass(frozen=True)
class GivenModel:
    """A pretrained model that takes the teacher's place.

    Attributes:
        place: run folder, Hugging Face folder, `hub:OWNER/NAME`, or file of llama2.c.
        tokenizer: file or folder of its tokenizer, for a file of llama2.c.
    """

    place: str
    tokenizer: str | None = None


@dataclass(frozen=True)
class DemoRuns:
    """Configurations of all training runs.

    Attributes:
        folder: of the demo.
        teacher: the teacher's run; its data are those of all.
        students: the runs of each student, one after the other, as they would be for one attention with a window.
        heads: the draft head's run.
        given: a pretrained model in place of the teacher; None trains one.
    """

    folder: Path
    teacher: RunConfig
    students: tuple[RunConfig, ...]
    heads: RunConfig
    given: GivenModel | None = None

    @classmethod
    def load(
        cls, folder: Path, files: Sequence[str | Path], data: str | None, given: GivenModel | None = None
    ) -> "DemoRuns":
        """Reads the configurations of teacher, students (one run, or stages) and heads.

        Args:
            folder: of the demo.
            files: the three YAML files.
            data: name of a text in place of the teacher's: a file or folder, or `hub:OWNER/NAME`.
            given: a pretrained model.

        Raises:
            UserError: a file is missing or wrong.
        """
        teacher, heads = load_run_config(files[0]), load_run_config(files[2])
        read = teacher.data
        if data is not None:
            read = replace(read, source=data, document_separator=DataConfig.document_separator)
        if given is not None:
            read = replace(read, tokenizer=given.tokenizer)
        teacher = replace(teacher, data=read, output=str(folder / TEACHER_FOLDER))
        plan, *_ = parse_command([str(files[1])])
        students = tuple(stage.last for stage in plan.stages) if isinstance(plan, Pipeline) else (plan,)
        return cls(folder, teacher, students, heads, given)

    @property
    def teacher_place(self) -> str:
        """Place of the teacher, trained or to be trained."""
        return self.teacher.output if self.given is None else self.given.place

    @property
    def tokenizer(self) -> str | None:
        """File of the teacher's tokenizer, where the teacher is a file of llama2.c."""
        return None if self.given is None else self.given.tokenizer

    @cached_property
    def source(self) -> ModelSource:
        """The teacher, once it is there.

        Raises:
            UserError: there is none, or it has no softmax attention.
        """
        source = ModelSource.open(self.teacher_place)
        if not is_softmax(source.config):
            names = ", ".join(each.label for each in attentions_of(source.config).values())
            raise UserError(
                f"{self.teacher_place} has the attention {names}; give a model of softmax attention, to be linearized"
            )
        return source

    @property
    def data(self) -> DataConfig:
        """The text, in rows that the teacher has positions for."""
        longest = getattr(self.source.config, "max_positions", None) if self.given is not None else None
        data = self.teacher.data
        return data if longest is None else replace(data, sequence_length=min(data.sequence_length, longest))

    def student_folder(self, name: str) -> Path:
        """Folder of a student's last run."""
        return self.folder / name

    def attention_of(self, name: str) -> AttentionConfig:
        """A student's attention: its sizes are those of the students' file.

        Without a window the state has room for the usual number of features.
        """
        model: Any = self.students[-1].model
        sizes: AttentionConfig = model.attention
        if "window" in name.split("+")[1:]:
            return replace(sizes, name=name)
        return replace(sizes, name=name, window=None, features=None)

    def student_runs(self, name: str) -> list[RunConfig]:
        """The runs of one student, each from where the one before ended."""
        config, folder = self.source.config, self.student_folder(name)
        attention = self.attention_of(name)
        model = replace(config, attention=attention, **self._computed(config))
        rate = WINDOW_RATE if attention.window is not None else 1.0
        begin, runs = self.teacher_place, list[RunConfig]()
        for number, stage in enumerate(self.students, 1):
            output = str(folder if number == len(self.students) else folder / f"stage_{number}")
            run = replace(
                stage,
                output=output,
                init_from=begin,
                teacher=self.teacher_place,
                family=family_of_config(config).name,
                model=model,
                data=replace(self.data, validation_batches=stage.data.validation_batches),
                optimizer=replace(stage.optimizer, learning_rate=rate * stage.optimizer.learning_rate),
            )
            runs.append(run)
            begin = output
        return runs

    def head_run(self) -> RunConfig:
        """The run of the draft head, on the last student."""
        base = self.student_folder(BEST)
        data = replace(self.data, tokenizer=None, validation_batches=self.heads.data.validation_batches)
        return replace(self.heads, output=str(base / HEAD_FOLDER), init_from=str(base), data=data)

    def _computed(self, config: Any) -> dict[str, Any]:
        """Types and loops of a student: what learns on a CPU is float32."""
        dtype = default_dtype(config.dtype)
        return {"dtype": dtype, "param_dtype": dtype, "unroll": min(config.num_layers, MOST_UNROLLED)}


def run_all(runs: Sequence[RunConfig]) -> None:
    """Trains runs one after the other; those that are finished are left alone, and one that was begun goes on.

    Raises:
        TrainingStoppedError: a signal has ended one.
    """
    for run in runs:
        folder = Path(run.output)
        steps = saved_steps(folder) if folder.exists() else []
        if steps and steps[-1] >= run.training.steps:
            continue
        outcome = train(run, resume=bool(steps))
        if outcome.status:
            raise TrainingStoppedError(outcome.status)


def find_model(place: str, tokenizer: str | None) -> GivenModel:
    """Finds a pretrained model: OWNER/NAME is on the Hub, and a folder may hold a file of llama2.c and its tokenizer.

    Raises:
        UserError: such a folder holds several models, or no tokenizer or several.
    """
    path = Path(place).expanduser()
    if not path.exists() and place.count("/") == 1 and not place.startswith(("hub:", ".", "~", "/")):
        return GivenModel(f"hub:{place}", tokenizer)
    if not path.is_dir() or any((path / name).exists() for name in ("config.json", "config.yaml")):
        return GivenModel(place, tokenizer)
    files = sorted(path.glob("*.bin"))
    models = [file for file in files if _is_llama2c(file)]
    if not models:
        return GivenModel(place, tokenizer)
    if len(models) > 1:
        raise UserError(f"{place} holds {len(models)} models, {models[0].name} first; name the file")
    if tokenizer is None:
        others = [file for file in (*files, *sorted(path.glob("*.model"))) if file not in models]
        if len(others) != 1:
            said = "no file" if not others else f"{len(others)} files"
            raise UserError(f"{place} holds {said} that may be the tokenizer of {models[0].name}; name it (TOKENIZER=)")
        tokenizer = str(others[0])
    return GivenModel(str(models[0]), tokenizer)


def _is_llama2c(path: Path) -> bool:
    try:
        read_header(path)
    except UserError:
        return False
    return True
