"""Names of the Hub and of the web: what is fetched by the Hub's own clients, and what is said without a network."""

import io
import json
import socket
import time
from pathlib import Path

import pytest
from huggingface_hub import constants
from support.processes import ROOT, printed
from support.stand_ins import StandIns, options

from lin_jax.cli.train import main
from lin_jax.data import DataConfig, read_documents
from lin_jax.data.sources import remote
from lin_jax.data.sources.remote import DATA_SET, MODEL, RemoteName, fetch_file, is_remote_file
from lin_jax.errors import UserError
from lin_jax.hub.files import find_checkpoint
from lin_jax.training.stages.config import Pipeline, parse_command


@pytest.mark.parametrize(
    ("text", "repository", "file"),
    [
        ("hub:owner/name", "owner/name", None),
        ("hub:squad", "squad", None),
        ("hub:owner/name/a.bin", "owner/name", "a.bin"),
        ("hub:owner/name/a/b c.txt", "owner/name", "a/b c.txt"),
        ("https://host.org/a/b.bin", None, "a/b.bin"),
    ],
)
def test_names(text: str, repository: str | None, file: str | None) -> None:
    name = RemoteName.parse(text)
    assert (name.repository, name.file) == (repository, file)
    assert is_remote_file(text) == (file is not None)


@pytest.mark.parametrize(
    "text", ["hub:", "hub:/x", "hub:a/", "hub:a/b/", "hub:a/b/../c", "hub:a/b//c", "https://", "https://x/"]
)
def test_names_of_nothing(text: str) -> None:
    with pytest.raises(UserError, match="names nothing; give hub:OWNER/NAME, hub:OWNER/NAME/FILE"):
        RemoteName.parse(text)


def test_files_stand_in_lists_and_data_sets_alone() -> None:
    assert not DataConfig(source=("hub:a/b/c.txt", "here.txt")).is_hub
    assert DataConfig(source=("hub:a/b/c.txt", "here.txt")).is_remote
    with pytest.raises(UserError, match="mixes kinds"):
        DataConfig(source=("hub:a/b", "here.txt"))
    with pytest.raises(UserError, match="subset 'x' is for hub data sets"):
        DataConfig(source="hub:a/b/c.txt", subset="x")


@pytest.mark.thorough
def test_from_a_hub(tmp_path: Path) -> None:
    """Models, tokenizers and text come from the right files, and again when the server is gone."""
    [line] = printed("fake_hub.py", str(tmp_path))
    found = json.loads(line)
    there, gone, served = found["there"], found["gone"], found["served"]
    assert there["llama"] == [11, [3, 5, 4, 7], ["stories260K", "stories260K.bin"]]
    whole = ["TinyStoriesV2-GPT4-train.", *(f"Story {number} of a cat é." for number in range(1000))]
    assert whole[:50] == there["stories"][:50]
    assert there["stories"] == whole[: len(there["stories"])]
    assert there["fewer stories"] == whole[:3]
    # No more of a large file than is asked for.
    assert served["TinyStoriesV2-GPT4-train.txt"] == 2000
    assert there["whole file"] == 1001
    assert there["wikitext"] == [" = wikitext-2-raw-v1 = \n", " A train . \n"]
    assert there["one table"] == [" = wikitext-2-raw-v1 = \n", " A test . \n"]
    for task, columns in (("sst2", ["sentence"]), ("mrpc", ["sentence1", "sentence2"])):
        assert there[task] == [
            [[[f"{column} of {task}" for column in columns], 0], [[f"a {split}"] * len(columns), 1]]
            for split in ("train", "validation")
        ]
    assert there["bert"] == [5, 6]
    # Neither pickles nor what is no tokenizer's or model's.
    assert there["checkpoint"] == ["config.json", "model.safetensors", "tokenizer.json"]
    assert not {"pytorch_model.bin", "stories15M.bin", "TinyStories-train.txt"} & set(served)
    assert there["stream"] == {"text": " = en = \n"}
    assert there["no such file"].startswith("error: hub:roneneldan/TinyStories/none.txt cannot be fetched: 404")
    assert "cannot be fetched from the Hub: 404" in there["no such model"]
    kept = [name for name in there if not name.endswith("seconds") and not name.startswith(("stream", "no such"))]
    assert {name: gone[name] for name in kept} == {name: there[name] for name in kept}
    for name in ("stream", "no such file", "no such model", "no such task"):
        assert "cannot be fetched, there is no network; get " in gone[name]
        assert gone[f"{name}, seconds"] < 15


@pytest.fixture
def no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine out of reach of everything, that has nothing kept."""

    def refuse(*arguments: object, **keywords: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(remote, "_reached", {})
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> StandIns:
    return StandIns(tmp_path_factory.mktemp("stand_ins"))


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("recipe", "lacks"),
    [
        ("linearize_stories260k", ("init_from", "held_out.source", "data.tokenizer", "data.source")),
        ("linearize_babyllama105", ("init_from",)),
        ("linearize_lora", ("init_from",)),
        ("glue_tiny", ("data.source", "data.tokenizer")),
        ("pretrain_llama", ("data.source",)),
        ("stories", ("data.source",)),
    ],
)
def test_what_is_said_without_a_network(recipe: str, lacks: tuple[str, ...], places: StandIns, tmp_path: Path) -> None:
    """One line, at once, that names the option which takes a local copy; each option given brings on the next line."""
    path = ROOT / "configs" / f"{recipe}.yaml"
    words = options(path, places, tmp_path)
    given = dict(zip(words[::2], words[1::2], strict=True))
    for number, option in enumerate(lacks):
        missing = {f"--{each}" for each in lacks[number:]}
        if "--data.source" in missing and "--data.subset" in given:
            missing.add("--data.subset")
        command = [word for name, value in given.items() if name not in missing for word in (name, value)]
        begin = time.monotonic()
        with pytest.raises(UserError) as caught:
            main([str(path), *command, "--output", str(tmp_path / f"run_{number}")])
        assert time.monotonic() - begin < 60
        assert "cannot be fetched, there is no network; get " in str(caught.value)
        assert f" with --{option}" in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("no_network")
def test_a_beginning_is_cut_from_what_is_kept(tmp_path: Path) -> None:
    """The same whether a longer part is there or not, whole lines of whole characters."""
    name = "hub:owner/name/a/text.txt"
    place = tmp_path / "home" / "lin_jax" / "datasets" / "owner" / "name" / "a" / "first-100" / "text.txt"
    place.parent.mkdir(parents=True)
    place.write_text("é one\ntwo\nthree" * 6)
    assert fetch_file(name, DATA_SET, 12).read_text() == "é one\ntwo\n"
    assert fetch_file(name, DATA_SET, 2).read_text() == "é"
    assert [document.text for document in read_documents(DataConfig(source=name, max_bytes=12))] == ["é one\ntwo\n"]
    with pytest.raises(UserError, match="there is no network"):
        fetch_file(name, DATA_SET, 1000)


@pytest.mark.usefixtures("no_network")
def test_files_of_the_web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def answer(request, timeout):
        asked.append((request.full_url, request.headers.get("Range")))
        return io.BytesIO(b"one\ntwo\nthree")

    name = "https://host.org/some/text.txt"
    with pytest.raises(UserError, match=r"text.txt cannot be fetched, there is no network; get a copy of that file"):
        fetch_file(name, MODEL)
    monkeypatch.setattr(remote, "_in_reach", lambda address: address.startswith("https://host.org/"))
    monkeypatch.setattr("urllib.request.urlopen", answer)
    assert fetch_file(name, DATA_SET, 6).read_text() == "one\n"
    for _ in range(2):
        assert fetch_file(name, MODEL).read_text() == "one\ntwo\nthree"
    assert asked == [(name, "bytes=0-5"), (name, None)]


def test_a_model_in_one_file_is_one_of_llama2c() -> None:
    with pytest.raises(UserError, match=r"is no file of llama2.c \(.bin\); give one, or hub:OWNER/NAME"):
        find_checkpoint("hub:karpathy/tinyllamas/stories260K/stories260K.pt")


@pytest.fixture
def slow_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_PATIENCE", 0.2)
    monkeypatch.setattr(remote, "_reached", {})
    monkeypatch.setattr(remote, "_connects", lambda place: time.sleep(5))


@pytest.mark.usefixtures("slow_names")
def test_a_server_that_does_not_answer_is_not_waited_for() -> None:
    begin = time.monotonic()
    assert not remote._in_reach("https://nowhere.invalid/x")
    assert not remote._in_reach("https://nowhere.invalid/y")
    assert time.monotonic() - begin < 4


def test_held_out_text_has_options_of_its_own(tmp_path: Path) -> None:
    """`--data.source` leaves alone what held_out says itself."""
    recipe = str(ROOT / "configs" / "linearize_stories260k.yaml")
    plan, *_ = parse_command([recipe, "--data.source", "mine.txt", "--data.sequence_length=32"])
    assert isinstance(plan, Pipeline)
    assert str(plan.held_out.source).endswith("TinyStories-valid.txt")
    assert plan.held_out.sequence_length == 32
    assert {run.data.source for stage in plan.stages for run in stage.runs} == {"mine.txt"}
    plan, *_ = parse_command([recipe, "--held_out.source", "other.txt", "--held_out.max_bytes=5"])
    assert isinstance(plan, Pipeline)
    assert (plan.held_out.source, plan.held_out.max_bytes) == ("other.txt", 5)
    assert plan.stages[0].last.data.max_bytes == 6_000_000
