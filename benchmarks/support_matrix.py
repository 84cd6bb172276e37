"""Which attention works in which model, for what: every cell is tried, on small random models in float64.

    python benchmarks/support_matrix.py [--models llama gpt2] [--attentions relu softmax] [--json FILE] [--write FILE]

A model is T(rained: eight steps lower the loss), E(ncodes: real tokens do not see padding), D(ecodes: token by token
equals the whole text), S(peculates: drafts leave the tokens of plain decoding), X (exported: what comes back from a
Hugging Face folder is equal to the bit, and PyTorch's logits of it agree: to 1e-9, or to 1e-5 where transformers' own
code, which is partly float32, opens it). A letter that
is missing is something that attention and model do not have; one in brackets failed. `--write` puts the table between
the marks in a file.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from lib.attention_names import attention_of, label
from tqdm import tqdm

from lin_jax.attention import REGISTRY, AttentionConfig, parse_name, tree_arrays
from lin_jax.decoding import DraftTree, Generator
from lin_jax.decoding.drafting.api import DraftContext, Guesses, Stateless, TreeLevel
from lin_jax.errors import exit_cleanly
from lin_jax.hub import from_pretrained, save_pretrained
from lin_jax.hub.config_json import is_known
from lin_jax.hub.families.registry import family_of_model
from lin_jax.models import (
    T5,
    Bert,
    BertConfig,
    BertMaskedLM,
    CausalModel,
    Flash,
    FlashConfig,
    FlashEncoder,
    Gpt2,
    Gpt2Config,
    Llama,
    LlamaConfig,
    T5Config,
)

VOCABULARY, LENGTH, NEW = 31, 18, 12
DOUBLE = {"dtype": "float64", "param_dtype": "float64"}
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_layers": 2, **DOUBLE}
TREE = DraftTree(((0,), (1,), (0, 0), (0, 1), (0, 0, 0)))
MARK = "<!-- support matrix -->"
Encode = Callable[[Any, jax.Array, jax.Array], jax.Array]


@dataclass
class Subject:
    """One model with one attention.

    Attributes:
        model: what is trained and exported.
        logits: of the model, from tokens `[B, T]`.
        encode: hidden vectors from tokens and a mask; None where nothing is encoded.
        causal: a causal language model; None where nothing is decoded.
        encoder: what `encode` takes instead of the model.
        in_pytorch: transformers' automatic class that opens the export.
    """

    model: Any
    logits: Callable[[Any, jax.Array], jax.Array]
    encode: Encode | None = None
    causal: CausalModel | None = None
    encoder: Any = None
    in_pytorch: str = "AutoModelForCausalLM"


def llama(attention: AttentionConfig, rngs: nnx.Rngs) -> Subject:
    """Grouped queries."""
    sizes = {"intermediate_size": 24, "num_heads": 4, "num_kv_heads": 2, "initializer_range": 0.4}
    model = Llama(LlamaConfig(**SIZES, **sizes, attention=attention), rngs=rngs)
    return Subject(model, lambda model, tokens: model(tokens), causal=model)


def gpt2(attention: AttentionConfig, rngs: nnx.Rngs) -> Subject:
    """Learnt positions."""
    sizes = {"num_heads": 2, "max_positions": 128, "initializer_range": 0.4}
    model = Gpt2(Gpt2Config(**SIZES, **sizes, attention=attention), rngs=rngs)
    return Subject(model, lambda model, tokens: model(tokens), causal=model)


def t5(attention: AttentionConfig, rngs: nnx.Rngs) -> Subject:
    """The attention in encoder and decoder, and between them where it can; else softmax there.

    A memory decays in the decoder alone.
    """
    other = replace(attention, decay="none")
    cross = other if "cross" in REGISTRY[parse_name(attention.name).base].forms else AttentionConfig("softmax")
    sizes = {"head_dim": 8, "intermediate_size": 24, "num_heads": 2}
    attentions = {"encoder_attention": other, "decoder_attention": attention, "cross_attention": cross}
    model = T5(T5Config(**SIZES, **sizes, **attentions), rngs=rngs)
    source = jnp.asarray(draw_tokens(2, 11, seed=9))
    return Subject(
        model,
        lambda model, tokens: model(tokens, tokens),
        lambda model, tokens, mask: model.encode(tokens, mask),
        model.condition(source),
        in_pytorch="AutoModelForSeq2SeqLM",
    )


def bert(attention: AttentionConfig, rngs: nnx.Rngs) -> Subject:
    """An encoder alone."""
    sizes = {"intermediate_size": 24, "num_heads": 2, "max_positions": 64}
    model = BertMaskedLM(BertConfig(**SIZES, **sizes, attention=attention), rngs=rngs)
    body: Bert = model.bert
    return Subject(
        model,
        lambda model, tokens: model(tokens),
        lambda body, tokens, mask: body.hidden(tokens, mask=mask),
        encoder=body,
        in_pytorch="AutoModelForMaskedLM",
    )


def flash(attention: AttentionConfig, rngs: nnx.Rngs) -> Subject:
    """Gated attention units, causal and, with the same sizes, as an encoder."""
    config = FlashConfig(**SIZES, query_key_size=8, initializer_range=0.4, attention=attention)
    model = Flash(config, rngs=rngs)
    encoder = FlashEncoder(replace(config, attention=replace(attention, decay="none")), rngs=rngs)
    return Subject(
        model,
        lambda model, tokens: model(tokens),
        lambda encoder, tokens, mask: encoder.hidden(tokens, mask=mask),
        model,
        encoder,
    )


MODELS = {"llama": llama, "gpt2": gpt2, "t5": t5, "bert": bert, "flash": flash}
AUGMENTED = ("performer+local+convolution", "rfa+local+convolution", "linformer+local+convolution")
# Other options than the names' own stand behind them.
WINDOWED = (
    "exponential+window",
    "hedgehog+window",
    "clustered+window",
    "exponential+window+convolution/window=5",
    "exponential+window/decay=token",
    "relu/decay=constant",
    "augmented/decay=token",
)
ATTENTIONS = ("augmented", *REGISTRY, *AUGMENTED, *WINDOWED)


def draw_tokens(*shape: int, seed: int = 0) -> np.ndarray:
    """Random tokens, none of them special."""
    return np.random.default_rng(seed).integers(3, VOCABULARY, shape)


def trains(subject: Subject) -> bool:
    """Whether eight steps of Adam lower the loss, with finite gradients for every parameter."""
    tokens = jnp.asarray(draw_tokens(2, LENGTH))

    @jax.jit
    @nnx.value_and_grad
    def loss(model: Any) -> jax.Array:
        logits = subject.logits(model, tokens)
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()

    graph, params, rest = nnx.split(subject.model, nnx.Param, ...)
    optimizer = optax.adam(1e-3)
    moments, losses = optimizer.init(params), []
    for _ in range(9):
        value, gradients = loss(nnx.merge(graph, params, rest))
        losses.append(float(value))
        if not all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(gradients)):
            return False
        updates, moments = optimizer.update(gradients, moments)
        params = optax.apply_updates(params, updates)
    return losses[-1] < losses[0]


def encodes(subject: Subject) -> bool:
    """Whether the real tokens of a padded row come out as they do alone."""
    assert subject.encode is not None
    encoder = subject.model if subject.encoder is None else subject.encoder
    tokens, real = jnp.asarray(draw_tokens(1, LENGTH)), 11
    mask = (jnp.arange(LENGTH) < real)[None].astype(jnp.int32)
    padded = subject.encode(encoder, tokens, mask)[:, :real]
    alone = subject.encode(encoder, tokens[:, :real], mask[:, :real])
    return bool(jnp.max(jnp.abs(padded - alone)) < 1e-9 * jnp.max(jnp.abs(alone)))


def decodes(subject: Subject) -> bool:
    """Whether single steps give what one piece gives."""
    model = subject.causal
    assert model is not None
    tokens = jnp.asarray(draw_tokens(2, LENGTH))
    state = model.init_state(2, LENGTH)

    @jax.jit
    def both(model: CausalModel, state: Any) -> tuple[jax.Array, jax.Array]:
        whole, _ = model.prefill(tokens, jnp.full((2,), LENGTH), state)

        def step(state: Any, token: jax.Array) -> tuple[Any, jax.Array]:
            hidden, nodes = model.verify(token[:, None], tree_arrays((-1,)), state)
            return model.commit(state, nodes, jnp.zeros((2, 1), int), jnp.ones((2,), int)), hidden[:, 0]

        return whole, jnp.moveaxis(jax.lax.scan(step, state, tokens.T)[1], 0, 1)

    whole, single = both(model, state)
    return bool(jnp.max(jnp.abs(whole - single)) < 1e-9 * jnp.max(jnp.abs(whole)))


class Prompter(Stateless):
    """Drafts from a given text, wrong at every third position; it remembers how far it has come."""

    depth, width = 3, 2

    def __init__(self, text: np.ndarray) -> None:
        self.text = nnx.Variable(jnp.asarray(text, jnp.int32))

    def init_state(self, batch: int, capacity: int) -> jax.Array:
        """Tokens of each row that came before the root."""
        del capacity
        return jnp.zeros((1, batch), jnp.int32)

    def prefill(self, state: jax.Array, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
        """So many more."""
        return state + lengths

    def commit(self, state: jax.Array, path: jax.Array, length: jax.Array) -> jax.Array:
        """So many more."""
        return state + length

    def begin(self, context: DraftContext, state: jax.Array) -> tuple[jax.Array, None]:
        """Where the root is."""
        return state[0], None

    def expand(self, shared: jax.Array, carried: None, level: TreeLevel) -> tuple[Guesses, None]:
        """The next token of the text, at either rank."""
        ahead = jnp.minimum(shared + 1 + level.depth, self.text.shape[1] - 1)[:, None]
        token = jnp.take_along_axis(self.text[...], ahead, axis=1)
        right = jnp.where(ahead % 3 == 0, (token + 1) % VOCABULARY, token)
        wrong = (right + 7) % VOCABULARY
        swapped = (ahead % 2 == 0)[..., None]
        found = jnp.where(swapped, jnp.stack([wrong, right], -1), jnp.stack([right, wrong], -1))[:, :, : level.ranks]
        return Guesses(jnp.broadcast_to(found, (*level.tokens.shape, level.ranks)), None), None


def speculates(subject: Subject) -> bool:
    """Whether drafts, some of them accepted, leave the tokens of plain decoding."""
    assert subject.causal is not None
    prompts = draw_tokens(2, 7).tolist()
    plain = Generator(subject.causal, prefill_chunk_size=8).generate(prompts, NEW)
    text = np.array([prompt + tokens for prompt, tokens in zip(prompts, plain.tokens, strict=True)])
    drafted = Generator(subject.causal, drafter=Prompter(text), tree=TREE, prefill_chunk_size=8).generate(prompts, NEW)
    return drafted.tokens == plain.tokens and drafted.mean_accepted_tokens > 1


def exports(subject: Subject) -> bool:
    """Whether an export comes back to the bit, and, where PyTorch can open it, gives the same logits there."""
    tokens = draw_tokens(2, LENGTH)
    with tempfile.TemporaryDirectory() as place:
        folder = save_pretrained(subject.model, Path(place) / "model")
        back = from_pretrained(folder, dtype="float64", param_dtype="float64")
        own, other = (dict(nnx.to_flat_state(nnx.state(model))) for model in (subject.model, back))
        if own.keys() != other.keys() or not all(np.array_equal(own[key][...], other[key][...]) for key in own):
            return False
        import torch
        import transformers

        automatic = getattr(transformers, subject.in_pytorch)
        theirs = automatic.from_pretrained(folder, trust_remote_code=True, dtype=torch.float64).eval()
        inputs = {"input_ids": torch.asarray(tokens)}
        if isinstance(subject.model, T5):
            inputs["decoder_input_ids"] = inputs["input_ids"]
        # Without a state, which yoso samples; an encoder has none.
        stateless = {} if isinstance(subject.model, BertMaskedLM) else {"use_cache": False}
        with torch.no_grad():
            found = theirs(**inputs, **stateless).logits.numpy()
    expected = np.asarray(subject.logits(subject.model, jnp.asarray(tokens)))
    bound = 1e-5 if is_known(family_of_model(subject.model), subject.model.config) else 1e-9
    return bool(np.abs(found - expected).max() < bound * np.abs(expected).max())


CHECKS: dict[str, Callable[[Subject], bool]] = {
    "T": trains,
    "E": encodes,
    "D": decodes,
    "S": speculates,
    "X": exports,
}


def config_of(attention: str) -> AttentionConfig:
    """Small sizes of an attention; options are behind its name, as in `exponential+window/window=5/decay=token`."""
    return attention_of(attention, group_size=5, kernel_size=7, initial_alpha=0.5, rank=2, hashes=4, hash_bits=3)


def has_form(model: str, attention: AttentionConfig) -> bool:
    """Whether a model takes an attention at all: one that decays is causal, and of FLASH's none in FLASH."""
    base = parse_name(attention.name).base
    if model in ("t5", "bert") and "bidirectional" not in REGISTRY[base].forms:
        return False
    unable = model == "bert" or (model in ("t5", "flash") and base.startswith("flash"))
    return attention.decay == "none" or not unable


def attempts(model: str, attention: str) -> Iterator[tuple[str, bool]]:
    """What this attention can do in this model by its forms, and whether it does."""
    config = config_of(attention)
    if not has_form(model, config):
        return
    subject = MODELS[model](config, nnx.Rngs(0))
    rng = np.random.default_rng(3)
    for path, parameter in nnx.to_flat_state(nnx.state(subject.model, nnx.Param)):
        if path[-1] in ("taps", "alpha", "balance"):
            parameter[...] = parameter[...] + jnp.asarray(rng.normal(size=parameter.shape)) / 4
    for letter, check in CHECKS.items():
        if (letter == "E" and subject.encode is None) or (letter in "DS" and subject.causal is None):
            continue
        yield letter, check(subject)


def table(results: dict[str, dict[str, dict[str, bool]]]) -> str:
    """Results by attention and model as Markdown."""
    models = list(next(iter(results.values())))
    lines = ["| attention | " + " | ".join(models) + " |", "| --- " * (len(models) + 1) + "|"]
    for attention, cells in results.items():
        words = ["".join(k if ok else f"({k})" for k, ok in cells[model].items()) or "-" for model in models]
        lines.append(f"| {label(attention)} | " + " | ".join(words) + " |")
    return "\n".join(lines)


def main() -> int:
    """Tries every cell and prints the table; 1 if something failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--attentions", nargs="+", default=list(ATTENTIONS), metavar="NAME")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results as JSON")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table between the marks in this file")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_disable_most_optimizations", True)
    for attention in options.attentions:
        config_of(attention)
    cells = [(attention, model) for attention in options.attentions for model in options.models]
    results: dict[str, dict[str, dict[str, bool]]] = {}
    for attention, model in tqdm(cells, unit="cell", disable=None):
        results.setdefault(attention, {})[model] = dict(attempts(model, attention))
        jax.clear_caches()
    print(table(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    if options.write:
        before, _, after = options.write.read_text().split(MARK)
        options.write.write_text(f"{before}{MARK}\n{table(results)}\n{MARK}{after}")
    return int(not all(ok for row in results.values() for cell in row.values() for ok in cell.values()))


if __name__ == "__main__":
    sys.exit(exit_cleanly(main))
