"""Benches by name: `python -m harness.bench hessian --help`.

What a bench starts in processes of its own does not import this module again, as it would the module of a bench that
is run itself.
"""

from __future__ import annotations

import sys

from harness.bench import cpu, decode, hessian, quantize
from methods.base import hint

BENCHES = {"cpu": cpu.main, "decode": decode.main, "hessian": hessian.main, "quantize": quantize.main}


def main() -> int:
    """Exit status of the bench; 2 for an unknown name."""
    name = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if name in BENCHES:
        return BENCHES[name]()
    print(f"unknown bench {name!r}: {hint(name, BENCHES)}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
