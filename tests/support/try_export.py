"""Exported folders, tried with the transformers of any Python: is the text of `generate` that of whole passes?

    python tests/support/try_export.py --write out/exports       # with lin_jax: small random models, and what they say
    OTHER/bin/python tests/support/try_export.py out/exports/*   # with torch and transformers alone, any version

Each way to generate (one prompt and a batch, greedy and sampled, several samples, beams, a text continued on its state,
with drafts, an assistant) is compared with passes over the whole text of each row that keep no state; greedy texts also
with those of lin_jax, where the folder was written by `--write`. Batches are padded on the left; those of a T5's
encoder on the right. A cell says `equal`, `WRONG`, or the first line of the error. `--json FILE` writes the cells, too.
The exit status is 1 if a cell is WRONG.

Another version is tried in an environment of its own:

    python -m venv /tmp/other && /tmp/other/bin/pip install torch transformers==5.24.0
"""

import argparse
import json
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel

EXPECTED_FILE = "expected.json"
TEXT = "the wind and the sea"
NEW_TOKENS, SEED = 10, 3
VOCABULARY = 270
OPTIONS = {"max_new_tokens": NEW_TOKENS, "eos_token_id": None, "pad_token_id": 0}
SAMPLED = {"do_sample": True, "top_k": 0}

Rows = list[list[int]]


def main() -> int:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, help="exported folders to try")
    parser.add_argument("--write", type=Path, help="write small random models into folders inside this one, and stop")
    parser.add_argument("--json", type=Path, help="write the cells to this file")
    options = parser.parse_args()
    if options.write is not None:
        import jax

        jax.config.update("jax_enable_x64", True)
        write_exports(options.write)
        return 0
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    print(f"transformers {transformers.__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    cells = {}
    for folder in options.folders:
        cells[folder.name] = try_folder(folder)
        print(f"\n{folder.name}")
        for name, found in cells[folder.name].items():
            print(f"  {name:<24} {found}")
    if options.json is not None:
        report = {"transformers": transformers.__version__, "torch": torch.__version__, "cells": cells}
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    return int(any(found.startswith("WRONG") for row in cells.values() for found in row.values()))


def try_folder(folder: Path) -> dict[str, str]:
    """All cells of a folder, by name."""
    file = folder / EXPECTED_FILE
    expected = json.loads(file.read_text()) if file.is_file() else {}
    cells = {"tokenizer": attempt(lambda: same_ids(folder, expected))}
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        automatic = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model = automatic.from_pretrained(folder, trust_remote_code=True).double().eval()
    except Exception as error:  # whatever it is, it is the answer
        return cells | {"model": said(error)}
    prompts = expected.get("prompts") or random_prompts(model)
    single = prompts[:1]
    ways: dict[str, Callable[[], str]] = {
        "greedy": lambda: compared(generated(model, single), whole_passes(model, single)),
        "greedy, batched": lambda: compared(generated(model, prompts), whole_passes(model, prompts)),
        "sampled": lambda: compared(generated(model, single, **SAMPLED), whole_passes(model, single, sample=True)),
        "sampled, batched": lambda: compared(
            generated(model, prompts, **SAMPLED), whole_passes(model, prompts, sample=True)
        ),
        "several samples": lambda: compared(
            generated(model, prompts, num_return_sequences=2, **SAMPLED),
            whole_passes(model, [row for row in prompts for _ in range(2)], sample=True),
        ),
        "beams": lambda: compared(
            generated(model, prompts, num_beams=3), generated(model, prompts, num_beams=3, use_cache=False)
        ),
        "continued on its state": lambda: compared(continued(model, single), whole_passes(model, single)),
        "speculative": lambda: compared(generated(model, single, speculative=True), whole_passes(model, single)),
        "speculative, batched": lambda: compared(
            generated(model, prompts, speculative=True), whole_passes(model, prompts)
        ),
        "assistant": lambda: compared(generated(model, single, assistant_model=model), whole_passes(model, single)),
    }
    if expected:
        ways["as lin_jax says"] = lambda: compared(generated(model, prompts), expected["greedy"])
    return cells | {name: attempt(way) for name, way in ways.items()}


def attempt(way: Callable[[], str]) -> str:
    """What a comparison finds, or the error that it ends in."""
    try:
        return way()
    except Exception as error:
        return said(error)


def said(error: Exception) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def compared(found: Rows, right: Rows) -> str:
    """`equal`, or how many rows differ."""
    wrong = sum(one != other for one, other in zip(found, right, strict=True))
    return f"WRONG: {wrong} of {len(right)} texts differ" if wrong else "equal"


def same_ids(folder: Path, expected: dict) -> str:
    """Opens the tokenizer, and compares the ids of a text and the text of these ids."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    right = expected.get("text_ids", ids) == ids and tokenizer.decode(ids) == TEXT
    return "equal" if right else "WRONG: other ids, or another text of them"


def random_prompts(model: PreTrainedModel) -> Rows:
    """Prompts of 14, 5 and 11 tokens."""
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(1, model.config.vocab_size, (count,), generator=draw).tolist() for count in (14, 5, 11)]


def padded(model: PreTrainedModel, rows: Rows) -> dict[str, torch.Tensor]:
    """Rows padded on the left, where texts go on; on the right, where they are a T5's sources."""
    longest = max(map(len, rows))
    both = [([0] * (longest - len(row)), row) for row in rows]
    left = not model.config.is_encoder_decoder
    tokens = [padding + row if left else row + padding for padding, row in both]
    mask = [padding + [1] * len(row) if left else [1] * len(row) + padding for padding, row in both]
    return {"input_ids": torch.tensor(tokens), "attention_mask": torch.tensor(mask)}


def new_tokens(model: PreTrainedModel, inputs: dict[str, torch.Tensor], tokens: torch.Tensor) -> Rows:
    """What is new in the rows that `generate` returns, behind the prompt, or the token that every text begins with."""
    return tokens[:, 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1] :].tolist()


def generated(model: PreTrainedModel, rows: Rows, **options: object) -> Rows:
    """New tokens of `generate`."""
    torch.manual_seed(SEED)
    inputs = padded(model, rows)
    return new_tokens(model, inputs, model.generate(**inputs, **OPTIONS | {"do_sample": False} | options))


def continued(model: PreTrainedModel, rows: Rows) -> Rows:
    """New tokens of two calls of `generate`, the second on the state of the first."""
    inputs, half = padded(model, rows), {**OPTIONS, "do_sample": False, "max_new_tokens": NEW_TOKENS // 2}
    first = model.generate(**inputs, **half, return_dict_in_generate=True)
    names = [name for name in ("cache", "past_key_values") if name in first]
    half["max_new_tokens"] = NEW_TOKENS - NEW_TOKENS // 2
    longer = {"input_ids": first.sequences, "attention_mask": torch.ones_like(first.sequences)}
    if model.config.is_encoder_decoder:
        longer = {**inputs, "decoder_input_ids": first.sequences}
    return new_tokens(model, inputs, model.generate(**longer, **{names[0]: first[names[0]]}, **half))


def next_logits(model: PreTrainedModel, prompt: list[int], new: list[int]) -> torch.Tensor:
    """Logits `[V]` of the next token, by one pass over the whole text."""
    if not model.config.is_encoder_decoder:
        return model(input_ids=torch.tensor([prompt + new]), use_cache=False).logits[0, -1]
    texts = {"input_ids": torch.tensor([prompt]), "decoder_input_ids": torch.tensor([[0, *new]])}
    return model(**texts, use_cache=False).logits[0, -1]


@torch.no_grad()
def whole_passes(model: PreTrainedModel, rows: Rows, *, sample: bool = False) -> Rows:
    """New tokens, each from one pass over the whole text of its row alone."""
    torch.manual_seed(SEED)
    found: Rows = [[] for _ in rows]
    for _ in range(NEW_TOKENS):
        logits = torch.stack([next_logits(model, row, new) for row, new in zip(rows, found, strict=True)])
        tokens = torch.multinomial(logits.float().softmax(-1), num_samples=1)[:, 0] if sample else logits.argmax(-1)
        for new, token in zip(found, tokens.tolist(), strict=True):
            new.append(token)
    return found


def write_exports(place: Path, names: Sequence[str] = ()) -> list[Path]:
    """Writes small models with random weights and a tokenizer, and their greedy texts; only those named, if any are."""
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from lin_jax.data import Tokenizer
    from lin_jax.hub import save_pretrained

    tokenizer = Tokenizer.train(["the wind and the sea, the sun and the rain. "] * 20, VOCABULARY)
    draw, folders, models = np.random.default_rng(0), [], small_models()
    prompts = [draw.integers(1, VOCABULARY, count).tolist() for count in (14, 5, 11)]
    for name in names or models:
        model = models[name]()
        for _, leaf in nnx.to_flat_state(nnx.state(model)):  # every parameter random, also those that begin constant
            if np.issubdtype(leaf.dtype, np.floating):
                leaf.set_value(jnp.asarray(draw.normal(size=leaf.shape) * 0.4, leaf.dtype))
        greedy = greedy_texts(model, prompts)
        folders.append(save_pretrained(model, place / name, tokenizer=tokenizer, overwrite=True))
        expected = {"prompts": prompts, "greedy": greedy, "text_ids": tokenizer.encode(TEXT).tolist()}
        (folders[-1] / EXPECTED_FILE).write_text(json.dumps(expected) + "\n")
    return folders


def greedy_texts(model: Any, prompts: Rows) -> Rows:
    """New tokens that lin_jax writes."""
    import jax.numpy as jnp

    from lin_jax.decoding import Generator
    from lin_jax.models import T5

    if not isinstance(model, T5):
        return Generator(model).generate(prompts, NEW_TOKENS).tokens
    longest = max(map(len, prompts))
    tokens = jnp.asarray([row + [0] * (longest - len(row)) for row in prompts])
    mask = jnp.asarray([[1] * len(row) + [0] * (longest - len(row)) for row in prompts])
    return Generator(model.condition(tokens, mask)).generate([[0]] * len(prompts), NEW_TOKENS).tokens


def small_models() -> dict[str, Callable[[], Any]]:
    """Models in float64, with softmax (but FLASH) and linearized, and LLaMA with scaled rotary positions."""
    from flax import nnx

    from lin_jax.attention import AttentionConfig
    from lin_jax.models import Flash, FlashConfig, Gpt2, Gpt2Config, Llama, LlamaConfig

    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_layers": 2, "num_heads": 4}
    mixers = {"group_size": 4, "kernel_size": 5, "features": 6, "rank": 2}
    models: dict[str, Callable[[], Any]] = {}
    windowed = {"window": 6, "decay": "token"}
    for name in ("softmax", "augmented", "performer+local+convolution", "linformer", "exponential+window"):
        attention = AttentionConfig(name, **mixers | (windowed if name.endswith("window") else {}))
        common = {**sizes, "dtype": "float64", "param_dtype": "float64", "attention": attention}
        llama = LlamaConfig(**common, num_kv_heads=2)
        models[f"llama-{name}"] = partial(Llama, llama, rngs=nnx.Rngs(0))
        models[f"gpt2-{name}"] = partial(Gpt2, Gpt2Config(**common, max_positions=80), rngs=nnx.Rngs(0))
        for scaling, rotary in rotary_scalings().items():
            # With softmax, longrope's factors change in the middle of a text.
            if name == "augmented" or (name == "softmax" and scaling != "longrope"):
                models[f"llama-{name}-{scaling}"] = partial(Llama, replace(llama, rotary=rotary), rngs=nnx.Rngs(0))
        if name != "softmax":
            sizes_of_units = {each: sizes[each] for each in ("vocab_size", "hidden_size", "num_layers")}
            double = {"dtype": "float64", "param_dtype": "float64"}
            flash = FlashConfig(**sizes_of_units, **double, query_key_size=8, attention=attention)
            models[f"flash-{name}"] = partial(Flash, flash, rngs=nnx.Rngs(0))
        models[f"t5-{name}"] = partial(small_t5, sizes, attention)
    return models


def small_t5(sizes: dict[str, int], attention: Any) -> Any:
    """A T5 in float64, the attention in both its halves, and between them where it can be."""
    from flax import nnx

    from lin_jax.attention import REGISTRY, AttentionConfig, parse_name
    from lin_jax.models import T5, T5Config

    entry = REGISTRY[parse_name(attention.name).base]
    plain = replace(attention, decay="none")
    parts = {
        "encoder_attention": plain,
        "decoder_attention": attention,
        "cross_attention": plain if "cross" in entry.forms else AttentionConfig("softmax"),
    }
    return T5(T5Config(**sizes, **parts, head_dim=4, dtype="float64", param_dtype="float64"), rngs=nnx.Rngs(0))


def rotary_scalings() -> dict[str, Any]:
    """Rotary options of texts of 64 tokens by the name of their scaling, as far as transformers 4 knows it."""
    from lin_jax.models import RotaryConfig

    factors = {"short_factor": (1.0, 1.3), "long_factor": (1.5, 4.0)}
    options = {
        "linear": {"original_context_length": 64, "factor": 3.0},
        "dynamic": {"original_context_length": 64, "factor": 3.0},
        "yarn": {"original_context_length": 16, "factor": 4.0},
        "llama3": {"original_context_length": 8, "factor": 8.0},
        "longrope": {"original_context_length": 16, "factor": 4.0, **factors},
    }
    return {name: RotaryConfig(1000.0, name, context_length=64, **each) for name, each in options.items()}


if __name__ == "__main__":
    sys.exit(main())
