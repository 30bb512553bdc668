"""Planted outliers: the same function bit for bit, activations larger by the scale, refusals."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor, nn

from harness.outliers import Outliers, plant
from methods.network import Network, discover, hooks

VOCAB = 96
LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
TOKENS = torch.randint(VOCAB, (4, 32), generator=torch.Generator().manual_seed(3))


def network(config: transformers.PretrainedConfig, dtype: torch.dtype = torch.float32) -> Network:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    return discover(model.to(dtype), VOCAB)


def largest_inputs(network: Network) -> dict[str, Tensor]:
    """max |x| over tokens [in] of the input of each group."""
    largest: dict[str, Tensor] = {}

    def spy(name: str) -> object:
        def hook(module: nn.Module, args: tuple[Tensor]) -> None:
            del module
            largest[name] = args[0].abs().flatten(0, -2).amax(0)

        return network.linear(name).register_forward_pre_hook(hook)

    with hooks([spy(group.name) for group in network.groups]):
        network.logits(TOKENS)
    return largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "config",
    [
        transformers.LlamaConfig(**LLAMA),
        transformers.OPTConfig(**LLAMA, ffn_dim=48, word_embed_proj_dim=32),
        transformers.GPTNeoXConfig(**LLAMA),
    ],
    ids=lambda config: config.model_type,
)
def test_logits_are_unchanged(config: transformers.PretrainedConfig, dtype: torch.dtype) -> None:
    model = network(config, dtype)
    before = model.logits(TOKENS)
    plant(model, Outliers(channels=4))
    assert torch.equal(model.logits(TOKENS), before)


def test_activations_behind_norms_grow_by_the_scale() -> None:
    model = network(transformers.LlamaConfig(**LLAMA))
    outliers = Outliers(channels=3, scale=64)
    before = largest_inputs(model)
    plant(model, outliers)
    after = largest_inputs(model)
    channels = set()
    for group in model.groups:
        growth = after[group.name] / before[group.name]
        if group.name.endswith(("q_proj", "gate_proj")):
            assert sorted(growth.unique().tolist()) == [1, 64] and (growth == 64).sum() == 3
            channels.add(tuple((growth == 64).nonzero().flatten().tolist()))
            ratios = [(x[group.name].max() / x[group.name].median()).item() for x in (before, after)]
            assert 32 <= ratios[1] / ratios[0] <= 64
        else:
            torch.testing.assert_close(growth, torch.ones_like(growth))
    assert len(channels) == 1, "the channels differ between layers"


def test_linears_are_no_producers_of_outliers() -> None:
    """Without GQA, scales also fold from o_proj into v_proj and from down_proj into up_proj: not here."""
    model = network(transformers.LlamaConfig(**LLAMA))
    names = [name for name in model.linears if name.endswith(("o_proj", "down_proj"))]
    before = {name: model.weight(name) for name in names}
    assert all(model.group_of[name].producer for name in names)
    plant(model, Outliers(channels=4))
    assert all(torch.equal(model.weight(name), before[name]) for name in names)


def test_the_seed_chooses_the_channels() -> None:
    def planted(seed: int) -> Tensor:
        model = network(transformers.LlamaConfig(**LLAMA))
        plant(model, Outliers(channels=4, seed=seed))
        return model.module("model.layers.0.input_layernorm").weight

    assert torch.equal(planted(0), planted(0)) and not torch.equal(planted(0), planted(1))


def test_plain_per_token_int8_suffers() -> None:
    """What the outliers are for: they take the grid, and the other channels are left with a few steps."""
    model = network(transformers.LlamaConfig(**LLAMA))
    exact = model.logits(TOKENS)

    def quantize(module: nn.Module, args: tuple[Tensor]) -> Tensor:
        del module
        step = args[0].abs().amax(-1, keepdim=True) / 127
        return (args[0] / step).round() * step

    def error() -> float:
        with hooks([model.linear(n).register_forward_pre_hook(quantize) for n in model.linears]):
            return (model.logits(TOKENS) - exact).norm().item()

    before = error()
    plant(model, Outliers(channels=4))
    assert error() > 10 * before


@pytest.mark.parametrize(
    ("outliers", "message"),
    [
        (Outliers(4, scale=100), r"model\.outliers\.scale=100 is not a power of two"),
        (Outliers(4, scale=-2), r"model\.outliers\.scale=-2 is not a power of two"),
        (Outliers(channels=33), r"model\.outliers\.channels=33 is outside 1 to 32"),
        (Outliers(channels=0), r"model\.outliers\.channels=0 is outside 1 to 32"),
    ],
)
def test_bad_settings(outliers: Outliers, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plant(network(transformers.LlamaConfig(**LLAMA)), outliers)


def test_model_without_foldable_norms() -> None:
    with pytest.raises(ValueError, match="Gemma2ForCausalLM: none of its linears follows a norm"):
        plant(
            network(transformers.Gemma2Config(**LLAMA, head_dim=8, num_key_value_heads=2)),
            Outliers(channels=4),
        )
