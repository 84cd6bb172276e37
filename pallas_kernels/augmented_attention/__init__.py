"""Augmented linear attention as one operation, and the reference that every implementation is checked against."""

from pallas_kernels.augmented_attention.operation import augmented_attention as augmented_attention
from pallas_kernels.augmented_attention.problem import Placement as Placement
from pallas_kernels.augmented_attention.problem import Start as Start
from pallas_kernels.augmented_attention.reference import (
    augmented_attention_reference as augmented_attention_reference,
)
