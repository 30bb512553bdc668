from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from methods.network import Network
from methods.sensitivity.hvp import hessian, mean_loss, probe

TOKENS = torch.randint(96, (2, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    """As the harness may call: products must not depend on the caller's gradient mode."""
    with torch.no_grad():
        yield


def relative_error(estimate: Tensor, truth: Tensor) -> float:
    return float((estimate - truth).norm() / truth.norm())


def test_products_equal_those_of_the_dense_hessian(
    minute_llama: Network, dense_hessian: Callable[[Network, Tensor, str], Tensor]
) -> None:
    with hessian(minute_llama, TOKENS, minute_llama.linears) as product:
        for i, name in enumerate(minute_llama.linears):
            v = torch.randn(minute_llama.shape(name), generator=torch.Generator().manual_seed(i))
            image = product({name: v})[name]
            truth = dense_hessian(minute_llama, TOKENS, name) @ v.flatten()
            assert relative_error(image.flatten(), truth) < 1e-4


def test_products_of_several_linears_include_cross_terms(minute_llama: Network) -> None:
    a, b = minute_llama.linears[:2]
    generator = torch.Generator().manual_seed(0)
    vectors = {name: torch.randn(minute_llama.shape(name), generator=generator) for name in (a, b)}
    step = 1e-3

    def gradient(sign: float) -> Tensor:
        for name, v in vectors.items():
            minute_llama.linear(name).weight.add_(sign * step * v)
        weight = minute_llama.linear(a).weight.requires_grad_(True)
        with torch.enable_grad(), minute_llama.eager_attention():
            (slope,) = torch.autograd.grad(mean_loss(minute_llama, TOKENS), weight)
        weight.requires_grad_(False)
        for name, v in vectors.items():
            minute_llama.linear(name).weight.sub_(sign * step * v)
        return slope

    minute_llama.model.requires_grad_(False)
    difference = (gradient(1) - gradient(-1)) / (2 * step)
    with hessian(minute_llama, TOKENS, [a, b]) as product:
        joint = product(vectors)[a]
        alone = product({a: vectors[a]})[a]
    assert relative_error(joint, difference) < 0.01
    assert relative_error(alone, difference) > 0.1


def test_the_hessian_of_a_batch_is_the_mean_over_its_sequences(minute_llama: Network) -> None:
    name = minute_llama.linears[3]
    v = torch.randn(minute_llama.shape(name), generator=torch.Generator().manual_seed(0))
    images = []
    for batch in (TOKENS, TOKENS[:1], TOKENS[1:]):
        with hessian(minute_llama, batch, [name]) as product:
            images.append(product({name: v})[name])
    torch.testing.assert_close(images[0], (images[1] + images[2]) / 2)


def test_the_model_is_left_as_it_was(small_llama: Callable[..., Network]) -> None:
    network = small_llama(attn_implementation="sdpa")
    network.model.requires_grad_(False).train()
    kept = network.model.get_parameter("model.norm.weight").requires_grad_(True)
    with pytest.raises(KeyError), hessian(network, TOKENS, network.linears[:2]) as product:
        assert [p.requires_grad for p in network.model.parameters()].count(True) == 2
        assert not network.model.training
        assert network.model.config._attn_implementation == "eager"
        product({"unknown": torch.zeros(1)})
    assert [p for p in network.model.parameters() if p.requires_grad] == [kept]
    assert network.model.training
    assert network.model.config._attn_implementation == "sdpa"
    assert not torch.is_grad_enabled()


def test_the_graph_is_freed_at_the_end(minute_llama: Network) -> None:
    name = minute_llama.linears[0]
    with hessian(minute_llama, TOKENS, [name]) as product:
        pass
    with pytest.raises(KeyError):
        product({name: torch.ones(minute_llama.shape(name))})


def test_what_has_no_second_derivative_is_refused(small_llama: Callable[..., Network]) -> None:
    network = small_llama()
    with (
        pytest.raises(ValueError, match="at least 2 tokens"),
        hessian(network, TOKENS[:, :1], network.linears),
    ):
        pass
    network.model.to(torch.bfloat16)
    with pytest.raises(ValueError, match="load the model in fp32"), hessian(network, TOKENS, network.linears):
        pass


def test_probes_are_signs_and_follow_the_generator() -> None:
    like = torch.empty(30, 40)
    drawn = [probe(like, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert drawn[0].dtype == torch.float32
    assert set(drawn[0].unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert abs(float(drawn[0].mean())) < 4 / 1200**0.5
