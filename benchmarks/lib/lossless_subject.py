"""Subject of lossless.py: configurations, model, prompts, and the texts of plain decoding."""

import argparse
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from lib.attention_names import attention_of
from lib.prompts import Prompt, read_prompts
from tqdm import tqdm

from lin_jax.attention import max_draft_depth
from lin_jax.data.sources.remote import MODEL, fetch_file
from lin_jax.data.tokenizers.sentencepiece import read_sentencepiece
from lin_jax.data.tokenizers.token_bytes import token_bytes
from lin_jax.decoding import DraftTree, Generator, Sampling, TextMemory, chain
from lin_jax.decoding.autotune.costs import NullDrafter
from lin_jax.decoding.autotune.shapes import DraftShapes, draft_shapes
from lin_jax.decoding.autotune.step_costs import ENOUGH, StepCosts
from lin_jax.decoding.drafting.api import Drafter
from lin_jax.decoding.drafting.drafters import DraftParts, UnionDrafter, build_drafter, reads_memory
from lin_jax.decoding.drafting.dynamic_tree import DynamicTree
from lin_jax.decoding.drafting.tree import MC_SIM_7B_63, AnyTree
from lin_jax.decoding.engine.programs import ProgramCompiler
from lin_jax.decoding.engine.stop_strings import stop_automaton
from lin_jax.hub import from_pretrained
from lin_jax.models import CausalModel, MedusaHeads, PathHead, as_trained
from lin_jax.models.stored_weights import WeightStorage, restored
from lin_jax.session import Session
from lin_jax.session.loading import draft_parts
from lin_jax.session.session import SAME_BITS_CHUNK

SEED = 11
# Of a prompt at a time: no multiple of a group, and so short that all pieces share a program.
PIECE = 40
HEADS = 4
# Where the data folder does not hold it.
STORIES260K = "hub:karpathy/tinyllamas/stories260K"
# Guesses nothing.
SILENT = "silent"
DRAFTERS = (
    SILENT,
    "ngram",
    "medusa",
    "path",
    "model",
    "self",
    "medusa+ngram",
    "path+ngram",
    "suffix",
    "path/suffix",
    "copy",
)
TREES: dict[str, AnyTree] = {
    "chain": chain(4),
    "bushy": DraftTree(((0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (1, 0, 0), (0, 0, 0, 0))),
    "dynamic": DynamicTree(12, 4, 3, 3),
    "mc_sim_7b_63": MC_SIM_7B_63,
}
# Shapes chosen while decoding, instead of a tree.
ADAPTIVE = "adaptive"
# Every kind of drafter, chains, dynamic trees and shapes chosen while decoding, every batch size, mode and ending: what
# takes long is to compile, and this is a fifth of it.
SHORT = (
    "ngram:adaptive",
    "ngram:dynamic",
    "medusa+ngram:adaptive",
    "path+ngram:chain",
    "model:chain",
    "self:dynamic",
    "suffix:dynamic",
    "suffix:adaptive",
    "path/suffix:chain",
    "copy:chain",
)
BATCHES = (16, 3, 1)
MODES = {
    "greedy": Sampling(),
    "sampled": Sampling(0.9, top_p=0.95),
    "penalised": Sampling(0.9, min_p=0.05, repetition_penalty=1.2),
}
# With the same bits: sums of top-p and of penalties are outside of it.
SAME_BITS_MODES = {"greedy": Sampling(), "sampled": Sampling(0.9)}
ENDINGS = ("free", "end tokens", "stop string")
# Plain steps that each node of a draft, and a look of the host, are said to cost where shapes are chosen while
# decoding: so little that drafts are tried often and kept where they give anything, whatever they cost in this model.
NODE_COST, VISIT_COST = 0.01, 0.05


class Configuration(NamedTuple):
    """One way to decode."""

    drafter: str
    tree: str
    batch: int
    mode: str
    ending: str

    @property
    def name(self) -> str:
        """Name by which `--configurations` selects it."""
        return ":".join(map(str, self))


class Ending(NamedTuple):
    """Tokens and strings that end a text before its limit."""

    tokens: tuple[int, ...] = ()
    stops: tuple[str, ...] = ()


class Subject(NamedTuple):
    """Model, prompts and expected texts.

    Attributes:
        parts: the model and the parts of drafters.
        pieces: the bytes of every token.
        prompts: the prompts.
        new_tokens: limit of a text.
        plain: per mode, plain decoding's texts.
        endings: per mode, the endings by name.
        modes: ways of sampling by name.
        piece: tokens of a prompt that are read at a time.
    """

    parts: DraftParts
    pieces: list[bytes]
    prompts: list[Prompt]
    new_tokens: int
    plain: dict[str, list[list[int]]]
    endings: dict[str, dict[str, Ending]]
    modes: dict[str, Sampling]
    piece: int

    def generator(self, drafter: str, tree: str, ending: Ending | None = None) -> Generator:
        """Generator with the given drafter, tree and ending, and an empty memory."""
        ending = ending or Ending()
        parts = replace(self.parts, memory=TextMemory())
        built = NullDrafter(width=10, depth=4) if drafter == SILENT else build_drafter(drafter, parts)
        stops = stop_automaton(ending.stops, self.pieces) if ending.stops else None
        known = parts.memory if reads_memory(drafter) else None
        shapes = None
        if tree == ADAPTIVE:
            shapes = draft_shapes(built, max_draft_depth(self.parts.target.config.attention), memory=known)
        return Generator(
            self.parts.target,
            drafter=built,
            tree=None if shapes else fitting(TREES[tree], built),
            shapes=shapes,
            costs=None if shapes is None else paying_costs(shapes),
            compiler=ProgramCompiler(background=False),
            end_tokens=ending.tokens,
            stops=stops,
            prefill_chunk_size=self.piece,
            memory=known,
        )


def paying_costs(shapes: DraftShapes) -> Callable[[int], StepCosts]:
    """Costs under which drafts pay, the same for every batch size: choices follow from counts alone, not from a clock.

    Args:
        shapes: the shapes to choose among.
    """
    measured = [[1 + NODE_COST * (tree.size - 1)] * ENOUGH for tree in shapes.trees]
    return lambda slots: StepCosts([tree.size for tree in shapes.trees], measured, visit=VISIT_COST)


def configurations() -> list[Configuration]:
    """Each drafter with each tree or with shapes to choose among, over them squares of batch, mode and ending."""
    found = []
    for number, drafter in enumerate(DRAFTERS):
        trees = [
            tree for tree in (*TREES, ADAPTIVE) if tree != "mc_sim_7b_63" or drafter.startswith(("medusa", "path"))
        ]
        for order, tree in enumerate(trees):
            batch = BATCHES[(order + number) % 3]
            mode = list(MODES)[(order - number) % 3]
            found.append(Configuration(drafter, tree, batch, mode, ENDINGS[(order + number // 3) % 3]))
    return found


def fitting(tree: AnyTree, drafter: Drafter) -> AnyTree:
    """Part of a tree that a drafter can fill; of a union, both drafters in turn, a level and a rank at a time."""
    if isinstance(tree, DynamicTree):
        depth, width = min(tree.depth, drafter.depth), min(tree.width, drafter.width)
        most = DynamicTree(2, depth, tree.beam, width).max_size
        return DynamicTree(min(tree.size, most), depth, tree.beam, width)
    paths = tree.paths
    if type(drafter) is UnionDrafter and tree is not MC_SIM_7B_63:
        second = drafter.drafters[0].width
        paths = tuple(tuple(r // 2 + second * ((r + depth) % 2) for depth, r in enumerate(path)) for path in paths)
    return DraftTree(tuple(path for path in paths if len(path) <= drafter.depth and max(path) < drafter.width))


def load(options: argparse.Namespace) -> Session:
    """The model to decode with, in the type asked for, with heads that are trained or are yet to be fitted."""
    if options.model:
        session = Session.load(options.model)
        model = in_type(as_trained(session.model), options.dtype)
    else:
        place = options.data / "checkpoints" / "stories260K"
        attention = attention_of(options.attention, group_size=16, kernel_size=7)
        types = {"dtype": options.dtype, "param_dtype": options.dtype}
        model, tokens = (place / name for name in ("stories260K.bin", "tok512.bin"))
        if not place.is_dir():
            model, tokens = f"{STORIES260K}/{model.name}", fetch_file(f"{STORIES260K}/{tokens.name}", MODEL)
        model = from_pretrained(model, attention=attention, **types)
        stir(model)
        tokenizer = read_sentencepiece(tokens, model.config.vocab_size)
        session = Session(DraftParts(model), tokenizer, ())
    medusa, path = session.parts.medusa, session.parts.path
    if options.same_bits:
        model = draft_parts(model, storage=WeightStorage(same_bits=True)).target
    count = model.layers.count
    parts = DraftParts(
        target=model,
        medusa=medusa,
        path=path,
        model=model.with_layers(range(max(count - 1, 1))),
        layers=tuple(range(max(count - 2, 1))),
    )
    return replace(session, parts=parts)


def in_type(model: CausalModel, dtype: str) -> CausalModel:
    """The same model with parameters and activations of another type."""
    config = replace(model.config, dtype=dtype, param_dtype=dtype)
    other = type(model)(config, rngs=nnx.Rngs(0))
    nnx.update(other, jax.tree.map(lambda old, new: new.astype(old.dtype), nnx.state(other), nnx.state(model)))
    return other


def stir(model: CausalModel) -> None:
    """Draws factors, taps, balances and gates of decay, which begin at zero, so that every branch contributes."""
    rng = np.random.default_rng(SEED)
    for path, parameter in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if path[-1] in ("taps", "alpha", "balance") or path[-2:] == ("decay", "weight"):
            drawn = jnp.asarray(rng.normal(size=parameter.shape) / 10, parameter.dtype)
            parameter[...] = parameter[...] + drawn


def fitted(
    parts: DraftParts,
    texts: Sequence[Sequence[int]],
    *,
    places: int = 256,
    steps: int = 60,
    learning_rate: float = 1e-2,
    medusa: bool = True,
) -> DraftParts:
    """Heads that are missing, fitted to the model's own texts at some places, so that some of their guesses stand.

    Args:
        parts: the model, and the heads that there are.
        texts: token ids.
        places: how many places of the texts are learned from, all of them in every step.
        steps: of Adam.
        learning_rate: of Adam.
        medusa: whether Medusa heads are wanted beside the path head.
    """
    model, width = parts.target, max(map(len, texts))
    tokens = np.array([[*text, *[0] * (width - len(text))] for text in texts])
    every = [(row, index) for row, text in enumerate(texts) for index in range(len(text) - HEADS - 1)]
    rows, index = np.random.default_rng(SEED).permutation(every)[:places].T
    hidden = jax.jit(lambda model: model.hidden(jnp.asarray(tokens))[rows, index])(model)
    ahead = jnp.asarray(tokens[rows[:, None], index[:, None] + np.arange(1, HEADS + 2)])
    optimizer = optax.adam(learning_rate)

    def trained(heads: Any) -> Any:
        graph, state = nnx.split(heads)

        def loss(state: Any) -> jax.Array:
            logits = nnx.merge(graph, state).guess(hidden, ahead[:, :-1])
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, ahead[:, 1:]))

        def step(carry: Any, _: None) -> tuple[Any, None]:
            updates, moments = optimizer.update(jax.grad(loss)(carry[0]), carry[1])
            return (optax.apply_updates(carry[0], updates), moments), None

        fit = jax.jit(lambda state: jax.lax.scan(step, (state, optimizer.init(state)), None, steps)[0][0])
        return nnx.merge(graph, fit(state))

    return replace(
        parts,
        medusa=parts.medusa or (trained(MedusaHeads.on(model, HEADS)) if medusa else None),
        path=parts.path or trained(PathHead.on(model, max(model.config.hidden_size // 2, 1), nnx.Rngs(SEED))),
    )


def prepare(options: argparse.Namespace, chosen: Sequence[Configuration]) -> Subject:
    """Prepares everything but the measurements: model, prompts, and plain decoding's texts in the modes asked for."""
    session = load(options)
    prompts = read_prompts(options.data, session.encode_prompt, options.prompts)
    texts = [prompt.tokens for prompt in prompts]
    known, piece = (SAME_BITS_MODES, SAME_BITS_CHUNK) if options.same_bits else (MODES, PIECE)
    generator = Generator(session.model, prefill_chunk_size=piece)
    plain = {}
    modes = [mode for mode in known if any(each.mode == mode for each in chosen)]
    for mode in tqdm(modes, desc="plain decoding", unit="mode", disable=None):
        found = generator.generate(texts, options.new_tokens, sampling=known[mode], seed=SEED, slots=16)
        plain[mode] = found.tokens
    pieces = token_bytes(session.tokenizer)
    pieces += [b""] * (session.model.config.vocab_size - len(pieces))
    parts = session.parts
    if any(each.drafter.startswith(("medusa", "path")) for each in chosen):
        whole = [[*text, *rest] for text, rest in zip(texts, plain[modes[0]], strict=True)]
        learnt = fitted(replace(parts, target=restored(parts.target)), whole[:32])
        parts = replace(learnt, target=parts.target)
    endings = {mode: choose_endings(each, pieces) for mode, each in plain.items()}
    return Subject(parts, pieces, prompts, options.new_tokens, plain, endings, known, piece)


def choose_endings(texts: Sequence[Sequence[int]], pieces: Sequence[bytes]) -> dict[str, Ending]:
    """Two tokens, and a string across two tokens, each of which ends about a third of the texts."""

    def suited(found: Iterator[Any]) -> list[Any]:
        counts = Counter(found)
        return sorted(counts, key=lambda item: (abs(counts[item] - len(texts) / 3), item))

    def readable(pair: tuple[int, int]) -> str:
        return b"".join(pieces[token] for token in pair).decode(errors="ignore") if all(pieces[t] for t in pair) else ""

    ends = suited(token for text in texts for token in set(text))[:2]
    strings = map(readable, suited(pair for text in texts for pair in set(pairwise(text))))
    stop = next((string for string in strings if len(string) > 1), "\n")
    return dict(zip(ENDINGS, (Ending(), Ending(tuple(ends)), Ending((), (stop,))), strict=True))
