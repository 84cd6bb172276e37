"""Scores of continuations against a loop over whole texts in float64."""

import jax
import numpy as np
import pytest
from flax import nnx
from support.cells import cells

from lin_jax.attention import AttentionConfig
from lin_jax.decoding.scoring import scorer as module
from lin_jax.decoding.scoring.scorer import ContinuationScorer
from lin_jax.errors import UserError
from lin_jax.models import Gpt2, Gpt2Config, Llama, LlamaConfig

SIZES = {"vocab_size": 13, "hidden_size": 8, "num_layers": 2, "num_heads": 2, "initializer_range": 0.4}


def llama(attention="augmented", dtype="float64"):
    mixer = AttentionConfig(attention, group_size=4, kernel_size=5, initial_alpha=0.3)
    return Llama(
        LlamaConfig(**SIZES, intermediate_size=12, dtype=dtype, param_dtype=dtype, attention=mixer), rngs=nnx.Rngs(0)
    )


def few_shot_requests():
    """Requests as tasks ask them: shared examples, questions of several answers, the same text twice."""
    chance = np.random.default_rng(0)
    examples = chance.integers(0, 13, 37).tolist()
    contexts = [examples + chance.integers(0, 13, count).tolist() for count in (14, 3, 22, 17, 9)]
    answers = [chance.integers(0, 13, count).tolist() for count in (1, 1, 4, 2)]
    requests = [(context, answer) for context in contexts for answer in answers]
    requests += [([3], chance.integers(0, 13, 70).tolist()), ([5], []), (examples, contexts[0][37:])]
    return [*requests, requests[0], (contexts[0][:20], contexts[0][20:])]


def check(model, requests, found, tolerance):
    forward = jax.jit(lambda tokens: model(tokens))
    for (context, continuation), scores in zip(requests, found, strict=True):
        text = np.zeros((1, 128), np.int32)
        text[0, : len(context) + len(continuation)] = [*context, *continuation]
        logits = np.asarray(forward(text), np.float64)[0]
        assert scores.log_probs.shape == scores.greedy.shape == (len(continuation),)
        for place, token in enumerate(continuation):
            before = logits[len(context) + place - 1]
            expected = before[token] - np.log(np.sum(np.exp(before)))
            assert scores.log_probs[place] == pytest.approx(expected, abs=tolerance)
            assert scores.greedy[place] == (before.argmax() == token)


@pytest.mark.parametrize(
    ("attention", "batch", "chunk"),
    cells(
        [("augmented", 4, 16)],
        [
            ("softmax", 16, 256),
            ("augmented", 1, 256),
            ("linformer", 4, 64),
            ("exponential+window", 4, 16),
            ("performer+local", 64, 32),
        ],
    ),
)
@pytest.mark.usefixtures("x64")
def test_scores_are_those_of_whole_texts(attention, batch, chunk):
    model, requests, counts = llama(attention), few_shot_requests(), []
    scorer = ContinuationScorer(model, batch_size=batch, chunk_size=chunk)
    found = scorer.score(requests, counts.append)
    check(model, requests, found, 1e-10)
    assert sum(counts) == len(requests)
    whole = len({(*context, *answer[:-1]) for context, answer in requests if answer})
    assert scorer.tokens_read < 350 < whole * 40
    # What was asked twice, or in two parts, has one answer.
    np.testing.assert_array_equal(found[0].log_probs, found[-2].log_probs)
    np.testing.assert_allclose(found[-3].log_probs, [*found[-1].log_probs][-14:], rtol=1e-12)


@pytest.mark.thorough
def test_float32_does_not_depend_on_sharing():
    model, requests = llama(dtype="float32"), few_shot_requests()
    shared = ContinuationScorer(model, batch_size=4, chunk_size=16)
    alone = ContinuationScorer(model, batch_size=4, chunk_size=16, share=False)
    one, other = shared.score(requests), alone.score(requests)
    for ours, theirs in zip(one, other, strict=True):
        np.testing.assert_allclose(ours.log_probs, theirs.log_probs, atol=2e-6)
        np.testing.assert_array_equal(ours.greedy, theirs.greedy)
    assert shared.tokens_read < alone.tokens_read / 3


@pytest.mark.thorough
def test_logits_in_pieces(monkeypatch):
    model, requests = llama(dtype="float32"), few_shot_requests()[:12]
    expected = ContinuationScorer(model, batch_size=4, chunk_size=16).score(requests)
    monkeypatch.setattr(module, "LOGITS", 13 * 5)
    module._score_chunk.clear_cache()
    found = ContinuationScorer(model, batch_size=4, chunk_size=16).score(requests)
    module._score_chunk.clear_cache()
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.log_probs, other.log_probs, atol=2e-6)


def test_a_batch_that_is_too_large_is_halved(monkeypatch):
    model, requests, sizes = llama(dtype="float32"), few_shot_requests()[:12], []
    expected = ContinuationScorer(model, batch_size=4, chunk_size=16).score(requests)
    whole = ContinuationScorer._read_batch

    def small_device(self, batch, states):
        sizes.append(len(batch))
        if len(batch) > 2:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no memory")
        return whole(self, batch, states)

    monkeypatch.setattr(ContinuationScorer, "_read_batch", small_device)
    scorer = ContinuationScorer(model, batch_size=16, chunk_size=16)
    found = scorer.score(requests)
    assert max(sizes) > 2 >= scorer.batch_size > 0
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.log_probs, other.log_probs, atol=2e-6)


def test_what_cannot_be_scored_is_refused():
    model = Gpt2(Gpt2Config(**SIZES, intermediate_size=12, max_positions=16), rngs=nnx.Rngs(0))
    scorer = ContinuationScorer(model)
    assert scorer.score([([1] * 10, [2] * 7)])[0].log_probs.shape == (7,)
    with pytest.raises(UserError, match="text of 17 tokens does not fit into the model's 16 positions"):
        scorer.score([([1] * 10, [2] * 8)])
    with pytest.raises(UserError, match="a context is empty; give at least one token"):
        scorer.score([([], [2])])
    with pytest.raises(UserError, match="batch size is 0"):
        ContinuationScorer(model, batch_size=0)
    assert scorer.score([]) == []
