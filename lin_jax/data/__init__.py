"""Text to batches: sources, mixtures, the held-out split, tokenizers, and packed, resumable batches."""

from lin_jax.data.config import DataConfig, MixturePart
from lin_jax.data.loader.loader import TrainingBatches
from lin_jax.data.loader.pipeline import training_batches
from lin_jax.data.loader.sharding import merged_positions
from lin_jax.data.loader.validation import validation_batches
from lin_jax.data.sources.corpus import Corpus, CorpusPart
from lin_jax.data.sources.split import split_documents
from lin_jax.data.sources.text import Document, open_documents, read_documents, stream_documents
from lin_jax.data.tokenizers.incremental import StreamDecoder
from lin_jax.data.tokenizers.loading import load_tokenizer, prepare_tokenizer
from lin_jax.data.tokenizers.tokenizer import Tokenizer

__all__ = [
    "Corpus",
    "CorpusPart",
    "DataConfig",
    "Document",
    "MixturePart",
    "StreamDecoder",
    "Tokenizer",
    "TrainingBatches",
    "load_tokenizer",
    "merged_positions",
    "open_documents",
    "prepare_tokenizer",
    "read_documents",
    "split_documents",
    "stream_documents",
    "training_batches",
    "validation_batches",
]
