"""Training: a run described in YAML, its objective, step, loop and checkpoints."""

from lin_jax.training.config import OptimizerConfig as OptimizerConfig
from lin_jax.training.config import RunConfig as RunConfig
from lin_jax.training.config import TrainingConfig as TrainingConfig
from lin_jax.training.config import load_run_config as load_run_config
from lin_jax.training.config import parse_run_config as parse_run_config
from lin_jax.training.loading import load_heads as load_heads
from lin_jax.training.loading import load_model as load_model
from lin_jax.training.loading import read_base as read_base
from lin_jax.training.profiling import ProfileConfig as ProfileConfig
from lin_jax.training.watch import WatchConfig as WatchConfig
from lin_jax.training.weights_and_biases import WandbConfig as WandbConfig
