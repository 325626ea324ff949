"""The log-sum-exp of attention rows, which the Triton kernels of column mass start from."""
