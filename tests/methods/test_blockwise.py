from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from methods.network import Network, discover
from methods.sensitivity.base import METRICS, Subject
from methods.sensitivity.blockwise import blockwise_hessian
from methods.sensitivity.hvp import hessian

TOKENS = torch.randint(96, (2, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    """As the harness may call: products must not depend on the caller's gradient mode."""
    with torch.no_grad():
        yield


def random_vectors(network: Network, names: tuple[str, ...], seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(network.shape(name), generator=generator) for name in names}


def assert_equal_products(network: Network, asked: list[tuple[str, ...]]) -> None:
    linears = [name for name in network.linears if any(name in names for names in asked)]
    with hessian(network, TOKENS, linears) as whole, blockwise_hessian(network, TOKENS, linears) as parts:
        for names in asked:
            vectors = random_vectors(network, names)
            truth, image = whole(vectors), parts(vectors)
            assert list(image) == list(names)
            for name in names:
                assert float((image[name] - truth[name]).norm()) < 3e-6 * float(truth[name].norm())


def test_products_equal_those_of_the_whole_graph(small_llama: Callable[..., Network]) -> None:
    network = small_llama(num_hidden_layers=3)
    assert_equal_products(network, [(name,) for name in network.linears])


def test_products_of_several_linears_equal_those_of_the_whole_graph(small_llama: Callable[..., Network]) -> None:
    network = small_llama(num_hidden_layers=3)
    names = network.linears
    assert_equal_products(network, [names, names[2:5], names[::4], (names[-1], names[9]), names[::-6]])


def test_only_the_blocks_asked_for_are_needed(small_llama: Callable[..., Network]) -> None:
    network = small_llama(num_hidden_layers=3)
    assert_equal_products(network, [network.linears[8:10], network.linears[-1:]])


class Held:
    """A tensor that a graph saved; counts the bytes of those alive, and their peak."""

    live = 0
    peak = 0

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        Held.live += tensor.nbytes
        Held.peak = max(Held.peak, Held.live)

    def __del__(self) -> None:
        Held.live -= self.tensor.nbytes


def peak_of_graphs(opened: Callable[..., Any], network: Network) -> int:
    Held.live = Held.peak = 0
    saved = torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor)
    with saved, opened(network, TOKENS, network.linears) as product:
        product(random_vectors(network, network.linears))
        product(random_vectors(network, network.linears[:1]))
    return Held.peak


def test_the_graphs_in_memory_do_not_grow_with_the_number_of_blocks(small_llama: Callable[..., Network]) -> None:
    networks = [small_llama(num_hidden_layers=depth) for depth in (2, 4, 6)]
    parts = [peak_of_graphs(blockwise_hessian, network) for network in networks]
    whole = [peak_of_graphs(hessian, network) for network in networks]
    assert parts[0] == parts[1] == parts[2]
    assert whole[2] - whole[1] == whole[1] - whole[0] > 0
    assert whole[2] > 3 * parts[2]


class TupleBlock(nn.Module):
    """Is called with keywords, and returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, hidden_states: Tensor, shift: Tensor) -> tuple[Tensor, str]:
        return hidden_states + self.outer(torch.sigmoid(self.inner(hidden_states + shift))), "rest"


class TupleModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(_attn_implementation="eager")
        self.embedding, self.head = nn.Embedding(96, 6), nn.Linear(6, 96)
        self.layers = nn.ModuleList(TupleBlock() for _ in range(3))

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        hidden = self.embedding(input_ids)
        for layer in self.layers:
            hidden, rest = layer(hidden_states=hidden, shift=torch.tensor(0.5))
            assert rest == "rest"
        return SimpleNamespace(logits=self.head(torch.tanh(hidden)))


@pytest.fixture
def tuple_network() -> Network:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return discover(TupleModel(), 96)


def test_blocks_may_take_keywords_and_return_tuples(tuple_network: Network) -> None:
    names = tuple_network.linears
    assert_equal_products(tuple_network, [(name,) for name in names] + [names])


def test_the_model_is_left_as_it_was(tuple_network: Network) -> None:
    blocks = [tuple_network.module(block.name) for block in tuple_network.blocks]
    original = blocks[1].forward
    replaced = lambda *args, **kwargs: original(*args, **kwargs)  # noqa: E731  (accelerate does this)
    blocks[1].forward = replaced  # type: ignore[method-assign]
    before = tuple_network.logits(TOKENS)
    with pytest.raises(KeyError), blockwise_hessian(tuple_network, TOKENS, tuple_network.linears) as product:
        product(random_vectors(tuple_network, tuple_network.linears))
        product({"unknown": torch.zeros(1)})
    assert ["forward" in vars(block) for block in blocks] == [False, True, False]
    assert blocks[1].forward is replaced
    assert torch.equal(tuple_network.logits(TOKENS), before)
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in blocks)


def test_the_batch_is_forgotten_at_the_end(minute_llama: Network) -> None:
    name = minute_llama.linears[0]
    with blockwise_hessian(minute_llama, TOKENS, [name]) as product:
        pass
    with pytest.raises(KeyError):
        product({name: torch.ones(minute_llama.shape(name))})


def test_what_has_no_second_derivative_is_refused(minute_llama: Network) -> None:
    minute_llama.model.to(torch.bfloat16)
    with (
        pytest.raises(ValueError, match="load the model in fp32"),
        blockwise_hessian(minute_llama, TOKENS, minute_llama.linears),
    ):
        pass


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("hutchinson", {"max_probes": 2}),
        ("eigenvalue", {"max_iterations": 3}),
        ("lanczos", {"max_products": 3}),
        ("hutchpp", {"products": 4}),
    ],
)
def test_metrics_find_the_same_either_way(
    name: str, options: dict[str, Any], small_llama: Callable[..., Network], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []

    def spy(*args: Any) -> Any:
        opened.append(args)
        return blockwise_hessian(*args)

    monkeypatch.setattr(f"{blockwise_hessian.__module__}.blockwise_hessian", spy)
    network = small_llama(hidden_size=16, intermediate_size=24)
    subject = Subject(network, TOKENS, TOKENS, (), lambda stat, linear: torch.empty(0))
    whole = METRICS[name](**options)(subject)
    assert not opened
    parts = METRICS[name](**options, blockwise=True)(subject)
    assert opened
    assert parts.values == pytest.approx(whole.values, rel=1e-3)
    assert parts.cost.passes == whole.cost.passes
