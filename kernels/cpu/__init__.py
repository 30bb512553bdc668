"""Kernels for CPUs in C++: products with packed integers, for AVX-512 with VNNI and BF16, AVX2, and any machine.

They read the buffers of `kernels.packed.PackedInteger` as they are, since one row of one block of 128 codes is whole
vectors already (`kernels.packing`): nothing is repacked, and there is no second copy of a matrix.
"""
