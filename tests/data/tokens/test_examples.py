"""Instruction data: masks against transformers' own tokens, packed rows, validation, and the loss that they give."""

import json
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from lin_jax.data import Corpus, DataConfig, MixturePart, Tokenizer, prepare_tokenizer, training_batches
from lin_jax.data.loader.validation import validation_batches
from lin_jax.data.tokenizers.loading import load_tokenizer
from lin_jax.data.tokens.examples import encode_example
from lin_jax.errors import UserError
from lin_jax.losses.cross_entropy import shifted_targets

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}@{{ m['content'] }}<|im_end|>\n#"
    "{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN, MARKED = (
    CHAT.replace("@", a).replace("#", b) for a, b in (("", ""), ("{% generation %}", "{% endgeneration %}"))
)
# Writes an earlier answer shorter once more follows.
FORGETFUL = PLAIN.replace("{{ m['content'] }}<|im_end|>", "{{ m['content'] if loop.last else '' }}<|im_end|>", 1)
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How are you?"},
    {"role": "assistant", "content": "Well. And you?"},
    {"role": "user", "content": "So so."},
    {"role": "assistant", "content": "Oh."},
]
ROWS = [{"prompt": f"{n} plus {n} is", "completion": f" {2 * n}, I think."} for n in range(40)]


@pytest.fixture(scope="module")
def fast():
    texts = [f"{row['prompt']}{row['completion']}" for row in ROWS] * 4
    backend = Tokenizer.train(texts, 320).backend
    backend.add_special_tokens([AddedToken("<|im_start|>"), AddedToken("<|im_end|>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", clean_up_tokenization_spaces=False, chat_template=PLAIN
    )


@pytest.fixture(scope="module")
def tokenizer(fast, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    fast.save_pretrained(folder)
    return load_tokenizer(folder)


@pytest.fixture
def with_template(fast, tmp_path):
    def make(template):
        fast.save_pretrained(tmp_path)
        for name in ("chat_template.jinja", "tokenizer_config.json"):
            path = tmp_path / name
            if name.endswith("jinja"):
                path.write_text(template)
            elif "chat_template" in (content := json.loads(path.read_text())):
                path.write_text(json.dumps(content | {"chat_template": template}))
        return load_tokenizer(tmp_path)

    return make


def table(folder, rows, name="rows.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def encoded(example, tokenizer):
    row = encode_example(json.dumps(example), tokenizer)
    assert row["tokens"].dtype == row["loss_mask"].dtype == np.int32
    return row["tokens"].tolist(), row["loss_mask"].tolist()


def test_a_completion_is_what_follows_the_prompts_own_tokens(fast, tokenizer):
    for example in ROWS[:8]:
        prompt, whole = (fast(text)["input_ids"] for text in (example["prompt"], "".join(example.values())))
        tokens, mask = encoded(example, tokenizer)
        assert tokens == [*whole, fast.eos_token_id]
        assert mask == [0] * len(prompt) + [1] * (len(whole) - len(prompt) + 1)


def test_a_token_over_the_seam_is_not_lost(fast, tokenizer):
    """Where a token would reach from the prompt into the completion, both keep the tokens that they have alone."""
    word = next(token for token in fast.get_vocab() if len(token) > 3 and token.isalpha())
    example = {"prompt": word[:2], "completion": word[2:]}
    prompt, completion = (fast(text)["input_ids"] for text in example.values())
    assert fast(word)["input_ids"][: len(prompt)] != prompt
    assert encoded(example, tokenizer) == (
        [*prompt, *completion, fast.eos_token_id],
        [0] * len(prompt) + [1] * (len(completion) + 1),
    )


def test_every_answer_of_a_conversation_is_learnt(fast, tokenizer, with_template):
    """A template that marks what the assistant generates and one that does not give the same masks."""
    tokens, mask = encoded({"messages": MESSAGES}, tokenizer)
    assert tokens == fast.apply_chat_template(MESSAGES, tokenize=True, return_dict=True)["input_ids"]
    learnt = fast.decode([token for token, target in zip(tokens, mask, strict=True) if target])
    assert learnt == "Well. And you?<|im_end|>\nOh.<|im_end|>\n"
    marked = with_template(MARKED)
    assert encoded({"messages": MESSAGES}, marked) == (tokens, mask)


def test_a_prompt_of_messages(fast, tokenizer):
    prompt, completion = MESSAGES[:4], MESSAGES[4:]
    options = {"tokenize": True, "return_dict": True}
    before = fast.apply_chat_template(prompt, add_generation_prompt=True, **options)["input_ids"]
    whole = fast.apply_chat_template(MESSAGES, **options)["input_ids"]
    expected = whole, [0] * len(before) + [1] * (len(whole) - len(before))
    assert encoded({"prompt": prompt, "completion": completion}, tokenizer) == expected


def test_templates_that_do_not_serve(tokenizer, with_template):
    with pytest.raises(UserError, match=r"chat template writes a message in another way once others follow"):
        encode_example(json.dumps({"messages": MESSAGES}), with_template(FORGETFUL))
    with pytest.raises(UserError, match=r"does not take a conversation: no systems; mend it"):
        encode_example(json.dumps({"messages": MESSAGES}), with_template("{{ raise_exception('no systems') }}"))
    with pytest.raises(UserError, match=r"has no chat template; give one that has, or rows of prompt and completion"):
        encode_example(json.dumps({"messages": MESSAGES}), Tokenizer(tokenizer.backend))


@pytest.mark.parametrize("streaming", [False, True], ids=["in memory", "streamed"])
def test_packed_rows_keep_masks_beside_their_tokens(tokenizer, tmp_path, streaming):
    expected = {}
    for row in ROWS:
        tokens, mask = encoded(row, tokenizer)
        expected[tuple(tokens)] = mask
    config = DataConfig(table(tmp_path, ROWS), format="prompt_completion", sequence_length=16, streaming=streaming)
    train, held_out = Corpus.open(config).split(0.2)
    batches = training_batches(train, tokenizer, config, batch_size=2, seed=0)
    rows = [next(batches) for _ in range(8)]
    held = validation_batches(held_out, tokenizer, config, batch_size=2)
    seen = 0
    for batch in [*rows, *held]:
        assert batch.keys() == {"tokens", "segment_ids", "loss_mask"}
        for tokens, documents, mask in zip(
            *(batch[name] for name in ("tokens", "segment_ids", "loss_mask")), strict=True
        ):
            for document in range(1, documents.max() + 1):
                part, own = (each[documents == document].tolist() for each in (tokens, mask))
                whole = next(
                    (mask[at : at + len(own)])
                    for ids, mask in expected.items()
                    for at in range(len(ids))
                    if list(ids[at : at + len(part)]) == part and mask[at : at + len(own)] == own
                )
                assert whole == own
                seen += tuple(part) in expected
    assert seen > 10


def test_a_text_beside_examples_counts_in_full(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("one two three. " * 40 + "\n@@\n" + "four five six. " * 40)
    parts = (
        MixturePart(str(tmp_path / "a.txt"), document_separator="@@"),
        MixturePart(table(tmp_path, ROWS), format="prompt_completion"),
    )
    config = DataConfig(mixture=parts, sequence_length=16)
    batches = training_batches(Corpus.open(config).split(0.2)[0], tokenizer, config, batch_size=4, seed=0)
    shares = np.concatenate([next(batches)["loss_mask"].mean(axis=1) for _ in range(16)])
    assert np.sum(shares == 1) == 32
    assert np.all(shares[shares < 1] < 0.8)


def test_only_what_counts_is_a_target():
    chance = np.random.default_rng(0)
    batch = {
        "tokens": chance.integers(0, 9, (3, 12)),
        "segment_ids": np.sort(chance.integers(0, 3, (3, 12)), axis=1)[:, ::-1],
        "loss_mask": chance.integers(0, 2, (3, 12)),
    }
    for ahead in (1, 3):
        found = shifted_targets({name: jnp.asarray(part) for name, part in batch.items()}, ahead)
        for row, t in np.ndindex(3, 11):
            documents, to = batch["segment_ids"][row], t + ahead
            inside = to < 12 and documents[t] > 0 and documents[t] == documents[to]
            assert bool(found.included[row, t]) == (inside and bool(batch["loss_mask"][row, to]))


def test_kinds_of_tables(tmp_path):
    config = DataConfig(table(tmp_path, ROWS), format="prompt_completion")
    expected = [each.text for each in Corpus.open(config).parts[0].documents]
    assert [json.loads(text) for text in expected] == ROWS
    capped = Corpus.open(replace(config, max_bytes=len("".join(expected[:3]).encode()) + 5)).parts[0].documents
    assert [each.text for each in capped] == expected[:3]
    (tmp_path / "rows.csv").write_text(
        "prompt,completion\n" + "".join(f'{a},"{b}"\n' for a, b in map(dict.values, ROWS))
    )
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    for name in ("rows.csv", "rows.parquet"):
        documents = Corpus.open(replace(config, source=str(tmp_path / name))).parts[0].documents
        assert [each.text for each in documents] == expected
    conversations = [{"messages": MESSAGES}, {"messages": MESSAGES[1:3]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(conversations), tmp_path / "chat.parquet")
    for place in (table(tmp_path, conversations, "chat.jsonl"), str(tmp_path / "chat.parquet")):
        documents = Corpus.open(DataConfig(place, format="messages")).parts[0].documents
        assert [json.loads(each.text) for each in documents] == conversations


@pytest.mark.parametrize(
    ("rows", "format", "message"),
    [
        ([{"prompt": "a"}], "prompt_completion", "has no rows with prompt and completion; give another file, or"),
        (
            [ROWS[0], {"prompt": [1], "completion": "b"}],
            "prompt_completion",
            r"line 2 of .*: prompt is no list of messa",
        ),
        ([{"messages": "hello"}], "messages", r"line 1 of .*: messages is no list of messages; give some such as"),
        ([{"messages": MESSAGES[:2]}], "messages", r"line 1 of .*: no message has the role assistant; give conversa"),
        ([ROWS[0]], "prompt_completion", "has a single example, and none to hold out; give more"),
    ],
)
def test_rows_that_are_no_examples(tmp_path, rows, format, message):
    with pytest.raises(UserError, match=message):
        Corpus.open(DataConfig(table(tmp_path, rows), format=format)).split(0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "chat"}, "format 'chat' is unknown; choose one of text, prompt_completion, messages"),
        ({"format": "messages", "cache": "x"}, "cache 'x' is for format text, and not for messages; leave it out"),
        ({"format": "messages", "source": "python-stdlib"}, "format messages needs a table with such rows; give a"),
    ],
)
def test_contradicting_options(options, message):
    with pytest.raises(UserError, match=message):
        DataConfig(**{"source": "x", **options})


def test_a_text_file_is_no_table(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match=r"a\.txt is no table, and format messages is for tables: \.jsonl, "):
        Corpus.open(DataConfig(str(tmp_path / "a.txt"), format="messages"))


def test_a_tokenizer_is_not_trained_on_examples(tmp_path):
    config = DataConfig(table(tmp_path, ROWS), format="prompt_completion")
    with pytest.raises(UserError, match=r"instruction data needs a tokenizer that exists; give data.tokenizer, or"):
        prepare_tokenizer(config, Corpus.open(config))
