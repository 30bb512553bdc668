"""Times on one GPU: `python -m kernels.bench.gpu`, or `make bench-gpu`."""
