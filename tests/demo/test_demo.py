"""The demo from end to end, tiny: parts, resuming after a signal, another model, and refusals in one line."""

import json
import shutil
from html import unescape

import pytest
import yaml
from flax import nnx
from support.interrupted import stopping_after
from support.llama2c_files import HEADER, write_file

from lin_jax.cli.demo import main
from lin_jax.data import read_documents
from lin_jax.decoding.autotune.shapes import draft_shapes
from lin_jax.decoding.drafting.drafters.ngram import NgramDrafter
from lin_jax.decoding.drafting.drafters.path import PathDrafter
from lin_jax.decoding.drafting.drafters.union import UnionDrafter
from lin_jax.demo.decoding import few_shapes, measure_decoding, part_of
from lin_jax.demo.runs import BARE, BEST, STUDENTS, find_model
from lin_jax.errors import UserError
from lin_jax.hub import save_pretrained
from lin_jax.models import PathHead
from lin_jax.training.checkpoint.files import saved_steps
from lin_jax.training.config_file import load_run_config
from lin_jax.training.model_source import ModelSource

TRAINING = {"batch_size": 4, "log_every": 1, "checkpoint_every": 2, "plot": False}
TEACHER = {
    "output": "unused",
    "model": {"hidden_size": 16, "intermediate_size": 16, "num_layers": 1, "num_heads": 2, "attention": "softmax"},
    "data": {"max_bytes": 200_000, "vocab_size": 280, "sequence_length": 32, "validation_batches": 2},
    "training": {"steps": 4, "evaluate_every": 4, **TRAINING},
}
STUDENT = {
    "output": "unused",
    "init_from": "unused",
    "objective": "attention_transfer",
    "model": {"attention": {"name": BEST, "window": 8, "features": 8, "group_size": 8, "kernel_size": 7}},
    "data": {"validation_batches": 1},
    "training": {"steps": 2, "evaluate_every": 2, **TRAINING},
}
HEADS = {
    "output": "unused",
    "init_from": "unused",
    "objective": "path",
    "heads": {"width": 8, "depth": 1},
    "data": {"validation_batches": 1},
    "training": {"steps": 2, "evaluate_every": 2, **TRAINING},
}
SIZES = ["--prompts", "2", "--new-tokens", "16", "--rounds", "1", "--contexts", "64"]
KEYS = (
    "lossless",
    "speedup",
    "plain_tokens_per_second",
    "speculative_tokens_per_second",
    "softmax_tokens_per_second",
    "teacher_perplexity",
    "students",
    "seconds",
    "cpu",
)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """The command line but for --output: files of tiny sizes."""
    folder = tmp_path_factory.mktemp("configs")
    found = [*SIZES]
    for option, content in (("--config", TEACHER), ("--students-config", STUDENT), ("--heads-config", HEADS)):
        path = folder / f"{option[2:]}.yaml"
        path.write_text(yaml.safe_dump(content))
        found += [option, str(path)]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory, words):
    """A demo that a signal has stopped while its teacher was trained, and that was called again."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    with pytest.MonkeyPatch.context() as patch:
        # Every drafter and tree has to be compiled.
        patch.setattr(measure_decoding, "__defaults__", (("path",),))
        with stopping_after(3, patch):
            assert main([*words, "--output", str(folder)]) == 143
        stopped = json.loads((folder / "parts.json").read_text())
        assert stopped["results"] == {}
        assert stopped["seconds"]["teacher"] > 0
        assert saved_steps(folder / "teacher") == [2, 3]
        assert main([*words, "--output", str(folder)]) == 0
    assert json.loads((folder / "parts.json").read_text())["seconds"]["teacher"] > stopped["seconds"]["teacher"]
    return folder


@pytest.fixture(scope="module")
def report(folder):
    return json.loads((folder / "report.json").read_text())


def test_report_has_its_keys(report):
    assert set(KEYS) <= set(report)
    assert report["lossless"] is True
    assert report["teacher_perplexity"] > 1
    assert set(report["students"]) == set(STUDENTS)
    for student in (*report["students"].values(), *report["baselines"].values()):
        assert student["ratio"] == pytest.approx(student["perplexity"] / report["teacher_perplexity"], rel=1e-5)
        assert student["interval"][0] <= student["ratio"] <= student["interval"][1]
        assert student["state_bytes"] > 0
    assert list(report["baselines"]) == ["window of 8, untrained"]
    drafted = report["drafters"]["path"]
    assert report["speedup"] == (drafted["speedup"] if drafted["drafted_share"] else 1.0)
    assert report["headline"]
    assert min(report[f"{name}_tokens_per_second"] for name in ("plain", "speculative", "softmax")) > 0


def test_every_part_has_its_seconds(report):
    parts = ["teacher", *STUDENTS, "quality", "head", "decoding", "context"]
    assert list(report["seconds"]) == [*parts, "total"]
    assert report["seconds"]["total"] == pytest.approx(sum(report["seconds"][name] for name in parts))


def test_long_texts_are_read_and_timed(report):
    context = report["context"]
    assert context["lengths"] == [64]
    for kind in ("linear", "softmax"):
        assert context[kind]["milliseconds"][0] > 0
    # One layer of two heads of 8, for keys and for values, and the position; a cache has room for one token more.
    assert context["softmax"]["state_bytes"] == [4 * (2 * 65 * 16 + 1)]


def test_samples_are_the_texts_of_the_prompts(report, folder):
    assert len(report["samples"]) == 2
    assert {len(each["tokens"]) for each in report["samples"]} == {16}
    assert all(len(each["origins"]) == 16 for each in report["samples"])
    page = (folder / "report.html").read_text()
    assert page.count("<article") == 2
    assert report["findings"][0]["text"][1:] in unescape(page)


def test_nothing_was_trained_on_held_out_text(folder):
    """All runs hold out the same documents."""
    runs = [load_run_config(path.parent).data for path in folder.rglob("config.yaml")]
    assert len(runs) == 5
    kept = [(each.source, each.document_separator, each.max_bytes, each.validation_fraction) for each in runs]
    assert len(set(kept)) == 1


def test_what_is_finished_is_left_alone(folder, words, report, capsys, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("done before")

    for name in ("run_all", "measure_quality", "measure_decoding", "measure_context"):
        monkeypatch.setattr(f"lin_jax.cli.demo.{name}", refuse)
    assert main([*words, "--output", str(folder)]) == 0
    assert json.loads((folder / "report.json").read_text()) == report
    said = capsys.readouterr().err
    assert said.count("done before") == 8
    assert report["headline"] in said


def test_other_settings_are_refused(folder, words, tmp_path):
    """Results of another text or machine are not mixed with what is there."""
    (tmp_path / "text.txt").write_text("some words\n" * 100)
    with pytest.raises(UserError, match=r"was begun with another --data: none.*give --fresh") as error:
        main([*words, "--output", str(folder), "--data", str(tmp_path / "text.txt")])
    assert "\n" not in str(error.value)
    copy = tmp_path / "copy"
    copy.mkdir()
    shutil.copy(folder / "parts.json", copy)
    content = json.loads((copy / "parts.json").read_text())
    content["settings"]["machine"] = "an abacus"
    (copy / "parts.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="another machine: an abacus"):
        main([*words, "--output", str(copy)])
    (copy / "parts.json").write_text("{")
    with pytest.raises(UserError, match="is damaged; give --fresh"):
        main([*words, "--output", str(copy)])


@pytest.fixture(scope="module")
def model_folder(folder, tmp_path_factory):
    """The demo's teacher as a Hugging Face folder."""
    source = ModelSource(folder / "teacher")
    place = tmp_path_factory.mktemp("model") / "llama"
    save_pretrained(source.model(), place, tokenizer=source.tokenizer())
    return place


def test_a_given_model_is_the_teacher(model_folder, words, tmp_path, monkeypatch, capsys):
    """Nothing trains a teacher; students begin from the model, on the given text, cut at its markers."""
    text = tmp_path / "stories.txt"
    text.write_text("<|endoftext|>".join(f"story {number}: " + "some words " * 30 for number in range(40)))
    output = tmp_path / "out"
    given = [*words, "--model", str(model_folder), "--data", str(text), "--output", str(output)]
    with stopping_after(1, monkeypatch):
        assert main(given) == 143
    assert f"1/7 linearizing it: {BARE}" in capsys.readouterr().err
    run = load_run_config(output / BARE)
    assert (run.init_from, run.teacher) == (str(model_folder), str(model_folder))
    assert (run.model.attention.name, run.model.attention.window, run.model.hidden_size) == (BARE, None, 16)
    assert (run.data.source, run.data.document_separator) == (str(text), "auto")
    assert len(read_documents(run.data)) == 40
    assert saved_steps(output / BARE) == [1]
    assert not (output / "teacher").exists()


def test_a_model_that_is_linear_already_is_refused(folder, words, tmp_path):
    with pytest.raises(UserError, match="give a model of softmax attention"):
        main([*words, "--model", str(folder / "augmented"), "--output", str(tmp_path / "out")])
    with pytest.raises(UserError, match="there is no folder"):
        main([*words, "--model", str(tmp_path / "nowhere"), "--output", str(tmp_path / "out")])


def test_models_are_found(tmp_path, model_folder):
    """A folder with a file of llama2.c and its tokenizer will do; what is ambiguous is said."""
    assert find_model(str(model_folder), None).place == str(model_folder)
    assert find_model("owner/name", None).place == "hub:owner/name"
    write_file(tmp_path / "model.bin", HEADER)
    with pytest.raises(UserError, match=r"holds no file that may be the tokenizer of model\.bin"):
        find_model(str(tmp_path), None)
    (tmp_path / "tok32.bin").write_bytes(b"a tokenizer")
    found = find_model(str(tmp_path), None)
    assert (found.place, found.tokenizer) == (str(tmp_path / "model.bin"), str(tmp_path / "tok32.bin"))
    (tmp_path / "other.model").write_bytes(b"another")
    with pytest.raises(UserError, match="holds 2 files that may be the tokenizer"):
        find_model(str(tmp_path), None)
    assert find_model(str(tmp_path), "mine").tokenizer == "mine"
    write_file(tmp_path / "second.bin", HEADER)
    with pytest.raises(UserError, match=r"holds 2 models, model\.bin first; name the file"):
        find_model(str(tmp_path), None)


def test_a_missing_text_is_found_out_before_anything_else(model_folder, words, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        main([*words, "--model", str(model_folder), "--data", str(tmp_path / "missing"), "--output", str(tmp_path)])


@pytest.mark.parametrize("option", ["--prompts", "--new-tokens", "--rounds"])
def test_wrong_numbers_are_refused(option, tmp_path):
    with pytest.raises(UserError, match=f"{option} is 0; give at least"):
        main([option, "0", "--output", str(tmp_path)])
    assert not any(tmp_path.iterdir())


def test_few_shapes_are_compiled():
    """Plain decoding, and the wanted drafters' chains and trees of four to eight nodes."""
    heads = PathDrafter(PathHead(8, 8, 16, rngs=nnx.Rngs(0)), depth=4)
    drafter = UnionDrafter(heads, NgramDrafter(matches=1, depth=31))
    every = draft_shapes(drafter)
    few = few_shapes(every, lambda tree: True)
    assert [arm.depth for arm in few.arms] == [0, 3, 4, 4, 3, 7]
    assert [tree.size for tree in few.trees] == [1, 4, 5, 8, 4, 8]
    assert set(few.trees) < set(every.trees)
    assert set(few.hindsight) == set(every.hindsight)
    ngram = few_shapes(every, lambda tree: part_of(drafter, tree) == 1)
    assert ngram.trees == (few.trees[0], *few.trees[4:])
    assert ngram.arms[1:] == few.arms[4:]
    none = few_shapes(every, lambda tree: False)
    assert (len(none.trees), none.hindsight) == (1, {})
