"""Evaluations: one benchmark a file, and what they share in base.py."""
