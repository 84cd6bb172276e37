"""Speculation in exported folders: the text of plain `generate`, token for token, and the state that it leaves."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cells import cells
from support.exported import AUGMENTED, CASES, FLAGSHIP, Case, code_folder, one_thread, opened  # noqa: F401 - fixtures
from transformers import PreTrainedModel

from lin_jax.hub import save_pretrained
from lin_jax.models import MedusaHeads

GREEDY = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
# A prompt that ends as it began.
PROMPT = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 1, 4]])
# One of each kind of state: groups, summaries, tables, keys and values, a ring, windows with and without decay.
STATES = [
    case
    for case in CASES
    if str(case) in {"llama-augmented-tie_embeddings", "gpt2-linformer+local+convolution", "gpt2-yoso"}
    or case.sizes.get("window") in (5, 6)
    or "pattern" in case.sizes
    or "layers" in case.sizes
]


def module(model: PreTrainedModel, name: str) -> Any:
    """A module of the code that a model was opened with."""
    return sys.modules[f"{type(model).__module__.rpartition('.')[0]}.{name}_lin_jax"]


@pytest.fixture
def drafted(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Guesses that are right for a while: 0 to 4 of each pass, and one that is wrong behind most of them."""

    def install(model: PreTrainedModel, text: list[int]) -> list[int]:
        passes: list[int] = []

        def following(self: Any, hidden: torch.Tensor, room: int) -> list[int]:
            done = len(self.ngrams.tokens)
            right = text[done : done + min(len(passes) % 5, room)]
            wrong = [(text[done + len(right)] + 1) % 23] if len(right) < room and len(passes) % 3 else []
            passes.append(len(right))
            self.guesses = [*right, *wrong]
            return self.guesses

        monkeypatch.setattr(module(model, "speculation")._Drafts, "next", following)
        return passes

    return install


@pytest.mark.parametrize("case", cells(STATES, [case for case in CASES if case not in STATES]), ids=str)
def test_the_text_and_the_state_are_those_of_plain_generation(case: Case, drafted: Any, tmp_path: Path) -> None:
    model = opened(save_pretrained(case.model("float32"), tmp_path / "model"))
    plain = model.generate(PROMPT, **GREEDY, return_dict_in_generate=True)
    passes = drafted(model, plain.sequences[0].tolist())
    fast = model.generate(PROMPT, **GREEDY, return_dict_in_generate=True, speculative=True)
    assert fast.sequences.tolist() == plain.sequences.tolist()
    assert 5 <= len(passes) <= 10
    one, other = (found.past_key_values for found in (plain, fast))
    assert (one.length, one.position.tolist()) == (other.length, other.position.tolist())
    more = {**GREEDY, "max_new_tokens": 6}
    texts = [model.generate(plain.sequences, past_key_values=state, **more) for state in (one, other)]
    assert texts[0].tolist() == texts[1].tolist()


@pytest.fixture(scope="module")
def model(code_folder: None, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:  # noqa: F811
    return opened(save_pretrained(FLAGSHIP.model("float32"), tmp_path_factory.mktemp("case") / "model"))


class TestText:
    """All else that `generate` does is as without speculation."""

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"max_new_tokens": 1},
            {"eos_token_id": "seventh"},
            {"repetition_penalty": 1.8},
            {"no_repeat_ngram_size": 2},
            {"min_new_tokens": 12, "eos_token_id": "seventh"},
        ],
        ids=str,
    )
    def test_equal(self, model: PreTrainedModel, options: dict[str, Any]) -> None:
        options = GREEDY | options
        if options["eos_token_id"] == "seventh":
            options["eos_token_id"] = int(model.generate(PROMPT, **GREEDY)[0, PROMPT.shape[1] + 6])
        plain = model.generate(PROMPT, **options)
        assert model.generate(input_ids=PROMPT, speculative=True, **options).tolist() == plain.tolist()

    def test_padding_before_the_prompt(self, model: PreTrainedModel) -> None:
        padded = torch.nn.functional.pad(PROMPT, (3, 0))
        inputs = {"input_ids": padded, "attention_mask": (torch.arange(padded.shape[1]) >= 3).long()[None]}
        plain = model.generate(**inputs, **GREEDY)
        assert plain[:, 3:].tolist() == model.generate(PROMPT, **GREEDY).tolist()
        assert model.generate(**inputs, speculative=True, **GREEDY).tolist() == plain.tolist()

    def test_a_streamer_is_given_every_token(self, model: PreTrainedModel) -> None:
        class Collected:
            def __init__(self) -> None:
                self.tokens: list[int] = []
                self.ended = False

            def put(self, tokens: torch.Tensor) -> None:
                self.tokens += tokens.flatten().tolist()

            def end(self) -> None:
                self.ended = True

        streamer = Collected()
        text = model.generate(PROMPT, speculative=True, streamer=streamer, **GREEDY)
        assert streamer.tokens == text[0].tolist()
        assert streamer.ended

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"do_sample": True}, "it is greedy"),
            ({"num_beams": 2}, "it is greedy"),
            ({"output_scores": True}, "it returns no scores"),
            ({"use_cache": False}, "it needs the state"),
            ({"prompt_lookup_num_tokens": 3}, "it drafts by itself"),
        ],
        ids=str,
    )
    def test_what_it_cannot_do_is_said(self, model: PreTrainedModel, options: dict[str, Any], reason: str) -> None:
        with pytest.raises(ValueError, match=f"no speculation: {reason}"):
            model.generate(PROMPT, speculative=True, **GREEDY | options)

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"streamer": object()}, "a streamer is for one prompt"),
            ({"prefix_allowed_tokens_fn": lambda row, text: [1]}, "prefix_allowed_tokens_fn is for one prompt"),
            ({"max_time": 9.0}, "texts of several prompts end at eos_token_id"),
        ],
        ids=lambda given: next(iter(given)) if isinstance(given, dict) else "",
    )
    def test_what_it_cannot_do_with_several_prompts(
        self, model: PreTrainedModel, options: dict[str, Any], reason: str
    ) -> None:
        with pytest.raises(ValueError, match=f"no speculation: {reason}"):
            model.generate(PROMPT.repeat(2, 1), speculative=True, **GREEDY | options)

    def test_under_the_name_of_transformers(self, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
        """`custom_generate=FOLDER` asks for it, whether the folder's function is in place or not."""
        asked = []
        decode = module(model, "causal_lm").decode
        monkeypatch.setattr(module(model, "causal_lm"), "decode", lambda *a, **b: asked.append(1) or decode(*a, **b))
        plain = model.generate(PROMPT, **GREEDY)
        assert not asked
        place = {"custom_generate": model.name_or_path, "trust_remote_code": True}
        assert model.generate(PROMPT, **GREEDY, **place).tolist() == plain.tolist()
        assert asked == [1]
        monkeypatch.delitem(vars(model), "generate")
        assert model.generate(PROMPT, **GREEDY, **place).tolist() == plain.tolist()
        assert asked == [1, 1]


LENGTHS = (12, 5, 9)


def padded_prompts() -> dict[str, torch.Tensor]:
    """Prompts of different lengths, padded on the left; each turns in a circle of its own."""
    real = torch.arange(12) >= 12 - torch.tensor(LENGTHS)[:, None]
    tokens = torch.stack([PROMPT[0], PROMPT[0].roll(3), PROMPT[0].flip(0)])
    return {"input_ids": tokens * real, "attention_mask": real.long()}


def said_at_several_places(rows: list[list[int]]) -> int:
    """A token that rows say at different places, or never, and none of them at once."""
    for token in range(1, 23):
        places = [[*row, token].index(token) for row in rows]
        if min(places) > 0 and len(set(places)) > 1:
            return token
    raise AssertionError("no token ends these texts at different places")


@pytest.mark.parametrize("case", cells(STATES[:2], STATES[2:]), ids=str)
@pytest.mark.parametrize("ends", [False, True])
def test_rows_of_a_batch_take_as_many_drafts_as_are_right(
    case: Case, ends: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text by text those of plain generation, padded behind their ends; and so is the state."""
    model = opened(save_pretrained(case.model("float32"), tmp_path / "model"))
    inputs, options = padded_prompts(), {**GREEDY, "return_dict_in_generate": True}
    plain = model.generate(**inputs, **options)
    if ends:
        # Some of these models say one token for ever.
        options["no_repeat_ngram_size"] = 2
        plain = model.generate(**inputs, **options)
        options["eos_token_id"] = said_at_several_places(plain.sequences[:, 12:].tolist())
        plain = model.generate(**inputs, **options)
    texts, taken = plain.sequences.tolist(), []

    def following(self: Any, hidden: torch.Tensor, room: int) -> list[int]:
        """Row r guesses r to r + 2 tokens that are right, and one that is wrong."""
        own = self.ngrams.tokens
        row = next(row for row, text in enumerate(texts) if text[: len(own)] == own)
        rest = [*texts[row][len(own) :], 0]
        right = rest[: min(row + len(own) % 3, room, len(rest) - 1)]
        self.guesses = [*right, (rest[len(right)] + 1) % 23][:room]
        taken.append((row, len(right)))
        return self.guesses

    monkeypatch.setattr(module(model, "speculation")._Drafts, "next", following)
    fast = model.generate(**inputs, **options, speculative=True)
    assert fast.sequences.tolist() == texts
    assert {row for row, _ in taken} == {0, 1, 2}
    assert len({right for _, right in taken}) > 1
    one, other = (found.past_key_values for found in (plain, fast))
    assert (one.length, one.position.tolist()) == (other.length, other.position.tolist())
    more = {**GREEDY, "max_new_tokens": 5}
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, plain.sequences.shape[1] - 12), value=1)
    after = [
        model.generate(plain.sequences, attention_mask=mask, past_key_values=state, **more) for state in (one, other)
    ]
    assert after[0].tolist() == after[1].tolist()


def test_a_batch_drafts_by_itself(model: PreTrainedModel) -> None:
    """With n-grams of its own rows, and with scores that a processor changes row by row."""
    for options in (GREEDY, GREEDY | {"repetition_penalty": 1.3}, GREEDY | {"no_repeat_ngram_size": 2}):
        plain = model.generate(**padded_prompts(), **options)
        assert model.generate(**padded_prompts(), **options, speculative=True).tolist() == plain.tolist()


def test_heads_draft_what_the_text_has_not(tmp_path: Path) -> None:
    """The heads of the folder, in float64 against their formula; and a text with them is the text without."""
    import jax.numpy as jnp
    import numpy as np

    ours = FLAGSHIP.model("float32")
    heads, rng = MedusaHeads.on(ours, 3), np.random.default_rng(2)
    for part in (heads.weight, heads.bias, heads.output):
        part[...] = jnp.asarray(rng.normal(size=part.shape), jnp.float32)
    model = opened(save_pretrained(ours, tmp_path / "model", heads=heads))
    hidden = torch.tensor(rng.normal(size=16))
    expected = np.asarray(heads(jnp.asarray(hidden.numpy(), jnp.float32))).argmax(-1).tolist()
    assert model.draft_heads().draft(hidden, 5) == expected
    assert model.draft_heads().draft(hidden, 2) == expected[:2]
    assert model.draft_heads() is model.draft_heads()
    prompt = torch.tensor([[7]])
    assert model.generate(prompt, speculative=True, **GREEDY).tolist() == model.generate(prompt, **GREEDY).tolist()


def test_ngrams(tmp_path: Path) -> None:
    ngrams = module(opened(save_pretrained(AUGMENTED.model("float32"), tmp_path / "model")), "drafts").NGrams
    text = ngrams([5, 6, 7, 8, 1, 6, 7])
    assert text.draft(3) == [8, 1, 6]  # after "6 7"
    assert text.draft(0) == []
    text.extend([9, 3, 6, 7])
    assert text.draft(2) == [9, 3]  # the newest
    text.extend([8, 2, 2, 2])
    assert text.draft(4) == [2, 2, 2, 2]  # round and round
    text.extend([4])
    assert text.draft(4) == []
