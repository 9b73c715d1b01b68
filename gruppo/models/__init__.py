"""Policies, value heads, reward models, LoRA, attention backends and the operations they run on."""
