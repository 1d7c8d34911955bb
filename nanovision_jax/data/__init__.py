"""Data: from files to packed batches. Nothing here imports jax."""
