"""Tensors in, tensors out: what the paper writes in equations. No config, no input or output."""
