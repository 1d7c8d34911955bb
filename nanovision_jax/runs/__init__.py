"""A run on disk: its files, config, checkpoints, lineage and metrics."""
