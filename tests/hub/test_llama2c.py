"""llama2.c's files: against its forward pass written out in NumPy, and the published models against known numbers."""

import lzma
import struct
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from support.cells import some_of
from support.llama2c_files import HEADER, UNTIED, write_file
from support.vocabularies import write_vocab

from lin_jax.attention import AttentionConfig
from lin_jax.data import DataConfig
from lin_jax.data.tokenizers.sentencepiece import SPECIAL, VocabularyPiece, read_sentencepiece
from lin_jax.decoding.generator import Generator
from lin_jax.errors import UserError
from lin_jax.evaluation.perplexity import evaluate
from lin_jax.hub import from_pretrained, save_pretrained
from lin_jax.hub.llama2c import Llama2cHeader
from lin_jax.models import Llama, LlamaConfig
from lin_jax.models.adapters import AdapterConfig
from lin_jax.session import Session
from lin_jax.training import RunConfig, TrainingConfig, load_model
from lin_jax.training.model_source import ModelSource
from lin_jax.training.run import train
from lin_jax.training.setup import resolve


def rms_norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-5) * weight


def turned(x: np.ndarray) -> np.ndarray:
    """Heads `[T, H, D]` with every neighbouring pair rotated by its position."""
    turns = np.exp(1j * np.arange(len(x))[:, None] * 10000.0 ** (-np.arange(0, x.shape[2], 2) / x.shape[2]))
    pairs = (x[..., ::2] + 1j * x[..., 1::2]) * turns[:, None]
    return np.stack([pairs.real, pairs.imag], axis=-1).reshape(x.shape)


def forward(parts: dict[str, np.ndarray], header: Llama2cHeader, tokens: np.ndarray) -> np.ndarray:
    """Logits `[T, V]`, as run.c calculates them."""
    embedding = parts["model.embed_tokens.weight"]
    x, heads, size = embedding[tokens], header.num_heads, header.head_dim
    for layer in range(header.num_layers):
        part = {name: value[layer] for name, value in parts.items() if value.ndim > 1 or "norm" in name}
        y = rms_norm(x, part["input_layernorm.weight"])
        q, k, v = ((y @ part[f"self_attn.{name}_proj.weight"].T).reshape(len(x), -1, size) for name in ("q", "k", "v"))
        q, k = turned(q), turned(k)
        mixed = np.zeros((len(x), heads, size))
        for t, head in np.ndindex(len(x), heads):
            shared = head // (heads // header.num_kv_heads)
            scores = np.array([q[t, head] @ k[s, shared] for s in range(t + 1)]) / np.sqrt(size)
            weights = np.exp(scores - scores.max())
            mixed[t, head] = weights / weights.sum() @ v[: t + 1, shared]
        x = x + mixed.reshape(len(x), -1) @ part["self_attn.o_proj.weight"].T
        y = rms_norm(x, part["post_attention_layernorm.weight"])
        gate = y @ part["mlp.gate_proj.weight"].T
        inner = gate / (1 + np.exp(-gate)) * (y @ part["mlp.up_proj.weight"].T)
        x = x + inner @ part["mlp.down_proj.weight"].T
    return rms_norm(x, parts["model.norm.weight"]) @ parts.get("lm_head.weight", embedding).T


@jax.jit
def logits_of(model: Llama, tokens: jax.Array) -> jax.Array:
    return model(tokens)


@pytest.mark.parametrize("header", [HEADER, UNTIED], ids=["tied", "untied"])
def test_forward_pass(header: Llama2cHeader, tmp_path: Path, x64: None) -> None:
    parts = write_file(tmp_path / "model.bin", header)
    model = from_pretrained(tmp_path / "model.bin", param_dtype="float64")
    tokens = np.random.default_rng(1).integers(0, 11, 13)
    expected = forward(parts, header, tokens)
    np.testing.assert_allclose(logits_of(model, tokens[None])[0], expected, rtol=1e-9, atol=1e-9)


def test_linearizing(tmp_path: Path) -> None:
    write_file(tmp_path / "model.bin", HEADER)
    model = from_pretrained(tmp_path / "model.bin", attention=AttentionConfig("augmented", group_size=4))
    assert not model.layers.layers.attention.mixer.alpha[...].any()


def damaged(path: Path, how: str) -> Path:
    write_file(path, HEADER)
    content = path.read_bytes()
    numbers = struct.unpack_from("<7i", content)
    path.write_bytes(
        {
            "truncated": content[:-4],
            "longer": content + b"\0",
            "a text": b"Once upon a time, there was a little girl named Lily.",
            "header torn": content[:20],
            "empty": b"",
            "later": struct.pack("<i", 0x616B3432) + content[4:],
            "odd heads": struct.pack("<7i", *numbers[:3], 5, *numbers[4:]) + content[28:],
        }[how]
    )
    return path


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "it is truncated or of another format"),
        ("longer", "it is truncated or of another format"),
        ("a text", "is not in llama2.c's first format"),
        ("header torn", "is not in llama2.c's first format"),
        ("empty", "is not in llama2.c's first format"),
        ("later", "is in a later format of llama2.c"),
        ("odd heads", "is not in llama2.c's first format"),
    ],
)
def test_damaged_files(how: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        from_pretrained(damaged(tmp_path / "model.bin", how))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# Folder, model, tokenizer, and then what is known of them: mean nats per token and per character, and greedy text.
GIRL = "Once upon a time, there was a little girl named Lily. She loved to play outside in the "
PARK = GIRL + "sunshine. One day, she went to the park with her mommy and daddy. "
PUBLISHED = {
    "stories260K": (
        "stories260K/stories260K.bin",
        "stories260K/tok512.bin",
        (1.257, 0.573),
        GIRL + "park. One day, she saw a big, red ball. She wanted to play with it, but it was too high.",
    ),
    "babyllama105": (
        "babyllama105/model5000.bin",
        "babyllama105/tok105.model",
        (0.641, 0.644),
        PARK + "She saw a big box on the ground.",
    ),
    "babyllama361": (
        "babyllama361/model5000.bin",
        "babyllama105/tok105.vocab",
        (0.582, 0.584),
        PARK + "They saw a big tree with a big smile on the gr",
    ),
}


@pytest.fixture(scope="module", params=some_of(PUBLISHED, 1))
def published(
    request: pytest.FixtureRequest, shared_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, Llama]:
    """A published model: its name, the Hugging Face folder that was made of it, and the model that went in."""
    model_file, tokenizer_file, *_ = PUBLISHED[request.param]
    model = from_pretrained(shared_data / "checkpoints" / model_file)
    tokenizer = read_sentencepiece(shared_data / "checkpoints" / tokenizer_file, model.config.vocab_size)
    folder = tmp_path_factory.mktemp("published") / request.param
    return request.param, save_pretrained(model, folder, tokenizer=tokenizer), model


def stories(shared_data: Path) -> list[str]:
    with lzma.open(shared_data / "tinystories" / "v2_train_head.txt.xz", "rt", encoding="utf-8") as file:
        return [story.strip() for story in file.read().split("<|endoftext|>")]


def test_losses(published: tuple[str, Path, Llama], shared_data: Path) -> None:
    """Mean nats over the first twelve stories, cut to 240 characters; the start token is given and not counted."""
    name, folder, _ = published
    session = Session.load(folder)
    texts = [story[:240] for story in stories(shared_data)[:12]]
    rows = [session.encode_prompt(text) for text in texts]
    tokens = np.zeros((12, max(map(len, rows))), int)
    for line, row in zip(tokens, rows, strict=True):
        line[: len(row)] = row
    logs = np.asarray(jax.nn.log_softmax(logits_of(session.model, jnp.asarray(tokens))))
    nats = -sum(logs[number, np.arange(len(row) - 1), row[1:]].sum(dtype=np.float64) for number, row in enumerate(rows))
    per_token, per_character = PUBLISHED[name][2]
    assert round(nats / sum(len(row) - 1 for row in rows), 3) == per_token
    assert round(nats / sum(map(len, texts)), 3) == per_character


def test_losses_as_training_measures_them(published: tuple[str, Path, Llama], shared_data: Path) -> None:
    """The same twelve stories as documents of a run: a token begins each, and none is asked for at its end."""
    name, _, model = published
    model_file, tokenizer_file, *_ = PUBLISHED[name]
    checkpoints = shared_data / "checkpoints"
    tokenizer = ModelSource.open(checkpoints / model_file).tokenizer(str(checkpoints / tokenizer_file))
    rows = [tokenizer.encode_document(story[:240]) for story in stories(shared_data)[:12]]
    tokens, segment_ids = np.zeros((2, 12, max(map(len, rows))), np.int32)
    for number, row in enumerate(rows):
        tokens[number, : len(row)], segment_ids[number, : len(row)] = row, 1
    found = evaluate(model, [{"tokens": tokens, "segment_ids": segment_ids}])
    assert round(found.loss, 3) == PUBLISHED[name][2][0]


def test_a_tokenizer_is_named_for_a_file_alone(tmp_path: Path) -> None:
    write_file(tmp_path / "model.bin", HEADER)
    source = ModelSource(tmp_path / "model.bin")
    for options, named in (({}, "--tokenizer"), ({"option": "--data.tokenizer"}, "--data.tokenizer")):
        with pytest.raises(UserError, match=f"model.bin holds no tokenizer; say where it is with {named} FILE"):
            source.tokenizer(**options)
    source.check_holds_no_tokenizer("letters.vocab")
    with pytest.raises(UserError, match=r"has a tokenizer of its own, and letters.vocab is not read"):
        ModelSource(tmp_path).check_holds_no_tokenizer("letters.vocab")


@pytest.mark.thorough
def test_a_run_on_a_file(tmp_path: Path) -> None:
    """Its sizes and weights, another attention, and the tokenizer that the run names; loaded again, and refused."""
    write_file(tmp_path / "model.bin", HEADER)
    pieces = [*(VocabularyPiece(text, 0.0) for text in SPECIAL), *(VocabularyPiece(text, -1.0) for text in " abcdefg")]
    write_vocab(tmp_path / "letters.vocab", pieces)
    (tmp_path / "text.txt").write_text(
        "\n<|>\n".join(f"{'abcdefg'[n % 7 :]} dad {'fab ' * (n % 5)}" for n in range(60))
    )
    run = RunConfig(
        output=str(tmp_path / "run"),
        init_from=str(tmp_path / "model.bin"),
        adapters=AdapterConfig(rank=2),
        model=LlamaConfig(attention=AttentionConfig(group_size=4, kernel_size=3)),
        data=DataConfig(
            source=str(tmp_path / "text.txt"),
            document_separator="<|>",
            tokenizer=str(tmp_path / "letters.vocab"),
            sequence_length=12,
            validation_batches=1,
        ),
        training=TrainingConfig(steps=1, batch_size=2),
    )
    with pytest.raises(UserError, match=r"model.bin holds no tokenizer; say where it is with --data.tokenizer FILE"):
        resolve(replace(run, data=replace(run.data, tokenizer=None)), resume=False)
    assert train(run).status == 0
    model, config, _ = load_model(tmp_path / "run")
    base = from_pretrained(tmp_path / "model.bin")
    assert (config.model.num_layers, config.model.vocab_size) == (2, 11)
    assert np.array_equal(model.layers.layers.feed_forward.up.kernel[...], base.layers.layers.feed_forward.up.kernel)
    session = Session.load(tmp_path / "run")
    assert session.encode_prompt("dad")[0] == 1
    assert session.tokenizer.eos_id is None


def test_greedy_text(published: tuple[str, Path, Llama]) -> None:
    name, folder, _ = published
    session = Session.load(folder)
    text = PUBLISHED[name][3]
    count = len(session.tokenizer.encode(text))
    generation = Generator(session.model).generate([session.encode_prompt("")], count)
    assert session.tokenizer.decode(generation.tokens[0]) == text


def test_export(published: tuple[str, Path, Llama]) -> None:
    """Back again bit for bit; the same logits and the same ids in transformers."""
    _, folder, model = published
    again = from_pretrained(folder)
    for (path, one), (_, other) in zip(
        nnx.to_flat_state(nnx.state(model)), nnx.to_flat_state(nnx.state(again)), strict=True
    ):
        assert np.array_equal(one[...], other[...]), path
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokens = transformers.AutoTokenizer.from_pretrained(folder)("One day, a boy\u2019s dog \u2013 Max\n")["input_ids"]
    assert tokens == Session.load(folder).encode_prompt("One day, a boy\u2019s dog \u2013 Max\n")
    expected = theirs(torch.tensor([tokens])).logits.detach().numpy()
    found = logits_of(again, jnp.asarray([tokens]))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
