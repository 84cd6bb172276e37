"""Other packages' attention on the same rows, timed beside our operations: flash-linear-attention, softmax by cuDNN.

flash-linear-attention (`pip install flash-linear-attention`) needs PyTorch on a GPU; a peer that is not there is named.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

# A call without arguments that returns when its work is done.
Call = Callable[[], Any]


@dataclass(frozen=True)
class Peer:
    """Another implementation of attention.

    Attributes:
        name: as it is printed.
        operations: of ours that it stands beside.
        same: those among them that it computes too, so that its outputs can be checked.
        missing: the name of what is not installed, None if it can run.
        build: `build(arrays, operation) -> forward, forward and backward`; the first returns outputs.
    """

    name: str
    operations: tuple[str, ...]
    same: tuple[str, ...]
    missing: Callable[[], str | None]
    build: Callable[[list[Array], str], tuple[Call, Call]]


def softmax(arrays: list[Array], operation: str) -> tuple[Call, Call]:
    """Causal softmax attention by cuDNN's FlashAttention, on a CPU by XLA."""
    queries, keys, values = arrays[:3]
    implementation = "cudnn" if jax.default_backend() == "gpu" else "xla"

    def attention(queries: Array, keys: Array, values: Array) -> Array:
        return jax.nn.dot_product_attention(queries, keys, values, is_causal=True, implementation=implementation)

    @jax.jit
    def both(queries: Array, keys: Array, values: Array) -> Any:
        outputs, pull = jax.vjp(attention, queries, keys, values)
        return outputs, pull(outputs)

    forward = jax.jit(attention)
    return (lambda: forward(queries, keys, values)), (lambda: both(queries, keys, values))


def flash_linear_attention(arrays: list[Array], operation: str) -> tuple[Call, Call]:
    """Chunked linear attention by flash-linear-attention's Triton kernels, in PyTorch."""
    import torch
    from fla.ops.linear_attn import chunk_linear_attn
    from fla.ops.simple_gla import chunk_simple_gla

    def tensor(array: Array) -> Any:
        dtype = getattr(torch, array.dtype.name)
        return torch.from_numpy(np.asarray(array, np.float32)).to("cuda", dtype).requires_grad_()

    queries, keys, values = (tensor(each) for each in arrays[:3])

    def run() -> Any:
        if operation == "decayed":
            decay = 1 - 2.0 ** -np.linspace(5, 12, keys.shape[2])
            gamma = torch.tensor(np.log(decay), dtype=torch.float32, device="cuda")
            return chunk_simple_gla(queries, keys, values, g_gamma=gamma, scale=1.0)[0]
        return chunk_linear_attn(queries, keys, values, scale=1.0, normalize=operation == "linear")[0]

    def forward() -> Any:
        with torch.no_grad():
            outputs = run()
        torch.cuda.synchronize()
        return jnp.asarray(outputs.float().cpu().numpy()) if outputs.numel() < 2**22 else None

    def both() -> None:
        outputs = run()
        torch.autograd.grad(outputs, (queries, keys, values), outputs.detach())
        torch.cuda.synchronize()

    return forward, both


def _no_fla() -> str | None:
    missing = [each for each in ("torch", "fla") if importlib.util.find_spec(each) is None]
    if missing:
        return f"{' and '.join(missing)} is not installed"
    import torch

    return None if torch.cuda.is_available() else "PyTorch sees no GPU"


ALL = ("augmented", "linear", "decayed")
PEERS = (
    Peer("softmax", ALL, (), lambda: None, softmax),
    Peer("flash-linear-attention", ALL, ("linear", "decayed"), _no_fla, flash_linear_attention),
)
