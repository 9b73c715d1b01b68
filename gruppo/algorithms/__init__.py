"""Pure functions on tensors and groups: filtering, credit, advantages, losses, aggregation, KL."""
