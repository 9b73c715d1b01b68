"""Algorithm 1 of DeepSeekMath, and everything that changes weights or saves them."""
