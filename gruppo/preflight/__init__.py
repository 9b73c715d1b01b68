"""`gruppo check`: what a recipe will take, and what is wrong with it, before a run."""
