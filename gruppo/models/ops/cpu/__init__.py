"""The C kernels for the CPU: compiling, loading and calling them."""
