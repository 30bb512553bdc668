from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from methods.network import Network, discover, hooks
from methods.stream import BlockStream, gram_matrices

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=48, num_key_value_heads=2)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32)),
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, intermediate_size=48)),
}


@pytest.fixture(params=MODELS)
def network(request: pytest.FixtureRequest) -> Network:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return discover(MODELS[request.param]().eval(), SIZES["vocab_size"])


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(96, (5, 12), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_streaming_all_blocks_gives_the_logits_of_the_model(network: Network, tokens: Tensor) -> None:
    expected = network.logits(tokens)
    stream = BlockStream(network, tokens, batch_size=2)  # the last batch is smaller
    for index in range(len(network.blocks)):
        stream.inputs = stream.run(index)
    streamed = torch.cat(stream.inputs)
    last = network.module(network.blocks[-1].name)

    def replace(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return (streamed, *output[1:]) if isinstance(output, tuple) else streamed

    wrong = torch.randint(96, tokens.shape, generator=torch.Generator().manual_seed(1))
    with hooks([last.register_forward_hook(replace)]):  # norm and head see the stream only
        logits = network.logits(wrong)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_gram_matrices_are_those_of_a_forward_pass(network: Network, tokens: Tensor) -> None:
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args: seen.__setitem__(name, args[0].flatten(0, -2))

    with hooks([network.linear(g.name).register_forward_pre_hook(keep(g.name)) for g in network.groups]):
        network.logits(tokens)
    stream = BlockStream(network, tokens, batch_size=2)
    for index, block in enumerate(network.blocks):
        grams, stream.inputs = gram_matrices(stream, index, block.groups)
        for group in block.groups:
            x = seen[group.name]
            torch.testing.assert_close(grams[group.name], x.T @ x / len(x), atol=1e-5, rtol=1e-4)


def test_hooks_of_the_caller_see_every_batch(network: Network, tokens: Tensor) -> None:
    sizes: list[int] = []
    block = network.module(network.blocks[0].name)
    stream = BlockStream(network, tokens, batch_size=2)
    with hooks([block.register_forward_hook(lambda m, a, o: sizes.append(len(a[0])))]):
        stream.run(0)
    assert sizes == [2, 2, 1]
