"""Text to batches: sources, mixtures, the held-out split, tokenizers, and packed batches that can be resumed."""

from lin_jax.data.config import DataConfig
from lin_jax.data.corpus import Corpus, Part
from lin_jax.data.mixture import MixturePart
from lin_jax.data.pipeline import training_batches
from lin_jax.data.shards import merged_positions
from lin_jax.data.sources import Document, open_documents, read_documents, stream_documents
from lin_jax.data.splitting import split_documents
from lin_jax.data.stream_decoder import StreamDecoder
from lin_jax.data.tokenizer import Tokenizer, prepare_tokenizer
from lin_jax.data.training_batches import TrainingBatches
from lin_jax.data.validation import validation_batches

__all__ = [
    "Corpus",
    "DataConfig",
    "Document",
    "MixturePart",
    "Part",
    "StreamDecoder",
    "Tokenizer",
    "TrainingBatches",
    "merged_positions",
    "open_documents",
    "prepare_tokenizer",
    "read_documents",
    "split_documents",
    "stream_documents",
    "training_batches",
    "validation_batches",
]
