"""Worker processes that run user-defined code: reward functions and environments."""
