"""Intel Neural Compressor: rounding to nearest, GPTQ, AWQ, TEQ and AutoRound for weights.

SmoothQuant is left out: it needs Intel's extension for PyTorch, which ended before the PyTorch that we work with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.lr_scheduler import LambdaLR

from kernels.packed import Packed
from kernels.packed_scaled import PackedScaled
from methods.base import Parts, hint, register
from methods.budget import Budget
from methods.network import Network, discover
from methods.toolchains.base import Toolchain, Work, on_grid

IMPORTS = ("neural_compressor.torch.quantization",)
ONLY_WIDTH_OF_TEQ = 4
WARMUP = 0.05
BETAS = (0.9, 0.9)
LR = 1e-3


@register("tool_inc")
@dataclass(frozen=True)
class ToolINC(Toolchain):
    """Integers of the budget's width and groups.

    Two faults of the library are kept, and what they spoil is refused: it computes with differences of 8-bit codes
    and zero points modulo 256, and TEQ packs codes of 4 bits at whatever width is asked for. A third only costs
    accuracy: AWQ searches scales and ranges at 4 bits, and then rounds to the width that is asked for.

    Args:
        algorithm: `rtn`, `gptq`, `awq`, `teq` or `autoround`, with the library's options.
        steps: of TEQ's training, which the library leaves to its user: one sequence each, as in `teq`.
        iters: of AutoRound, a block.
    """

    algorithm: str = "rtn"
    steps: int = 1000
    iters: int = 200

    requirements: ClassVar[tuple[str, ...]] = ("neural-compressor-pt==3.10", "auto-round==0.16.1")

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS:
            raise ValueError(f"unknown algorithm {self.algorithm!r}: {hint(self.algorithm, ALGORITHMS)}")

    @property
    def parts(self) -> Parts:
        return Parts(rounding=self.algorithm)

    def supports(self, network: Network, budget: Budget) -> str | None:
        reason = super().supports(network, budget)
        if reason is not None:
            return reason
        if self.algorithm == "teq" and budget.bits != ONLY_WIDTH_OF_TEQ:
            return f"Neural Compressor's TEQ packs codes of {ONLY_WIDTH_OF_TEQ} bits, whatever the budget asks for"
        if budget.bits == 8 and not budget.symmetric and self.algorithm != "autoround":
            return (
                "Neural Compressor computes with asymmetric integers of 8 bits modulo 256; "
                f"take symmetric ones, {budget.name}-sym"
            )
        return None

    def settings(self, budget: Budget) -> dict[str, Any]:
        return {
            "algorithm": self.algorithm,
            "steps": self.steps,
            "iters": self.iters,
            "integers": {"bits": budget.bits, "group_size": budget.group_size or -1, "use_sym": budget.symmetric},
        }

    def packed(self, budget: Budget, tensors: Mapping[str, Tensor]) -> Packed:
        codes = on_grid(tensors["weight"], tensors["scale"], tensors.get("zero"), budget.format())
        return PackedScaled(codes, tensors["inputs"].half()) if "inputs" in tensors else codes


def run(model: nn.Module, work: Work, settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """See `methods.toolchains.base`."""
    done = ALGORITHMS[settings["algorithm"]](model, work, settings)
    read = _rounded if settings["algorithm"] == "autoround" else unpacked
    answer: dict[str, Tensor] = {}
    for name in work.linears:
        found = read(done.get_submodule(name))
        if settings["integers"]["use_sym"]:
            found.pop("zero", None)
        answer |= {f"{name}/{key}": tensor for key, tensor in found.items()}
    return answer


def unpacked(module: Any) -> dict[str, Tensor]:
    """What a linear of the library's computes with. `inputs`, if there, is what its input is multiplied by."""
    found = {}
    if hasattr(module, "input_scale"):
        found["inputs"] = module.input_scale.float()
        module = module.linear
    parameters = module.unpack()
    found |= {"weight": module.recover().float(), "scale": parameters["scales"].float()}
    if parameters["zp"] is not None:
        found["zero"] = parameters["zp"].float()
    return found


def _rounded(module: Any) -> dict[str, Tensor]:
    """The same of a linear that AutoRound leaves."""
    rows = len(module.weight)
    found = {"weight": module.weight.detach().float(), "scale": module.scale.float().view(rows, -1)}
    return found | {"zero": torch.as_tensor(module.zp).float().expand(found["scale"].numel()).reshape(rows, -1)}


def _rtn(model: nn.Module, work: Work, settings: Mapping[str, Any]) -> Any:
    from neural_compressor.torch.quantization import RTNConfig, convert, prepare

    del work
    return convert(prepare(model, RTNConfig(**settings["integers"])))


def _gptq(model: nn.Module, work: Work, settings: Mapping[str, Any]) -> Any:
    from neural_compressor.torch.quantization import GPTQConfig, convert, prepare

    prepared = prepare(model, GPTQConfig(**settings["integers"]))
    _calibrate(prepared, work)
    return convert(prepared)


def _awq(model: nn.Module, work: Work, settings: Mapping[str, Any]) -> Any:
    from neural_compressor.torch.quantization import AWQConfig, convert, prepare

    prepared = prepare(model, AWQConfig(**settings["integers"]), example_inputs=work.tokens[:1])
    _calibrate(prepared, work)
    return convert(prepared)


def _teq(model: Any, work: Work, settings: Mapping[str, Any]) -> Any:
    """The library finds nothing to absorb scales into, so it is told."""
    from neural_compressor.torch.quantization import TEQConfig, convert, prepare

    network = discover(model, model.config.vocab_size)
    norms = {g.producer: list(g.linears) for g in network.groups if g.producer and g.producer not in network.linears}
    config = TEQConfig(**settings["integers"], absorb_to_layer=norms, folding=True)
    prepared = prepare(model, config, example_inputs=work.tokens[:1])
    train(prepared, list(prepared._trained_alphas.values()), work.tokens, settings["steps"])
    return convert(prepared)


def _autoround(model: nn.Module, work: Work, settings: Mapping[str, Any]) -> Any:
    from neural_compressor.torch.quantization import AutoRoundConfig, convert, prepare

    sequences, length = work.tokens.shape
    config = AutoRoundConfig(
        **settings["integers"],
        iters=settings["iters"],
        nsamples=sequences,
        seqlen=length,
        amp=False,
        device_map="cpu",
        export_format="fake",
        output_dir=f"{work.folder}/rounded",
    )
    prepared = prepare(model, config)
    _calibrate(prepared, work)
    return convert(prepared)


ALGORITHMS: dict[str, Callable[[nn.Module, Work, Mapping[str, Any]], Any]] = {
    "rtn": _rtn,
    "gptq": _gptq,
    "awq": _awq,
    "teq": _teq,
    "autoround": _autoround,
}


@torch.no_grad()
def _calibrate(model: nn.Module, work: Work) -> None:
    for row in work.tokens:
        model(row.unsqueeze(0))


def train(model: nn.Module, scales: list[Tensor], tokens: Tensor, steps: int) -> None:
    """Train TEQ's scales on the model's loss: Adam, a linear decay after a linear rise, one sequence a step.

    Args:
        model: `model(input_ids=..., labels=...)` has a `loss`.
        scales: parameters.
        tokens: int64 [sequences, length], taken in turn.
    """
    rise = int(WARMUP * steps)
    optimizer = Adam([scale.requires_grad_() for scale in scales], lr=LR, betas=BETAS)
    schedule = LambdaLR(optimizer, lambda n: n / rise if n < rise else (steps - n) / max(steps - rise, 1))
    with torch.enable_grad():
        for step in range(steps):
            text = tokens[step % len(tokens)].unsqueeze(0)
            optimizer.zero_grad()
            model(input_ids=text, labels=text, use_cache=False).loss.backward()
            optimizer.step()
            schedule.step()
