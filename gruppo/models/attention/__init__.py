"""How the attention of a transformers model is computed on packed groups."""
