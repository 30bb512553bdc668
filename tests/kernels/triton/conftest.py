"""Kernels are tested in two ways without a GPU: interpreted, where every operation is NumPy's, and compiled ahead of
time. What is decorated is one or the other for the whole process, as TRITON_INTERPRET is when Triton is imported.
"""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("triton") else ["test_ahead_of_time.py", "test_ptx.py"]
