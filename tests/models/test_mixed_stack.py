"""Models whose layers have attentions of several kinds: forms, parameters, loops, drafts, checkpoints."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.cells import cells
from support.model_forms import assert_documents_are_apart, assert_forms_agree, random_model
from support.samples import TREE, VOCABULARY, KnowingDrafter, build_model, padded

from lin_jax.attention import AttentionConfig
from lin_jax.decoding import Generator
from lin_jax.errors import UserError
from lin_jax.models import Gpt2, Gpt2Config, Llama, LlamaConfig, SeparateLayers, as_trained
from lin_jax.models.mixed_stack import MixedStack
from lin_jax.models.params import abstract_model, filled, initial_params, mixer_order, params_of

COMMON = {"group_size": 8, "kernel_size": 5, "initial_alpha": 0.3}
SLIDING = {"name": "softmax", "window": 3}
SIZES = {"vocab_size": 19, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2}
DOUBLE = {"dtype": "float64", "param_dtype": "float64"}
MIXES = {
    "repeated": (4, AttentionConfig("augmented", **COMMON, pattern=["augmented", SLIDING])),
    "by number": (4, AttentionConfig("augmented", **COMMON, layers={0: "softmax", 3: SLIDING})),
}


def llama(count: int, attention: AttentionConfig, **options) -> LlamaConfig:
    return LlamaConfig(**SIZES, **DOUBLE, num_layers=count, attention=attention, **options)


def model_of(name: str) -> Llama:
    return random_model(lambda rngs: Llama(llama(*MIXES[name]), rngs=rngs))


@pytest.mark.parametrize("name", cells(["by number"], ["repeated"]))
@pytest.mark.thorough
def test_forms_agree(name: str, x64: None) -> None:
    """Drafts of more layers and fewer, and rows of several documents, as in models of one attention."""
    model = model_of(name)
    assert isinstance(model.layers, MixedStack)
    assert_forms_agree(model)
    assert_documents_are_apart(model)


@pytest.mark.thorough
@pytest.mark.parametrize("name", cells(["repeated"], ["by number"]))
def test_drafts_change_nothing(name: str, x64: None) -> None:
    """A tree that is deeper than the window, of drafts that are right at times."""
    count, attention = MIXES[name]
    model, rng = build_model(attention, layers=count), np.random.default_rng(5)
    prompts = [rng.integers(0, VOCABULARY, length).tolist() for length in (1, 7, 19)]
    plain = Generator(model, prefill_chunk_size=32).generate(prompts, 24).tokens
    drafter = KnowingDrafter(padded(prompts, plain), 2, 0.8)
    found = Generator(model, drafter=drafter, tree=TREE, prefill_chunk_size=32).generate(prompts, 24)
    assert found.tokens == plain
    assert found.mean_accepted_tokens > 1.3


@pytest.mark.thorough
def test_layers_apart_and_together_again(x64: None) -> None:
    model = model_of("by number")
    tokens, expected = jnp.arange(12).reshape(1, 12), params_of(model)
    run = jax.jit(lambda model: (model(tokens), model.prefill(tokens, jnp.array([9]), model.init_state(1, 16))[1]))
    logits, state = run(model)
    some = run(model.with_layers([3, 1, 2]))
    model.layers = SeparateLayers.of(model.layers)
    for one, other in ((model, (logits, state)), (model.with_layers([3, 1, 2]), some)):
        found = run(one)
        assert jax.tree.structure(found) == jax.tree.structure(other)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9), found, other)
    jax.tree.map(np.testing.assert_array_equal, params_of(as_trained(model)), expected)


def test_the_loop_does_not_grow_with_the_depth() -> None:
    attention = AttentionConfig("augmented", **COMMON, pattern=["augmented", "augmented", SLIDING])

    def program(count: int) -> str:
        config = LlamaConfig(**SIZES, num_layers=count, attention=attention)
        model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
        graph, state = nnx.split(model)
        tokens = jax.ShapeDtypeStruct((1, 16), jnp.int32)
        return str(jax.make_jaxpr(lambda state, tokens: nnx.merge(graph, state)(tokens))(state, tokens))

    shallow, deep = program(6), program(24)
    assert shallow.count("dot_general") == deep.count("dot_general")
    assert len(deep.splitlines()) == len(shallow.splitlines())


def test_one_attention_keeps_its_parameters_and_its_name(x64: None) -> None:
    """However it is said: old checkpoints are read as ever."""
    plain = AttentionConfig("augmented", **COMMON)
    ways = [plain, AttentionConfig.of([plain]), AttentionConfig.of([plain, plain]), replace(plain, layers={1: plain})]
    trees = [jax.tree.structure(params_of(abstract_model(llama(2, way)))) for way in ways]
    assert trees == [trees[0]] * len(ways)
    assert [way.for_layers(2) for way in ways] == [plain] * len(ways)
    assert mixer_order(llama(2, ways[2])) is None


def test_a_layers_mixer_comes_from_the_same_layer_of_a_base(x64: None) -> None:
    """Of another mix: what the base has of a variable is taken layer by layer, all else stays fresh."""
    count, _ = MIXES["repeated"]
    base, own = model_of("repeated"), llama(count, AttentionConfig("augmented", **COMMON, layers={2: "softmax"}))
    model = random_model(lambda rngs: Llama(own, rngs=rngs), seed=5)
    fresh, given = params_of(model), params_of(base)
    orders = mixer_order(model.config), mixer_order(base.config)
    assert orders == ((0, 0, 1, 0), (0, 1, 0, 1))
    found = initial_params(fresh, given, orders=orders)
    mixers = [each["layers"]["mixer"]["kind0"]["alpha"] for each in (found, fresh, given)]
    # Layers 0, 1 and 3 here; 0 and 2 in the base.
    np.testing.assert_array_equal(mixers[0], np.stack([mixers[2][0], mixers[1][1], mixers[1][2]]))
    query = [each["layers"]["layers"]["attention"]["query"]["kernel"] for each in (found, given)]
    np.testing.assert_array_equal(*query)
    filled(model, found)


@pytest.mark.thorough
def test_gpt2_takes_a_mix(x64: None) -> None:
    config = Gpt2Config(**SIZES, **DOUBLE, num_layers=2, max_positions=64, attention=[SLIDING, "augmented"])
    assert_forms_agree(random_model(lambda rngs: Gpt2(config, rngs=rngs)))


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        ({"pattern": ["augmented"] * 3}, r"has 3 entries, which do not divide the model's 4 layers; give a number of"),
        ({"pattern": []}, r"attention.pattern is \[\]; give a list such as"),
        ({"pattern": ["augmented", 7]}, r"attention.pattern\[1\] is 7; give a name"),
        ({"pattern": ["augmented", "sofmax"]}, "attention.name 'sofmax' is unknown; choose one of"),
        ({"layers": {4: "softmax"}}, "names layer 4, and the model has 4, numbered from 0; give numbers up to 3"),
        ({"layers": {"first": "softmax"}}, 'has the key "first"; give numbers of layers'),
        ({"layers": {1: {"windw": 3}}}, "attention.layers.1.windw is unknown; an attention has name, group_size"),
        ({"layers": {1: {"window": "wide"}}}, 'attention.layers.1.window is "wide"; give a whole number'),
        ({"layers": "softmax"}, r"attention.layers is \"softmax\"; give attentions by number"),
        ({"layers": {0: AttentionConfig.of(["softmax"])}}, "attention.layers.0 is a mix itself"),
        ({"layers": {0: "softmax"}, "pattern": ["softmax"]}, "are both given; give one of them"),
    ],
)
def test_what_is_wrong(attention: dict, message: str, x64: None) -> None:
    with pytest.raises(UserError, match=message):
        abstract_model(llama(4, AttentionConfig(**attention)))
