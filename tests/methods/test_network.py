"""Structure found by walking the module tree: groups, producers, and folds that keep the function."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from methods.network import Network, discover

VOCAB = 96
SIZES = {
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
GQA = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2}
CONFIGS: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "llama-gqa": lambda: transformers.LlamaConfig(**GQA),
    "llama-mha": lambda: transformers.LlamaConfig(**GQA | {"num_key_value_heads": 4}),
    "mistral": lambda: transformers.MistralConfig(**GQA),
    "qwen3": lambda: transformers.Qwen3Config(**GQA, head_dim=8),
    "opt": lambda: transformers.OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32),
    "neox": lambda: transformers.GPTNeoXConfig(**SIZES, intermediate_size=48),
    "phi": lambda: transformers.PhiConfig(**SIZES, intermediate_size=48),
    "gemma2": lambda: transformers.Gemma2Config(**GQA, head_dim=8),
}

# Inside a block: linears that share an input -> the operator a scale of it folds into.
QKV, GATE_UP = "self_attn.q_proj self_attn.k_proj self_attn.v_proj", "mlp.gate_proj mlp.up_proj"
LLAMA: dict[str, str | None] = {
    QKV: "input_layernorm",
    "self_attn.o_proj": None,  # a key-value head feeds several query heads: v_proj has too few outputs
    GATE_UP: "post_attention_layernorm",
    "mlp.down_proj": "mlp.up_proj",
}
EXPECTED: dict[str, dict[str, str | None]] = {
    "llama-gqa": LLAMA,
    "llama-mha": LLAMA | {"self_attn.o_proj": "self_attn.v_proj"},
    "mistral": LLAMA,
    "qwen3": LLAMA,
    "opt": {
        QKV: "self_attn_layer_norm",
        "self_attn.out_proj": "self_attn.v_proj",
        "fc1": "final_layer_norm",
        "fc2": "fc1",  # ReLU commutes with positive scales
    },
    "neox": {
        "attention.query_key_value": "input_layernorm",
        "attention.dense": None,  # fused q/k/v has three times as many outputs
        "mlp.dense_h_to_4h": "post_attention_layernorm",
        "mlp.dense_4h_to_h": None,  # GELU does not commute with scales
    },
    # Attention and MLP in parallel read one norm.
    "phi": {
        f"{QKV} mlp.fc1": "input_layernorm",
        "self_attn.dense": "self_attn.v_proj",
        "mlp.fc2": None,
    },
    # The gain is 1 + weight, so dividing the weight does not divide the output.
    "gemma2": LLAMA | {QKV: None, GATE_UP: None},
}


def build(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
        for parameter in model.parameters():  # biases and gains too, so that a forgotten one shows
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.requires_grad_(False)


@pytest.fixture(scope="module", params=CONFIGS)
def case(request: pytest.FixtureRequest) -> tuple[str, Network]:
    return request.param, discover(build(request.param), VOCAB)


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(VOCAB, (2, 12), generator=torch.Generator().manual_seed(3))


def groups_of(network: Network, index: int) -> dict[str, str | None]:
    """Groups and producers of one block, by names relative to it."""
    prefix = network.blocks[index].name + "."
    return {
        " ".join(name.removeprefix(prefix) for name in group.linears): group.producer
        and group.producer.removeprefix(prefix)
        for group in network.blocks[index].groups
    }


def test_groups_and_producers(case: tuple[str, Network]) -> None:
    name, network = case
    assert len(network.blocks) == 2
    for index in range(2):
        assert groups_of(network, index) == EXPECTED[name]
        assert list(groups_of(network, index)) == list(EXPECTED[name]), "not in execution order"


def test_discovery_leaves_the_weights_alone(case: tuple[str, Network]) -> None:
    name, network = case
    original = build(name).state_dict()
    assert all(torch.equal(value, original[key]) for key, value in network.model.state_dict().items())


def test_fold_leaves_the_logits_unchanged(case: tuple[str, Network], tokens: Tensor) -> None:
    network = discover(build(case[0]), VOCAB)
    generator = torch.Generator().manual_seed(1)
    for group in network.groups:
        if group.producer is None:
            continue
        before, weight = network.logits(tokens), network.weight(group.name)
        scale = 0.2 + 3 * torch.rand(weight.shape[1], generator=generator)
        changed = network.fold(group, scale)
        torch.testing.assert_close(network.weight(group.name), weight * scale)
        torch.testing.assert_close(network.logits(tokens), before, rtol=1e-4, atol=1e-5)
        assert set(changed) == {
            f"{group.producer}.{key}" for key, _ in network.module(group.producer).named_parameters()
        }


def test_fold_without_producer_is_refused() -> None:
    network = discover(build("llama-gqa"), VOCAB)
    group = network.group_of["model.layers.0.self_attn.o_proj"]
    with pytest.raises(ValueError, match=r"no scale can be folded .*o_proj"):
        network.fold(group, torch.ones(32))


def test_scope_is_the_smallest_common_module() -> None:
    block = discover(build("llama-gqa"), VOCAB).blocks[1]
    scopes = [group.scope.removeprefix(f"{block.name}.") for group in block.groups]
    assert scopes == ["self_attn", "self_attn.o_proj", "mlp", "mlp.down_proj"]


def test_access_by_name() -> None:
    network = discover(build("llama-gqa"), VOCAB)
    name = "model.layers.0.mlp.down_proj"
    assert network.shape(name) == (32, 48)
    assert network.shapes[network.linears.index(name)] == (32, 48)
    copy = network.weight(name)
    network.overwrite(name, torch.zeros(32, 48))
    assert copy.any() and not network.weight(name).any()
    with pytest.raises(TypeError, match="not a linear"):
        network.linear("model.norm")


def test_eager_attention_agrees_and_is_undone(tokens: Tensor) -> None:
    network = discover(build("llama-gqa"), VOCAB)
    fused = network.logits(tokens)
    with pytest.raises(KeyError), network.eager_attention():
        assert network.model.config._attn_implementation == "eager"
        torch.testing.assert_close(network.logits(tokens), fused, rtol=1e-4, atol=1e-5)
        raise KeyError
    assert network.model.config._attn_implementation == "sdpa"


def test_model_without_blocks_of_linears() -> None:
    config = transformers.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    gpt2 = transformers.AutoModelForCausalLM.from_config(config)  # its projections are Conv1D
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel has no ModuleList .* nn\.Linear"):
        discover(gpt2, VOCAB)


# Hostile architectures. Each block maps [batch, length, 16] to the same shape.


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)


class SharedWeight(Block):
    """Two linears with one weight, reading one norm: folding scales the weight twice."""

    def __init__(self) -> None:
        super().__init__()
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + torch.tanh(self.a(h)) + self.b(h)


class UsedTwice(Block):
    """One linear behind two norms: folding into either spoils the other use."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.tanh(self.a(self.norm(x)))
        return x + torch.tanh(self.a(self.norm2(x)))


class NormElsewhere(Block):
    """The norm's output is also part of the residual stream, so its gain cannot change."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return h + torch.tanh(self.a(h))


class NoNorm(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.b(torch.tanh(self.a(x))))


class View(Block):
    """A part of a tensor begins at the same address, but is another input."""

    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Linear(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + torch.tanh(self.a(h)) + self.b(h[..., :8])


class Experts(Block):
    """A list inside the block, larger in number than the list of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + torch.tanh(sum(expert(h) for expert in self.experts))


class Toy(nn.Module):
    """A language model around any block; `use_cache` is accepted as by transformers."""

    def __init__(self, block: type[Block]) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embed = nn.Embedding(VOCAB, 16)
            self.layers = nn.ModuleList(block() for _ in range(2))

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        del use_cache
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return SimpleNamespace(logits=F.linear(x, self.embed.weight))


EXPERTS = " ".join(f"experts.{i}" for i in range(5))


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        (SharedWeight, {"a b": None}),
        (UsedTwice, {"a": None}),
        (NormElsewhere, {"a": None}),
        (NoNorm, {"a": None, "b": None}),
        (View, {"a": None, "b": None}),  # one norm feeds two groups
        (Experts, {EXPERTS: "norm"}),
    ],
)
def test_hostile_blocks(block: type[Block], expected: dict[str, str | None], tokens: Tensor) -> None:
    model = Toy(block).eval()
    before = model(tokens, use_cache=False).logits
    network = discover(model, VOCAB)
    assert [groups_of(network, index) for index in range(2)] == [expected, expected]
    assert torch.equal(network.logits(tokens), before)


def test_one_block_used_twice_is_listed_once() -> None:
    model = Toy(NoNorm)
    model.layers[1] = model.layers[0]
    assert discover(model, VOCAB).linears == ("layers.0.a", "layers.0.b")


def test_a_dead_first_block_does_not_decide_for_the_others():
    """With a zero output projection nothing that precedes it seems to matter: no producer may be inferred from that."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    torch.nn.init.zeros_(model.model.layers[0].self_attn.o_proj.weight)
    blocks = discover(model, 50).blocks
    assert blocks[0].groups[1].producer is None
    for block in blocks[1:]:
        assert [g.producer and g.producer.split(".")[-1] for g in block.groups] == [
            "input_layernorm",
            None,
            "post_attention_layernorm",
            "up_proj",
        ]


class _InPlace(torch.nn.Module):
    """A block whose second linear reads the tensor of the first, changed in place, by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)

    def forward(self, x):
        h = x.clone()
        y = self.first(h)
        h.add_(1)
        return x + y + self.second(input=h)


def test_an_input_changed_in_place_is_another_input():
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.blocks = torch.nn.Embedding(20, 16), torch.nn.ModuleList([_InPlace()])

        def forward(self, input_ids, use_cache=False):
            x = self.embed(input_ids)
            for block in self.blocks:
                x = block(x)
            return SimpleNamespace(logits=x @ self.embed.weight.T)

    torch.manual_seed(0)
    assert [g.linears for g in discover(Model().eval(), 20).blocks[0].groups] == [
        ("blocks.0.first",),
        ("blocks.0.second",),
    ]
