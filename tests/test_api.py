"""The package's verbs, as a notebook uses them: in memory and in a folder, run twice, stopped and gone on with."""

import subprocess
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx
from support.interrupted import stopping_after

import lin_jax
from lin_jax.data import Tokenizer
from lin_jax.errors import UserError
from lin_jax.hub import save_pretrained
from lin_jax.models import Llama
from lin_jax.models.params import params_of

OPTIONS = {"batch_size": 2, "sequence_length": 24}
LINEAR = lin_jax.AttentionConfig("augmented", group_size=8, kernel_size=7)


def values_of(model):
    return jax.tree.map(np.asarray, params_of(model))


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, values_of(one), values_of(other))


@pytest.fixture(scope="module")
def place(corpus, tiny_model, tmp_path_factory):
    """A Hugging Face folder of a LLaMA with softmax attention."""
    tokenizer = Tokenizer.train([corpus.read_text()], 280)
    config = replace(tiny_model, num_layers=1, vocab_size=280, attention="softmax", initializer_range=0.2)
    folder = tmp_path_factory.mktemp("model") / "llama"
    return save_pretrained(Llama(config, rngs=nnx.Rngs(0)), folder, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def loaded(place):
    return lin_jax.from_pretrained(place, attention=LINEAR)


def test_importing_the_package_imports_no_jax():
    code = "import lin_jax, sys; assert 'linearize' in dir(lin_jax); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = lin_jax.nothing


def test_an_attention_is_a_name_or_a_configuration(place, tiny_model):
    model, _ = lin_jax.from_pretrained(place, attention="augmented")
    assert model.config.attention == lin_jax.AttentionConfig("augmented")
    assert replace(tiny_model, attention="softmax").attention == lin_jax.AttentionConfig("softmax")
    with pytest.raises(UserError, match=r"attention\.name 'augment' is unknown"):
        lin_jax.from_pretrained(place, attention="augment")
    with pytest.raises(UserError, match="attention is 3; give a name, such as 'augmented', or an AttentionConfig"):
        replace(tiny_model, attention=3)


def test_in_memory(loaded, corpus):
    """Linearizing changes neither the model nor its teacher; run again, it gives the same model."""
    model, tokenizer = loaded
    before = values_of(model)
    linear = lin_jax.linearize(model, tokenizer, corpus, steps=3, **OPTIONS)
    jax.tree.map(np.testing.assert_array_equal, before, values_of(model))
    assert linear.config.attention == LINEAR
    assert any(
        np.any(one != other) for one, other in zip(*map(jax.tree.leaves, (before, values_of(linear))), strict=True)
    )
    assert_same(lin_jax.linearize(model, tokenizer, corpus, steps=3, **OPTIONS), linear)
    tuned = lin_jax.train(linear, tokenizer, corpus, steps=1, lora=2, **OPTIONS)
    assert jax.tree.map(np.shape, values_of(tuned)) == jax.tree.map(np.shape, before)


@pytest.mark.thorough
def test_what_is_linearized_goes_on_learning(loaded, corpus):
    """It learns from the model as it was loaded."""
    model, tokenizer = loaded
    linear = lin_jax.linearize(model, tokenizer, corpus, steps=3, **OPTIONS)
    again = lin_jax.linearize(linear, tokenizer, corpus, steps=2, **OPTIONS)
    tuned = lin_jax.train(again, tokenizer, corpus, steps=1, lora=2, **OPTIONS)
    assert jax.tree.map(np.shape, values_of(tuned)) == jax.tree.map(np.shape, values_of(model))


@pytest.mark.thorough
def test_an_attention_may_be_given_when_linearizing(place, loaded, corpus):
    model, tokenizer = loaded
    softmax, _ = lin_jax.from_pretrained(place)
    found = lin_jax.linearize(softmax, tokenizer, corpus, attention=LINEAR, steps=3, **OPTIONS)
    assert_same(found, lin_jax.linearize(model, tokenizer, corpus, steps=3, **OPTIONS))


@pytest.mark.thorough
def test_in_a_folder(loaded, corpus, tmp_path, monkeypatch, caplog, capsys):
    """Stopped in the middle and called again, the result is that of a call that nothing stopped."""
    model, tokenizer = loaded
    given = {"steps": 6, "output": tmp_path / "out", **OPTIONS}
    whole = lin_jax.linearize(model, tokenizer, corpus, **given | {"output": tmp_path / "whole"})
    with stopping_after(2, monkeypatch), pytest.raises(KeyboardInterrupt):
        lin_jax.linearize(model, tokenizer, corpus, **given)
    assert "out/transfer/checkpoints/2; the same call goes on from there" in capsys.readouterr().err
    linear = lin_jax.linearize(model, tokenizer, corpus, **given)
    assert_same(linear, whole)
    assert lin_jax.linearize(linear, tokenizer, corpus, **given) is linear
    assert_same(lin_jax.linearize(model, tokenizer, corpus, **given), linear)
    # Asked for otherwise, what is finished says what it was made with; nothing was said so far.
    assert "is finished" not in caplog.text
    for each in (linear, model):
        caplog.clear()
        lin_jax.linearize(each, tokenizer, [corpus, corpus], **given | {"batch_size": 4, "learning_rate": 2.0})
        for run in ("transfer", "tune"):
            lines = [line for line in caplog.messages if f"out/{run} is finished and stays as it is" in line]
            assert [line.split(" with ")[1].split()[0] for line in lines] == [
                "data.source",
                "optimizer.learning_rate",
                "training.batch_size",
            ]
    with pytest.raises(UserError, match="out holds this model after 6 steps, not 3; give another output"):
        lin_jax.linearize(linear, tokenizer, corpus, **given | {"steps": 3})
    with pytest.raises(UserError, match="has gone on to step 4, beyond the 2 asked for"):
        lin_jax.linearize(model, tokenizer, corpus, **given | {"steps": 3})
    trained = lin_jax.train(linear, tokenizer, corpus, steps=1, output=tmp_path / "on", **OPTIONS)
    loaded_again, _ = lin_jax.from_pretrained(tmp_path / "on" / "train")
    assert_same(loaded_again, trained)
    with stopping_after(1, monkeypatch):
        lin_jax.train(linear, tokenizer, corpus, steps=2, **OPTIONS)
    assert "train: stopped by SIGTERM after 1 of 2 steps; the model is what it is by now" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"out was begun from another model; give another output"):
        lin_jax.linearize(nnx.clone(trained), tokenizer, corpus, teacher=tmp_path / "out" / "teacher", **given)


def test_generating(loaded, corpus):
    model, tokenizer = loaded
    prompts = ["the cat sat", "then it ran"]
    plain = lin_jax.generate(model, tokenizer, prompts, 20, drafter="none")
    assert plain == [lin_jax.generate(model, tokenizer, each, 20, drafter="ngram")[0] for each in prompts]
    assert plain == lin_jax.generate(model, tokenizer, prompts, 20)
    # Other values are another model, whatever is remembered of the old ones.
    changed = nnx.clone(model)
    nnx.update(changed, jax.tree.map(lambda leaf: -leaf, nnx.state(changed, nnx.Param)))
    other = lin_jax.generate(changed, tokenizer, prompts, 20, drafter="none")
    nnx.update(model, nnx.state(changed))
    assert lin_jax.generate(model, tokenizer, prompts, 20, drafter="none") == other


@pytest.mark.thorough
def test_generating_from_memory_and_at_random(place, corpus):
    model, tokenizer = lin_jax.from_pretrained(place, attention=LINEAR)
    prompts = ["the cat sat", "then it ran"]
    plain = lin_jax.generate(model, tokenizer, prompts, 20, drafter="none")
    for _ in range(2):
        assert plain == lin_jax.generate(model, tokenizer, prompts, 20, drafter="suffix")
    sampled = [
        lin_jax.generate(model, tokenizer, prompts, 20, drafter=name, temperature=1.0) for name in ("none", "ngram")
    ]
    assert sampled[0] == sampled[1] != plain


def test_saving_twice(loaded, tmp_path):
    model, tokenizer = loaded
    for _ in range(2):
        folder = lin_jax.save_pretrained(model, tmp_path / "out", tokenizer=tokenizer)
    assert_same(lin_jax.from_pretrained(folder)[0], model)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("all of it")
    with pytest.raises(UserError, match="mine is not empty; give another folder"):
        lin_jax.save_pretrained(model, tmp_path / "mine")


@pytest.mark.thorough
def test_running_a_configuration(corpus, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        f"output: {tmp_path / 'run'}\n"
        "model: {hidden_size: 16, intermediate_size: 32, num_layers: 1, num_heads: 2, attention: softmax}\n"
        f"data: {{source: {corpus}, vocab_size: 280, sequence_length: 16, validation_batches: 1}}\n"
        "optimizer: {warmup_steps: 1}\n"
        "training: {steps: 1, batch_size: 2, plot: false}\n"
    )
    assert lin_jax.run(file, resume=True) == tmp_path / "run"
    assert lin_jax.run(file, "--training.steps=2", resume=True) == tmp_path / "run"
    model, tokenizer = lin_jax.from_pretrained(tmp_path / "run")
    assert (type(model).__name__, model.config.attention.name, tokenizer.vocab_size) == ("Llama", "softmax", 280)
    with pytest.raises(UserError, match="already holds checkpoints up to step 2"):
        lin_jax.run(file)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model, tokenizer: lin_jax.linearize(model, None, "x"), "the tokenizer is None; name the model's"),
        (lambda model, tokenizer: lin_jax.generate(model, None, "x"), "the tokenizer is None; name the model's"),
        (
            lambda model, tokenizer: lin_jax.linearize(model, tokenizer, "x", epochs=1),
            "option epochs is unknown; choose",
        ),
        (lambda model, tokenizer: lin_jax.linearize(model, tokenizer, "x", steps=1), "steps is 1; give 2 or more"),
        (lambda model, tokenizer: lin_jax.linearize(nnx.clone(model), tokenizer, "x"), "teacher of this model is not"),
        (lambda model, tokenizer: lin_jax.train(model, tokenizer, "nowhere.txt", steps=1), "nowhere.txt"),
        (
            lambda model, tokenizer: lin_jax.generate(model, tokenizer, "x", drafter="medusa"),
            "drafter 'medusa' is unknown",
        ),
        (lambda model, tokenizer: lin_jax.from_pretrained("nowhere"), "there is no folder nowhere"),
        (lambda model, tokenizer: lin_jax.from_pretrained("nowhere", weights="int4"), "weights 'int4' are unknown"),
    ],
)
def test_mistakes_are_named(loaded, call, message):
    with pytest.raises(UserError, match=message):
        call(*loaded)


@pytest.mark.thorough
def test_students_beside_their_teacher(place, loaded, corpus):
    """Compared on what training holds out, without folders; then one layer keeps the teacher's attention."""
    model, tokenizer = loaded
    linear = lin_jax.linearize(model, tokenizer, corpus, steps=2, **OPTIONS)
    options = {"sequence_length": 12, "batches": 1, "batch_size": 2}
    report = lin_jax.compare({"mine": linear}, tokenizer, corpus, prompts=2, **options)
    assert [each.name for each in report.models] == ["teacher", "window of 8, untrained", "mine"]
    assert (report.row_length, report.training_length) == (48, 12)
    teacher, _, mine = report.models
    assert teacher.ratio.value == 1 != mine.ratio.value
    assert set(mine.ablations) == {"local", "memory", "convolution"}
    choice = lin_jax.select_layers(linear, tokenizer, corpus, keep=1, **options)
    assert (choice.layers, choice.attention.name) == ((0,), "softmax")
    assert choice.divergences.tokens > 0
    with pytest.raises(UserError, match="2 of 1 layers are to keep the teacher's attention; give keep=1 to 1"):
        lin_jax.select_layers(linear, tokenizer, corpus, keep=2, **options)
    with pytest.raises(UserError, match="there are no students; give a model, or several by their names"):
        lin_jax.compare({}, tokenizer, corpus)
    softmax, _ = lin_jax.from_pretrained(place)
    with pytest.raises(UserError, match="the teacher of this model is not known"):
        lin_jax.compare(Llama(softmax.config, rngs=nnx.Rngs(1)), tokenizer, corpus)
