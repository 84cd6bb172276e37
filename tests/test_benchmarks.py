"""The benchmarks run, check themselves, and write what they promise."""

import importlib
import json
import os
import re
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx
from support.processes import ROOT

from lin_jax.attention import REGISTRY, AttentionConfig
from lin_jax.decoding.autotune.costs import Costs
from lin_jax.decoding.autotune.plan import SpeculationPlan, save_plans
from lin_jax.devices import device_kind
from lin_jax.errors import UserError
from lin_jax.evaluation.token_losses import token_losses
from lin_jax.models import Llama, LlamaConfig
from lin_jax.session import PLAN_FILE
from lin_jax.training import load_run_config
from lin_jax.training.model_source import with_attention
from lin_jax.training.monitoring.trackers import read_metrics
from lin_jax.training.run import train
from pallas_kernels.tiles import TABLE


def run_benchmark(script: str, *options: str, without: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, f"benchmarks/{script}.py", *options]
    environment = {name: value for name, value in os.environ.items() if name not in without}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.thorough
def test_train_cpu(tmp_path: Path) -> None:
    """Steps and their parts are timed, on rows of several documents."""
    file = tmp_path / "step.json"
    sizes = ("--hidden-size", "16", "--intermediate-size", "32", "--vocab-size", "64", "--num-layers", "1")
    sizes += ("--num-heads", "2", "--rows", "2", "--length", "64", "--turns", "1", "--attention", "augmented")
    done = run_benchmark("train_cpu", *sizes, "--documents", "--without-peer", "--json", str(file))
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert found["steps"]["augmented"]["tokens_per_second"] > 0
    assert {"forward", "forward and backward", "optimiser"} < set(found["parts"]["augmented"])


@pytest.mark.thorough
def test_softmax_cache(tmp_path: Path) -> None:
    """Both ways to read a cache have their times."""
    file = tmp_path / "cache.json"
    done = run_benchmark("softmax_cache", "--slots", "64", "--turns", "1", "--tokens", "2", "--json", str(file))
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(file.read_text())["rows"]
    assert (row["slots"], row["used"]) == (64, 62)
    assert {"blocks", "all slots"} < set(row)


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


def test_fact_stories(tmp_path: Path) -> None:
    """A document says the same of each kind; the same options make the same bytes; other stories are held out."""
    stories = [
        f"Tim saw {n} cats. Lily ran away from Tim and {n} dogs. They all went home to their {n} beds again. "
        for n in range(40)
    ]
    source = tmp_path / "stories.txt"
    source.write_text("<|endoftext|>".join(4 * story for story in stories))
    for folder in ("a", "b"):
        options = (
            "--source",
            str(source),
            "--sentences",
            "2",
            "--megabytes",
            "0.1",
            "--output",
            str(tmp_path / folder),
        )
        done = run_benchmark("fact_stories", *options)
        assert done.returncode == 0, done.stderr
    texts = {name: (tmp_path / "a" / f"{name}.txt").read_text() for name in ("train", "held_out", "dense", "bare")}
    assert all((tmp_path / "b" / f"{name}.txt").read_text() == text for name, text in texts.items())
    numbers = {name: set(re.findall(r"saw (\d+) cats", text)) for name, text in texts.items()}
    assert numbers["dense"] <= numbers["train"]
    assert not numbers["train"] & numbers["held_out"]
    assert len(numbers["train"] | numbers["held_out"]) == len(stories)
    assert all(
        re.fullmatch(r"\w+ spoke of the .*\.", line)
        for document in texts["bare"].split("<|endoftext|>")
        for line in document.splitlines()
    )
    casts = set()
    for document in texts["train"].split("<|endoftext|>"):
        told = re.findall(r"(\w+) spoke of the (\w+ \w+), the (\w+ \w+) and the (\w+ \w+)\.$", document, re.MULTILINE)
        assert len(told) == document.strip().count("\n") + 1
        facts = {fact for _, *facts in told for fact in facts}
        assert len(facts) == len(dict(fact.split() for fact in facts)) == 10
        # What is told again was told before the last two times, and so further away than a short window.
        assert all(len({fact for _, *facts in told[at : at + 3] for fact in facts}) == 9 for at in range(len(told) - 2))
        cast = {name for name, *_ in told}
        assert len(cast) == 3
        assert set(re.findall(r"(\w+) saw", document)) <= cast
        casts.add(frozenset(facts))
    assert len(casts) == texts["train"].count("<|endoftext|>") + 1 > 5
    # As many sentences between facts as were asked for, and one where facts are dense.
    often = {name: texts[name].count(" spoke of ") / texts[name].count(" home to ") for name in ("dense", "train")}
    assert often["dense"] == pytest.approx(3, rel=0.02)
    assert often["train"] == pytest.approx(1.5, rel=0.02)


def test_kept_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums are those of the models themselves: without a layer the student's, and with its only layer the teacher's."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    script = importlib.import_module("kept_layers")
    sizes: dict[str, Any] = {
        "vocab_size": 16,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_layers": 1,
        "num_heads": 2,
    }
    teacher = Llama(LlamaConfig(**sizes, attention=AttentionConfig("softmax")), rngs=nnx.Rngs(0))
    student = with_attention(teacher, AttentionConfig("softmax", window=2))
    batch = {"tokens": np.random.default_rng(0).integers(0, 16, (2, 13))}
    hidden, theirs, count = script.taught(teacher, batch)
    assert count == 24
    own = token_losses(student, [batch]).losses.sum()
    assert abs(own - theirs) > 1e-3
    loss, divergence = script.restored(student, teacher, batch, hidden, script.NONE)
    assert float(loss) == pytest.approx(own, rel=1e-5)
    assert divergence > 1e-4
    loss, divergence = script.restored(student, teacher, batch, hidden, 0)
    assert float(loss) == pytest.approx(float(theirs), rel=1e-5)
    assert float(divergence) == pytest.approx(0, abs=1e-5)


@pytest.mark.thorough
def test_lm_eval_prefixes(tmp_path: Path) -> None:
    """Answers are the same with and without the states of shared prefixes."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    file = tmp_path / "prefixes.json"
    sizes = ("--hidden", "16", "--layers", "1", "--questions", "4", "--shots", "2", "--tokens", "2", "--rounds", "1")
    done = run_benchmark("lm_eval_prefixes", *sizes, "--json", str(file))
    assert done.returncode == 0, done.stderr
    scored, written = json.loads(file.read_text())["tasks"]
    assert (scored["task"], scored["requests"]) == ("scored", 16)
    assert (written["task"], written["requests"]) == ("written", 4)
    assert scored["same"]
    assert written["same"]


@pytest.mark.thorough
def test_conversion_memory(tmp_path: Path) -> None:
    """A conversion block by block takes less memory than allowed, and writes what one in memory writes."""
    file = tmp_path / "memory.json"
    sizes = ("--gigabytes", "0.25", "--shards", "2", "--in-memory")
    done = run_benchmark("conversion_memory", *sizes, "--folder", str(tmp_path), "--json", str(file))
    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text())
    assert all(report["rows"][name]["same_bytes"] is True for name in ("in memory", "hub export"))
    most = min(report["allowed"], report["rows"]["in memory"]["peak_bytes"])
    assert all(report["rows"][name]["peak_bytes"] < most for name in ("hub import", "hub export"))


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
    assert f"on {device_kind()}: ngram+copy, 2 prompts of 24 new tokens" in done.stdout


@pytest.mark.thorough
def test_kernels(tmp_path: Path) -> None:
    """What runs here is right and has its times; what the TPU programs move is little more than they must."""
    file = tmp_path / "kernels.json"
    few = ("--shapes", "1,100,2,16", "--rounds", "1", "--seconds", "0.001")
    done = run_benchmark("kernels", *few, "--without-verify", "--json", str(file))
    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text())
    assert report["correct"] is True
    assert {each["operation"] for each in report["results"]} == {"augmented", "linear", "decayed", "windowed"}
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
@pytest.mark.parametrize(("name", "kernels"), [("llama2-7b-lora", 3), ("llama2-7b-windowed-lora", 3)])
def test_pod_plan(name: str, kernels: int, tmp_path: Path) -> None:
    """One layer for four chips: forward, forward again in the backward pass, and backward are kernels."""
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


@pytest.mark.thorough
@pytest.mark.skipif(not (Path(sys.prefix) / "libtpu").is_dir(), reason="libtpu is not installed")
def test_decode_programs(tmp_path: Path) -> None:
    """A tree is one kernel in the loop over layers, and what cannot be is refused in one line."""
    file = tmp_path / "programs.json"
    done = run_benchmark(
        *("decode_programs", "--cells", "1,3,2", "--layers", "2", "--heads", "2", "--implementations", "tpu"),
        *("--json", str(file)),
        without=("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS"),
    )
    assert done.returncode == 0, done.stderr
    verified, committed = json.loads(file.read_text())["results"]
    assert (verified["program"], verified["kernels"], committed["program"]) == ("verify", 1, "commit")
    assert verified["bytes"] > 0 < committed["fusions"]
    done = run_benchmark("decode_programs", "--cells", "1,2,3")
    assert done.returncode == 2
    assert "no longer a path than there are nodes" in done.stderr


@pytest.mark.thorough
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
def test_verify_speed(tmp_path: Path) -> None:
    """Steps of one node and of more take turns, with parts that they go to; too few nodes are refused in one line."""
    file = tmp_path / "verify.json"
    sizes = ("--hidden-size", "32", "--layers", "2", "--heads", "2", "--rounds", "2", "--steps", "4")
    words = ("--attentions", "clustered+window/group_size=8", "--nodes", "1", "3", "--drafting", "--trace")
    done = run_benchmark("verify_speed", *words, *sizes, "--json", str(file))
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(file.read_text())["attentions"].values()
    assert found["1"]["plain_steps"] == 1
    assert found["3"]["milliseconds"] > 0
    assert {each["part"] for each in found["parts"]["3"]} > {"attention", "feed-forward"}
    done = run_benchmark("verify_speed", "--attentions", "relu", "--weights", "int8", *sizes, "--nodes", "1", "2")
    assert done.returncode == 0, done.stderr
    done = run_benchmark("verify_speed", "--nodes", "2", "4")
    assert done.returncode == 2
    assert "--nodes is 2 4; give 1 first" in done.stderr


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
    done = run_benchmark("attention_steps", "--attentions", "relu", "--rounds", "2", *sizes, "--against", str(ROOT))
    assert done.returncode == 0, done.stderr
    assert "s of processor time a step" in done.stdout
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
    mix = "augmented,softmax,clustered+window/window=8,exponential/decay=constant,softmax/window=12"
    options = ("--prompts", "4", "--new-tokens", "16", "--data", str(shared_data), "--json", str(file))
    done = run_benchmark("lossless", *options, "--attention", mix, "--configurations", "ngram:chain")
    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text())
    assert report["lossless"] is True
    assert report["results"][0]["tokens"] > 0
    assert report["group_size"] == 16


def test_attentions_of_a_command_line_are_patterns_with_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each entry of a pattern has its own options."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    attention_of = importlib.import_module("lib.attention_names").attention_of
    found = attention_of("augmented,softmax/window=24", group_size=16)
    assert [(each.name, each.window, each.group_size) for each in found.of_layers(4)] == [
        ("augmented", None, 16),
        ("softmax", 24, 16),
    ] * 2


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


# Processes in place of a session's parts: they write a report, hang, and fail.
SAYS = "import json, sys; json.dump({'answer': 42}, open(sys.argv[1], 'w')); print('it is', sys.argv[2])"
HANGS = "import json, sys, time; json.dump({'answer': 1}, open(sys.argv[1], 'w')); print('half'); time.sleep(60)"
FAILS = "import sys; print('one line', file=sys.stderr); sys.exit('what went wrong')"


@pytest.fixture
def session_parts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The library of sessions, which benchmarks import beside themselves."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("lib.session_parts")


def test_session_of_parts(tmp_path: Path, session_parts: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """A part that hangs or fails stops no other, keeps what it wrote, and alone is tried again."""

    def part(name: str, script: str, seconds: float = 60) -> Any:
        words = ("-c", script, "{report}")
        table = lambda report: [f"The answer is {report['answer']}.", str(report["question"])]  # noqa: E731
        return session_parts.Part(name, words, seconds, ("real",), ("tiny",), table=table)

    session = session_parts.Session(tmp_path / "out", tmp_path, 300, rehearsal=True, notes=("left out: nothing",))
    session.output.mkdir()
    parts = [part("slow", HANGS, 2), part("bad", FAILS), part("good", SAYS)]
    results = session_parts.run_session(session, parts)
    assert json.loads(session.file.read_text()) == results
    states = {name: each["state"] for name, each in results["parts"].items()}
    assert states == {"slow": "too slow", "bad": "failed", "good": "done"}
    assert results["parts"]["slow"]["report"] == {"answer": 1}
    assert results["parts"]["slow"]["seconds"] < 20
    assert results["parts"]["bad"]["report"] is None
    assert results["parts"]["bad"]["tail"] == ["one line", "what went wrong"]
    summary = (session.output / "summary.md").read_text()
    assert "* bad: failed. what went wrong" in summary
    assert "* left out: nothing" in summary
    assert "The report could not be told (KeyError: 'question')" in summary
    assert "it is tiny" in (session.output / "log.txt").read_text()
    assert "good: at most 120 s, 4:5" in capsys.readouterr().out
    # The second try leaves alone what is done, and begins nothing for which there is no time.
    parts = [part("slow", SAYS), part("bad", FAILS), parts[2], part("late", SAYS)]
    results = session_parts.run_session(replace(session, limit=16), parts)
    assert "good: done already" in capsys.readouterr().out
    assert results["parts"]["slow"]["state"] == "done"
    assert results["parts"]["slow"]["limit"] <= 16
    results = session_parts.run_session(replace(session, limit=1), parts[1:], parts[:1])
    assert "| slow | done |" in (session.output / "summary.md").read_text()
    assert results["parts"]["late"]["state"] in ("done", "not begun")
    assert results["parts"]["bad"]["state"] == "not begun"


def test_gpu_session_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """All parts with installation take less than twelve minutes; without a GPU there is nothing to begin."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    script = importlib.import_module("gpu_session")
    assert script.INSTALL_SECONDS + sum(part.seconds for part in script.PARTS) <= script.LIMIT == 720
    monkeypatch.setattr(script, "has_gpu", lambda: False)
    monkeypatch.setattr(script.signal, "signal", lambda *_: None)
    monkeypatch.setattr("sys.argv", ["gpu_session.py", "--output", "nowhere"])
    with pytest.raises(UserError, match="there is no NVIDIA GPU here"):
        script.main()


def wheel(folder: Path) -> Path:
    """A package of one module, as a wheel."""
    file = folder / "something_new-1.0-py3-none-any.whl"
    about = "something_new-1.0.dist-info"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("something_new.py", "ANSWER = 42\n")
        archive.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: something-new\nVersion: 1.0\n")
        archive.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nGenerator: none\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        names = ("something_new.py", f"{about}/METADATA", f"{about}/WHEEL", f"{about}/RECORD")
        archive.writestr(f"{about}/RECORD", "".join(f"{name},,\n" for name in names))
    return file


@pytest.mark.thorough
def test_gpu_session_rehearsal(tmp_path: Path) -> None:
    """Every part of the session runs on the CPU with tiny sizes, after an installation from wheels."""
    wheel(tmp_path)
    places = ("--output", str(tmp_path / "out"), "--scratch", str(tmp_path / "scratch"), "--wheels", str(tmp_path))
    done = run_benchmark("gpu_session", *places, "--rehearse", without=("TRITON_INTERPRET",))
    results = json.loads((tmp_path / "out" / "session.json").read_text())
    told = {name: (each["state"], each["last_line"]) for name, each in results["parts"].items()}
    assert {state for state, _ in told.values()} == {"done"}, told
    assert done.returncode == 0, done.stderr
    names = ["install", "machine", "smoke", "tune", "kernels", "beside-fla", "train", "drafting", "verify", "commit"]
    assert list(told) == names
    assert (tmp_path / "scratch" / "site" / "something_new.py").exists()
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert "could not be told" not in summary
    assert "flash-linear-attention's own model" in summary
    for name in names[1:]:
        assert name == "smoke" or f"\n## {name}\n" in summary
    # Nobody's table but the session's own is changed.
    assert json.loads((tmp_path / "out" / "tiles.json").read_text()) != json.loads(TABLE.read_text())
