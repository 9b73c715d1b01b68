"""Reading the answer out of a completion, and comparing it with the reference."""
