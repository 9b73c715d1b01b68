"""Helpers without any reinforcement learning."""
