"""Pure functions on tensors and groups: filtering, credit assignment, advantages, losses, aggregation and KL."""
