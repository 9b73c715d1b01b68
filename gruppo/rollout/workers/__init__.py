"""Processes that run users' reward functions."""
