"""Folders that others wrote, each after a public report: the values that are right, or a line that says what to do."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file

from lin_jax.attention import AttentionConfig
from lin_jax.cli.hub.options import main
from lin_jax.errors import UserError
from lin_jax.hub import from_pretrained
from lin_jax.hub.files import generation_ends, read_checkpoint
from lin_jax.hub.load import Pretrained

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": 32,
    "n_embd": 16,
    "n_layer": 1,
    "n_head": 2,
    "n_positions": 64,
}
T5: dict[str, Any] = {
    "model_type": "t5",
    "architectures": ["T5ForConditionalGeneration"],
    "vocab_size": 32,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 1,
    "num_heads": 2,
    "tie_word_embeddings": False,
}
BERT: dict[str, Any] = {
    "model_type": "bert",
    "architectures": ["BertForMaskedLM"],
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
Arrays = dict[str, np.ndarray]


def tensors_of(config: dict[str, Any]) -> Arrays:
    """Random tensors of a model, by transformers' names."""
    automatic = transformers.AutoConfig.for_model(**config)
    theirs = getattr(transformers, config["architectures"][0])(automatic)
    rng = np.random.default_rng(0)
    names = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    return {name: rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in names.items()}


@pytest.fixture(scope="module")
def llama() -> Arrays:
    return tensors_of(LLAMA)


def write(folder: Path, config: dict[str, Any], tensors: Arrays) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def refused(act: Callable[[], Any]) -> str:
    """The line of an error, which comes quickly."""
    begin = time.perf_counter()
    with pytest.raises(UserError) as caught:
        act()
    assert time.perf_counter() - begin < 5
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1500
    return str(caught.value)


def theirs(folder: Path) -> Any:
    """The model as transformers reads it."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


class TestFiles:
    """What is read of a folder, and what is not."""

    def write_index(self, folder: Path, **places: str) -> None:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))

    @pytest.mark.parametrize("name", ["../outside.safetensors", "/{folder}/outside.safetensors", "x/../../o", "a\0b"])
    def test_nothing_outside_the_folder(self, name: str, tmp_path: Path) -> None:
        save_file({"a": np.ones(2)}, tmp_path / "outside.safetensors")
        (tmp_path / "inside").mkdir()
        self.write_index(tmp_path / "inside", a=name.format(folder=tmp_path))
        assert "is outside the folder" in refused(lambda: read_checkpoint(tmp_path / "inside"))

    @pytest.mark.parametrize("name", ["n" * 300, "sub"])
    def test_shards_that_are_no_files(self, name: str, tmp_path: Path) -> None:
        (tmp_path / "sub").mkdir()
        self.write_index(tmp_path, a=name)
        assert "of the 1 shards" in refused(lambda: read_checkpoint(tmp_path))

    def test_links(self, tmp_path: Path) -> None:
        """As the Hub's own folders have them; a link to nothing is named."""
        save_file({"a": np.ones(2)}, tmp_path / "real.safetensors")
        (tmp_path / "folder").mkdir()
        link = tmp_path / "folder" / "model.safetensors"
        link.symlink_to("../real.safetensors")
        assert np.asarray(read_checkpoint(tmp_path / "folder")["a"]).tolist() == [1, 1]
        link.unlink()
        link.symlink_to("../blob")
        assert "is a link to ../blob, which is not there" in refused(lambda: read_checkpoint(tmp_path / "folder"))

    @pytest.mark.parametrize("old", [True, False])
    def test_an_old_index_beside_a_new_file(
        self, old: bool, llama: Arrays, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The single file is read, as by transformers, whether the old shards are still there or not."""
        write(tmp_path, LLAMA, llama)
        if old:
            save_file({name: np.zeros_like(tensor) for name, tensor in llama.items()}, tmp_path / "m1.safetensors")
        self.write_index(tmp_path, **dict.fromkeys(llama, "m1.safetensors"))
        model = from_pretrained(tmp_path)
        assert np.array_equal(model.embed.embedding[...], llama[EMBEDDING])
        assert np.array_equal(theirs(tmp_path).model.embed_tokens.weight.detach().numpy(), llama[EMBEDDING])
        [line] = caplog.messages
        assert "model.safetensors and model.safetensors.index.json of other files: the former was read" in line

    def test_an_index_that_names_the_single_file(self, tmp_path: Path) -> None:
        save_file({"a": np.ones(2)}, tmp_path / "model.safetensors")
        save_file({"b": np.ones(3)}, tmp_path / "more.safetensors")
        self.write_index(tmp_path, a="model.safetensors", b="more.safetensors")
        assert set(read_checkpoint(tmp_path)) == {"a", "b"}

    @pytest.mark.parametrize("size", [2**60, 2**63, 2**40])
    def test_headers_that_claim_more_than_there_is(self, size: int, tmp_path: Path) -> None:
        (tmp_path / "model.safetensors").write_bytes(size.to_bytes(8, "little") + b"{}")
        assert "is truncated or not a safetensors file" in refused(lambda: read_checkpoint(tmp_path))

    def test_marks_of_byte_order(self, llama: Arrays, tmp_path: Path) -> None:
        write(tmp_path, LLAMA, llama)
        for name, content in (("config.json", LLAMA), ("generation_config.json", {"eos_token_id": [2, 5]})):
            (tmp_path / name).write_text(json.dumps(content), encoding="utf-8-sig")
        assert np.array_equal(from_pretrained(tmp_path).head.kernel[...], llama[HEAD].T)
        assert generation_ends(tmp_path) == (2, 5)

    @pytest.mark.parametrize("value", [-1, True, [[0]], "0", 1.5, 10**12])
    def test_end_tokens_that_are_none(self, value: Any, llama: Arrays, tmp_path: Path) -> None:
        write(tmp_path, LLAMA | {"eos_token_id": value}, llama)
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
        assert "eos_token_id" in refused(lambda: Pretrained.open(tmp_path))
        assert "is no token; give its id" in refused(lambda: generation_ends(tmp_path))

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_weights_that_are_no_numbers(self, value: float, dtype: str, llama: Arrays, tmp_path: Path) -> None:
        wrong = llama | {"model.norm.weight": np.where(np.arange(16) == 7, value, 1).astype(np.float32)}
        folder = write(tmp_path, LLAMA, wrong)
        assert "model.norm.weight holds NaN or infinity" in refused(lambda: from_pretrained(folder, param_dtype=dtype))


class TestOptions:
    """What stands in `config.json`."""

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"rms_norm_eps": "small"}, 'rms_norm_eps is "small" in the configuration; give a number above 0'),
            ({"rms_norm_eps": float("nan")}, "rms_norm_eps is NaN"),
            ({"rms_norm_eps": 10**400}, "rms_norm_eps is 1000"),
            ({"rope_theta": 0}, "rope_theta is 0"),
            ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor is 0"),
            ({"rope_scaling": "linear"}, 'rope_scaling is "linear" in the configuration; give an object'),
            ({"rope_scaling": {"rope_type": "longrope", "short_factor": 5, "long_factor": [1]}}, "short_factor is 5"),
            ({"hidden_size": -16}, "hidden_size is -16"),
            ({"hidden_size": 16.5}, "hidden_size is 16.5"),
            ({"max_position_embeddings": -1}, "max_position_embeddings is -1"),
            ({"vocab_size": 10**9}, "the model expects (1000000000, 16)"),
            ({"num_hidden_layers": 10**6}, "says 1,000,000 layers, and the files in"),
            ({"architectures": [5]}, "architectures is [5]"),
            ({"model_type": ["llama"]}, 'model_type ["llama"] in config.json is not supported'),
            ({"tie_word_embeddings": "no"}, 'tie_word_embeddings is "no" in the configuration; give true or false'),
            ({"layer_types": 5}, "layer_types is 5"),
            ({"attention": {"name": "augmented", "group_size": True}}, "group_size is true"),
        ],
    )
    def test_refused(self, change: dict[str, Any], message: str, llama: Arrays, tmp_path: Path) -> None:
        folder = write(tmp_path, LLAMA | change, llama)
        assert message in refused(lambda: from_pretrained(folder))

    @pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, '{"a":' * 900 + "1" + "}" * 900])
    def test_nesting(self, text: str, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(text)
        assert "is nested more than 64 levels deep" in refused(lambda: Pretrained.open(tmp_path))

    @pytest.mark.parametrize(
        "name",
        [
            "hidden_act",
            "architectures",
            "attention_bias",
            "rms_norm_eps",
            "head_dim",
            "initializer_range",
            "num_key_value_heads",
            "rope_scaling",
            "rope_parameters",
            "rope_theta",
            "tie_word_embeddings",
            "quantization_config",
            "mlp_bias",
            "layer_types",
        ],
    )
    def test_null_is_absent(self, name: str, llama: Arrays, tmp_path: Path) -> None:
        absent = Pretrained.open(write(tmp_path / "absent", LLAMA, llama))
        null = Pretrained.open(write(tmp_path / "null", LLAMA | {name: None}, llama))
        assert null.model.config == absent.model.config
        assert not null.problems()

    @pytest.mark.parametrize(
        "name", ["activation_function", "layer_norm_epsilon", "n_inner", "scale_attn_weights", "initializer_range"]
    )
    def test_null_is_absent_in_a_gpt2(self, name: str, tmp_path: Path) -> None:
        tensors = {name: np.ones(1, np.float32) for name in "abc"}
        absent = Pretrained.open(write(tmp_path / "absent", GPT2, tensors))
        assert (
            Pretrained.open(write(tmp_path / "null", GPT2 | {name: None}, tensors)).model.config == absent.model.config
        )

    @pytest.mark.parametrize("name", ["model_type", "vocab_size"])
    def test_null_where_a_value_must_stand(self, name: str, llama: Arrays, tmp_path: Path) -> None:
        folder = write(tmp_path, LLAMA | {name: None}, llama)
        assert f"has no {name}; give" in refused(lambda: Pretrained.open(folder))

    @pytest.mark.parametrize("option", [{"attn_factor": 0.87}, {"finetuned": True}])
    def test_rotary_options_that_nobody_heeds(
        self, option: dict[str, Any], llama: Arrays, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """As in transformers, whose frequencies are the same with and without them; said once."""
        yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
        folder = write(tmp_path, LLAMA | {"rope_scaling": yarn | option}, llama)
        model = from_pretrained(folder)
        plain = Pretrained.open(write(tmp_path / "plain", LLAMA | {"rope_scaling": yarn}, llama)).model.config
        assert model.config.rotary == plain.rotary
        frequencies = [theirs(each).model.rotary_emb for each in (folder, tmp_path / "plain")]
        assert frequencies[0].attention_scaling == frequencies[1].attention_scaling
        [line] = [line for line in caplog.messages if "rotary options" in line]
        assert next(iter(option)) in line

    def test_a_window(self, llama: Arrays, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """It is that of softmax, whose state it bounds; another attention has none."""
        mistral = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 16}
        folder = write(tmp_path, LLAMA | mistral | {"num_key_value_heads": 2}, llama)
        model = from_pretrained(folder)
        assert model.config.attention == AttentionConfig("softmax", window=16)
        assert not caplog.messages
        assert model.init_state(1, 1000).keys.shape[2] == 16
        linear = Pretrained.open(folder, attention="augmented")
        assert "falls away with the attention that is replaced" in linear.notes[0]
        assert main(["import", str(folder), str(tmp_path / "out")]) == 0
        said = json.loads((tmp_path / "out" / "config.json").read_text())
        assert (said["model_type"], said["sliding_window"]) == ("mistral", 16)

    @pytest.mark.parametrize(
        ("architecture", "message"),
        [
            (
                "LlamaForSequenceClassification",
                "names a LlamaForSequenceClassification, which is not supported; give one",
            ),
            ("LlamaModel", 'a LlamaModel is saved without a head; set "tie_word_embeddings": true'),
        ],
    )
    def test_architectures(self, architecture: str, message: str, llama: Arrays, tmp_path: Path) -> None:
        tensors = {name: tensor for name, tensor in llama.items() if name != HEAD}
        folder = write(tmp_path, LLAMA | {"architectures": [architecture]}, tensors)
        assert message in refused(lambda: from_pretrained(folder))


class TestHeads:
    """One rule in all families."""

    @pytest.mark.parametrize("config", [LLAMA, LLAMA | {"tie_word_embeddings": False}, T5], ids=["none", "false", "t5"])
    def test_a_missing_head(self, config: dict[str, Any], tmp_path: Path) -> None:
        tensors = tensors_of(config)
        del tensors[HEAD]
        line = refused(lambda: from_pretrained(write(tmp_path, config, tensors)))
        assert "lm_head.weight is missing" in line
        assert 'set "tie_word_embeddings": true' in line

    def test_another_head_than_the_embedding(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """A tied configuration with a head of its own: the head of the file, as in transformers."""
        for config in (LLAMA | {"tie_word_embeddings": True}, GPT2):
            caplog.clear()
            tensors = tensors_of(config)
            folder = write(tmp_path / config["model_type"], config, tensors)
            model = from_pretrained(folder)
            assert np.array_equal(model.head.kernel[...], tensors[HEAD].T)
            assert np.array_equal(theirs(folder).lm_head.weight.detach().numpy(), tensors[HEAD])
            assert not model.config.tie_embeddings
            assert len([line for line in caplog.messages if "as if tie_word_embeddings were" in line]) == 1

    @pytest.mark.parametrize("config", [T5 | {"tie_word_embeddings": True}, BERT], ids=["t5", "bert"])
    def test_another_head_where_no_model_has_one(self, config: dict[str, Any], tmp_path: Path) -> None:
        folder = write(tmp_path, config, tensors_of(config))
        assert "tie_word_embeddings" in refused(lambda: from_pretrained(folder))

    @pytest.mark.parametrize("kept", [("encoder",), ("decoder",), ("encoder", "decoder")])
    def test_a_t5_without_its_shared_embedding(self, kept: tuple[str, ...], tmp_path: Path) -> None:
        """Either part's copy is the embedding, and the head stays what it is."""
        tensors = tensors_of(T5)
        embedding = tensors.pop("shared.weight")
        tensors = {name: tensor for name, tensor in tensors.items() if "embed_tokens" not in name}
        copies = {f"{part}.embed_tokens.weight": embedding for part in kept}
        model = from_pretrained(write(tmp_path, T5, tensors | copies))
        assert np.array_equal(model.embed.embedding[...], embedding)
        assert np.array_equal(model.head.kernel[...], tensors[HEAD].T)
        assert "shared.weight is missing" in refused(lambda: from_pretrained(write(tmp_path / "none", T5, tensors)))


class TestNames:
    """Beginnings and wrappers of names."""

    @pytest.mark.parametrize(
        "rename",
        [
            lambda name: f"module.{name}",
            lambda name: f"_orig_mod.{name}",
            lambda name: f"model.{name}",
            lambda name: name.replace("layers.0.", "layers.0._orig_mod."),
            lambda name: name.replace("layers.0.", "layers.0._checkpoint_wrapped_module."),
            lambda name: name.removeprefix("model."),
        ],
    )
    def test_of_a_llama(self, rename: Callable[[str], str], llama: Arrays, tmp_path: Path) -> None:
        model = from_pretrained(write(tmp_path, LLAMA, {rename(name): tensor for name, tensor in llama.items()}))
        assert np.array_equal(model.embed.embedding[...], llama[EMBEDDING])
        assert np.array_equal(model.head.kernel[...], llama[HEAD].T)
        gate = model.layers.layers.feed_forward.gate.kernel[...]
        assert np.array_equal(gate[0], llama["model.layers.0.mlp.gate_proj.weight"].T)

    @pytest.mark.parametrize("config", [GPT2, BERT], ids=["gpt2", "bert"])
    @pytest.mark.parametrize("front", ["", "module.", "model."])
    def test_of_others(self, config: dict[str, Any], front: str, tmp_path: Path) -> None:
        """A trunk alone, or inside another model."""
        prefix = {"gpt2": "transformer.", "bert": "bert."}[config["model_type"]]
        tensors = {name: each for name, each in tensors_of(config).items() if name.startswith(prefix)}
        renamed = {front + (name if front else name.removeprefix(prefix)): each for name, each in tensors.items()}
        folder = write(tmp_path, config, renamed)
        opened = Pretrained.open(folder, head="encoder" if config is BERT else None)
        assert not opened.problems()
        assert opened.entries

    def test_one_tensor_twice(self, llama: Arrays, tmp_path: Path) -> None:
        folder = write(tmp_path, LLAMA, llama | {f"module.{HEAD}": llama[HEAD]})
        assert "are one tensor, lm_head.weight; keep one of them" in refused(lambda: from_pretrained(folder))

    def test_many_that_do_not_fit(self, llama: Arrays, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """A line names some, counts the others, and says what they have in common; a table says what to do."""
        strange = {f"model.layers.0.self_attn.q_proj.lora_{each}.weight": np.ones(1, np.float32) for each in range(40)}
        folder = write(tmp_path, LLAMA, llama | strange)
        line = refused(lambda: from_pretrained(folder))
        assert line.count("is unknown") == 3
        assert "37 more are unknown, all of them model.layers.*.self_attn.q_proj.*.weight; it holds adapters" in line
        assert main(["inspect", str(folder)]) == 1
        assert "what to do" in capsys.readouterr().out.splitlines()[-1]


class TestBertHeads:
    """Checkpoints of other tasks, as bases."""

    @pytest.mark.parametrize("architecture", ["BertForQuestionAnswering", "BertForTokenClassification"])
    def test_heads_that_no_model_here_has(self, architecture: str, tmp_path: Path) -> None:
        """Refused by name; with a head that is asked for, the trunk is read, and so it is said."""
        config = BERT | {"architectures": [architecture]}
        tensors = tensors_of(config)
        folder = write(tmp_path, config, tensors)
        assert f"names a {architecture}, which is not supported" in refused(lambda: from_pretrained(folder))
        for head in ("classifier", "encoder"):
            opened = Pretrained.open(folder, head=head)
            assert not opened.problems()
            assert f"config.json names a {architecture}, and a " in opened.notes[0]
        model = from_pretrained(folder, head="classifier")
        theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
        words = tensors["bert.embeddings.word_embeddings.weight"]
        assert np.array_equal(model.bert.embed.word.embedding[...], words)
        assert np.array_equal(theirs.bert.embeddings.word_embeddings.weight.detach().numpy(), words)
        # A classifier of the same form is read by transformers, too.
        same = np.array_equal(model.head.kernel[...].T, theirs.classifier.weight.detach().numpy())
        assert same == (architecture == "BertForTokenClassification")

    @pytest.mark.parametrize("second", [True, False])
    def test_the_bias_under_its_second_name(self, second: bool, tmp_path: Path) -> None:
        tensors = tensors_of(BERT)
        bias = tensors["cls.predictions.bias"]
        tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"]
        tensors["cls.predictions.decoder.bias"] = bias
        if second:
            del tensors["cls.predictions.bias"]
        folder = write(tmp_path, BERT, tensors)
        assert np.array_equal(from_pretrained(folder).bias[...], bias)
        theirs = transformers.AutoModelForMaskedLM.from_pretrained(folder)
        assert np.array_equal(theirs.cls.predictions.decoder.bias.detach().numpy(), bias)
        assert not Pretrained.open(folder, head="classifier").problems()


def test_files_are_left_as_they_are(llama: Arrays, tmp_path: Path) -> None:
    """Reading under other names changes nothing in the folder."""
    folder = write(tmp_path, LLAMA, {f"module.{name}": tensor for name, tensor in llama.items()})
    before = (folder / "model.safetensors").read_bytes()
    from_pretrained(folder)
    assert (folder / "model.safetensors").read_bytes() == before
    assert set(load_file(folder / "model.safetensors")) == {f"module.{name}" for name in llama}
