"""`gruppo convert`: a recipe from the arguments of another trainer (TRL, verl, OpenRLHF)."""
