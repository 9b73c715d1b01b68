"""`from gruppo.trl import GRPOTrainer, GRPOConfig`."""
