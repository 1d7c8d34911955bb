"""Benchmarks, one a file: each has a run(...) that gives a result to write to RUN/eval/<task>.json."""
