"""HAWQ-V3 (Yao et al., ICML 2021, arXiv 2011.10680): its published allocations, and its integer-only arithmetic."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from harness.claims.checks.base import check, fact
from harness.claims.evidence import Evidence, Missing
from harness.claims.verdicts import Case, Rule
from kernels.dyadic import MANTISSA_BITS, requantize
from methods.allocation.base import Problem
from methods.allocation.ilp import ILP
from methods.formats.integer import Integer

PROBLEMS = "hawq_v3_ilp.json"
NETWORKS = ("resnet18", "resnet50")
NARROW, WIDE = Integer(4), Integer(8)
UNITS = 10**9
"""Costs are counted in billionths of a megabyte, of 2^10 million bit operations, or of a millisecond."""

OUTPUT_TOP = 127
ACCUMULATORS = 1_000_000


@check("ilp_golden", Rule((16.0, 18.0)))
def ilp_golden(evidence: Evidence) -> list[Case]:
    """C07: how many of the 18 allocations that HAWQ-V3 published our solver finds again, from its published traces,
    rounding errors and costs (its repository, `ILP.ipynb` and `bit_config.py`)."""
    path = evidence.folder / PROBLEMS
    if not path.exists():
        raise Missing(f"{path} is missing; restore it from the repository")
    networks = json.loads(path.read_text())
    told = {(n, key): bits for n in NETWORKS for key, bits in networks[n]["published"].items()}
    more = {
        f"{n} {key}": charge(networks[n], bits) - charge(networks[n], found)
        for (n, key), bits in told.items()
        if (found := allocation(networks[n], key)) != bits
    }
    missed = "".join(f"; the one published for {name} has an Ω larger by {loss:.2g}" for name, loss in more.items())
    test = f"the widths of all layers compared{missed}"
    return [fact(f"published allocations, of {len(told)}", len(told) - len(more), "allocations", test)]


def allocation(network: dict[str, Any], key: str) -> list[int]:
    """Widths of a network's layers for `CONSTRAINT_SHARE`: an upper bound on the size, the bit operations or the
    latency, a share of the way from all layers in 4 bits to all in 8. Tied layers share a width."""
    constraint, share = key.split("_")
    members = _groups(network)
    traces, arrays = network["arrays"]["Hutchinson_trace"], network["arrays"]
    squared = {NARROW: arrays["delta_weights_4bit_square"], WIDE: arrays["delta_weights_8bit_square"]}
    each = {fmt: _costs(arrays, constraint, int(fmt.bits)) for fmt in squared}
    least, most = (sum(costs) for costs in each.values())
    limit = least + float(share) * (most - least)
    problem = Problem(
        {g: {f: sum(traces[i] * squared[f][i] for i in rows) for f in squared} for g, rows in members.items()},
        {g: {f: round(UNITS * sum(each[f][i] for i in rows)) for f in squared} for g, rows in members.items()},
        UNITS,
        limit + len(traces) / UNITS,  # every cost was rounded
        slack=limit,
    )
    plan = ILP()(problem)
    widths = {i: int(plan[g].bits) for g, rows in members.items() for i in rows}
    return [widths[i] for i in sorted(widths)]


def charge(network: dict[str, Any], bits: list[int]) -> float:
    """The sum of Ω over layers in these widths."""
    arrays = network["arrays"]
    squared = {8: arrays["delta_weights_8bit_square"], 4: arrays["delta_weights_4bit_square"]}
    return sum(arrays["Hutchinson_trace"][i] * squared[width][i] for i, width in enumerate(bits))


def _groups(network: dict[str, Any]) -> dict[str, list[int]]:
    first = {layer: ties[0] for ties in network["ties"] for layer in ties}
    members: dict[str, list[int]] = {}
    for layer in range(len(network["layers"])):
        members.setdefault(str(first.get(layer, layer)), []).append(layer)
    return members


def _costs(arrays: dict[str, list[float]], constraint: str, width: int) -> list[float]:
    return {
        "modelsize": [n * width / 8 for n in arrays["parameters"]],
        "bops": [n * width**2 / 1024 for n in arrays["bops"]],
        "latency": arrays[f"latency_int{width}"],
    }[constraint]


@check("dyadic", Rule((0.0, 0.001)))
def dyadic_mismatches(evidence: Evidence) -> list[Case]:
    """C06: the share of 8-bit outputs in which a dyadic multiplier m/2^e differs from the fp32 one.

    Accumulators are normal, as sums of many products are, with the spreads of layers of some hundreds to tens of
    thousands of inputs, and multipliers put four deviations at the largest output.
    """
    del evidence
    shares = {bits: float((differences(bits) > 0).double().mean()) for bits in (MANTISSA_BITS, 15, 7)}
    narrower = ", ".join(f"{bits} bits: {shares[bits]:.2g}" for bits in (15, 7))
    test = f"{ACCUMULATORS:,} accumulators; with a mantissa of {narrower}"
    return [fact(f"{MANTISSA_BITS}-bit mantissa", shares[MANTISSA_BITS], "share of integers that differ", test)]


@check("dyadic_lsb", Rule((0.0, 1.0)))
def dyadic_largest(evidence: Evidence) -> list[Case]:
    """C06: the largest difference of these outputs, in units of the last bit."""
    del evidence
    largest = {bits: float(differences(bits).max()) for bits in (MANTISSA_BITS, 15, 7)}
    narrower = ", ".join(f"{bits} bits: {largest[bits]:.0f}" for bits in (15, 7))
    test = f"{ACCUMULATORS:,} accumulators; with a mantissa of {narrower}"
    return [fact(f"{MANTISSA_BITS}-bit mantissa", largest[MANTISSA_BITS], "LSB", test)]


def differences(bits: int, count: int = ACCUMULATORS) -> Tensor:
    """|q_dyadic − q_float| of 8-bit outputs [count], with a mantissa of so many bits."""
    generator = torch.Generator().manual_seed(0)
    spread = 10 ** (3 + 3 * torch.rand(count, generator=generator, dtype=torch.float64))
    accumulators = (spread * torch.randn(count, generator=generator, dtype=torch.float64)).round().long()
    multipliers = (OUTPUT_TOP / (4 * spread)).float()
    fraction, exponent = torch.frexp(multipliers)
    mantissa = torch.floor(fraction.double() * 2**bits + 0.5).long()
    dyadic = requantize(accumulators, mantissa, bits - exponent.long())
    floating = torch.floor(accumulators.float() * multipliers + 0.5).long()
    return (_clamped(dyadic) - _clamped(floating)).abs()


def _clamped(outputs: Tensor) -> Tensor:
    return outputs.clamp(-OUTPUT_TOP - 1, OUTPUT_TOP)
