"""Rows from anywhere become `Prompt`s with token ids: sources, benchmarks, mixtures, offline completions."""
