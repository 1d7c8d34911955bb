"""Serving: a run behind an HTTP interface that OpenAI's clients speak."""
