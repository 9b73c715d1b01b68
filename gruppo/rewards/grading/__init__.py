"""Extract the answer from a completion and compare it with the reference."""
