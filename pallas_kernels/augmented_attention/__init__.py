"""Augmented linear attention as one operation, and the reference that every implementation is checked against."""

from pallas_kernels.augmented_attention.api import augmented_attention as augmented_attention
from pallas_kernels.augmented_attention.problem import PackedRows as PackedRows
from pallas_kernels.augmented_attention.problem import PriorContext as PriorContext
from pallas_kernels.augmented_attention.reference import (
    augmented_attention_reference as augmented_attention_reference,
)
