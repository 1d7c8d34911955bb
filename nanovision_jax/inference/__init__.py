"""Inference: a run opened for use, prompts, and the engine that answers them."""
