"""Training: a run described in YAML, its objective, step, loop and checkpoints."""

from lin_jax.training.checkpoint.loading import read_base as read_base
from lin_jax.training.config import RunConfig as RunConfig
from lin_jax.training.config import TrainingConfig as TrainingConfig
from lin_jax.training.config_file import load_run_config as load_run_config
from lin_jax.training.config_file import parse_run_config as parse_run_config
from lin_jax.training.model_source import ModelSource as ModelSource
from lin_jax.training.model_source import load_heads as load_heads
from lin_jax.training.model_source import load_model as load_model
from lin_jax.training.monitoring.profiler import ProfileConfig as ProfileConfig
from lin_jax.training.monitoring.spike_detection import LossSpikesConfig as LossSpikesConfig
from lin_jax.training.monitoring.wandb import WandbConfig as WandbConfig
from lin_jax.training.monitoring.watchdog import MonitoringConfig as MonitoringConfig
from lin_jax.training.objective_configs import HeadsConfig as HeadsConfig
from lin_jax.training.optimizer import MuonConfig as MuonConfig
from lin_jax.training.optimizer import OptimizerConfig as OptimizerConfig
