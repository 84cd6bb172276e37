"""The model class of lm-evaluation-harness, on local tasks, against the harness's own model on the exported folder."""

import importlib.metadata
import json
import random
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from support.processes import ROOT

from lin_jax.attention import AttentionConfig
from lin_jax.cli import lm_eval as command
from lin_jax.data import Tokenizer
from lin_jax.errors import UserError
from lin_jax.hub import save_pretrained
from lin_jax.models import Llama, LlamaConfig

LENGTH = 100
COLOURS = ("red", "blue", "green", "grey")
TASKS = {
    "choices": {
        "output_type": "multiple_choice",
        "num_fewshot": 3,
        "fewshot_split": "examples",
        "fewshot_config": {"sampler": "first_n"},
        "doc_to_text": "Question: what colour is {{text}}?\nAnswer:",
        "doc_to_choice": list(COLOURS),
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "letters": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}} is A or B?",
        "doc_to_choice": ["A", "B"],
        "doc_to_target": "{{label % 2}}",
        "metric_list": [{"metric": "acc"}],
    },
    "last_word": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{text.rsplit(' ', 1)[0]}}",
        "doc_to_target": "{{' ' + text.rsplit(' ', 1)[1]}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{long}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "written": {
        "output_type": "generate_until",
        "num_fewshot": 2,
        "fewshot_split": "examples",
        "fewshot_config": {"sampler": "first_n"},
        "doc_to_text": "Story: {{text}}",
        "doc_to_target": "{{long}}",
        "generation_kwargs": {"until": ["th", "\n\n"], "max_gen_toks": 24, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An export of a model with random weights, and tasks with their texts beside it."""
    place, chance = tmp_path_factory.mktemp("lm_eval"), random.Random(0)
    words = ["the", "cat", "house", "ran", "under", "and", "then", "some", "thing", "what", *COLOURS]

    def document(number):
        lengths = chance.randint(4, 20), chance.randint(30, 200)
        text, long = (" ".join(chance.choices(words, k=length)) for length in lengths)
        return {"text": text, "long": long, "label": number % 4}

    for name, count in (("examples", 4), ("texts", 9)):
        lines = [json.dumps(document(number)) for number in range(count)]
        (place / f"{name}.jsonl").write_text("\n".join(lines))
    files = {name: str(place / f"{name}.jsonl") for name in ("examples", "texts")}
    for name, task in TASKS.items():
        common = {"task": f"local_{name}", "dataset_path": "json", "dataset_kwargs": {"data_files": files}}
        (place / f"{name}.yaml").write_text(json.dumps(common | {"test_split": "texts"} | task))
    tokenizer = Tokenizer.train([" ".join(words), "Question: Answer: Story: A or B? is"] * 3, 300)
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_layers=2,
        num_heads=2,
        initializer_range=0.3,
        attention=AttentionConfig(group_size=8, kernel_size=7, initial_alpha=0.3),
    )
    save_pretrained(Llama(config, rngs=nnx.Rngs(1)), place / "model", tokenizer=tokenizer)
    return place


@pytest.fixture(scope="module")
def evaluated(folder):
    """Results of all tasks, by model and its options."""
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    from lm_eval.tasks import TaskManager

    import lin_jax.lm_eval  # noqa: F401

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    names = [f"local_{name}" for name in TASKS]

    def run(model, **options):
        given = {"pretrained": str(folder / "model"), "dtype": "float32", "max_length": LENGTH} | options
        return lm_eval.simple_evaluate(model, given, tasks=names, task_manager=manager, bootstrap_iters=0)

    return run


def responses(results):
    """Answers of a model, by task and document."""
    return {(task, each["doc_id"]): each["resps"] for task, samples in results["samples"].items() for each in samples}


def assert_same(ours, theirs, tolerance):
    for (task, number), found in ours.items():
        for one, other in zip(found, theirs[task, number], strict=True):
            if task == "local_written":
                assert one == other
            elif task == "local_rolling":
                # Sums of hundreds of tokens, which the harness's model adds up in float32.
                assert one[0] == pytest.approx(other[0], abs=tolerance, rel=2e-7)
            else:
                assert one[0][0] == pytest.approx(other[0][0], abs=tolerance)
                assert one[0][1] == other[0][1]


@pytest.mark.filterwarnings("default")
def test_tasks_are_as_with_the_harness_s_own_model(evaluated):
    theirs = evaluated("hf", trust_remote_code=True, device="cpu", batch_size=4)
    ours = evaluated("lin_jax", batch_size=4, drafter="ngram")
    assert_same(responses(ours), responses(theirs), 1e-4)
    assert len(responses(ours)) == 9 * len(TASKS)
    for task, metrics in theirs["results"].items():
        for name, value in metrics.items():
            if isinstance(value, float):
                assert ours["results"][task][name] == pytest.approx(value, rel=1e-5), (task, name)
    answers = [each[0][0] for (task, _), each in responses(ours).items() if task == "local_written"]
    # Some end at a stop string, which is left out.
    assert len(set(map(len, answers))) > 1
    assert not any("th" in each for each in answers)


@pytest.mark.thorough
@pytest.mark.filterwarnings("default")
def test_batches_drafts_and_shared_prefixes_change_nothing(evaluated):
    ours = evaluated("lin_jax", batch_size=4, drafter="ngram")
    alone = evaluated("lin_jax", batch_size=1, drafter="none", shared_prefixes=False)
    assert_same(responses(alone), responses(ours), 1e-5)


@pytest.fixture
def model(folder):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    from lin_jax.lm_eval import LinJaxLM

    return LinJaxLM(str(folder / "model"), batch_size="auto", max_batch_size=8, drafter="none")


@pytest.mark.filterwarnings("default")
def test_options_and_their_errors(model, folder):
    from lin_jax.lm_eval import LinJaxLM, _batch_size

    assert (model.batch_size, model.max_length, model.eot_token_id) == (8, 2048, model.prefix_token_id)
    with pytest.raises(UserError, match="generation option 'num_beams' is unknown; choose among until"):
        model._writing({"num_beams": 2})
    with pytest.raises(UserError, match="an answer of 2048 tokens leaves no room"):
        model._writing({"max_new_tokens": 2048})
    sampled = model._writing({"until": "x", "do_sample": True, "top_p": 0.5})
    assert (sampled.stops, sampled.new_tokens) == (("x",), 256)
    assert (sampled.sampling.temperature, sampled.sampling.top_p) == (1.0, 0.5)
    assert model._writing({"do_sample": False, "temperature": 0.7}).sampling.temperature == 0
    for name in ("0", "many", -1):
        with pytest.raises(UserError, match=f"batch_size is {name}; give a number from 1 on, or auto"):
            _batch_size(name, None)
    assert _batch_size("auto:4", None) == 64
    with pytest.raises(UserError, match="max_length is 1; give 2 tokens or more"):
        LinJaxLM(str(folder / "model"), max_length=1)
    with pytest.raises(UserError, match="there is no folder nowhere"):
        LinJaxLM("nowhere")


def test_the_command_adds_what_is_meant():
    common = ["--model_args", "pretrained=x"]
    assert command.with_model(common) == ["run", "--model", "lin_jax", *common]
    assert command.with_model(["run", *common]) == ["run", "--model", "lin_jax", *common]
    assert command.with_model(["run", "--model=hf"]) == ["run", "--model=hf"]
    assert command.with_model(["--config", "a.yaml"]) == ["run", "--config", "a.yaml"]
    assert command.with_model(["ls", "tasks"]) == ["ls", "tasks"]
    assert command.with_model(["--help"]) == ["--help"]
    assert command.with_model([]) == []


def test_without_the_harness_there_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    message = (
        r"^lm-eval needs the package lm_eval, which is not installed; install it with: pip install 'lin-jax\[eval\]'$"
    )
    with pytest.raises(UserError, match=message):
        command.main(["--tasks", "x"])


def test_the_entry_point_names_the_class():
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["lm_eval.models"]
    point = importlib.metadata.EntryPoint("lin_jax", declared["lin_jax"], "lm_eval.models")
    from lm_eval.api.registry import get_model

    assert point.load() is get_model("lin_jax")


@pytest.mark.thorough
@pytest.mark.filterwarnings("default")
def test_the_command_runs_a_task(folder, capsys):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    before = list(sys.argv)
    args = ["--model_args", f"pretrained={folder / 'model'},drafter=none", "--tasks", "local_letters"]
    assert command.main([*args, "--include_path", str(folder), "--batch_size", "4", "--limit", "2"]) == 0
    assert "local_letters" in capsys.readouterr().out
    assert sys.argv == before
    assert not np.any([path.name.startswith("results") for path in Path.cwd().iterdir()])
