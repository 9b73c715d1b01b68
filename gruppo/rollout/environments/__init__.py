"""Environments that a model talks to over several turns."""
