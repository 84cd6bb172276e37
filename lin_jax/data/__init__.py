"""Text to batches: sources, the held-out split, tokenizers, and packed batches that can be resumed."""

from lin_jax.data.config import DataConfig
from lin_jax.data.pipeline import TrainingBatches, training_batches, validation_batches
from lin_jax.data.sources import Document, open_documents, read_documents, stream_documents
from lin_jax.data.splitting import split_documents
from lin_jax.data.stream_decoder import StreamDecoder
from lin_jax.data.tokenizer import Tokenizer, prepare_tokenizer

__all__ = [
    "DataConfig",
    "Document",
    "StreamDecoder",
    "Tokenizer",
    "TrainingBatches",
    "open_documents",
    "prepare_tokenizer",
    "read_documents",
    "split_documents",
    "stream_documents",
    "training_batches",
    "validation_batches",
]
