from dataclasses import replace

import numpy as np
import pytest
from support.corpora import PARTS, SHARES, TOKENIZER, assert_same, corpus, mixture_config, take

from lin_jax.data import (
    Corpus,
    CorpusPart,
    DataConfig,
    Document,
    MixturePart,
    Tokenizer,
    prepare_tokenizer,
    read_documents,
    stream_documents,
    training_batches,
    validation_batches,
)
from lin_jax.data.loader.mixture import furthest_behind
from lin_jax.errors import UserError
from lin_jax.training import RunConfig, load_run_config

BYTES = Tokenizer.train(["a"], 257)


def letters(part):
    """A corpus of one letter, so that a row tells its source."""
    return [Document(f"{part}{number}", part * (40 + number)) for number in range(20)]


@pytest.mark.parametrize("shares", [(1.0,), (0.7, 0.3), (0.55, 0.3, 0.15), (0.9, 0.09, 0.009, 0.001)])
def test_parts_never_stray_from_their_shares(shares):
    taken = [0] * len(shares)
    for total in range(1, 5000):
        taken[furthest_behind(taken, shares)] += 1
        assert all(abs(had - share * total) < 1.5 for had, share in zip(taken, shares, strict=True))


def test_rows_come_in_the_proportions_of_the_weights_and_are_mixed_in_every_batch():
    mixture = Corpus(tuple(CorpusPart(name, share, letters(name)) for name, share in zip("abc", SHARES, strict=True)))
    config = DataConfig(sequence_length=24, shards=8)
    sources = []
    for batch in take(training_batches(mixture, BYTES, config, batch_size=8, seed=0), 160):
        found = [set(BYTES.decode(row, skip_special_tokens=True)) for row in batch["tokens"]]
        assert all(len(each) == 1 for each in found)
        sources.append([each.pop() for each in found])
    for name, share in zip("abc", SHARES, strict=True):
        # Unfinished windows of eight shards.
        assert abs(np.mean([[source == name for source in batch] for batch in sources]) - share) < 0.03
    # All from one: 1% of the batches by chance, all of them if shards went in step.
    assert np.mean([len(set(batch)) == 1 for batch in sources]) < 0.1


@pytest.mark.parametrize("streaming", [False, True])
def test_a_configured_mixture_is_read_part_by_part(parts, streaming):
    config = mixture_config(parts, sequence_length=24, streaming=streaming)
    mixture = Corpus.open(config)
    assert [part.name for part in mixture.parts] == [str(parts / letter) for letter in PARTS]
    np.testing.assert_allclose([part.share for part in mixture.parts], SHARES)
    for part, expected in zip(mixture.parts, PARTS.values(), strict=True):
        assert sorted(part.texts()) == sorted(each.text for each in expected)
    whole = stream_documents(config) if streaming else read_documents(config)
    assert [each["text"] if streaming else each.text for each in whole] == [
        text for part in mixture.parts for text in part.texts()
    ]


def test_parts_are_read_in_their_own_ways(tmp_path):
    (tmp_path / "stories.txt").write_text("one\n<end>\ntwo")
    (tmp_path / "code.jsonl").write_text('{"content": "three"}\n')
    parts = (
        MixturePart(str(tmp_path / "stories.txt"), document_separator="<end>"),
        MixturePart((str(tmp_path / "code.jsonl"),), weight=3, text_field="content"),
    )
    mixture = Corpus.open(DataConfig(mixture=parts))
    assert [(part.share, list(part.texts())) for part in mixture.parts] == [(0.25, ["one", "two"]), (0.75, ["three"])]


def test_validation_text_comes_from_all_parts_in_their_shares():
    mixture = Corpus(tuple(CorpusPart(name, share, letters(name)) for name, share in zip("abc", SHARES, strict=True)))
    train, held_out = mixture.split(0.5)
    assert all(part.documents for part in (*train.parts, *held_out.parts))
    config = DataConfig(sequence_length=24, validation_batches=2)
    batches = validation_batches(held_out, BYTES, config, batch_size=2)
    text = BYTES.decode(np.concatenate([batch["tokens"].ravel() for batch in batches]), skip_special_tokens=True)
    # 100 tokens, ends of documents among them.
    assert [abs(text.count(name) - 100 * share) <= 2 for name, share in zip("abc", SHARES, strict=True)] == [True] * 3


def test_a_tokenizer_learns_from_every_part(monkeypatch):
    monkeypatch.setattr("lin_jax.data.tokenizers.loading._TRAINING_CHARACTERS", 1000)
    monkeypatch.setattr(Tokenizer, "train", lambda texts, size: "".join(texts))
    mixture = Corpus(
        tuple(CorpusPart(name, share, letters(name) * 2) for name, share in zip("abc", SHARES, strict=True))
    )
    text = prepare_tokenizer(DataConfig(), mixture)
    assert [text.count(name) for name in "abc"] == [550, 300, 150]


def test_a_position_is_for_its_weights(parts):
    config = DataConfig(sequence_length=24)
    mixture = corpus("mixture", parts)
    other = Corpus(tuple(replace(part, share=1 / 3) for part in mixture.parts))
    state = training_batches(mixture, TOKENIZER, config, batch_size=2, seed=0).get_state()
    with pytest.raises(UserError, match="mixture"):
        training_batches(other, TOKENIZER, config, batch_size=2, seed=0).set_state(state)


def test_a_mixture_is_configured_in_yaml_and_saved_with_the_run(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "output: out\ndata:\n  shards: 2\n  mixture:\n  - {source: books, weight: 0.7}\n"
        "  - {source: [a, b], weight: 0.3, text_field: content, document_separator: '<end>'}\n"
    )
    config = load_run_config(path)
    assert config.data.mixture == (
        MixturePart("books", 0.7),
        MixturePart(("a", "b"), 0.3, text_field="content", document_separator="<end>"),
    )
    config.save(tmp_path / "saved.yaml")
    assert load_run_config(tmp_path / "saved.yaml") == config
    with pytest.raises(UserError, match="batch_size 8 is not a multiple"):
        RunConfig("out", data=DataConfig(shards=3))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"source": "x"}, "source 'x' does not go with a mixture"),
        ({"text_field": "content"}, "text_field 'content' does not go with a mixture"),
        ({"mixture": [{"source": "a", "weight": 0}]}, "weight 0 of data source 'a'"),
        ({"mixture": [{"source": "a", "weight": -1.5}]}, "weight -1.5"),
        ({"mixture": [{"source": "a", "weight": float("nan")}]}, "weight nan"),
        ({"mixture": [{"source": " "}]}, "' ' is empty"),
        ({"mixture": [{"source": "a", "subset": "raw"}]}, "subset 'raw'"),
        ({"mixture": [{"source": "python-stdlib"}], "streaming": True}, "cannot be streamed"),
        ({"mixture": [{"source": "a"}], "streaming": True, "cache": "tokens"}, "cache 'tokens'"),
        ({"cache": " "}, "cache is blank"),
        ({"shards": 0}, "shards 0"),
    ],
)
def test_bad_options_are_refused_at_once(options, expected):
    mixture = options.pop("mixture", [] if options.keys() & {"cache", "shards"} else [{"source": "a"}])
    with pytest.raises(UserError, match=expected) as error:
        DataConfig(mixture=tuple(MixturePart(**part) for part in mixture), **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_mixture_of_one_is_its_source(parts, streaming):
    plain = DataConfig(source=str(parts / "a"), sequence_length=24, streaming=streaming)
    mixed = replace(plain, source=DataConfig.source, mixture=(MixturePart(str(parts / "a"), 5.0),))
    batches = [
        take(training_batches(Corpus.open(config), TOKENIZER, config, batch_size=2, seed=0), 20)
        for config in (plain, mixed)
    ]
    assert_same(*batches)
