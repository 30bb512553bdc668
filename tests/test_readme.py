"""What the README promises: its example method works as printed, its commands compose, its files exist."""

import re
import sys
import types
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from transformers import LlamaConfig, LlamaForCausalLM

from harness.config import register_configs, to_cell
from methods.base import METHODS, Budget, Context
from methods.base import discover as discover_methods
from methods.network import discover

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.fixture
def example():
    """The README's method, registered for the length of a test."""
    discover_methods()
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    module = types.ModuleType("stochastic_example")
    sys.modules[module.__name__] = module
    exec(compile(code, "README.md", "exec"), module.__dict__)
    yield METHODS["stochastic"]
    del METHODS["stochastic"], sys.modules[module.__name__]


def quantized_weights(method, bits: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Original and quantized weights of a random model, flat."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4
    )
    network = discover(LlamaForCausalLM(config).eval().requires_grad_(False), 50)
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    context = Context(
        network=network,
        tokens=tokens,
        scoring=tokens,
        statistics=lambda stat, linear: torch.empty(0),
        budget=Budget(bits=bits, group_size=32),
        generator=torch.Generator().manual_seed(seed),
    )
    original = torch.cat([network.weight(name).flatten() for name in network.linears])
    packed = method.quantize(context).packed
    return original, torch.cat([packed[name].dequantize().flatten() for name in network.linears])


def test_the_example_method_is_unbiased_as_it_says(example):
    draws = [quantized_weights(example(), 3, seed)[1] for seed in range(30)]
    original, nearest = quantized_weights(example(temperature=0.0), 3, 0)
    mean = torch.stack(draws).mean(0)
    assert (mean - original).abs().mean() < 0.4 * (nearest - original).abs().mean()


def test_the_example_method_without_temperature_is_rounding_to_nearest(example):
    original, zero = quantized_weights(example(temperature=0.0), 4, 0)
    _, nearest = quantized_weights(METHODS["rtn"](), 4, 0)
    assert torch.equal(zero, nearest)
    assert not torch.equal(original, nearest)


COMMANDS = [
    line.split("#")[0].split()
    for line in README.splitlines()
    if line.startswith("    python -m harness ") and "--help" not in line
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: " ".join(c[3:])[:60])
def test_every_command_composes(command):
    register_configs()
    overrides = [re.sub(r"=([^,\[]+),.*", r"=\1", a) for a in command[3:] if a != "-m"]  # first value of a sweep
    if any(a.startswith("experiment=") for a in overrides):
        overrides.append("method=rtn")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        assert to_cell(compose("config", overrides)).method.name in METHODS


def test_every_file_it_names_exists():
    for name in re.findall(r"`((?:harness|methods|kernels|conf|tests|results)/[\w./]*)`", README):
        if name != "results/runs/":
            assert (ROOT / name).exists(), name


def test_its_table_is_the_committed_one():
    shown = README.split("<!-- comparison -->")[1].split("<!-- end of comparison -->")[0].strip()
    committed = (ROOT / "results" / "tables" / "comparison.md").read_text()
    assert shown.count("\n") > 20
    assert shown in committed
