"""Evaluation of a model, or of its draft heads, on given text."""

from lin_jax.evaluation.head_accuracy import HeadAccuracy as HeadAccuracy
from lin_jax.evaluation.head_accuracy import head_accuracy as head_accuracy
from lin_jax.evaluation.perplexity import Perplexity as Perplexity
from lin_jax.evaluation.perplexity import evaluate as evaluate
