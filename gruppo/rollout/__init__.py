"""Prompts become scored groups: sampling, multi-turn episodes, rewards."""
