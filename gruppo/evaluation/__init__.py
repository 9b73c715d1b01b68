"""Evaluation sets, running them, metrics, comparison and plots."""
