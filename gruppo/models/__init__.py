"""Policies, value models, reward models, LoRA, attention plans, and the operations they run on."""
