"""Command `evaluate`, against loops over whole texts."""

import json
import math

import jax
import numpy as np
import pytest
from flax import nnx

from lin_jax.attention import AttentionConfig
from lin_jax.cli.evaluate import main
from lin_jax.cli.evaluate.answers import split_tokens
from lin_jax.cli.evaluate.perplexity import sliding_windows
from lin_jax.data import Tokenizer
from lin_jax.errors import UserError
from lin_jax.hub import save_pretrained
from lin_jax.models import Llama, LlamaConfig

TEXTS = ["the cat and the dog " * 7, "a dog", "the house that ran under the cat", "x"]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(TEXTS * 3, 280)


@pytest.fixture(scope="module")
def model(tokenizer):
    attention = AttentionConfig(group_size=4, kernel_size=5, initial_alpha=0.3)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_layers": 1, "num_heads": 2, "initializer_range": 0.4}
    return Llama(LlamaConfig(vocab_size=tokenizer.vocab_size, **sizes, attention=attention), rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def place(model, tokenizer, tmp_path_factory):
    place = tmp_path_factory.mktemp("evaluate")
    save_pretrained(model, place / "model", tokenizer=tokenizer)
    (place / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    return place


@pytest.fixture
def report(place, capsys):
    def run(*options):
        assert main([str(place / "model"), *map(str, options)]) == 0
        return json.loads(capsys.readouterr().out)

    return run


@jax.jit
def forward(model, tokens):
    return model(tokens)


def log_probs(model, tokens):
    """Log-probability of each token but the first, in one pass over the text."""
    padded = np.zeros((1, 64), np.int32)
    padded[0, : len(tokens)] = tokens
    logits = np.asarray(forward(model, padded), np.float64)[0]
    every = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    return every[np.arange(len(tokens) - 1), tokens[1:]]


def test_whole_documents_and_windows(report, place, model, tokenizer):
    documents = [[tokenizer.eos_id, *tokenizer.encode_document(text).tolist()] for text in TEXTS]
    expected = np.concatenate([log_probs(model, each) for each in documents])
    found = report("--text", place / "text.jsonl", "--context", "document", "--batch", 4)
    assert found["loss"] == pytest.approx(-expected.mean(), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert (found["tokens"], found["documents"], found["context"]) == (len(expected), 4, "document")
    # Bytes of the texts: what ends them has none.
    assert found["bytes"] == sum(len(text) for text in TEXTS)
    assert found["bits_per_byte"] == pytest.approx(-expected.sum() / math.log(2) / found["bytes"], rel=1e-5)
    assert found["peak_memory_bytes"] > 10**7
    options = ("--context", "sliding", "--sequence-length", 12, "--stride", 5, "--batch", 4)
    windows = [window for each in documents[:2] for window in sliding_windows(each, 12, 5)]
    expected = np.concatenate([log_probs(model, [*one, *other])[-len(other) :] for one, other in windows])
    found = report("--text", place / "text.jsonl", *options, "--documents", 2)
    assert found["loss"] == pytest.approx(-expected.mean(), rel=1e-5)
    assert found["tokens"] == sum(len(each) - 1 for each in documents[:2])


def test_windows_score_every_token_once():
    tokens = list(range(20))
    found = list(sliding_windows(tokens, 8, 3))
    assert [token for _, scored in found for token in scored] == tokens[1:]
    assert found[0] == (tokens[:1], tokens[1:9])
    assert found[1] == (tokens[3:9], tokens[9:12])
    assert all(len(one) + len(other) <= 9 for one, other in found)
    assert list(sliding_windows([1], 8, 3)) == []


def test_rows_have_bits_per_byte(report, place, model, tokenizer):
    found = report("--text", place / "text.jsonl", "--sequence-length", 16, "--batch", 2, "--batches", 1)
    assert found["bits_per_byte"] == pytest.approx(found["loss"] * found["tokens"] / math.log(2) / found["bytes"])
    assert 0 < found["bytes"] < sum(map(len, TEXTS))


def test_choices(report, place, model, tokenizer):
    questions, right, by_bytes = [], 0, 0
    for number, prompt in enumerate(["the cat and ", "the", "", "a dog"]):
        choices = [" the house that ran", "dog", " cat and a"][: 2 + number % 2]
        begin = [tokenizer.eos_id] if not prompt else []
        scores = []
        for choice in choices:
            tokens = [*begin, *tokenizer.encode(prompt + choice).tolist()]
            context = len(begin) + len(tokenizer.encode(prompt.rstrip()))
            scores.append(log_probs(model, tokens)[context - 1 :].sum())
        by_byte = [score / len(choice) for score, choice in zip(scores, choices, strict=True)]
        questions.append({"prompt": prompt, "choices": choices, "answer": 1})
        right, by_bytes = right + (np.argmax(scores) == 1), by_bytes + (np.argmax(by_byte) == 1)
    file = place / "questions.jsonl"
    file.write_text("\n".join(map(json.dumps, questions)) + "\n\n")
    found = report("--choices", file, "--batch", 4)
    assert (found["accuracy"], found["accuracy_by_bytes"]) == (right / 4, by_bytes / 4)
    assert (found["questions"], found["chance"]) == (4, pytest.approx((1 / 2 + 1 / 3) / 2))
    context, choice = split_tokens(tokenizer, "the cat ", "dog")
    assert tokenizer.decode(context) == "the cat"
    assert tokenizer.decode([*context, *choice]) == "the cat dog"


def test_speed(report):
    found = report("--speed", "--batch", 2, "--sequence-length", 16, "--new-tokens", 3)
    assert found["read_tokens_per_second"] > 0
    assert found["write_tokens_per_second"] > 0
    assert found["state_bytes"] > 0
    assert found["weight_bytes"] >= 4 * found["parameters"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch", "0"], "--batch is 0; give at least 1"),
        (["--speed", "--choices", "x"], "--choices and --speed are both given"),
        (["--stride", "3"], "--stride is for --context sliding, not rows"),
        (["--documents", "3"], "--documents is for --context document or sliding"),
        (["--batches", "3", "--context", "document"], "--batches is for --context rows, not document"),
        ([], "is no run, and so has no held-out text; give a text with --text"),
        (["--choices", "nowhere.jsonl"], "cannot read questions from nowhere.jsonl"),
        (["--context", "all"], "invalid choice: 'all'"),
    ],
)
def test_wrong_options_are_one_line(options, message, place):
    with pytest.raises(UserError, match=message) as caught:
        main([str(place / "model"), *options])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1 of .* is no JSON"),
        ('{"prompt": "a", "choices": ["b"], "answer": 0}', "line 1 of .* is no question; give a text as 'prompt'"),
        (
            '{"prompt": "a", "choices": ["b", "c"], "answer": 2}',
            "the 'answer' of line 1 .* is 2; give a number from 0 to 1",
        ),
        ("", "holds no questions"),
    ],
)
def test_wrong_questions_are_one_line(line, message, place, tmp_path):
    file = tmp_path / "questions.jsonl"
    file.write_text(line)
    with pytest.raises(UserError, match=message):
        main([str(place / "model"), "--choices", str(file)])
