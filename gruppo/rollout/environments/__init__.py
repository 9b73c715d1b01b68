"""Environments that a model interacts with over several turns."""
