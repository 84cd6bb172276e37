"""`python -m lin_jax.hub`: folders made and shown, and one line and exit code 2 for what a user can get wrong."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from support.llama2c_files import HEADER, write_file
from support.processes import ROOT

from lin_jax.cli.hub.options import main
from lin_jax.data import load_tokenizer
from lin_jax.data.tokenizers.sentencepiece import SPECIAL
from lin_jax.errors import UserError
from lin_jax.hub import from_pretrained

LETTERS = " abcdefg"


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model of llama2.c and its tokenizer, in the working folder."""
    monkeypatch.chdir(tmp_path)
    write_file(tmp_path / "model.bin", HEADER)
    (tmp_path / "letters.vocab").write_text("".join(f"{text}\t0\n" for text in (*SPECIAL, *LETTERS)))
    return tmp_path


IMPORT = ("import", "model.bin", "out", "--tokenizer", "letters.vocab")


def run(*words: str) -> int:
    return main(list(words))


def test_import_of_llama2c(files: Path) -> None:
    (files / "figures.json").write_text('{"nats per token": 1.25, "nested": {"a": 1}}')
    assert run(*IMPORT, "--dtype", "bfloat16", "--figures", "figures.json") == 0
    model = from_pretrained("out")
    assert model.config.param_dtype == "bfloat16"
    assert load_tokenizer("out").encode("abc").tolist() == [3, 4, 5, 6]
    said = json.loads(Path("out/config.json").read_text())
    assert (said["bos_token_id"], said["eos_token_id"]) == (1, 2)
    # Texts of llama2.c follow each other, and each begins with its first token.
    assert json.loads(Path("out/generation_config.json").read_text())["eos_token_id"] == [1, 2]
    card = Path("out/README.md").read_text()
    assert "made from model.bin" in card
    assert "| nats per token | 1.25 |" in card


def test_import_of_a_folder(files: Path) -> None:
    """With another attention, and then without a word about it: the folder says it itself."""
    options = ("--attention", "performer+local", "--attention.group_size", "8", "--attention.features", "6")
    assert run(*IMPORT) == 0
    assert run("import", "out", "linear", *options, "--seed", "3", "--max-shard-bytes", "4000") == 0
    assert run("import", "linear", "again") == 0
    model, again = from_pretrained("linear"), from_pretrained("again")
    assert (model.config.attention.name, model.config.attention.features) == ("performer+local", 6)
    assert load_tokenizer("again").encode("abc").tolist() == [3, 4, 5, 6]
    for (path, one), (_, other) in zip(
        nnx.to_flat_state(nnx.state(model)), nnx.to_flat_state(nnx.state(again)), strict=True
    ):
        assert np.array_equal(one[...], other[...]), path


def test_inspect(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*IMPORT) == 0
    capsys.readouterr()
    assert run("inspect", "out") == 0
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert shown["family"] == "llama (llama), Llama"
    assert shown["attention"] == "softmax"
    assert shown["fits"] == "every tensor"
    assert shown["heads"] == "4 (2 for keys and values)"
    assert shown["parameters"] == f"{sum(t.size for t in load_file('out/model.safetensors').values()):,}"
    # Keys and values of 32 tokens: 2 layers, 2 heads of 4 numbers, and the position.
    assert shown["decode"].startswith(f"state     {(2 * 32 * 2 * 2 * 4 + 2) * 4 / 1024:.1f} KiB per sequence")
    assert run("inspect", "out", "--attention", "augmented", "--attention.kernel_size", "3") == 0
    assert "begins anew" in capsys.readouterr().out
    words = ("--attention", "exponential+window", "--attention.window", "8", "--attention.decay", "token")
    assert run("inspect", "out", *words) == 0
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert shown["attention"] == "exponential+window, window 8, decay token"
    assert "query_map" in shown["begins"]
    # 2 layers of 2 heads of 4 numbers: 7 tokens and their decays, 8 features of values and a normaliser; and positions.
    assert shown["decode"].startswith(f"state     {(2 * (2 * 7 * (2 * 4 + 1) + 2 * 8 * 5) + 2) * 4 / 1024:.1f} KiB per")
    for options in (
        ("augmented,softmax", "--attention.window", "8"),
        ("augmented", "--attention.window", "8", "--attention.layers", "1=softmax"),
    ):
        assert run("inspect", "out", "--attention", *options) == 0
        assert "[augmented, softmax of 8]" in capsys.readouterr().out
    tensors = load_file("out/model.safetensors")
    tensors["model.extra"] = tensors.pop("model.norm.weight")
    save_file(tensors, "out/model.safetensors")
    assert run("inspect", "out") == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == ["does not fit     model.norm.weight is missing", f"{'':17}model.extra is unknown"]
    assert run("inspect", "model.bin") == 0


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, str]]:
    """Status and rows of a table."""
    capsys.readouterr()
    status = run("inspect", *words)
    rows = (re.split(r"  +", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    return status, {name: value for name, value in rows if name}


def test_inspect_tokenizers(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is beside the model, how far it fits, and what ends a text."""
    assert run(*IMPORT) == 0
    status, rows = shown(capsys, "out")
    assert (status, rows["texts end at"]) == (0, "1 '<s>', 2 '</s>'")
    assert rows["tokenizer"] == "11 entries"
    tokenizer = load_tokenizer("out")
    tokenizer.backend.add_special_tokens(["<pad>"])
    tokenizer.save("out")
    more = "12 entries, 1 more than the model: texts with '<pad>' and the like are refused"
    assert shown(capsys, "out")[1]["tokenizer"] == more
    Path("out/generation_config.json").write_text('{"eos_token_id": -1}')
    assert "cannot be used: eos_token_id -1 in out/generation_config.json is no" in shown(capsys, "out")[1]["tokenizer"]
    Path("out/tokenizer.json").write_text("{")
    assert "cannot be used: cannot read a tokenizer from" in shown(capsys, "out")[1]["tokenizer"]
    for file in Path("out").glob("tokenizer*"):
        file.unlink()
    Path("out/special_tokens_map.json").unlink()
    assert shown(capsys, "out")[1]["tokenizer"].startswith("none; name one")


def test_inspect_what_is_left_out(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*IMPORT) == 0
    tensors = load_file("out/model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    save_file(tensors, "out/model.safetensors")
    status, rows = shown(capsys, "out")
    assert (status, rows["fits"]) == (0, "every tensor")
    assert rows["left out"] == "1: model.layers.0.self_attn.rotary_emb.inv_freq"


@pytest.mark.parametrize(
    ("change", "status", "row", "value"),
    [
        ({}, 0, "what to do", "merge them: python -m lin_jax hub import owner/base OUT --adapter adapter"),
        ({}, 0, "layers", "1: model.layers.0.self_attn.q_proj"),
        ({"use_rslora": True}, 0, "factors", "2.82843"),
        ({"rank_pattern": {"q_proj": 2}, "r": 8}, 0, "ranks", "2"),
        ({"init_lora_weights": "pissa"}, 1, "cannot be read", "adapter: init_lora_weights"),
        ({"r": None}, 1, "cannot be read", "adapter: r is null; give the number"),
    ],
)
def test_inspect_adapters(
    change: dict[str, Any], status: int, row: str, value: str, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the model that they belong to."""
    Path("adapter").mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": "owner/base", "r": 2, "lora_alpha": 4}
    Path("adapter/adapter_config.json").write_text(json.dumps(config | change))
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    pair = {
        f"{layer}.lora_A.weight": np.ones((2, 8), np.float32),
        f"{layer}.lora_B.weight": np.ones((8, 2), np.float32),
    }
    save_file(pair, "adapter/adapter_model.safetensors")
    found, rows = shown(capsys, "adapter")
    assert found == status
    assert rows[row].startswith(value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("import", "nowhere", "out"), "there is no folder nowhere"),
        (("import", "model.bin", "out"), "say where it is with --tokenizer FILE"),
        (("import", "letters.vocab", "out"), "is not in llama2.c's first format"),
        (("import", "model.bin", "out", "--tokenizer", "missing.vocab"), "holds no tokenizer"),
        (("import", "model.bin", "model.bin"), "model.bin is a file"),
        (("import", "model.bin", "."), "is not empty"),
        ((*IMPORT, "--attention", "magic"), "attention.name 'magic' is unknown"),
        ((*IMPORT, "--attention.rank", "3"), "--attention.rank needs --attention NAME"),
        ((*IMPORT, "--attention", "augmented", "--attention.rank", "x"), "invalid int value: 'x'"),
        ((*IMPORT, "--attention", "augmented", "--attention.convolve_padding", "x"), "neither true nor false"),
        ((*IMPORT, "--attention", "augmented", "--attention.kernel_size", "4"), "give an odd number"),
        ((*IMPORT, "--dtype", "int4"), "invalid choice: 'int4'"),
        ((*IMPORT, "--sheep"), "--sheep"),
        ((*IMPORT, "--figures", "model.bin"), "cannot be read as JSON"),
        (("frobnicate", "model.bin"), "frobnicate"),
        ((*IMPORT, "--max-shard-bytes", "0"), "--max-shard-bytes is 0; give at least 1"),
        (("inspect", "."), "holds no config.json"),
        ((), "required"),
    ],
)
def test_errors(words: tuple[str, ...], message: str, files: Path) -> None:
    before = sorted(files.iterdir())
    with pytest.raises(UserError) as caught:
        run(*words)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(files.iterdir()) == before


def test_a_run_is_no_checkpoint(files: Path) -> None:
    (files / "run").mkdir()
    (files / "run" / "config.yaml").write_text("output: run\n")
    with pytest.raises(UserError, match=r"run is a run of train.py; make a folder of it with hub export run OUT"):
        run("inspect", "run")


def test_options_of_attentions_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("import", "--help")
    assert "tokens in a group, by absolute position (default: 64)" in " ".join(capsys.readouterr().out.split())


def test_overwriting(files: Path) -> None:
    assert run(*IMPORT) == 0
    with pytest.raises(UserError, match="out is not empty; give another folder, or --overwrite"):
        run(*IMPORT)
    assert run(*IMPORT, "--overwrite", "--dtype", "float64") == 0
    assert load_file("out/model.safetensors")["model.norm.weight"].dtype == np.float64


def test_exit_code_and_single_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lin_jax.hub", "import", "nowhere", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


class TestUpload:
    """`--push-to-hub`, with a Hub that only notes what it is asked for."""

    @pytest.fixture
    def asked(self, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
        calls: list[Any] = []

        class Hub:
            def whoami(self) -> None:
                calls.append("whoami")

            def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> Any:
                calls.append((name, private, exist_ok))
                return SimpleNamespace(repo_id=name if "/" in name else f"me/{name}")

            def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
                calls.append((repo_id, sorted(path.name for path in folder_path.iterdir())))
                if repo_id == "they/theirs":
                    raise OSError("403 Forbidden: not yours.\nmore lines")

        monkeypatch.setattr("huggingface_hub.HfApi", Hub)
        monkeypatch.setattr("huggingface_hub.get_token", lambda: "secret")
        return calls

    def test_a_folder_is_uploaded_when_it_is_whole(
        self, files: Path, asked: list[Any], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run(*IMPORT, "--push-to-hub", "mine", "--private") == 0
        assert asked[:2] == ["whoami", ("mine", True, True)]
        repository, names = asked[2]
        assert repository == "me/mine"
        assert names == sorted(path.name for path in Path("out").iterdir())
        assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= {*names}
        assert "https://huggingface.co/me/mine holds out" in capsys.readouterr().out

    def test_what_goes_wrong_is_said_in_a_line(
        self, files: Path, asked: list[Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with pytest.raises(UserError, match=r"--push-to-hub '\.\./up' is no name of a repository; give OWNER/NAME"):
            run(*IMPORT, "--push-to-hub", "../up")
        with pytest.raises(UserError, match="--private is for a repository; name it with --push-to-hub"):
            run(*IMPORT, "--private")
        refused = re.escape("out is whole, and cannot be uploaded as they/theirs: 403 Forbidden: not yours; try again")
        with pytest.raises(UserError, match=refused):
            run(*IMPORT, "--push-to-hub", "they/theirs")
        assert from_pretrained("out") is not None
        monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
        with pytest.raises(UserError, match="--push-to-hub needs a login; run `hf auth login`"):
            run("import", "out", "again", "--push-to-hub", "mine")
        assert not Path("again").exists()
