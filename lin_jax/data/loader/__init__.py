"""Packed training batches: shuffled, sharded, prefetched and resumable; and validation batches."""
