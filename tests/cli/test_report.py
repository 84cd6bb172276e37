"""The report of students and their teacher: figures against those of the parts, seeds, pages, and wrong options."""

import json
from dataclasses import replace

import numpy as np
import pytest
from flax import nnx

from lin_jax.attention import AttentionConfig
from lin_jax.cli.main import main
from lin_jax.cli.report import _student
from lin_jax.data import Corpus, DataConfig, Tokenizer, validation_batches
from lin_jax.decoding import Generator
from lin_jax.errors import UserError
from lin_jax.evaluation import evaluate
from lin_jax.hub import save_pretrained
from lin_jax.models import Llama, LlamaConfig
from lin_jax.report.measure import prompts_of
from lin_jax.training.model_source import ModelSource, with_attention

TEXT = "\n@@\n".join(
    f"{n} green bottles hanging on the wall, {n} green bottles, and {n + 1} more. " * 6 for n in range(12)
)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A teacher, two students of it with taps of their own, and a text."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "text.txt").write_text(TEXT)
    tokenizer = Tokenizer.train([TEXT], 280)
    config = LlamaConfig(
        vocab_size=280,
        hidden_size=16,
        intermediate_size=24,
        num_layers=1,
        num_heads=2,
        initializer_range=0.2,
        attention=AttentionConfig("softmax"),
    )
    teacher = Llama(config, rngs=nnx.Rngs(0))
    save_pretrained(teacher, folder / "teacher", tokenizer=tokenizer)
    for seed in (1, 2):
        student = with_attention(teacher, AttentionConfig("augmented", group_size=4, kernel_size=5), seed)
        mixer = student.layers.layers.attention.mixer
        mixer.convolution.taps[...] = mixer.convolution.taps[...] + 0.1 * seed
        save_pretrained(student, folder / f"seed{seed}", tokenizer=tokenizer)
    return folder


@pytest.fixture(scope="module")
def report(places):
    words = ["report", f"linear={places / 'seed1'},{places / 'seed2'}", "--teacher", str(places / "teacher")]
    words += ["--text", str(places / "text.txt"), "--document-separator", "@@", "--output", str(places / "out")]
    words += ["--training-length", "12", "--batch", "4", "--prompts", "2", "--prompt-tokens", "6", "--new-tokens", "8"]
    assert main([*words, "--rounds", "1"]) == 0
    return json.loads((places / "out" / "report.json").read_text())


@pytest.mark.thorough
def test_figures_are_those_of_the_parts(report, places):
    teacher, *others = report["models"]
    students = [each for each in others if each["kind"] == "student"]
    assert [each["kind"] for each in others] == ["baseline"] * (len(others) - 2) + ["student"] * 2
    assert (report["row_length"], report["training_length"], teacher["ratio"]["value"]) == (48, 12, 1)
    source = ModelSource.open(places / "teacher")
    tokenizer = source.tokenizer()
    data = DataConfig(str(places / "text.txt"), document_separator="@@", sequence_length=48, validation_batches=2**31)
    corpus = Corpus.open(data)
    batches = list(validation_batches(corpus, tokenizer, data, batch_size=4))
    whole = evaluate(source.model(), batches)
    assert teacher["perplexity"] == pytest.approx(whole.perplexity, rel=1e-5)
    assert report["tokens"] == whole.tokens == sum(each["tokens"] for each in teacher["positions"])
    prompts = prompts_of(corpus, tokenizer, 2, 6)
    texts = Generator(source.model(), end_tokens=source.end_tokens(tokenizer)).generate(prompts, 8).tokens
    for student, place in zip(students, ("seed1", "seed2"), strict=True):
        model = ModelSource.open(places / place).model()
        own = evaluate(model, batches).perplexity
        assert student["perplexity"] == pytest.approx(own, rel=1e-5)
        assert student["ratio"]["value"] == pytest.approx(own / whole.perplexity, rel=1e-5)
        assert student["ratio"]["low"] <= student["ratio"]["value"] <= student["ratio"]["high"]
        found = Generator(model, end_tokens=source.end_tokens(tokenizer)).generate(prompts, 8).tokens
        equal = sum(a == b for one, other in zip(texts, found, strict=True) for a, b in zip(one, other, strict=False))
        assert student["agreement"]["equal"] == equal / sum(map(len, texts))
        without = with_attention(model, replace(model.config.attention, name="flash_global+local"))
        bare = evaluate(without, batches).perplexity / whole.perplexity
        assert student["ablations"]["convolution"]["value"] == pytest.approx(bare, rel=1e-5)
        assert student["ablations"].keys() == {"local", "memory", "convolution"}
        # Keys and values of 4 tokens, a memory of 2 heads of 8 x 8, 2 values for the taps, and the position.
        assert student["state_bytes"] == 4 * (2 * 4 * 16 + 2 * 8 * 8 + 2 * 16 + 1)
        assert not student["state_grows"]
        assert teacher["state_grows"]
    assert all(each["decode_tokens_per_second"] > 0 for each in report["models"])
    assert all(each["training_tokens_per_second"] > 0 for each in report["models"])


def test_seeds_have_a_mean_and_a_spread(report):
    ratios = [each["ratio"]["value"] for each in report["models"] if each["kind"] == "student"]
    (seeds,) = report["seeds"]
    assert (seeds["name"], seeds["seeds"]) == ("linear", 2)
    found = seeds["figures"]["ratio"]
    assert (found["low"], found["high"]) == (min(ratios), max(ratios))
    assert found["mean"] == pytest.approx(np.mean(ratios))
    assert found["deviation"] == pytest.approx(np.std(ratios, ddof=1))


def test_pages_say_the_same(report, places):
    page = (places / "out" / "report.md").read_text()
    for model in report["models"]:
        assert f"| {model['perplexity']:.4f} |" in page
        for value in model["ablations"].values():
            assert f"| {value['value']:.4f} |" in page
    assert "| 12 to 23 |" in page
    assert "| 24 to 47 |" in page
    assert (places / "out" / "report.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{seed1}"], "the following arguments are required: --teacher"),
        (["{seed1}", "--teacher", "{teacher}"], "no student is a run, and so there is no held-out text; give a text"),
        (["a={seed1},{seed1}", "--teacher", "{teacher}"], "is there twice, and a model is no second seed of its own"),
        (["{seed1}", "--teacher", "{teacher}", "--rounds", "-1"], "--rounds is -1; give 0 or more"),
        (["{seed1}", "--teacher", "{teacher}", "--prompts", "0"], "--prompts is 0; give at least 1"),
        (["a=", "--teacher", "{teacher}"], "student 'a=' names no place; give NAME=FOLDER, or a folder"),
    ],
)
def test_wrong_options(places, words, message):
    names = {name: str(places / name) for name in ("seed1", "teacher")}
    with pytest.raises(UserError, match=message):
        main(["report", *(word.format(**names) for word in words)])


def test_names_of_students():
    assert _student("a=x/y,z") == ("a", ["x/y", "z"])
    assert _student("runs/x=1/tune") == ("x=1/tune", ["runs/x=1/tune"])
