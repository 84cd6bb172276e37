"""YAML files of runs: text stays text, and every other file is refused in one line."""

import math
import random
import string
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lin_jax.data import DataConfig
from lin_jax.errors import UserError
from lin_jax.training import RunConfig, load_run_config
from lin_jax.training.stages.config import Pipeline, parse_command


def parse(path: Path, content: str | bytes) -> RunConfig | Pipeline:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return parse_command([str(path)])[0]


def is_run_or_line(path: Path, content: str | bytes) -> bool:
    try:
        return isinstance(parse(path, content), RunConfig | Pipeline)
    except UserError as error:
        return "\n" not in str(error)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "run.yaml"


@pytest.mark.parametrize("word", ["007", "2026-11-27", "1", "on", "no", "1e5", "0x1F", "1:30", "1_000", ".5", "true"])
def test_text_stays_text(word: str, file: Path) -> None:
    run = parse(
        file, f"output: {word}\ndata:\n  text_field: {word}\n  source: [{word}, b]\n  document_separator: {word}\n"
    )
    assert isinstance(run, RunConfig)
    assert run.output == word
    assert run.data == DataConfig(source=(word, "b"), text_field=word, document_separator=word)
    # A run's own folder says the same.
    run.save(file.with_name("config.yaml"))
    assert load_run_config(file.with_name("config.yaml")) == run
    mixture = parse(
        file, f"output: x\ndata:\n  mixture:\n  - {{source: {word}, weight: 1}}\n  - {{source: a, weight: 2}}\n"
    )
    assert isinstance(mixture, RunConfig)
    assert [(part.source, part.weight) for part in mixture.data.mixture] == [(word, 1), ("a", 2)]


def test_text_stays_text_in_stages(file: Path) -> None:
    plan = parse(
        file, "output: 007\nstages:\n- name: 01\n  data: {text_field: 5}\n- name: two\nheld_out: {source: 12}\n"
    )
    assert isinstance(plan, Pipeline)
    assert [(stage.name, stage.last.output, stage.last.data.text_field) for stage in plan.stages] == [
        ("01", "007/01", "5"),
        ("two", "007/two", "text"),
    ]
    assert plan.held_out.source == "12"


def test_numbers_stay_numbers(file: Path) -> None:
    content = (
        "output: x\noptimizer: {learning_rate: 1e-3, weight_decay: 0, max_grad_norm: .inf}\ntraining: {steps: 0x10}\n"
    )
    run = parse(file, content + "data: {document_separator: null, streaming: off}\n")
    assert isinstance(run, RunConfig)
    assert (run.optimizer.learning_rate, run.optimizer.weight_decay, run.training.steps) == (1e-3, 0, 16)
    assert (run.optimizer.max_grad_norm, run.data.document_separator, run.data.streaming) == (math.inf, None, False)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_byte_order_marks(encoding: str, file: Path) -> None:
    run = parse(file, "# a comment\r\noutput: é\r\ndata:\r\n  text_field: 1\r\n".encode(encoding))
    assert isinstance(run, RunConfig)
    assert (run.output, run.data.text_field) == ("é", "1")


def test_null_is_a_field_that_is_not_given(file: Path) -> None:
    run = parse(file, "output: x\nmodel:\ndata:\n  text_field:\ntraining: {steps: null}\nadapters: null\nlaunch:\n")
    assert run == parse(file, "output: x\n")


# Each a list of four of the one before.
ALIASES = "a0: &a0 [x]\n" + "".join(f"a{n + 1}: &a{n + 1} [*a{n},*a{n},*a{n},*a{n}]\n" for n in range(12))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (bytes(range(256)), "is not a YAML file that describes a run: unacceptable character"),
        ("", "the following arguments are required: output"),
        ("output: null", "the following arguments are required: output"),
        ("- a\n- b\n", "holds no names with values"),
        ("runs/x", "holds no names with values"),
        ("output: x\ntraining:\n  steps: 5\ntraining:\n  batch_size: 4\n", "training stands twice in line 4"),
        ("output: &a [*a]\n", "nested without end"),
        (ALIASES, "holds too many"),
        ("output: " + "[" * 10_000, "is not a YAML file"),
        ('output: !!python/object/apply:os.system ["touch ran"]\n', "could not determine a constructor"),
        ("output: x\ntraining:\n\tsteps: 5\n", "in line 3"),
        ("output: x\ntraining: 3\n", "training is 3; give its fields"),
        ("output: x\nmodel: big\n", "model is 'big'; give its fields"),
        ("output: x\ntraining: {steps: many}\n", "training.steps"),
        ("output: x\nsheep: 3\n", "sheep"),
        ("output: x\n1: 3\n", "Option '1' is not accepted"),
        ("output: x\n~: 3\n", "None where a name should stand"),
        ("output: x\n? [a]\n: 3\n", "unhashable key"),
        ('output: "\\ud83d"\n', "half a character"),
        ("output: x\nconfig: other.yaml\n", "config is for the command line"),
        ("output: x\ntraining: {seed: !!int 'a'}\n", "is not a YAML file"),
    ],
)  # fmt: skip
def test_other_files_are_refused_in_one_line(content: str | bytes, message: str, file: Path) -> None:
    with pytest.raises(UserError) as error:
        parse(file, content)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert sorted(file.parent.iterdir()) == [file]


def test_a_text_that_looks_like_null(file: Path, tmp_path: Path) -> None:
    """In quotes it is a name; it is written and read as one."""
    for text in ("null", "Null", "~"):
        run = parse(file, f"output: {tmp_path}\ndata: {{source: 'hub:a/b', subset: '{text}', tokenizer: null}}\n")
        assert (run.data.subset, run.data.tokenizer) == (text, None)
        run.save(tmp_path / "config.yaml")
        assert load_run_config(tmp_path) == run


def test_places_without_a_file(tmp_path: Path) -> None:
    for place, reason in ((tmp_path, "Is a directory"), (tmp_path / "none.yaml", "No such file")):
        with pytest.raises(UserError, match=f"cannot read {place}: {reason}"):
            parse_command([str(place)])


NAMES = [
    "output",
    "data",
    "model",
    "training",
    "optimizer",
    "stages",
    "name",
    "source",
    "mixture",
    "steps",
    "attention",
]
NAMES += ["family", "adapters", "weight", "text_field", "resume", "launch", "held_out", "heads", "mesh", "on", "null"]
SIGNS = [":", "-", "{", "}", "[", "]", "&a", "*a", "!!", "!!set", "!!int", "<<", "?", "|", ">", "'", '"', "#", "%", "@"]
SIGNS += ["~", "1e5", "---", "...", "0o7", "=", "2026-99-99"]
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.sampled_from(NAMES), st.dates(),
    st.binary(max_size=4),
)  # fmt: skip
trees = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES) | scalars, inner, max_size=4),
    max_leaves=12,
)
snippets = st.lists(
    st.sampled_from([*NAMES, *SIGNS, " ", "\n", "- ", "? ", "\t", "\0", "\ufeff"]),
    max_size=25,
)
contents = st.one_of(
    st.dictionaries(st.sampled_from(NAMES), trees, max_size=6).map(lambda tree: {"output": "x"} | tree).map(yaml.dump),
    trees.map(yaml.dump),
    snippets.map("".join),
    st.text(alphabet=string.printable, max_size=60),
)


@given(content=st.one_of(contents.map(lambda text: text.encode(errors="surrogatepass")), st.binary(max_size=60)))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_file_is_a_run_or_a_line(content: bytes, tmp_path: Path) -> None:
    assert is_run_or_line(tmp_path / "any.yaml", content)


def test_damaged_configurations_are_a_run_or_a_line(file: Path) -> None:
    """A whole file with a character changed, left out or doubled."""
    whole = "output: x\nfamily: llama\ndata:\n  source: [a, b]\ntraining: {steps: 5}\nmodel:\n  attention: relu\n"
    chance = random.Random(0)
    for _ in range(25):
        place, char = chance.randrange(len(whole)), chance.choice(":[]{}\n\t -#&*!|>'\"%@`,?")
        changed = whole[:place] + chance.choice([char, "", whole[place] * 2]) + whole[place + 1 :]
        assert is_run_or_line(file, changed)
