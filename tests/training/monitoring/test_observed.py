"""What a run shows of itself: figures, trackers, a trace, curves, and whose fault a wait is."""

import json
import shutil
import sys
import threading
import time
import types
from dataclasses import replace
from types import SimpleNamespace

import jax
import pytest
from support.planted import planted

from lin_jax.cli.plot import main as draw_curves
from lin_jax.errors import UserError
from lin_jax.evaluation import flops
from lin_jax.training import MonitoringConfig, ProfileConfig, WandbConfig
from lin_jax.training.monitoring import plot
from lin_jax.training.monitoring.input_stalls import InputStalls
from lin_jax.training.monitoring.progress import Progress
from lin_jax.training.monitoring.spike_response import SpikeResponse
from lin_jax.training.monitoring.throughput import MACHINE_FIGURES
from lin_jax.training.monitoring.trackers import JsonLines, read_metrics
from lin_jax.training.monitoring.watchdog import Watchdog, main_stack
from lin_jax.training.run import train
from lin_jax.training.setup import resolve


class FakeWandb(types.ModuleType):
    """Keeps what it is given."""

    def __init__(self):
        super().__init__("wandb")
        self.runs = []

    def init(self, **options):
        run = SimpleNamespace(options=options, logged=[], metrics=[], finished=False)
        run.id = options["id"] or f"id-{len(self.runs)}"
        run.define_metric = lambda name, step_metric: run.metrics.append((name, step_metric))
        run.log = run.logged.append
        run.finish = lambda: setattr(run, "finished", True)
        self.runs.append(run)
        return run


def slow(number):
    """The fourth batch is long in coming, and the others take their time."""
    time.sleep(1.5 if number == 4 else 0.1)


@pytest.fixture(scope="module")
def observed(tmp_path_factory, tiny_run):
    """A run with everything on, stopped at step 6 and resumed: its folder, what it said, and the fake package."""
    folder, fake = tmp_path_factory.mktemp("observed") / "run", FakeWandb()
    config = tiny_run(
        folder,
        steps=9,
        log_every=3,
        plot=True,
        profile=ProfileConfig(start=3, steps=2),
        wandb=WandbConfig("linear", mode="offline"),
        monitoring=MonitoringConfig(stall_seconds=0.7, hang_seconds=0.8),
    )
    said, look = [], SpikeResponse.on_step

    def look_long(self, training, metrics):
        time.sleep(1.6 if training.step == 5 else 0)
        return look(self, training, metrics)

    with pytest.MonkeyPatch.context() as patch, planted({}, slow):
        patch.setitem(sys.modules, "wandb", fake)
        patch.setattr(SpikeResponse, "on_step", look_long)
        patch.setattr(Progress, "_write", lambda self, text: said.append(text))
        train(replace(config, training=replace(config.training, steps=6)))
        train(config, resume=True)
    return folder, said, fake


@pytest.mark.thorough
def test_every_figure_is_in_every_tracker(observed):
    folder, said, fake = observed
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == [3, 6, 9]
    for line in lines:
        assert set(line) >= MACHINE_FIGURES - {"mfu"}
        # The first batch, which the compiler has to wait for too, does not count.
        assert line["wait_seconds"] > 0.06
        assert line["peak_memory_bytes"] > 2**20
    # Figures of a step are read when the batch after it has come.
    assert lines[0]["wait_seconds"] > 0.5 > lines[2]["wait_seconds"]
    assert lines[-1]["seconds_left"] == 0
    assert any("GiB" in text and "tokens/s" in text and text.startswith("step 3/6: loss") for text in said)
    assert len(list((folder / "tensorboard").iterdir())) == 2
    logged = [figures for run in fake.runs for figures in run.logged if "loss" in figures]
    assert [{name: figures[name] for name in line} for figures, line in zip(logged, lines, strict=True)] == lines


@pytest.mark.thorough
def test_weights_and_biases_goes_on_with_the_same_run(observed):
    _, _, fake = observed
    first, second = fake.runs
    assert first.options["id"] is None
    assert second.options["id"] == first.id == "id-0"
    assert first.options | {"id": None, "config": None} == second.options | {"id": None, "config": None}
    assert (first.options["project"], first.options["name"], first.options["mode"]) == ("linear", "run", "offline")
    assert first.options["config"]["model"]["hidden_size"] == 16
    assert first.metrics == [("*", "step")]
    assert first.finished
    assert second.finished


def test_weights_and_biases_is_asked_for_before_anything_starts(tmp_path, tiny_run, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"^training.wandb.project is set, and the package wandb is not installed; "):
        train(tiny_run(tmp_path / "run", wandb=WandbConfig("linear")))
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match=r"training.wandb.mode is 'sometimes'; choose one of online, offline, disabled"):
        WandbConfig("linear", mode="sometimes")


@pytest.mark.thorough
def test_steps_are_traced_on_request(observed):
    folder, said, _ = observed
    traces = list((folder / "profile").rglob("*.xplane.pb"))
    assert len(traces) == 1
    assert b"train" in traces[0].read_bytes()
    assert f"step 4: traced; to look at it: pip install xprof, then xprof --logdir {folder / 'profile'}" in said
    with pytest.raises(UserError, match=r"training.profile.start is 0; give 1 or more"):
        ProfileConfig(start=0)


def test_a_slow_input_is_named(observed, corpus):
    _, said, _ = observed
    assert {text for text in said if text.startswith("waited 0.7 s")} == {
        f"waited 0.7 s for data from {corpus}, and still waiting; is its disk, network or tokenizer stuck?"
    }


def test_a_stall_is_said_while_it_lasts_and_once_an_interval():
    said, cried = [], threading.Event()

    def alarm(text):
        said.append(text)
        cried.set()

    with Watchdog(pause=0.01) as watchdog:
        stalls, training = InputStalls(lambda: "somewhere", 0.05, watchdog), SimpleNamespace(idle=True, alarm=alarm)
        for interval in (1, 2):
            cried.clear()
            for _ in range(2):
                with stalls.around_input(training):
                    # Nothing comes before somebody has complained.
                    cried.wait(20)
            stalls.lap(training, 1e-9, 2)
            assert [text[:39] for text in said] == interval * ["waited 0.05 s for data from somewhere, "]


def test_waits_that_keep_the_model_waiting_are_said_once_they_add_up():
    said = []
    with Watchdog() as watchdog:
        stalls = InputStalls(lambda: "somewhere", 10.0, watchdog)

        def wait(idle=True):
            training = SimpleNamespace(idle=idle, alarm=said.append)
            with stalls.around_input(training):
                time.sleep(0.02)
            return training

        assert stalls.lap(wait(), 0.03, 1) > 0.02
        # Waits beside which the devices were busy, and waits of less than half of the time, are nobody's fault.
        for idle in (False, True):
            stalls.lap(wait(idle), 1.0, 1)
        assert not said
        for _ in range(30):
            training = wait()
        stalls.lap(training, 1.0, 30)
    assert len(said) == 1
    assert "s passed waiting for data from somewhere; the input is slower than the model" in said[0]


def test_a_run_that_hangs_shows_where(observed):
    _, said, _ = observed
    cry = next(text for text in said if text.startswith("nothing has happened for 0.8 s near step 5; "))
    assert "time.sleep(1.6" in cry


def test_what_lasts_too_long_is_noticed_once():
    cries, called = [], threading.Event()

    def cry():
        cries.append(main_stack())
        called.set()

    with Watchdog(pause=0.01) as watchdog:
        with watchdog.limit(60.0, cry), watchdog.limit(None, cry):
            pass
        with watchdog.limit(0.05, cry):
            assert called.wait(20)
            time.sleep(0.1)
    assert len(cries) == 1
    assert "test_what_lasts_too_long_is_noticed_once" in cries[0]
    assert "called.wait(20)" in cries[0]


def test_utilisation_counts_matrices_and_known_chips(tiny_run, tmp_path, monkeypatch):
    run = resolve(tiny_run(tmp_path / "run"), resume=False)
    size, inner, vocabulary = 16, 32, 280
    layer = 4 * size * size + 3 * size * inner
    model, params, frozen = run.config.model, run.state.params, {"head": run.state.params["head"]}
    mixing = flops.mixing_flops(model, 24)
    assert mixing > 0
    weights = 2 * layer + size * vocabulary
    assert flops.step_flops(model, params, {}, 2, 24) == 2 * (6 * 24 * weights + 3 * mixing)
    assert flops.step_flops(model, {}, frozen, 1, 24) == 2 * 24 * size * vocabulary + 3 * mixing
    assert flops.utilisation(1e12, 1.0) is None
    chip = SimpleNamespace(device_kind="TPU v4 slice")
    monkeypatch.setattr(jax, "devices", lambda: [chip])
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    assert flops.utilisation(4 * 275e12, 2.0) == 0.5


def test_json_has_no_word_for_nan(tmp_path):
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.log(1, {"loss": float("nan"), "grad_norm": 2.0})
    lines.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": None, "grad_norm": 2.0}


def test_curves_are_drawn_at_the_end_and_side_by_side(observed, tmp_path, monkeypatch, capsys):
    folder, said, _ = observed
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert f"curves: {folder / 'curves.png'}" in said
    (tmp_path / "run").mkdir()
    shutil.copy(folder / "metrics.jsonl", tmp_path / "run")
    both = tmp_path / "both.svg"
    assert draw_curves([str(folder), str(tmp_path / "run"), "--output", str(both)]) == 0
    assert capsys.readouterr().out.strip() == str(both)
    assert "<svg" in both.read_text()
    curves = plot.read_curves([folder, tmp_path / "run"])
    assert [each.name for each in curves] == [f"{path.parent.name}/run" for path in (folder, tmp_path / "run")]
    assert [each.name for each in plot.read_curves([folder])] == ["run"]
    with pytest.raises(UserError, match=r"holds no metrics.jsonl; give the output folder"):
        plot.read_curves([tmp_path])
    with pytest.raises(UserError, match=r"cannot write .*curves.doc"):
        plot.draw(curves, tmp_path / "curves.doc")


def test_curves_know_where_updates_were_left_out():
    lines = [{"step": step, "left_out": left, "roll_backs": 0, "loss": 1.0} for step, left in enumerate([0, 1, 1, 3])]
    assert plot.Curves("run", [{"step": 0, "validation_loss": None}, *lines]).troubles == [1, 3]


def test_without_matplotlib_a_line_says_how_to_get_it(observed, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = []
    plot.draw_at_end(observed[0], said.append)
    assert said == [
        "no curves: drawing curves needs the package matplotlib, which is not installed; "
        "install it with: pip install 'lin-jax[plot]'"
    ]
