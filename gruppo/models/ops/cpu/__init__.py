"""The compiled C kernels of the CPU: building, loading and calling them."""
