"""Turns prompts into scored groups: sampling, multi-turn trajectories, rewards."""
