"""Augmented linear attention as one operation. So far: the reference that every implementation is checked against."""

from pallas_kernels.augmented_attention.reference import (
    augmented_attention_reference as augmented_attention_reference,
)
