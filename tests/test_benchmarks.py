"""The benchmarks run, check themselves, and write what they promise."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from support.processes import ROOT

from lin_jax.attention import REGISTRY
from lin_jax.decoding.autotune.costs import Costs
from lin_jax.decoding.autotune.plan import SpeculationPlan, save_plans
from lin_jax.devices import device_kind
from lin_jax.session import PLAN_FILE
from lin_jax.training import load_run_config
from lin_jax.training.monitoring.trackers import read_metrics
from lin_jax.training.run import train


def run_benchmark(script: str, *options: str, without: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, f"benchmarks/{script}.py", *options]
    environment = {name: value for name, value in os.environ.items() if name not in without}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.thorough
def test_few_rows(tmp_path: Path) -> None:
    """Every form has a time for every number of rows that it is for."""
    file = tmp_path / "rows.json"
    sizes = ("--shapes", "16x8", "--rows", "1", "32", "--weights", "int8", "bfloat16", "--seconds", "0.1")
    done = run_benchmark("few_rows", *sizes, "--json", str(file))
    assert done.returncode == 0, done.stderr
    found = {(each["weights"], each["form"]): each["microseconds"] for each in json.loads(file.read_text())["products"]}
    assert set(found) == {
        ("int8", "sum"),
        ("int8", "columns"),
        ("bfloat16", "sum"),
        ("bfloat16", "columns"),
        ("bfloat16", "split"),
    }
    assert set(found["bfloat16", "split"]) == {"1", "32"}
    assert set(found["int8", "sum"]) == {"1"}


@pytest.mark.thorough
def test_conversion_memory(tmp_path: Path) -> None:
    """A conversion block by block takes less memory than allowed, and writes what one in memory writes."""
    file = tmp_path / "memory.json"
    sizes = ("--gigabytes", "0.25", "--shards", "2", "--in-memory")
    done = run_benchmark("conversion_memory", *sizes, "--folder", str(tmp_path), "--json", str(file))
    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text())
    assert report["rows"]["in memory"]["same_bytes"] is True
    assert report["rows"]["hub import"]["peak_bytes"] < min(
        report["allowed"], report["rows"]["in memory"]["peak_bytes"]
    )


@pytest.mark.thorough
def test_export_speculation(tmp_path: Path) -> None:
    """Texts with drafts are those without, in fewer passes."""
    file = tmp_path / "drafts.json"
    sizes = ("--layers", "1", "--width", "64", "--tokens", "40", "--rounds", "1")
    done = run_benchmark("export_speculation", *sizes, "--json", str(file))
    assert done.returncode == 0, done.stderr
    rows = json.loads(file.read_text())["rows"]
    assert [row["equal"] for row in rows] == [True] * 3
    assert all(row["passes"] <= row["tokens"] for row in rows)


@pytest.mark.thorough
def test_decode_speed(tmp_path: Path) -> None:
    """Every cell is right with and without drafts, and the state as large after any context."""
    file, plot = tmp_path / "speed.json", tmp_path / "speed.png"
    sizes = ("--contexts", "16", "80", "--batches", "1", "2", "--tokens", "4", "--rounds", "1")
    drafts = ("--drafter", "ngram", "--tree", "0;1;0,0")
    done = run_benchmark("decode_speed", *sizes, *drafts, "--json", str(file), "--plot", str(plot))
    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text())
    assert report["correct"] is True
    assert report["left_out"] == []
    assert [(cell["batch"], cell["context"]) for cell in report["results"]] == [(1, 16), (1, 80), (2, 16), (2, 80)]
    assert len({cell["state_bytes"] for cell in report["results"]}) == 1
    assert all(cell["speedup"] > 0 and cell["peak_memory_bytes"] > 0 for cell in report["results"])
    for cell in report["results"]:
        assert cell["plain"]["computed_tokens"] == cell["plain"]["useful_tokens"] == 3 * cell["batch"]
        assert cell["speculative"]["drafter"] == "ngram"
        assert len(cell["speculative"]["acceptance_by_depth"]) == 2
    assert report["largest_ratio"] >= 1
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.thorough
def test_decode_speed_far_apart(tmp_path: Path) -> None:
    """Two contexts are read piece by piece, and the clock and the memory looked at."""
    file = tmp_path / "long.json"
    done = run_benchmark("decode_speed", "--long", "40", "700", "--tokens", "4", "--rounds", "1", "--json", str(file))
    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text())
    assert report["correct"] is True
    assert [each["context"] for each in report["reading"]] == [40, 700]
    assert all(each["peak_memory_bytes_after"] >= each["peak_memory_bytes_before"] for each in report["reading"])
    assert len({cell["state_bytes"] for cell in report["results"]}) == 1


@pytest.mark.thorough
def test_speculation(tmp_path: Path) -> None:
    """A plan's tree, a chain and Hugging Face's generate take turns, and write what they should."""
    config = replace(load_run_config(ROOT / "configs" / "tiny.yaml"), output=str(tmp_path / "run"))
    train(replace(config, training=replace(config.training, steps=2)))
    plan = SpeculationPlan("ngram", 1, "0;1;0,0", device_kind(), expected_speedup=2.0, measured_speedup=2.0)
    costs = Costs(1, (1, 2, 16), (1.0, 1.1, 1.5))
    save_plans(tmp_path / "run" / PLAN_FILE, [plan], [costs])
    file, plot = tmp_path / "speculation.json", tmp_path / "speculation.png"
    few = {"prompts": "2", "new-tokens": "16", "rounds": "1", "chains": "1", "batches": "1", "batch-seconds": "1"}
    sizes = [word for name, value in few.items() for word in (f"--{name}", value)]
    words = ("--model", str(tmp_path / "run"), "--drafters", "ngram", "--keep-plans", *sizes)
    done = run_benchmark("speculation", *words, "--json", str(file), "--plot", str(plot))
    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text())
    assert report["correct"] is True
    contenders = {each["name"]: each for each in report["contenders"]}
    assert [each["kind"] for each in contenders.values()] == ["plain", "tree", "chain", "hugging face"]
    assert contenders["ngram, tree of 3"]["planned"] is True
    assert contenders["plain"]["mean_accepted_tokens"] == contenders["Hugging Face"]["mean_accepted_tokens"] == 1
    for each in contenders.values():
        assert each["wrong"] == 0
        assert each["equal"] + each["rounding_ties"] == 2
        assert each["tokens_per_second"] > 0
    (batch,) = report["batches"]
    assert (batch["batch"], batch["tree"], batch["wrong"]) == (1, plan.tree, 0)
    assert {name: each["target"] for name, each in report["targets"].items() if isinstance(each, dict)} == {
        "plain": 2.0,
        "chain": 1.15,
        "batches": 0.98,
    }
    assert report["targets"]["best_tree"] == "ngram, tree of 3"
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.thorough
def test_adaptive_speculation(tmp_path: Path, shared_data: Path) -> None:
    """Every prompt has its ratio, and the text of plain decoding."""
    file, place = tmp_path / "adaptive.json", shared_data / "checkpoints" / "stories260K"
    model = ("--model", str(place / "stories260K.bin"), "--tokenizer", str(place / "tok512.bin"), "--adaptive")
    few = ("--data", str(shared_data), "--prompts", "2", "--new-tokens", "24", "--rounds", "1", "--json", str(file))
    done = run_benchmark("speculation", *model, *few)
    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text())
    assert report["device"] == device_kind()
    assert report["adaptive"]["correct"] is True
    assert len(report["adaptive"]["prompts"]) == 2
    for each in report["adaptive"]["prompts"]:
        assert not each["wrong"]
        assert each["ratio"] > 0
        assert sum(each["steps_by_nodes"].values()) <= 23
    assert f"on {device_kind()}: ngram, 2 prompts of 24 new tokens" in done.stdout


@pytest.mark.thorough
def test_kernels(tmp_path: Path) -> None:
    """What runs here is right and has its times; what the TPU programs move is little more than they must."""
    file = tmp_path / "kernels.json"
    few = ("--shapes", "1,100,2,16", "--rounds", "1", "--seconds", "0.001")
    done = run_benchmark("kernels", *few, "--without-verify", "--json", str(file))
    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text())
    assert report["correct"] is True
    assert {each["operation"] for each in report["results"]} == {"augmented", "linear", "decayed"}
    for way in ("xla", "softmax"):
        assert all(each["implementations"][way]["forward"]["milliseconds"] > 0 for each in report["results"])
    assert "flash-linear-attention is left out" in done.stderr
    done = run_benchmark(
        "kernels", "--traffic", "--shapes", "4,4096,64,128", "--dtype", "bfloat16", "--json", str(file)
    )
    assert done.returncode == 0, done.stderr
    assert all(1 < each["times_least"] <= 1.5 for each in json.loads(file.read_text())["results"])


@pytest.mark.thorough
@pytest.mark.skipif(not (Path(sys.prefix) / "libtpu").is_dir(), reason="libtpu is not installed")
@pytest.mark.parametrize(("name", "kernels"), [("llama2-7b-lora", 3), ("llama2-7b-windowed-lora", 0)])
def test_pod_plan(name: str, kernels: int, tmp_path: Path) -> None:
    """One layer for four chips: forward, forward again in the backward pass, and backward are kernels, or plain XLA."""
    file = tmp_path / "plan.json"
    done = run_benchmark(
        *("pod_plan", "--plans", name, "--topologies", "v5e:2x2", "--layers", "1", "--json", str(file)),
        without=("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS"),
    )
    assert done.returncode == 0, done.stderr
    (plan,) = json.loads(file.read_text())["plans"]
    assert (plan["chips"], plan["kernels"], plan["mesh"]) == (4, kernels, {"fsdp": 4})
    assert 0 < plan["gib_held"] + plan["gib_in_between"] < plan["gib_of_a_chip"]
    assert f"| {plan['gib_held']:.2f} |" in done.stdout


def test_support_matrix(tmp_path: Path) -> None:
    """One cell is tried, and the README's table has every attention, with nothing that failed."""
    file = tmp_path / "matrix.json"
    options = ("--models", "bert", "--attentions", "relu", "--json", str(file))
    done = run_benchmark("support_matrix", *options)
    assert done.returncode == 0, done.stderr
    assert json.loads(file.read_text()) == {"relu": {"bert": {"T": True, "E": True, "X": True}}}
    assert "| `relu` | TEX |" in done.stdout
    table = (ROOT / "README.md").read_text().split("<!-- support matrix -->")[1]
    assert "(" not in table
    assert all(f"| `{name}` |" in table for name in REGISTRY)


@pytest.mark.thorough
def test_attention_steps(tmp_path: Path) -> None:
    """Steps take turns, and memory grows no faster than the text; an unknown option is refused in one line."""
    file = tmp_path / "steps.json"
    sizes = ("--hidden-size", "32", "--layers", "1", "--heads", "2", "--rows", "1", "--timed-length", "128")
    words = ("--attentions", "augmented", "exponential+window/window=16", "--rounds", "2", "--lengths", "1024", "2048")
    done = run_benchmark("attention_steps", *words, *sizes, "--json", str(file))
    assert done.returncode == 0, done.stderr
    first, second = json.loads(file.read_text())["results"]
    assert (first["attention"], first["times_the_first"]) == ("augmented", 1)
    assert len(second["all_seconds"]) == 2
    assert second["temporary_bytes"]["2048"] > second["temporary_bytes"]["1024"] > 0
    assert 0 < second["growth"] <= 1.1
    done = run_benchmark("attention_steps", "--attentions", "relu/span=3")
    assert done.returncode == 2
    assert "'relu/span=3' has the option 'span'; choose among group_size" in done.stderr


@pytest.mark.thorough
def test_lossless(tmp_path: Path, shared_data: Path) -> None:
    """Drafts change no token and no state; accepted runs cross group boundaries, and texts end early."""
    file = tmp_path / "lossless.json"
    wanted = ("ngram:bushy", "self:dynamic")
    options = ("--prompts", "16", "--new-tokens", "24", "--data", str(shared_data), "--json", str(file))
    done = run_benchmark("lossless", *options, "--configurations", *wanted)
    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text())
    assert report["lossless"] is True
    assert sum(report["prompts"].values()) == 16
    for result in report["results"]:
        assert result["equal_prompts"] == result["prompts"] >= 4
        assert result["divergences"] == []
    assert report["results"][0]["ended_early"] > 0
    assert report["results"][1]["mean_accepted_tokens"] > 1
    assert report["results"][1]["boundaries_crossed"] > 0
    assert 0 <= report["state_equality"][0]["largest_difference"] < 1e-12


@pytest.mark.thorough
def test_kills(tmp_path: Path) -> None:
    """A run that is killed at random, as a write begins and during one goes on as if it had been left alone."""
    file = tmp_path / "kills.json"
    done = run_benchmark("kills", "--kills", "3", "--folder", str(tmp_path), "--json", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(file.read_text())
    assert report["wrong"] == []
    assert report["losses_equal"] is True
    assert set(report["kills_by_moment"].values()) == {1}
    assert report["kills_during_a_write"] >= 1
    assert report["damage_found"] == sum(report["damaged"].values()) >= 1
    assert report["most_steps_repeated"] <= 2 * report["checkpoint_every"]
    lines = read_metrics(tmp_path / "killed" / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, report["steps"] + 1))
