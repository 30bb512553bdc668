"""How fast the kernels are, beside the hardware's ceilings and other implementations."""
