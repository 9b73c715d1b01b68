"""`gruppo check`: estimate memory, time and disk for a recipe and report problems, before a run."""
