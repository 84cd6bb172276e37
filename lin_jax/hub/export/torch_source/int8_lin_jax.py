"""Linear layers and tables of vectors in int8: integers from -127 to 127, and a factor for each output or row.

The `int8_weights` of a configuration names the modules that are such layers; there are no others.
"""

from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class Int8Weight(nn.Module):
    """Integers and their factors, which are in float32 or better whatever the model's type.

    Args:
        shape: of the integers.
        outputs: axis that has a factor for each place.
    """

    def __init__(self, shape: torch.Size, outputs: int) -> None:
        super().__init__()
        exact = torch.promote_types(torch.get_default_dtype(), torch.float32)
        factors = [shape[axis] if axis == outputs else 1 for axis in (0, 1)]
        self.register_buffer("weight", torch.zeros(shape, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.ones(factors, dtype=exact))


class Int8Linear(Int8Weight):
    """A linear layer: `(x @ W) * scale + b`.

    Args:
        layer: the layer in whose place it is.
    """

    def __init__(self, layer: nn.Linear | Conv1D) -> None:
        inputs_first = isinstance(layer, Conv1D)
        super().__init__(layer.weight.shape, 1 if inputs_first else 0)
        self.inputs_first = inputs_first
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """Applies the layer to the last axis."""
        weight = self.weight if self.inputs_first else self.weight.T
        scaled = _scaled_product(x, weight, self.weight_scale)
        return scaled if self.bias is None else scaled + self.bias


class Int8Embedding(Int8Weight):
    """A table of vectors `[V, E]`, read row by row in the model's type.

    Args:
        table: the table in whose place it is.
    """

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__(table.weight.shape, 0)
        self.num_embeddings, self.embedding_dim = table.weight.shape
        self.dtype = torch.get_default_dtype()

    def _apply(self, fn: Any, recurse: bool = True) -> "Int8Embedding":
        # None of its own tensors tells which type the model is turned into.
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)

    def forward(self, tokens: Tensor) -> Tensor:
        """The vectors of tokens."""
        return (self.weight[tokens] * self.weight_scale[tokens]).to(self.dtype)


class Int8TiedHead(nn.Module):
    """A head that is the table of tokens, and has no tensors of its own.

    Args:
        table: the table.
    """

    def __init__(self, table: Int8Embedding) -> None:
        super().__init__()
        self.table = [table]  # in a list it is no part of this module

    @property
    def weight(self) -> Tensor:
        """The integers of the table, which transformers 4 assigns once more."""
        return self.table[0].weight

    @weight.setter
    def weight(self, value: Tensor) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        """Products with all rows."""
        return _scaled_product(x, self.table[0].weight.T, self.table[0].weight_scale)


def put_int8_layers(model: Any) -> None:
    """Puts int8 layers in the place of those that a model's configuration names, and of a head that is such a table."""
    patterns = getattr(model.config, "int8_weights", None)
    if not patterns:
        return
    for name, layer in list(model.named_modules()):
        names = (name, f"{model.base_model_prefix}.{name}")  # the names are those of a model with a head
        if not any(fnmatchcase(each, pattern) for each in names for pattern in patterns):
            continue
        holder, _, last = name.rpartition(".")
        if isinstance(layer, nn.Linear | Conv1D):
            setattr(model.get_submodule(holder), last, Int8Linear(layer))
        elif isinstance(layer, nn.Embedding):
            setattr(model.get_submodule(holder), last, Int8Embedding(layer))
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(table, Int8Embedding) and isinstance(head, nn.Linear) and model.config.tie_word_embeddings:
        model.set_output_embeddings(Int8TiedHead(table))
        model._tied_weights_keys = None


def _scaled_product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """`x @ W` with a factor for each output, in the type of x."""
    return ((x @ weight.to(x.dtype)) * scale.flatten()).to(x.dtype)
