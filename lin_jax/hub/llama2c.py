"""Reader of llama2.c's first format: seven numbers, then all weights in float32, little endian.

The numbers are width, feed-forward width, layers, heads, key/value heads, vocabulary (negative where the head is not
tied) and longest text. The weights, each of all layers at once: embedding; attention norm; wq; wk; wv; wo; feed-forward
norm; w1 (gate); w2 (down); w3 (up); final norm; two tables of rotary frequencies, which are not needed; the head, if it
is not tied.

Their rotary positions turn neighbouring pairs `(2i, 2i+1)` of a head, ours `(i, i + D/2)`: rows of wq and wk are put in
another order on the way in, which leaves every product of queries and keys as it is.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lin_jax.errors import UserError
from lin_jax.hub.families.llama import EMBEDDING, HEAD

FIELDS = 7
# Magic number of the later formats ("ak42").
LATER_MAGIC = 0x616B3432


@dataclass(frozen=True)
class Llama2cHeader:
    """The seven numbers of a file, in their order; `vocab_size` is negative if the head is not tied."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    context_length: int

    @property
    def head_dim(self) -> int:
        """Size D of a head."""
        return self.hidden_size // self.num_heads

    @property
    def tied(self) -> bool:
        """True if the head is the transposed embedding."""
        return self.vocab_size > 0

    def arrays(self) -> list[tuple[str, tuple[int, ...]]]:
        """Name and shape of every array of the file, in order; names of stacked layers have a `*` for the layer."""
        width, inner, layers, vocabulary = self.hidden_size, self.intermediate_size, self.num_layers, self.vocab_size
        kv_width, table = self.num_kv_heads * self.head_dim, (self.context_length, self.head_dim // 2)
        head = [] if self.tied else [(HEAD, (-vocabulary, width))]
        return [
            (EMBEDDING, (abs(vocabulary), width)),
            ("model.layers.*.input_layernorm.weight", (layers, width)),
            ("model.layers.*.self_attn.q_proj.weight", (layers, width, width)),
            ("model.layers.*.self_attn.k_proj.weight", (layers, kv_width, width)),
            ("model.layers.*.self_attn.v_proj.weight", (layers, kv_width, width)),
            ("model.layers.*.self_attn.o_proj.weight", (layers, width, width)),
            ("model.layers.*.post_attention_layernorm.weight", (layers, width)),
            ("model.layers.*.mlp.gate_proj.weight", (layers, inner, width)),
            ("model.layers.*.mlp.down_proj.weight", (layers, width, inner)),
            ("model.layers.*.mlp.up_proj.weight", (layers, inner, width)),
            ("model.norm.weight", (width,)),
            ("cos", table),
            ("sin", table),
            *head,
        ]


def read_llama2c(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Opens a model under Hugging Face's names: contents of a `config.json`, and tensors, which are read when used.

    Raises:
        UserError: there is no such file, it is truncated, or of another format.
    """
    header = read_header(path)
    hf_config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": abs(header.vocab_size),
        "hidden_size": header.hidden_size,
        "intermediate_size": header.intermediate_size,
        "num_hidden_layers": header.num_layers,
        "num_attention_heads": header.num_heads,
        "num_key_value_heads": header.num_kv_heads,
        "max_position_embeddings": header.context_length,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": header.tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return hf_config, llama2c_tensors(path, header)


def read_header(path: Path) -> Llama2cHeader:
    """Reads the seven numbers of a file, and checks its size against them.

    Raises:
        UserError: there is no such file, it is truncated, or of another format.
    """
    try:
        size = path.stat().st_size
        numbers = np.fromfile(path, "<i4", FIELDS)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give a checkpoint of llama2.c") from error
    if numbers.size and int(numbers[0]) == LATER_MAGIC:
        raise UserError(f"{path} is in a later format of llama2.c; export it as version 0, which is supported")
    foreign = UserError(
        f"{path} is not in llama2.c's first format: its first seven numbers are not sizes; give a file of llama2.c"
    )
    if numbers.size < FIELDS:
        raise foreign
    header = Llama2cHeader(*numbers.tolist())
    sizes = [abs(number) if index == 5 else number for index, number in enumerate(numbers.tolist())]
    if min(sizes) < 1 or max(sizes) > 2**24 or header.hidden_size % header.num_heads or header.head_dim % 2:
        raise foreign
    if header.num_heads % header.num_kv_heads:
        raise foreign
    expected = 4 * (FIELDS + sum(math.prod(shape) for _, shape in header.arrays()))
    if size != expected:
        raise UserError(
            f"{path} has {size:,} bytes, its first numbers ask for {expected:,}: it is truncated or of another format; "
            "copy it again"
        )
    return header


def llama2c_tensors(path: Path, header: Llama2cHeader) -> dict[str, np.ndarray]:
    """Maps every tensor of a file by Hugging Face's names; numbers are read when they are used."""
    numbers = np.memmap(path, "<f4", "r", offset=4 * FIELDS)
    tensors: dict[str, np.ndarray] = {}
    begin = 0
    for name, shape in header.arrays():
        array = numbers[begin : begin + math.prod(shape)].reshape(shape)
        begin += array.size
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            array = half_split(array, header.head_dim)
        if "*" in name:
            tensors |= {name.replace("*", str(layer)): weight for layer, weight in enumerate(array)}
        elif name not in ("cos", "sin"):
            tensors[name] = array
    return tensors


def half_split(weights: np.ndarray, head_dim: int) -> np.ndarray:
    """Reorders rows `[..., H D, E]` from neighbouring pairs to split halves."""
    *lead, rows, width = weights.shape
    pairs = weights.reshape(*lead, rows // head_dim, head_dim // 2, 2, width)
    return np.swapaxes(pairs, -3, -2).reshape(weights.shape)
