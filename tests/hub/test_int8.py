"""Int8 weights in folders: the numbers of rounding when loaded, the bytes of a conversion, and logits in PyTorch."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file, save_file
from support.cells import cells
from support.exported import FLAGSHIP, Case, code_folder, one_thread, opened, random_model  # noqa: F401 - fixtures
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

import lin_jax
from lin_jax.api.sessions import session_of
from lin_jax.attention import AttentionConfig
from lin_jax.cli.hub.options import WEIGHTS as OPTIONS
from lin_jax.cli.hub.options import main
from lin_jax.data import Tokenizer
from lin_jax.errors import UserError
from lin_jax.hub import from_pretrained, save_pretrained
from lin_jax.hub.conversion import blocks
from lin_jax.hub.conversion.convert import WEIGHTS, convert, converted_bytes
from lin_jax.hub.int8.tensor import RoundedTensor
from lin_jax.hub.load import HubCheckpoint, Pretrained
from lin_jax.hub.peft import save_adapters
from lin_jax.models import T5, Flash, FlashConfig, MedusaHeads, SeparateLayers, T5Classifier, T5Config
from lin_jax.models.bert import BertConfig, BertMaskedLM
from lin_jax.models.lora import add_lora
from lin_jax.models.params import params_of
from lin_jax.models.stored_weights import Storage, WeightStorage, store
from lin_jax.session import Session

TOKENS = np.random.default_rng(0).integers(0, 23, (2, 12)).astype(np.int32)
ROUNDED = Storage(WeightStorage("int8"))
SOFTMAX = Case("softmax")
LEARNT = Case("exponential+window", sizes={"window": 3})
MIXED = Case("augmented", sizes={"pattern": ("augmented", {"name": "softmax", "window": 3})})


def flash() -> Flash:
    sizes = {"vocab_size": 23, "hidden_size": 16, "num_layers": 2, "query_key_size": 8}
    types = {"dtype": "float64", "param_dtype": "float64"}
    config = FlashConfig(**sizes, **types, attention=AttentionConfig("flash", group_size=4))
    return random_model(lambda: Flash(config, rngs=nnx.Rngs(0)))


def t5(kind: type, name: str, dtype: str = "float64", **options: Any) -> Any:
    sizes = {"vocab_size": 23, "hidden_size": 16, "head_dim": 6, "intermediate_size": 24, "num_layers": 1}
    attention = AttentionConfig(name, group_size=4)
    places = {f"{place}_attention": attention for place in ("encoder", "decoder", "cross")}
    types = {"dtype": dtype, "param_dtype": dtype}
    config = T5Config(**{"num_heads": 2, **sizes, **options}, **types, **places)
    return random_model(lambda: kind(config, rngs=nnx.Rngs(0)))


MODELS: dict[str, Any] = {
    "llama": FLAGSHIP.model,
    "llama-softmax": SOFTMAX.model,
    "llama-mixed": MIXED.model,
    "gpt2": Case("augmented", "gpt2").model,
    "gpt2-untied": Case("softmax", "gpt2", {"tie_embeddings": False}).model,
    "flash": flash,
}


def logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(TOKENS.astype(np.int64))).logits.double().numpy()


def leaves(model: Any) -> list[Any]:
    return jax.tree.leaves(nnx.state(model))


def numbers(folder: Path) -> dict[str, np.ndarray]:
    return {name: array for file in folder.glob("model*.safetensors") for name, array in load_file(file).items()}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA with softmax in bfloat16, with heads."""
    model = SOFTMAX.model("bfloat16")
    return save_pretrained(model, tmp_path_factory.mktemp("source") / "llama", heads=MedusaHeads.on(model, 2))


@pytest.mark.parametrize(
    "name", cells(always=["llama"], thorough=["gpt2", "llama-softmax", "llama-mixed", "gpt2-untied", "flash"])
)
def test_logits_in_pytorch(name: str, tmp_path: Path, x64: None) -> None:
    """Those of the numbers that integers and factors stand for; opened, written by transformers, and opened again."""
    folder = save_pretrained(MODELS[name](), tmp_path / "model", weights="int8")
    expected = np.asarray(from_pretrained(folder)(TOKENS))
    theirs = opened(folder)
    np.testing.assert_allclose(logits(theirs), expected, rtol=0, atol=1e-9)
    theirs.save_pretrained(tmp_path / "again")
    again = opened(tmp_path / "again")
    assert np.array_equal(logits(again), logits(theirs))
    there, here = numbers(tmp_path / "again"), numbers(folder)
    rounded = [name for name, array in here.items() if array.dtype == np.int8]
    assert rounded
    assert all(np.array_equal(there[each], here[each]) for one in rounded for each in (one, one + "_scale"))
    if name == "llama":
        np.testing.assert_array_equal(np.asarray(from_pretrained(tmp_path / "again")(TOKENS)), expected)


def test_types_in_pytorch(tmp_path: Path) -> None:
    """In bfloat16, factors stay in float32; a model that is turned into another type takes its table with it."""
    ours = FLAGSHIP.model("float32")
    folder = save_pretrained(ours, tmp_path / "model", heads=MedusaHeads.on(ours, 2), weights="int8")
    right, half = logits(opened(folder, torch.float32)), opened(folder, torch.bfloat16)
    assert {x.dtype for name, x in half.named_buffers() if name.endswith("_scale")} == {torch.float32}
    assert half.get_input_embeddings()(torch.tensor([3])).dtype == torch.bfloat16
    np.testing.assert_allclose(logits(half), right, rtol=0.1, atol=0.1)
    np.testing.assert_allclose(logits(half.double()), right, rtol=0.02, atol=0.02)
    assert half.lm_head.weight is half.get_input_embeddings().weight
    greedy = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    prompts = torch.tensor(TOKENS[:, :3].astype(np.int64))
    assert half.draft_heads() is not None
    assert half.generate(prompts, speculative=True, **greedy).tolist() == half.generate(prompts, **greedy).tolist()


@pytest.mark.parametrize(
    ("kind", "attention", "options"),
    cells(
        always=[(T5, "exponential+window", {})],
        thorough=[
            (T5Classifier, "softmax", {}),
            (T5, "softmax", {}),
            (T5, "augmented", {"tie_embeddings": False, "feed_forward": "gated-gelu"}),
        ],
    ),
)
def test_a_t5_in_pytorch(kind: type, attention: str, options: dict[str, Any], tmp_path: Path, x64: None) -> None:
    """Logits, greedy texts with drafts and the trunk alone; opened, written by transformers, and opened again."""
    folder = save_pretrained(t5(kind, attention, **options), tmp_path / "model", weights="int8")
    rounded = {name for name, array in numbers(folder).items() if array.dtype == np.int8}
    narrow = {name.rpartition(".")[2] for name, array in numbers(folder).items() if array.dtype == jnp.bfloat16}
    assert narrow == ({"query_map", "key_map"} if attention == "exponential+window" else set())
    prefix, more = ("", []) if kind is T5 else ("transformer.", ["classification_head.dense.weight"])
    first = [prefix + name for name in ("shared.weight", "decoder.block.0.layer.1.EncDecAttention.q.weight")]
    assert rounded >= {*first, *more}
    assert not any("relative_attention_bias" in name or "norm" in name for name in rounded)

    ours, given = from_pretrained(folder), np.random.default_rng(1).integers(2, 23, (2, 7)).astype(np.int32)
    inputs = {"input_ids": torch.tensor(TOKENS.astype(np.int64))}
    automatic = AutoModelForSequenceClassification
    if kind is T5:
        automatic, inputs["decoder_input_ids"] = AutoModelForSeq2SeqLM, torch.tensor(given.astype(np.int64))
    expected = np.asarray(ours(TOKENS, given) if kind is T5 else ours(TOKENS))
    theirs = [automatic.from_pretrained(folder, trust_remote_code=True, dtype=torch.float64)]
    theirs[0].save_pretrained(tmp_path / "again")
    theirs.append(automatic.from_pretrained(tmp_path / "again", trust_remote_code=True, dtype=torch.float64))
    for each in theirs:
        with torch.no_grad():
            np.testing.assert_allclose(each(**inputs).logits.numpy(), expected, rtol=0, atol=1e-9)
    again = numbers(tmp_path / "again")
    assert all(np.array_equal(again[name], array) for name, array in numbers(folder).items() if name in rounded)
    assert all(
        np.array_equal(*pair) for pair in zip(leaves(from_pretrained(tmp_path / "again")), leaves(ours), strict=True)
    )
    if kind is T5:
        check_texts(folder, theirs[0], inputs)


def check_texts(folder: Path, theirs: Any, inputs: dict[str, torch.Tensor]) -> None:
    """Greedy texts of an exported T5, with drafts and without; the vectors of its trunk, which has no head."""
    greedy = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    texts = theirs.generate(inputs["input_ids"], **greedy)
    assert theirs.generate(inputs["input_ids"], **greedy, speculative=True).tolist() == texts.tolist()
    trunk = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float64)
    with torch.no_grad():
        vectors, logits = trunk(**inputs).last_hidden_state, theirs(**inputs).logits
        torch.testing.assert_close(theirs.lm_head(theirs.read_by_head(vectors)), logits)


def test_an_encoder_in_pytorch(tmp_path: Path, x64: None) -> None:
    sizes = {"vocab_size": 23, "hidden_size": 16, "intermediate_size": 24, "num_layers": 1, "num_heads": 2}
    config = BertConfig(**sizes, max_positions=16, dtype="float64", param_dtype="float64")
    ours = random_model(lambda: BertMaskedLM(config, rngs=nnx.Rngs(0)))
    folder = save_pretrained(ours, tmp_path / "model", weights="int8")
    theirs = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float64)
    np.testing.assert_allclose(logits(theirs), np.asarray(from_pretrained(folder)(TOKENS)), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("case", "dtype"),
    cells(
        always=[(FLAGSHIP, "float32"), (LEARNT, "float32")],
        thorough=[(Case("augmented", "gpt2"), "bfloat16"), (SOFTMAX, "bfloat16"), (MIXED, "float32")],
    ),
    ids=str,
)
def test_a_folder_is_read_as_it_would_be_rounded(case: Case, dtype: str, tmp_path: Path) -> None:
    """To the bit, straight from the file as well as by way of a model that learns."""
    model = case.model(dtype)
    plain, rounded = (save_pretrained(model, tmp_path / name, weights=name) for name in ("stored", "int8"))
    right = Pretrained.open(plain, dtype="float32").load(storage=lambda model: ROUNDED)
    found = Pretrained.open(rounded, dtype="float32").load(storage=lambda model: ROUNDED)
    learning = from_pretrained(rounded, dtype="float32")
    if case is MIXED:
        for each in (right, found):
            each.layers = SeparateLayers.of(each.layers)
            store(each, ROUNDED)
    learning.layers = SeparateLayers.of(learning.layers)
    store(learning, ROUNDED)
    if case is LEARNT:
        maps = from_pretrained(plain).layers.layers.attention.mixer.linear.features.key_map[...]
        for each in (found, learning, right):
            kept = np.stack(
                [np.asarray(layer.attention.mixer.linear.features.key_map[...]) for layer in each.layers.layers]
            )
            assert kept.dtype == np.float32
            np.testing.assert_array_equal(kept, np.asarray(maps.astype(jnp.bfloat16)).astype(np.float32))
    for each in (found, learning):
        for one, other in zip(leaves(each), leaves(right), strict=True):
            np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32))
    assert {one.dtype for one in leaves(found)} == {jnp.dtype("int8"), jnp.dtype("float32")}


def test_a_quarter_of_the_bytes(tmp_path: Path) -> None:
    model = Case("augmented", sizes={"group_size": 64}, options={"hidden_size": 128, "intermediate_size": 384}).model(
        "float32"
    )
    sizes = {}
    for name in ("stored", "int8"):
        folder = save_pretrained(model, tmp_path / name, weights=name)
        sizes[name] = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert sizes["int8"] <= 0.3 * sizes["stored"]


@pytest.mark.parametrize("family", cells(["llama"], ["gpt2"]))
def test_a_conversion_writes_the_same(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block at a time, whose ends are none of the rows'; from int8 to int8, and back to what they stand for."""
    monkeypatch.setattr(blocks, "BLOCK", 100)
    source = save_pretrained(Case("softmax", family).model("bfloat16"), tmp_path / "source")
    raw = json.loads((source / "config.json").read_text())
    model = from_pretrained(source, attention="augmented", seed=3)
    right = save_pretrained(model, tmp_path / "right/out", source=raw, weights="int8", max_shard_bytes=3000)
    written: list[int] = []
    attentive = Pretrained.open(source, attention="augmented")
    size = converted_bytes(attentive, "int8")
    options: dict[str, Any] = {"seed": 3, "weights": "int8", "max_shard_bytes": 3000, "note": written.append}
    found = convert(attentive, tmp_path / "ours/out", **options)
    for name in ("config.json", "README.md", *(file.name for file in right.glob("model*"))):
        assert (found / name).read_bytes() == (right / name).read_bytes()
    assert sum(written) == size

    kept = convert(Pretrained.open(found, param_dtype="bfloat16"), tmp_path / "kept/out", max_shard_bytes=3000)
    assert (kept / "config.json").read_bytes() == (found / "config.json").read_bytes()
    same, there = numbers(kept), numbers(found)
    assert same.keys() == there.keys()
    assert all(np.array_equal(same[name], there[name]) for name in same)
    back = convert(Pretrained.open(found), tmp_path / "back", weights="float")
    exact = dict(HubCheckpoint.open(found).tensors)
    rounded = [name for name, tensor in exact.items() if isinstance(tensor, RoundedTensor)]
    assert rounded
    for name, array in numbers(back).items():
        np.testing.assert_array_equal(array, np.asarray(exact[name]).astype(np.float32))
        if name in rounded:
            np.testing.assert_array_equal(array, there[name] * there[name + "_scale"])
    assert "int8_weights" not in json.loads((back / "config.json").read_text())


def test_adapters_are_merged_before_rounding(source: Path, tmp_path: Path) -> None:
    """Those of a float folder; those of an int8 one, into what it stands for."""
    base = from_pretrained(source)
    add_lora(base, 2, 4.0, rngs=nnx.Rngs(0))
    for path, variable in nnx.to_flat_state(nnx.state(base)):
        if path[-1] == "lora_b":
            variable.set_value(jnp.ones(variable.shape, variable.dtype))
    save_adapters(base, tmp_path / "lora", base="base")
    plain = convert(Pretrained.open(source), tmp_path / "plain", adapter=tmp_path / "lora")
    found = convert(Pretrained.open(source), tmp_path / "found", adapter=tmp_path / "lora", weights="int8")
    right = convert(Pretrained.open(plain), tmp_path / "right", weights="int8")
    assert all(np.array_equal(array, numbers(right)[name]) for name, array in numbers(found).items())
    before = convert(Pretrained.open(source), tmp_path / "before", weights="int8")
    after = convert(Pretrained.open(before), tmp_path / "after", adapter=tmp_path / "lora")
    changed = {name for name, array in numbers(after).items() if not np.array_equal(array, numbers(before)[name])}
    assert {name.rpartition(".")[0] for name in changed if name.endswith("_scale")} == {
        f"model.layers.{layer}.self_attn.{name}"
        for layer in (0, 1)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj")
    }


def test_a_session_and_the_verbs(tmp_path: Path) -> None:
    """They decode with a folder's int8 weights, beside heads too, and do not train them unless asked to."""
    tokenizer = Tokenizer.train(["some text of some words"], 264)
    model = Case("augmented", options={"vocab_size": 264}).model("float32")
    heads = MedusaHeads.on(model, 1)
    plain = save_pretrained(model, tmp_path / "plain", tokenizer=tokenizer)
    folder = lin_jax.save_pretrained(model, tmp_path / "folder", tokenizer=tokenizer, weights="int8")
    right = Session.load(plain, weights="int8")
    found = Session.load(folder)
    save_pretrained(model, tmp_path / "heads", tokenizer=tokenizer, heads=heads, weights="int8")
    with_heads = Session.load(tmp_path / "heads")
    for each in (found, with_heads):
        for one, other in zip(leaves(each.model), leaves(right.model), strict=True):
            np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    loaded, tokenizer = lin_jax.from_pretrained(folder)
    own = session_of(loaded, tokenizer).model
    assert all(np.array_equal(*pair) for pair in zip(leaves(own), leaves(right.model), strict=True))
    for verb in (lin_jax.train, lin_jax.linearize):
        with pytest.raises(UserError, match="loaded from int8 weights, which are for decoding; load the model that"):
            verb(loaded, tokenizer, "no file")
    asked, _ = lin_jax.from_pretrained(folder, dtype="float32")
    with pytest.raises(UserError, match="no file"):
        lin_jax.train(asked, tokenizer, "no file")
    for one, other in zip(jax.tree.leaves(params_of(asked)), jax.tree.leaves(params_of(loaded)), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def test_a_run_does_not_begin_from_int8(source: Path, tmp_path: Path) -> None:
    folder = convert(Pretrained.open(source), tmp_path / "int8", weights="int8")
    (tmp_path / "text.txt").write_text("some text " * 99)
    config = tmp_path / "run.yaml"
    config.write_text(f"init_from: {folder}\noutput: {tmp_path / 'run'}\ndata: {{source: '{tmp_path / 'text.txt'}'}}\n")
    remedy = f"hub import {folder} OUT --weights float"
    with pytest.raises(UserError, match=f"has int8 weights, which are for decoding; give the model .*{remedy}"):
        lin_jax.run(config)


def test_the_command(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It writes int8 weights, keeps them, and turns them back; the card and the table name them."""
    one, two, three = (str(tmp_path / name) for name in ("one", "two", "three"))
    assert main(["import", str(source), one, "--weights", "int8"]) == 0
    assert main(["export", one, two]) == 0
    assert numbers(Path(one)).keys() == numbers(Path(two)).keys()
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()
    assert main(["import", one, three, "--weights", "float", "--dtype", "bfloat16"]) == 0
    assert {array.dtype.name for array in numbers(Path(three)).values()} == {"bfloat16"}
    assert "int8, with a float32 factor" in (tmp_path / "one/README.md").read_text()
    assert "trust_remote_code=True" in (tmp_path / "one/README.md").read_text()
    assert "int8" not in (tmp_path / "three/README.md").read_text()
    capsys.readouterr()
    assert main(["inspect", one]) == 0
    shown = capsys.readouterr().out
    assert "tensors int8, with factors  16, " in shown
    assert "int8, for decoding; to train them: hub import FOLDER OUT --weights float" in shown
    assert OPTIONS == WEIGHTS


def test_what_cannot_be_is_said(source: Path, tmp_path: Path) -> None:
    model = SOFTMAX.model("float32")
    with pytest.raises(UserError, match="weights 'int4' are unknown; choose one of stored, int8"):
        save_pretrained(model, tmp_path / "model", weights="int4")
    with pytest.raises(UserError, match="weights 'int4' are unknown; choose one of stored, int8, float"):
        convert(Pretrained.open(source), tmp_path / "model", weights="int4")

    folder = convert(Pretrained.open(source), tmp_path / "int8", weights="int8")
    file, there = folder / "model.safetensors", numbers(folder)
    name = "model.norm.weight"
    wrong = {
        "lm_head.weight is int8, and lm_head.weight_scale is not there": {"lm_head.weight_scale": None},
        r"lm_head.weight_scale is float32 \(4, 1\), and lm_head.weight has shape": {
            "lm_head.weight_scale": np.ones((4, 1), np.float32)
        },
        "weight_scale holds a factor that is not above zero": {"lm_head.weight_scale": np.zeros((23, 1), np.float32)},
        f"{name}_scale is unknown": {f"{name}_scale": np.ones((16, 1), np.float32)},
    }
    for message, change in wrong.items():
        content = {name: array for name, array in (there | change).items() if array is not None}
        save_file(content, file, metadata={"format": "pt"})
        with pytest.raises(UserError, match=message):
            from_pretrained(folder)


def test_rounding_again_changes_nothing() -> None:
    """Factors have few enough bits: products with integers are exact, and give the same integers and factors."""
    from lin_jax.models.products import dequantized, quantized

    draw = np.random.default_rng(3)
    weight = (draw.normal(size=(4000, 12)) * np.exp(draw.normal(size=(4000, 1)) * 9)).astype(np.float32)
    integers, factors = quantized(weight)
    exact = np.asarray(integers, np.float64) * np.asarray(factors, np.float64)[:, None]
    products = dequantized(integers, factors)
    assert np.array_equal(np.asarray(products, np.float64), exact)
    for one, other in zip(quantized(products), (integers, factors), strict=True):
        assert np.array_equal(np.asarray(one), np.asarray(other))
