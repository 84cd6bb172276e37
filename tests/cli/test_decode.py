"""decode.py as a user runs it: real text out, one line and exit code 2 for what a user can get wrong."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from support.cells import cells
from support.processes import ROOT

from lin_jax.cli.decode import command
from lin_jax.cli.decode.command import decode
from lin_jax.cli.decode.options import parse
from lin_jax.data import Tokenizer
from lin_jax.decoding.autotune.costs import measure_costs
from lin_jax.decoding.autotune.plan import load_plans
from lin_jax.decoding.autotune.prompts import held_out_prompts
from lin_jax.devices import machine_flags
from lin_jax.errors import UserError
from lin_jax.session import Session
from lin_jax.training import load_run_config
from lin_jax.training.run import train

DRAFTERS = ("medusa+ngram",)
FEW = (1, 4, 16)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with heads, trained on real text."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    train(replace(load_run_config(ROOT / "configs/tiny.yaml"), output=str(folder)))
    heads = load_run_config(ROOT / "configs/tiny_medusa.yaml")
    train(replace(heads, output=str(folder / "heads"), init_from=str(folder)))
    return folder


@pytest.fixture(scope="module")
def planned_folder(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a plan for it."""
    folder = tmp_path_factory.mktemp("planned") / "tiny"
    shutil.copytree(run_folder, folder)
    session = Session.load(folder)
    assert session.data is not None
    with pytest.MonkeyPatch.context() as patch:
        # Every tree that is timed has to be compiled.
        patch.setitem(measure_costs.__kwdefaults__, "sizes", FEW)
        prompts = held_out_prompts(session.data, session.tokenizer, 4)[:4]
        session.plans(DRAFTERS, prompts=prompts, tokens=24)
    return folder


def output(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[str, str]:
    capsys.readouterr()
    assert decode(parse(argv)) == 0
    return capsys.readouterr()


@pytest.mark.thorough
def test_every_drafter_writes_the_same(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = {}
    for drafter, tree in (
        ("none", "none"),
        ("ngram", "chain:3"),
        ("medusa", "0;1;0,0"),
        ("medusa+ngram", "0;10;10,10"),
    ):
        for options in ((), ("--temperature", "0.9", "--seed", "5", "--top-k", "50")):
            words = (str(run_folder), "import os\n", "--max-new-tokens", "40", "--drafter", drafter, "--tree", tree)
            written, figures = output(capsys, *words, *options)
            assert written.startswith("import os\n")
            assert "tokens/s" in figures
            assert "state" in figures
            texts.setdefault(options, set()).add(written)
    assert [len(each) for each in texts.values()] == [1, 1]


@pytest.mark.thorough
def test_a_run_remembers_its_texts(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same prompt six times, one at a time: what was written before is drafted whole, by itself and with heads."""
    lines = tmp_path / "prompts.jsonl"
    lines.write_text((json.dumps({"prompt": "import os\n"}) + "\n") * 6)
    words = (str(run_folder), "--prompt-file", str(lines), "--max-new-tokens", "150", "--batch", "1", "--json")
    accepted = {}
    for drafter in ("ngram", "suffix", "medusa/suffix"):
        written, figures = output(capsys, *words, "--drafter", drafter, "--tree", "chain:3")
        rows = [json.loads(line) for line in written.splitlines()]
        assert len({row["text"] for row in rows}) == 1
        accepted[drafter] = float(figures.split(" tokens per step")[0].split()[-1])
    assert accepted["suffix"] > 3
    assert accepted["medusa/suffix"] > 3
    assert accepted["ngram"] < accepted["suffix"]


@pytest.mark.thorough
def test_a_thorough_search_is_kept(
    planned_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is made when it is asked for, and not before; that of another machine is made anew."""
    monkeypatch.setitem(measure_costs.__kwdefaults__, "sizes", FEW)
    shutil.copytree(planned_folder, tmp_path / "run")
    file = tmp_path / "run" / "speculation.json"
    measured = json.loads(file.read_text())
    plans = [plan for plan in measured["plans"] if plan["drafter"] != "ngram"]
    file.write_text(json.dumps({**measured, "plans": plans}))
    words = (str(tmp_path / "run"), "x = ", "--max-new-tokens", "10", "--drafter", "ngram")
    assert "choosing draft trees" not in output(capsys, *words)[1]
    assert "choosing draft trees" in output(capsys, *words, "--plan")[1]
    found = json.loads(file.read_text())
    assert {plan["drafter"] for plan in found["plans"]} == {"ngram", *DRAFTERS}
    assert {plan["flags"] for plan in found["plans"]} == {machine_flags()}
    said = output(capsys, *words, "--plan")[1]
    assert "choosing draft trees" not in said
    assert "plain decoding, 1.00x" in said or "measured" in said
    for plan in found["plans"]:
        plan["flags"] = "avx1024"
    file.write_text(json.dumps(found))
    assert load_plans(file) == ([], [])


@pytest.mark.parametrize(
    ("folder", "options"),
    cells(
        [("run_folder", ())],
        [
            ("run_folder", ("--temperature", "0.8")),
            ("planned_folder", ()),
            ("planned_folder", ("--temperature", "0.8")),
        ],
    ),
)
def test_decoding_begins_at_once(
    folder: str,
    options: tuple[str, ...],
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing is measured or searched before the first token, with or without a plan; the text is plain decoding's."""

    words = (str(request.getfixturevalue(folder)), "import os\n", "--max-new-tokens", "60", *options)

    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("calibration")

    for name in ("measure_costs", "make_plan", "calibration_prompts"):
        place = "session" if name == "calibration_prompts" else "plan_search"
        monkeypatch.setattr(f"lin_jax.session.{place}.{name}", refuse)
    plain, figures = output(capsys, *words, "--drafter", "none")
    assert "(plain decoding)" in figures
    assert output(capsys, *words)[0] == plain


def test_prompt_files(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = tmp_path / "prompts.jsonl"
    lines.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in ("def f(", "class A:\n    x", "")))
    words = ("--drafter", "none", "--max-new-tokens", "8", "--json")
    written, _ = output(capsys, str(run_folder), "--prompt-file", str(lines), *words)
    rows = [json.loads(line) for line in written.splitlines()]
    assert [row["prompt"] for row in rows] == ["def f(", "class A:\n    x", ""]
    assert all(1 <= len(row["tokens"]) <= 8 for row in rows)
    single = tmp_path / "prompt.txt"
    single.write_text("def f(")
    written, _ = output(capsys, str(run_folder), "--prompt-file", str(single), *words)
    assert json.loads(written)["text"] == rows[0]["text"]


@pytest.mark.thorough
def test_a_batch_with_stops_and_chances(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three prompts in two slots: the texts end before the stop string, and every token has its log-probability."""
    lines = tmp_path / "prompts.jsonl"
    lines.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in ("import os\n", "def f(", "class A:\n    x")))
    words = (str(run_folder), "--prompt-file", str(lines), "--drafter", "ngram", "--tree", "chain:2", "--json")
    written, _ = output(capsys, *words, "--max-new-tokens", "30", "--batch", "2", "--log-probs")
    free = [json.loads(line) for line in written.splitlines()]
    stop = free[0]["text"][5:8]
    written, _ = output(capsys, *words, "--max-new-tokens", "30", "--stop", stop, "--stop", "never ever")
    stopped = [json.loads(line) for line in written.splitlines()]
    for one, other in zip(free, stopped, strict=True):
        assert other["text"] == one["text"].partition(stop)[0]
        assert (other["ending"] == "stop string") == (stop in one["text"])
        assert len(one["log_probs"]) == len(one["tokens"])
        assert max(one["log_probs"]) <= 0
    shown, _ = output(
        capsys, str(run_folder), "import os\n", "--max-new-tokens", "30", "--tree", "none", "--stop", stop
    )
    assert shown == f"import os\n{stopped[0]['text']}\n"


def test_a_saved_state_goes_on(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt that takes long to read is told."""
    monkeypatch.setattr(command, "_LONG_PROMPT", 5)
    state = str(tmp_path / "state.safetensors")
    words = ("--drafter", "ngram", "--tree", "chain:2", "--max-new-tokens", "20")
    _, said = output(capsys, str(run_folder), "import os\nimport", *words, "--save-state", state)
    assert "tokens; the state after them is in" in said
    whole, _ = output(capsys, str(run_folder), "import os\nimport sys", *words)
    rest, more = output(capsys, str(run_folder), " sys", *words, "--state", state)
    assert "reading a prompt of" in said
    assert "reading a prompt of" not in more
    assert f"import os\nimport{rest}" == whole


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("nowhere", "x"), "nowhere"),
        (("RUN", "x", "--tree", "chain:8", "--drafter", "ngram"), "a group holds 8 tokens"),
        (("RUN", "x", "--tree", "0;2,2"), "has no parent"),
        (("RUN", "x", "--tree", "0;5", "--drafter", "ngram"), "the drafter offers"),
        (("RUN", "some long prompt", "--max-prompt-tokens", "2"), "2 are allowed"),
        (("RUN", "x", "--drafter", "magic"), "magic"),
        (("RUN", "x", "--sheep"), "--sheep"),
        (("RUN", "x", "--temperature", "-1"), "temperature"),
        (("RUN", "x", "--top-p", "0"), "top-p"),
        (("RUN", "x", "--max-new-tokens", "0", "--drafter", "none"), "new tokens"),
        (("RUN", "--prompt-file", "missing.txt"), "missing.txt"),
        (("RUN", "x", "--heads", "RUN"), "no draft heads"),
        (("RUN", "x", "--drafter", "path", "--tree", "chain:2"), "needs a path head"),
        (("RUN", "x", "--draft-layers", "0,7"), "do not exist; give numbers from 0 to 1"),
        (("RUN", "x", "--draft-layers", "first"), "draft-layers"),
        (("RUN", "x", "--acceptance", "maybe"), "choose one of exact, rejection, typical"),
        (("RUN", "x", "--state", "missing"), "cannot read a state"),
        (("RUN", "x", "--stop", ""), "stop string is empty"),
        (("RUN", "--prompt-file", "TWO", "--save-state", "state"), "for one prompt, and there are 2"),
        (("RUN", "x", "--batch", "0"), "--batch is 0"),
        (("RUN", "x", "--batch", "100000000"), "--batch is 100000000; give 1 to 65536"),
        (("RUN", "x", "--max-new-tokens", "3000000000"), "give at most 268435456"),
        (("RUN", "x", "--max-new-tokens", "3e9"), "invalid int value: '3e9'"),
        (("RUN", "x", "--seed", "-1"), "--seed is -1; give a number from 0 to 4294967295"),
        (("RUN", "x", "--seed", "4294967296"), "--seed is 4294967296"),
        (("RUN", "x", "--tree", "chain:100000"), "no chain of 0 to 1023 guesses"),
        (("RUN", "x", "--tree", "chain:-1"), "no chain of 0 to 1023 guesses"),
        (("RUN", "x", "--tree", "dynamic:8:1000000000"), "candidates; give smaller ones"),
        (("RUN", "x", "--draft-layers", "a"), "'a' names no layers; give numbers such as 0,2"),
        (("RUN", "--prompt-file", "BLANK"), "has no prompts"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors(
    run_folder: Path, tmp_path: Path, argv: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wrong words are found before anything is measured."""
    two = tmp_path / "two.jsonl"
    two.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    blank = tmp_path / "blank.jsonl"
    blank.write_text("\n \n")
    stands_for = {"RUN": str(run_folder), "TWO": str(two), "BLANK": str(blank)}
    with pytest.raises(UserError, match=message) as error:
        decode(parse([stands_for.get(word, word) for word in argv]))
    assert "choosing draft trees" not in capsys.readouterr().err
    assert "\n" not in str(error.value)


def test_another_tokenizer_is_refused(run_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(run_folder, tmp_path / "run")
    Tokenizer.train(["quite another text"] * 50, 290).save(tmp_path / "run" / "tokenizer")
    with pytest.raises(UserError, match="tokenizer"):
        Session.load(tmp_path / "run")


@pytest.mark.thorough
def test_heads_of_another_model_are_refused(run_folder: Path, tmp_path: Path) -> None:
    other = replace(load_run_config(ROOT / "configs" / "tiny.yaml"), output=str(tmp_path / "other"))
    train(replace(other, training=replace(other.training, steps=1, seed=9)))
    with pytest.raises(UserError, match="another model"):
        Session.load(tmp_path / "other", run_folder / "heads")


@pytest.mark.thorough
def test_exit_code_and_single_line() -> None:
    done = subprocess.run([sys.executable, "decode.py", "nowhere", "x"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
