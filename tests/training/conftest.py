import random

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from lin_jax.attention import AttentionConfig
from lin_jax.data import DataConfig
from lin_jax.models import LlamaConfig
from lin_jax.training import OptimizerConfig, RunConfig, TrainingConfig
from lin_jax.training.loop import train


@pytest.fixture(scope="session")
def programs_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(scope="module", autouse=True)
def programs_on_disk(programs_folder):
    """Runs are stopped and gone on with, here and in processes of their own: their programs are compiled once."""
    options = {"jax_compilation_cache_dir": str(programs_folder), "jax_persistent_cache_min_compile_time_secs": 0.0}
    before = {name: getattr(jax.config, name) for name in options}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in options.items():
            jax.config.update(name, value)
            patch.setenv(name.upper(), str(value))
        compilation_cache.reset_cache()
        yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A small, predictable text: sentences over few words, many documents."""
    chance = random.Random(0)
    words = "the a small big cat dog tree house sat ran under over near and then it".split()  # noqa: SIM905
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    documents = [" ".join(chance.choices(words, k=chance.randint(5, 60))) for _ in range(400)]
    path.write_text("\n<|endoftext|>\n".join(documents))
    return path


@pytest.fixture(scope="session")
def tiny_model():
    return LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_layers=2,
        num_heads=2,
        attention=AttentionConfig(group_size=8, kernel_size=7, initial_alpha=0.1),
    )


@pytest.fixture(scope="session")
def tiny_run(corpus, tiny_model):
    """Makes the configuration of a run of seconds: `tiny_run(output, steps=4, ...)`."""

    def make(output, *, model=tiny_model, objective="language_model", init_from=None, optimizer=None, **training):
        defaults = {
            "plot": False,
            "steps": 12,
            "batch_size": 4,
            "log_every": 1,
            "evaluate_every": 6,
            "checkpoint_every": 4,
        }
        return RunConfig(
            output=str(output),
            objective=objective,
            init_from=init_from,
            medusa_heads=2,
            joint_warmup_steps=5,
            path_width=8,
            path_depth=3,
            model=model,
            data=DataConfig(
                source=str(corpus),
                document_separator="<|endoftext|>",
                vocab_size=280,
                sequence_length=24,
                validation_batches=2,
            ),
            optimizer=optimizer or OptimizerConfig(learning_rate=0.01, warmup_steps=2),
            training=TrainingConfig(**(defaults | training)),
        )

    return make


@pytest.fixture(scope="session")
def base_run(tmp_path_factory, tiny_run):
    """A finished run: its folder."""
    folder = tmp_path_factory.mktemp("runs") / "base"
    train(tiny_run(folder))
    return folder
