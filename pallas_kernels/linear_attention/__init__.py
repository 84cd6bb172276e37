"""Chunked linear attention with an optional normaliser and decay, as one operation."""

from pallas_kernels.linear_attention.api import linear_attention as linear_attention
from pallas_kernels.linear_attention.problem import Memory as Memory
from pallas_kernels.linear_attention.reference import linear_attention_reference as linear_attention_reference
