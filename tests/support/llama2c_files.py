"""Files of llama2.c with random weights."""

import struct
from dataclasses import replace
from pathlib import Path

import numpy as np

from lin_jax.hub.llama2c import Llama2cHeader

HEADER = Llama2cHeader(16, 24, 2, 4, 2, 11, 32)
UNTIED = replace(HEADER, vocab_size=-11)


def write_file(path: Path, header: Llama2cHeader) -> dict[str, np.ndarray]:
    """A file of random weights; returns its parts."""
    rng = np.random.default_rng(0)
    parts = {name: rng.normal(0, 0.3, shape).astype("<f4") for name, shape in header.arrays()}
    content = struct.pack("<7i", *vars(header).values()) + b"".join(part.tobytes() for part in parts.values())
    path.write_bytes(content)
    return {name.removeprefix("model.layers.*."): part.astype(np.float64) for name, part in parts.items()}
