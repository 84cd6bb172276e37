import pytest

from lin_jax.data import DataConfig
from lin_jax.training import HeadsConfig, OptimizerConfig, RunConfig, TrainingConfig
from lin_jax.training.run import train


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
            heads=HeadsConfig(depth=3 if objective == "path" else 2, width=8, warmup_steps=5),
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
