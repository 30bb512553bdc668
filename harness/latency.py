"""The latency table of this machine: what a token costs in a linear of some shape and format, as measured here."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from harness.cache import Cache
from harness.code import code_version
from harness.environment import cpu
from kernels.linear import QuantLinear
from kernels.timing import microseconds
from methods.formats.base import Format
from methods.rounding.nearest import round_to_nearest


@dataclass(frozen=True)
class LatencyTable:
    """Measured on first use, then remembered in the cache for this processor, thread count and code."""

    cache: Cache
    device: torch.device

    @torch.no_grad()
    def __call__(self, shape: tuple[int, int], fmt: Format) -> float:
        """Microseconds of one token through a packed linear of this shape [out, in]."""
        identity = {
            "shape": list(shape),
            "format": fmt.name,
            "processor": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else cpu(),
            "threads": torch.get_num_threads(),
            "code": code_version("kernels.linear", type(fmt).__module__),
        }

        def measure() -> dict[str, torch.Tensor]:
            generator = torch.Generator().manual_seed(0)
            weight, x = (torch.randn(s, generator=generator) for s in (shape, (1, shape[1])))
            linear = QuantLinear(round_to_nearest(weight, fmt).packed).to(self.device)
            x = x.to(self.device)
            return {"microseconds": torch.tensor(microseconds(lambda: linear(x), self.device), dtype=torch.float64)}

        return float(self.cache("latency", identity, measure).value["microseconds"])
