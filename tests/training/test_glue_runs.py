"""Runs that tell texts apart: every family that can, classes and numbers, from nothing and from other models."""

import json
import random
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers
from scipy import stats
from support.cells import cells
from support.interrupted import lines_of, stopping_after

from lin_jax.attention import AttentionConfig
from lin_jax.cli.evaluate import main as evaluate
from lin_jax.cli.glue_predictions import write_predictions
from lin_jax.cli.hub.options import main
from lin_jax.data import DataConfig, Tokenizer, load_tokenizer
from lin_jax.data.glue.batches import ExampleEncoder
from lin_jax.data.glue.files import read_examples
from lin_jax.data.glue.tasks import glue_task
from lin_jax.errors import UserError
from lin_jax.hub import from_pretrained
from lin_jax.models import BertClassifier, BertConfig, Gpt2Classifier, Gpt2Config, T5Classifier, T5Config
from lin_jax.models.params import params_of
from lin_jax.session import Session
from lin_jax.training import OptimizerConfig, RunConfig, TrainingConfig, load_model
from lin_jax.training.objectives.registry import check_run, objective_of
from lin_jax.training.run import train
from lin_jax.training.setup import resolve

SPECIAL = {"pad_token": "[PAD]", "eos_token": "</s>", "cls_token": "[CLS]", "sep_token": "[SEP]"}
WORDS = {"good": 1, "fine": 1, "bad": 0, "poor": 0}
FILLER = "the film was a long and slow but rather story of its time".split()  # noqa: SIM905
ATTENTION = AttentionConfig(group_size=4, kernel_size=3, initial_alpha=0.1)
SIZES = {"hidden_size": 16, "num_layers": 1, "num_heads": 2}
FAMILIES = {
    "bert": (BertClassifier, BertConfig(**SIZES, intermediate_size=16, max_positions=32, attention=ATTENTION)),
    "gpt2": (Gpt2Classifier, Gpt2Config(**SIZES, max_positions=32, attention=ATTENTION)),
    "t5": (
        T5Classifier,
        T5Config(
            **SIZES,
            head_dim=8,
            intermediate_size=16,
            encoder_attention=ATTENTION,
            decoder_attention=ATTENTION,
            end_token=1,
        ),
    ),
}


@pytest.fixture(scope="module")
def glue(tmp_path_factory):
    """Sentences with one telling word, pairs that say the same or not, and pairs with a number for how much."""
    folder, chance = tmp_path_factory.mktemp("glue"), random.Random(0)
    for name in ("SST-2", "RTE", "STS-B"):
        (folder / name).mkdir()

    def sentence(word):
        # Two lengths only, so that few programs ask a model without padding.
        words = [*chance.choices(FILLER, k=chance.choice((2, 6))), word]
        chance.shuffle(words)
        return " ".join(words)

    for file, count in (("train.tsv", 90), ("dev.tsv", 13)):
        words = chance.choices(list(WORDS), k=count)
        rows = [f"{sentence(word)}\t{WORDS[word]}" for word in words]
        (folder / "SST-2" / file).write_text("\n".join(["sentence\tlabel", *rows]))
        names = ("entailment", "not_entailment")
        rows = [f"{n}\t{sentence('the')}\t{sentence(word)}\t{names[WORDS[word]]}" for n, word in enumerate(words)]
        (folder / "RTE" / file).write_text("\n".join(["index\tsentence1\tsentence2\tlabel", *rows]))
        rows = [f"0\ta\tb\tc\td\te\tf\t{sentence('a')}\t{sentence(word)}\t{4 * WORDS[word] + 0.5}" for word in words]
        header = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore"
        (folder / "STS-B" / file).write_text("\n".join([header, *rows]))
    pieces = dict.fromkeys([*SPECIAL.values(), "[UNK]", *WORDS, *FILLER])
    words = {piece: number for number, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    Tokenizer(backend, **SPECIAL).save(folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def make(glue):
    """The configuration of a run of seconds."""

    def build(output, family, task="sst2", **training):
        defaults = {"epochs": 1, "batch_size": 8, "log_every": 1}
        return RunConfig(
            output=str(output),
            objective="classification",
            family=family,
            model=FAMILIES[family][1],
            data=DataConfig(
                source=str(glue),
                task=task,
                tokenizer=str(glue / "tokenizer"),
                sequence_length=32,
            ),
            optimizer=OptimizerConfig(learning_rate=0.01, warmup_steps=2),
            training=TrainingConfig(**(defaults | training)),
        )

    return build


def answers_one_by_one(folder):
    """What a run's model says of every held-out text, alone and without padding, and what is right."""
    model, config, _ = load_model(folder)
    task = glue_task(config.data.task)
    examples = read_examples(config.data.source, task, task.held_out[0])
    encoder = ExampleEncoder(config.family, load_tokenizer(Path(folder) / "tokenizer"), task)
    ask, scores = jax.jit(lambda model, *inputs: model(*inputs)), []
    for segments in encoder.segments(examples, config.data.sequence_length):
        tokens = [np.concatenate([segment.ids for segment in segments])[None].astype(np.int32)]
        kinds = np.repeat([segment.type_id for segment in segments], [len(segment.ids) for segment in segments])[None]
        types = [None, kinds] if config.family == "bert" else []
        scores.append(np.asarray(ask(model, *tokens, *types)[0]))
    return np.array(scores), np.array([example.label for example in examples])


def check_predictions(folder, task, scores):
    """The held-out set without its labels, asked as a test set."""
    place = Path(load_model(folder)[1].data.source) / glue_task(task).folder
    header, *rows = [line.split("\t")[:-1] for line in (place / "dev.tsv").read_text().split("\n")]
    (place / "test.tsv").write_text("\n".join("\t".join(row) for row in [header, *rows]))
    (path,) = write_predictions(folder)
    lines = [line.split("\t") for line in path.read_text().splitlines()]
    assert (path.name, lines[0]) == (f"{place.name}.tsv", ["index", "prediction"])
    assert [int(index) for index, _ in lines[1:]] == list(range(13))
    said = [text for _, text in lines[1:]]
    if task == "stsb":
        np.testing.assert_allclose([float(text) for text in said], np.clip(scores[:, 0], 0, 5), atol=6e-4)
    else:
        assert said == [glue_task(task).labels[best] for best in scores.argmax(-1)]


@pytest.mark.parametrize(("family", "task"), cells([("bert", "rte")], [("gpt2", "sst2"), ("t5", "stsb")]))
def test_a_run_learns_and_reports(family, task, make, tmp_path, capsys):
    """The report is that of the model it leaves, asked text by text."""
    config = make(tmp_path, family, task, epochs=2)
    assert train(config).status == 0
    model, saved, step = load_model(tmp_path)
    assert type(model) is FAMILIES[family][0]
    assert (step, saved.training.steps, saved.training.evaluate_every) == (23, 23, 12)
    assert saved.data.sequence_length % 8 == 0
    scores, labels = answers_one_by_one(tmp_path)
    found = json.loads((tmp_path / "glue.json").read_text())
    assert found["task"] == task
    (report,) = found["sets"].values()
    assert report["texts"] == 13
    validations = [line for line in lines_of(tmp_path) if "validation_loss" in line]
    assert [line["step"] for line in validations] == [0, 12, 23]
    if task == "stsb":
        expected = {
            "pearson": stats.pearsonr(scores[:, 0], labels).statistic,
            "spearman": stats.spearmanr(scores[:, 0], labels).statistic,
        }
        loss = np.mean(np.square(scores[:, 0] - labels))
    else:
        guesses = scores.argmax(-1)
        expected = {"accuracy": np.mean(guesses == labels)}
        exact = scores.astype(np.float64)
        right = exact[np.arange(13), labels.astype(int)]
        loss = np.mean(np.log(np.exp(exact).sum(-1)) - right)
        counts = [[int(np.sum((labels == own) & (guesses == said))) for said in (0, 1)] for own in (0, 1)]
        assert report["confusion"] == counts
        assert report["majority"] == max(np.mean(labels), 1 - np.mean(labels))
    assert report["metrics"] == pytest.approx(expected, abs=1e-5)
    last = {name.removeprefix("validation_"): value for name, value in validations[-1].items()}
    assert {name: last[name] for name in expected} == report["metrics"]
    assert last["loss"] == pytest.approx(loss, rel=1e-4)
    assert last["loss"] < validations[0]["validation_loss"]
    check_predictions(tmp_path, task, scores)
    assert evaluate([str(tmp_path)]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {name: said[name] for name in expected} == pytest.approx(expected, abs=1e-5)
    assert (said["task"], said["step"], said["examples"]) == (task, 23, 13)


@pytest.mark.thorough
def test_a_stopped_run_continues_exactly(make, tmp_path, monkeypatch):
    """In the middle of an epoch."""
    whole, broken = (make(tmp_path / name, "bert") for name in ("whole", "broken"))
    assert train(whole).status == 0
    with stopping_after(5, monkeypatch):
        assert train(broken).status == 143
    assert train(broken, resume=True).status == 0
    assert lines_of(tmp_path / "broken") == lines_of(tmp_path / "whole")
    assert (tmp_path / "broken" / "glue.json").read_text() == (tmp_path / "whole" / "glue.json").read_text()
    assert main(["export", str(tmp_path / "whole"), str(tmp_path / "out")]) == 0
    assert type(from_pretrained(tmp_path / "out")) is BertClassifier
    with pytest.raises(UserError, match="holds a BertClassifier, which does not write texts"):
        Session.load(tmp_path / "whole")
    # Another task and another attention on the exported model: its head stays behind where labels differ.
    softmax = replace(FAMILIES["bert"][1], attention=AttentionConfig("softmax"))
    model = load_model(tmp_path / "whole")[0]
    for task, same in (("rte", True), ("stsb", False)):
        config = replace(make(tmp_path / task, "bert", task), model=softmax, init_from=str(tmp_path / "out"))
        run = resolve(config, resume=False)
        begun = run.state.params
        np.testing.assert_array_equal(begun["bert"]["pooler"]["kernel"], model.bert.pooler.kernel[...])
        assert (begun["head"]["kernel"].shape == model.head.kernel.shape) is same
        assert not same or np.array_equal(begun["head"]["kernel"], model.head.kernel[...])
        assert (run.config.model.attention.name, run.config.model.num_labels) == ("softmax", 2 if same else 1)


@pytest.mark.thorough
def test_a_classifier_on_a_language_model(tiny_run, make, tmp_path):
    model = replace(FAMILIES["gpt2"][1], tie_embeddings=False)
    train(replace(tiny_run(tmp_path / "text", steps=1), family="gpt2", model=model))
    trained = load_model(tmp_path / "text")[0]
    run = resolve(replace(make(tmp_path / "on", "gpt2"), init_from=str(tmp_path / "text")), resume=False)
    np.testing.assert_array_equal(run.state.params["model"]["embed"]["embedding"], trained.embed.embedding[...])
    assert run.metadata.tokenizer == load_tokenizer(tmp_path / "text" / "tokenizer").fingerprint
    assert run.state.params["score"]["kernel"].shape == (16, 2)


def test_accumulated_parts_are_the_whole(make, glue, tmp_path):
    """Rows that fill up a batch count for nothing in sums, and a batch without `part` is all texts."""
    objective = objective_of(replace(make(tmp_path, "gpt2"), model=replace(FAMILIES["gpt2"][1], vocab_size=300)))
    rng = np.random.default_rng(0)
    batch = {
        "tokens": rng.integers(0, 300, (4, 8)).astype(np.int32),
        "mask": np.ones((4, 8), np.int32),
        "labels": np.array([0, 1, 1, 0], np.int32),
    }
    params = objective.start(jax.random.key(0), None)
    three = {name: rows[:3] for name, rows in batch.items()}
    marked = {**batch, "split": np.array([0, 0, 0, -1], np.int32)}
    plain, filled = (jax.jit(objective.sums)(params, {}, each) for each in (three, marked))
    assert int(objective.counts(marked)[0]) == int(filled.tokens[0]) == int(plain.tokens[0]) == 3
    np.testing.assert_allclose(filled.loss, plain.loss, rtol=1e-6)
    assert int(filled.correct[0]) == int(plain.correct[0])
    assert params_of(objective.parts(params, {})[0]).keys() == params.keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"task": None}, "training": {"epochs": None}}, "objective 'classification' needs data.task"),
        (
            {"objective": "language_model", "family": "gpt2", "model": Gpt2Config()},
            "data.task is for objective classification",
        ),
        ({"family": "llama"}, "needs a model of type LlamaConfig"),
        ({"data": {"source": "nowhere"}}, "data.source 'nowhere' is not a folder; give one with GLUE's files"),
        ({"data": {"task": "cola"}}, "there is no CoLA/train.tsv"),
        ({"data": {"tokenizer": None}}, "the tokenizer has no cls_token, which BERT needs"),
        ({"model": T5Config(end_token=7), "family": "t5"}, "model.end_token is 7"),
        ({"data": {"sequence_length": 3}}, "sequence_length 3 has no room for a text"),
        ({"data": {"sequence_length": 33}}, "sequence_length 33 is more than the 32 of model.max_positions"),
        ({"training": {"epochs": 0}}, "training.epochs is 0; give a positive number"),
    ],
)
def test_what_is_wrong_is_said_before_anything_starts(change, message, make, tmp_path):
    def start():
        config = make(tmp_path / "run", "bert", "rte")
        parts = {
            name: replace(getattr(config, name), **value) if isinstance(value, dict) else value
            for name, value in change.items()
        }
        resolve(replace(config, **parts), resume=False)

    with pytest.raises(UserError) as refused:
        start()
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_epochs_are_for_tasks():
    with pytest.raises(UserError, match=r"epochs is for data\.task"):
        check_run(RunConfig(output="x", training=TrainingConfig(epochs=1)))
