"""`gruppo study`: recipes × changes × seeds × budgets, and the questions that their runs answer."""
