"""GLUE's tasks: their files as they are, rows as families read them, and epochs that can be resumed."""

import json
import lzma
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lin_jax.data import DataConfig, Tokenizer, load_tokenizer
from lin_jax.data.glue.batches import (
    ExampleEncoder,
    ExampleRows,
    row_length,
    task_training_batches,
    task_validation_batches,
)
from lin_jax.data.glue.files import Example, read_examples
from lin_jax.data.glue.tasks import TASKS, TRAIN, glue_task
from lin_jax.data.glue.templates import Segment, pad_row, pair_template, truncate_longest_first
from lin_jax.errors import UserError

# The beginning of every task's files, as GLUE's archive has them, and what is to be read.
FILES = {
    "cola": (
        'gj04\t1\t\tOur friends.\ngj04\t0\t*\tThem "friends.',
        [(("Our friends.",), 1), (('Them "friends.',), 0)],
    ),
    "sst2": ('sentence\tlabel\na charming "journey \t1\n', [(('a charming "journey ',), 1)]),
    "mrpc": (
        '\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n0\t1\t2\t"It is.\tIt\'s "not".\r\n',
        [(('"It is.', 'It\'s "not".'), 0)],
    ),
    "qqp": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\tA?\tB?\t1\ntorn\tline\n",
        [(("A?", "B?"), 1)],
    ),
    "stsb": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
        "0\tm\tf\t12\t1\tn\tn\tA plane.\tAn air plane.\t5.000\n1\tm\tf\t12\t1\tn\tn\tA\tB\t1.250\n",
        [(("A plane.", "An air plane."), 5.0), (("A", "B"), 1.25)],
    ),
    "mnli": (
        "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
        "sentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label\n0\t1\t2\tg\tb\tb\tp\tp\tP.\tH.\tneutral\tcontradiction\n",
        [(("P.", "H."), 2)],
    ),
    "qnli": ("index\tquestion\tsentence\tlabel\n0\tWhat?\tThat.\tnot_entailment\n", [(("What?", "That."), 1)]),
    "rte": ("index\tsentence1\tsentence2\tlabel\n0\tA\u2028B\tC\tentailment\n", [(("A\u2028B", "C"), 0)]),
    "wnli": ("4\tNo header.\tNone.\t1\n", [(("No header.", "None."), 1)]),
}


def write(folder: Path, task: str, text: str) -> str:
    place = folder / TASKS[task].folder
    place.mkdir(parents=True, exist_ok=True)
    (place / "train.tsv").write_text(text, newline="")
    return str(folder)


@pytest.mark.parametrize("name", TASKS)
def test_files_of_every_task(name: str, tmp_path: Path) -> None:
    text, expected = FILES[name]
    found = read_examples(write(tmp_path, name, text), glue_task(name), TRAIN)
    assert found == expected
    # The task's own folder will do, and so will a compressed file.
    (tmp_path / "train.tsv.xz").write_bytes(lzma.compress(text.encode()))
    assert read_examples(str(tmp_path / TASKS[name].folder), glue_task(name), TRAIN) == expected
    (tmp_path / TASKS[name].folder / "train.tsv").unlink()
    assert read_examples(str(tmp_path), glue_task(name), TRAIN) == expected


@pytest.mark.parametrize(
    ("name", "counts"), [("sst2", (67349, 436)), ("mrpc", (3668, 408)), ("rte", (2490, 277)), ("wnli", (518, 71))]
)
def test_published_files(name: str, counts: tuple[int, int], shared_data: Path) -> None:
    task = glue_task(name)
    sets = [read_examples(str(shared_data / "glue"), task, split) for split in (TRAIN, *task.held_out)]
    assert tuple(map(len, sets)) == counts
    for examples in sets:
        assert {example.label for example in examples} == {0, 1}
        assert all(text.strip() for example in examples for text in example.sentences)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no column 'sentence1'"),
        ("index\tsentence1\tlabel\n0\tA\tentailment\n", "has no column 'sentence2' in its first line"),
        ("index\tsentence1\tsentence2\tlabel\n", "holds no examples of rte in train.tsv"),
        (
            "index\tsentence1\tsentence2\tlabel\n0\tA\tB\tmaybe\n",
            r"label 'maybe' in .*line 2 is not a label of RTE; give one of entailment, not_entailment",
        ),
    ],
)
def test_bad_files(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        read_examples(write(tmp_path, "rte", text), glue_task("rte"), TRAIN)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no RTE/train"):
        read_examples(str(tmp_path), glue_task("rte"), TRAIN)
    with pytest.raises(UserError, match="is not a folder"):
        read_examples(str(tmp_path / "none"), glue_task("rte"), TRAIN)
    with pytest.raises(UserError, match="'imdb' is unknown; choose one of cola, sst2"):
        DataConfig(source=str(tmp_path), task="imdb")
    with pytest.raises(UserError, match=r"needs data\.source"):
        DataConfig(task="rte")


def test_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of nyu-mll/glue, by a stand-in for the network."""
    asked = []

    def load_dataset(name: str, subset: str, *, split: str) -> list[dict[str, Any]]:
        asked.append((name, subset, split))
        return [{"premise": "P.", "hypothesis": "H.", "label": 2 if split == "train" else -1, "idx": 0}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    task = glue_task("mnli")
    assert read_examples("hub:nyu-mll/glue", task, TRAIN) == [(("P.", "H."), 2)]
    with pytest.raises(
        UserError, match="label -1 in hub:nyu-mll/glue, row 0 of validation_mismatched is not a label of mnli"
    ):
        read_examples("hub:nyu-mll/glue", task, task.held_out[1])
    assert asked == [("nyu-mll/glue", "mnli", split) for split in ("train", "validation_mismatched")]
    with pytest.raises(
        UserError,
        match="has no column 'question'; give a data set with it, this one has hypothesis, idx, label, premise",
    ):
        read_examples("hub:nyu-mll/glue", glue_task("qnli"), TRAIN)


def test_sets_without_labels(tmp_path: Path) -> None:
    task = glue_task("mnli")
    assert [(split.file, split.hub) for split in task.tests] == [
        ("test_matched.tsv", "test_matched"),
        ("test_mismatched.tsv", "test_mismatched"),
    ]
    (tmp_path / "test_mismatched.tsv").write_text("index\tsentence1\tsentence2\n0\tP.\tH.\n")
    assert read_examples(str(tmp_path), task, task.tests[1]) == [(("P.", "H."), 0)]
    with pytest.raises(UserError, match="there is no MNLI/test_matched"):
        read_examples(str(tmp_path), task, task.tests[0])


def test_rows_of_every_family(shared_data: Path) -> None:
    """As transformers and the papers have them, spelled out."""
    example = Example(("A dog.", "No cat."), 1)
    expected = {
        ("bert", "bert-base-uncased"): "[CLS] a dog. [SEP] no cat. [SEP]",
        ("gpt2", "gpt2"): "A dog.<|endoftext|>No cat.<|endoftext|>",
        ("t5", "t5"): "mrpc sentence1: A dog. sentence2: No cat.</s>",
    }
    for (family, name), text in expected.items():
        tokenizer = load_tokenizer(shared_data / "tokenizers" / name)
        (segments,) = ExampleEncoder(family, tokenizer, glue_task("mrpc")).segments([example], 64)
        assert tokenizer.decode([token for segment in segments for token in segment.ids]) == text
    (segments,) = ExampleEncoder("t5", tokenizer, glue_task("mnli")).segments([example], 64)
    whole = tokenizer.encode("mnli hypothesis: No cat. premise: A dog.</s>").tolist()
    assert [token for segment in segments for token in segment.ids] == whole
    bert = load_tokenizer(shared_data / "tokenizers" / "bert-base-uncased")
    (segments,) = ExampleEncoder("bert", bert, glue_task("mrpc")).segments([example], 64)
    theirs = bert.backend.encode(*example.sentences)
    row = pad_row(segments, 12, 0, types=True)
    assert row["tokens"].tolist() == [*theirs.ids, *[0] * (12 - len(theirs.ids))]
    assert row["types"].tolist() == [*theirs.type_ids, *[0] * (12 - len(theirs.ids))]
    assert row["mask"].tolist() == [1] * len(theirs.ids) + [0] * (12 - len(theirs.ids))


def test_a_tokenizer_without_the_marks() -> None:
    tokenizer = Tokenizer.train(["some text"], 300)
    with pytest.raises(UserError, match="the tokenizer has no cls_token, which BERT needs"):
        pair_template("bert", tokenizer, glue_task("rte"))


@pytest.mark.parametrize(
    ("lengths", "room", "left"), [((5, 3), 9, (5, 3)), ((9, 3), 8, (5, 3)), ((9, 9), 7, (4, 3)), ((2, 9), 3, (2, 1))]
)
def test_the_longest_is_cut(lengths: tuple[int, int], room: int, left: tuple[int, int]) -> None:
    segments = [Segment([1]), *(Segment(range(length), truncatable=True) for length in lengths), Segment([2])]
    found = truncate_longest_first(segments, room + 2)
    assert [len(segment.ids) for segment in found] == [1, *left, 1]
    assert found[1].ids == range(left[0])
    with pytest.raises(UserError, match="2 has no room for a text; give more than 2"):
        truncate_longest_first(segments, 2)


@pytest.fixture(scope="module")
def toy() -> SimpleNamespace:
    """Ten examples that tell themselves apart."""
    tokenizer = Tokenizer.train(["one two three four five six"], 300)
    examples = [Example((f"{number} {'x' * number}",), number % 2) for number in range(10)]
    encoder = ExampleEncoder("gpt2", tokenizer, glue_task("sst2"), pad_id=7)
    segments = encoder.segments(examples, 64)
    rows = ExampleRows(encoder, examples, segments, row_length([segments], 64))
    return SimpleNamespace(tokenizer=tokenizer, examples=examples, rows=rows, length=row_length([segments], 64))


def batches(toy: SimpleNamespace, seed: int = 0, **options: Any) -> Any:
    return task_training_batches(
        toy.rows, toy.examples, toy.tokenizer, length=toy.length, batch_size=4, seed=seed, **options
    )


def test_epochs_hold_every_example_once(toy: SimpleNamespace) -> None:
    iterator = batches(toy)
    drawn = np.concatenate([next(iterator)["mask"].sum(1) for _ in range(5)])
    everything = sorted(int(toy.rows[number]["mask"].sum()) for number in range(10))
    assert sorted(drawn[:10].tolist()) == sorted(drawn[10:].tolist()) == everything
    assert drawn[:10].tolist() != drawn[10:].tolist()
    assert toy.length % 8 == 0


def test_a_position_is_resumed_exactly(toy: SimpleNamespace) -> None:
    whole, other = batches(toy), batches(toy)
    for _ in range(3):
        next(whole)
    other.set_state(json.loads(json.dumps(whole.get_state())))
    for _ in range(4):
        np.testing.assert_equal(next(other), next(whole))
    with pytest.raises(UserError, match="use the same seed"):
        batches(toy, seed=1).set_state(whole.get_state())


def test_processes_share_the_examples(toy: SimpleNamespace) -> None:
    """Each has its rows of the batch that one process would have."""
    whole, parts = batches(toy), [batches(toy, wanted=rows) for rows in ((0, 1), (1, 4))]
    for _ in range(5):
        expected, found = next(whole), [next(part) for part in parts]
        for name, rows in expected.items():
            np.testing.assert_array_equal(np.concatenate([part[name] for part in found]), rows)


def test_validation_holds_every_example_once(toy: SimpleNamespace) -> None:
    found = task_validation_batches([toy.rows, toy.rows], batch_size=8)
    assert [batch["split"].tolist() for batch in found] == [[0] * 8, [0] * 2 + [1] * 6, [1] * 4 + [-1] * 4]
    labels = np.concatenate([batch["labels"] for batch in found])
    assert labels[:20].tolist() == [number % 2 for number in range(10)] * 2
    assert found[0]["tokens"].dtype == found[0]["labels"].dtype == np.int32
