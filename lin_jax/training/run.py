"""Running a configuration: it is resolved, and a trainer runs it with hooks for its folder, or in memory."""

from contextlib import ExitStack
from typing import Any

import jax

from lin_jax.data import merged_positions
from lin_jax.devices import devices_shown
from lin_jax.evaluation.flops import step_flops
from lin_jax.training.checkpoint.manager import Checkpoints
from lin_jax.training.checkpoint.rollback import RollBack, roll_back
from lin_jax.training.config import RunConfig
from lin_jax.training.distributed.multihost import all_gather_json, broadcast_from_first, is_first
from lin_jax.training.distributed.preemption import StopSignal
from lin_jax.training.hooks import Hook, Training
from lin_jax.training.monitoring.input_stalls import InputStalls
from lin_jax.training.monitoring.plot import draw_at_end
from lin_jax.training.monitoring.profiler import Profiler
from lin_jax.training.monitoring.progress import Progress
from lin_jax.training.monitoring.spike_response import SpikeResponse
from lin_jax.training.monitoring.throughput import Clock, Throughput
from lin_jax.training.monitoring.trackers import Trackers, open_trackers
from lin_jax.training.monitoring.wandb import import_wandb
from lin_jax.training.monitoring.watchdog import HangWatch, Watchdog
from lin_jax.training.settings.changes import changes, check_optimizer, write_config
from lin_jax.training.setup import ResolvedRun, resolve
from lin_jax.training.trainer import Outcome, Trainer


class CheckpointWriter(Hook):
    """Writes checkpoints, with the position in the data.

    Args:
        checkpoints: of the run.
        run: its batches, and what its checkpoints say of themselves.
    """

    def __init__(self, checkpoints: Checkpoints, run: ResolvedRun) -> None:
        self._checkpoints = checkpoints
        self._run = run

    def on_save(self, training: Training, validation_loss: float | None) -> None:
        """Begins to save."""
        position = merged_positions(all_gather_json(self._run.batches.get_state()))
        self._checkpoints.save(training.step, training.state, position, self._run.metadata, validation_loss)


class FinalReport(Hook):
    """Ends a run: the objective's report, curves, and where everything is.

    Args:
        run: the run.
        checkpoints: of the run.
        how_to_go_on: said of a run that was stopped.
    """

    def __init__(self, run: ResolvedRun, checkpoints: Checkpoints, how_to_go_on: str) -> None:
        self._run = run
        self._checkpoints = checkpoints
        self._how_to_go_on = how_to_go_on

    def on_end(self, training: Training) -> None:
        """Prints the report and draws the curves."""
        run = self._run
        text = run.objective.report(training.state.params, run.frozen, run.validation, run.folder)
        if text is not None:
            print(text)
        self._checkpoints.wait()
        if run.config.training.plot and jax.process_index() == 0:
            draw_at_end(run.folder, training.note)
        training.note(f"step {training.step}: finished; saved {run.folder}")

    def on_stop(self, training: Training, signal_name: str) -> None:
        """Tells how to go on."""
        self._checkpoints.wait()
        saved = self._checkpoints.path(training.step)
        training.note(f"step {training.step}: stopped by {signal_name}; saved {saved}; {self._how_to_go_on}")


def train(config: RunConfig, *, resume: bool = False, how_to_go_on: str = "add --resume to go on") -> Outcome:
    """Runs a configuration to its last step, or until a signal such as Ctrl-C; either way there is a checkpoint then.

    Args:
        config: the run.
        resume: go on from the newest checkpoint in the run's folder; the losses are those of a run never interrupted.
            Settings that are not those of before are said, and written to the folder.
        how_to_go_on: said of a run that is stopped.

    Raises:
        UserError: the configuration or the folder does not allow it, or the loss is no longer a number.
    """
    if config.training.wandb.project is not None:
        import_wandb()
    run = resolve(config, resume=resume)
    with jax.set_mesh(run.shardings.mesh):
        return _train(run, resume, how_to_go_on)


def train_in_memory(run: ResolvedRun, description: str) -> tuple[Any, Outcome]:
    """Trains a run that is not written anywhere: its parameters after the last step, or after Ctrl-C.

    Args:
        run: from `setup.resolve_in_memory`.
        description: in front of the progress bar.

    Raises:
        UserError: the loss is no longer a number.
    """
    training = run.config.training
    with jax.set_mesh(run.shardings.mesh), ExitStack() as stack:
        progress = stack.enter_context(Progress(training.steps, description=description))
        for line in run.notes:
            progress.on_note(line)
        throughput = Throughput(Clock(), None, done=0, tokens=_tokens(run), flops=_flops(run))
        hooks = [SpikeResponse(training.loss_spikes), progress, throughput]
        trainer = _trainer(run, run.state, hooks, 0)
        outcome = trainer.run(stack.enter_context(StopSignal()))
        if outcome.stopped_by is not None:
            name, steps = outcome.stopped_by.name, f"{outcome.step} of {training.steps} steps"
            progress.on_note(f"{description}: stopped by {name} after {steps}; the model is what it is by now")
    return trainer.state.params, outcome


def _train(run: ResolvedRun, resume: bool, how_to_go_on: str) -> Outcome:
    training = run.config.training
    with ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(run.folder, training.keep_checkpoints, training.keep_best))
        stack.enter_context(checkpoints.full_disk_told())
        state, start, changed = run.state, None, list[str]()
        if resume:
            broadcast_from_first(lambda: check_optimizer(run.folder, run.config))
            restored = checkpoints.restore_latest(run.state, run.metadata)
            run.batches.set_state(restored.data)
            state, start = restored.state, restored.step
            changed = broadcast_from_first(lambda: changes(run.folder, run.config, restored.step))
            if changed and is_first():
                write_config(run.config)
        trackers = open_trackers(run.folder, run.config, start)
        stack.callback(trackers.close)
        progress = stack.enter_context(Progress(training.steps, start or 0))
        for line in (f"training {run.folder} on {devices_shown()}", _planned(run), *run.notes):
            progress.on_note(line)
        if start is not None:
            for line in [f"step {start}: going on from {checkpoints.path(start)}", *changed]:
                progress.on_note(line)
        watchdog, stop = stack.enter_context(Watchdog()), stack.enter_context(StopSignal())
        profiler = Profiler(training.profile, run.folder)
        stack.callback(profiler.close)
        ending = FinalReport(run, checkpoints, how_to_go_on)
        hooks = [*_hooks(run, checkpoints, trackers, progress, watchdog, profiler, start or 0), ending]
        return _trainer(run, state, hooks, start or 0).run(stop)


def _hooks(
    run: ResolvedRun,
    checkpoints: Checkpoints,
    trackers: Trackers,
    progress: Progress,
    watchdog: Watchdog,
    profiler: Profiler,
    done: int,
) -> list[Hook]:
    """Hooks of a run with a folder, in the order in which they are called, but for its end."""
    training = run.config.training

    def last_good() -> str:
        checkpoints.wait()
        return checkpoints.last_good()

    def go_back(training: Training) -> RollBack | None:
        margin = run.config.training.loss_spikes.margin
        return roll_back(checkpoints, training.state, training.step, margin, run.metadata)

    stalls = InputStalls(lambda: _source(run), training.monitoring.stall_seconds, watchdog)
    clock = Clock(trackers.seconds)
    return [
        SpikeResponse(training.loss_spikes, last_good, go_back),
        trackers,
        progress,
        stalls,
        Throughput(clock, stalls, done=done, tokens=_tokens(run), flops=_flops(run)),
        HangWatch(watchdog, training.monitoring.hang_seconds),
        profiler,
        CheckpointWriter(checkpoints, run),
    ]


def _trainer(run: ResolvedRun, state: Any, hooks: list[Hook], step: int) -> Trainer:
    return Trainer(
        run.objective,
        run.step,
        state,
        run.frozen,
        run.batches,
        run.validation,
        run.shardings,
        run.config.training,
        hooks,
        step=step,
    )


def _source(run: ResolvedRun) -> str:
    return getattr(run.batches, "source_name", None) or ", ".join(run.config.data.sources)


def _planned(run: ResolvedRun) -> str:
    """Size of the run in words: what takes long, before the first step shows how long."""
    training, length = run.config.training, run.config.data.sequence_length
    return (
        f"{training.steps:,} steps, each of {training.batch_size:,} rows of {length:,} tokens; "
        "nothing is shown while the first is compiled"
    )


def _tokens(run: ResolvedRun) -> int:
    return run.config.training.batch_size * run.config.data.sequence_length


def _flops(run: ResolvedRun) -> float:
    """Operations of a step, over all processes."""
    data, training = run.config.data, run.config.training
    sizes = training.batch_size, data.sequence_length
    return step_flops(run.config.model, run.state.params, run.frozen, *sizes)
