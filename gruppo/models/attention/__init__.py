"""Attention of transformers models on packed groups."""
