"""How fast a packed model is: prefill and decoding beside the full-precision model, and each linear alone.

Both models take turns on the same machine, so that what disturbs one disturbs the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kernels.bench.rounds import Operation, Times, in_turns
from kernels.linear import QuantLinear
from kernels.timing import microseconds

ROUNDS = 9
MODEL, REFERENCE = "model", "reference"


@torch.no_grad()
def throughput(reference: nn.Module, model: nn.Module, prompt: Tensor, rounds: int = ROUNDS) -> dict[str, Any]:
    """Measure a packed model.

    Args:
        reference: the full-precision model.
        model: its packed copy.
        prompt: int64 [tokens], the text that is read, and that stands before each decoded token.

    Returns:
        `prefill` and `decode` in tokens a second, each with the quartiles of the rounds; `prefill_speedup` and
        `decode_speedup` over the full-precision model, each with a 95 % interval; `layers`, the microseconds of one
        token in each linear; `prompt`, its tokens, and `threads`.
    """
    device = next(model.parameters()).device
    row = prompt.unsqueeze(0).to(device)
    models = {MODEL: model, REFERENCE: reference}
    result: dict[str, Any] = {"prompt": len(prompt), "threads": torch.get_num_threads()}
    for name, make, tokens in (("prefill", prefill, len(prompt)), ("decode", decode, 1)):
        times = in_turns({key: _finished(make(chosen, row), device) for key, chosen in models.items()}, rounds)
        result |= {name: _rate(times[MODEL], tokens), f"{name}_speedup": _speedup(times)}
    return result | {"layers": latencies(model)}


def prefill(model: Any, row: Tensor) -> Operation:
    """Reads a prompt, int64 [1, tokens], and returns logits."""
    return lambda _: model(input_ids=row, use_cache=False).logits


def decode(model: Any, row: Tensor) -> Operation:
    """Reads one more token after a prompt that is cached, always the prompt's first, and returns its logits."""
    cache = model(input_ids=row, use_cache=True).past_key_values

    def step(_: int) -> Tensor:
        logits: Tensor = model(input_ids=row[:, :1], past_key_values=cache, use_cache=True).logits
        cache.crop(-1)
        return logits

    return step


def latencies(model: nn.Module) -> dict[str, float]:
    """Microseconds of one token in each packed linear, by its name."""
    found = {}
    for name, linear in model.named_modules():
        if isinstance(linear, QuantLinear):
            found[name] = _latency(linear, next(model.parameters()))
    return found


def _latency(linear: QuantLinear, like: Tensor) -> float:
    x = torch.randn(1, linear.in_features, generator=torch.Generator().manual_seed(0)).to(like)
    return microseconds(lambda: linear(x), like.device, budget=0.02)


def _finished(operation: Operation, device: torch.device) -> Operation:
    """The same, and waits for the device."""
    wait: Callable[[], object] = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def waited(turn: int) -> None:
        operation(turn)
        wait()

    return waited


def _rate(times: Times, tokens: int) -> dict[str, float]:
    first, third = times.quartiles
    return {"value": tokens / times.median, "low": tokens / third, "high": tokens / first}


def _speedup(times: Mapping[str, Times]) -> dict[str, float]:
    return dict(zip(("value", "low", "high"), times[MODEL].speedup(times[REFERENCE]), strict=True))
