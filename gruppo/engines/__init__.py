"""Engines turn prompts into completions."""
