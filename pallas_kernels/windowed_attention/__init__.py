"""Attention over a window and a linear memory as one operation, and the reference that it is checked against."""

from pallas_kernels.windowed_attention.api import windowed_attention as windowed_attention
from pallas_kernels.windowed_attention.api import windowed_implementation as windowed_implementation
from pallas_kernels.windowed_attention.problem import FeatureWeights as FeatureWeights
from pallas_kernels.windowed_attention.problem import WindowedPrior as WindowedPrior
from pallas_kernels.windowed_attention.reference import windowed_attention_reference as windowed_attention_reference
