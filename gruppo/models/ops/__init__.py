"""Operations of the fused decoder, with C kernels for the CPU and torch equivalents."""
