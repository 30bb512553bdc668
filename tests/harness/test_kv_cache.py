"""Models that read packed keys and values: how far logits move, incremental decoding, generation, refusals."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache

from harness.kv_cache import PackedCache, PackedLayer, pack_cache, row_format
from methods.network import Network

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
LLAMA = transformers.LlamaConfig(**SIZES, intermediate_size=96, num_key_value_heads=2)
CONFIGS = [
    LLAMA,
    transformers.OPTConfig(**SIZES, ffn_dim=96, word_embed_proj_dim=64),
    transformers.GPTNeoXConfig(**SIZES, intermediate_size=96),
    transformers.MistralConfig(**SIZES, intermediate_size=96, num_key_value_heads=2, sliding_window=5),
]
TOKENS = torch.randint(96, (3, 12), generator=torch.Generator().manual_seed(0))


def build(config: Any = LLAMA) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.15)
    return model


def packed(model: Any, name: str) -> Any:
    model = copy.deepcopy(model)
    pack_cache(model, row_format(name))
    return model


def logits(model: Any) -> Tensor:
    """As evaluation computes them, which asks for no cache."""
    return Network(model, ()).logits(TOKENS)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_fewer_bits_move_the_logits_further(config: Any) -> None:
    model = build(config)
    exact = logits(model)
    errors = {name: float((logits(packed(model, name)) - exact).norm() / exact.norm()) for name in ("int8", "int4")}
    assert 1e-4 < errors["int8"] < 0.02
    assert 5 * errors["int8"] < errors["int4"] < 0.5
    assert torch.equal(logits(model), exact)


def test_attention_reads_exactly_the_decoded_rows() -> None:
    """The same model with rounding written into its attention, in place of a cache."""
    model = build()
    fmt = row_format("int4")
    assert fmt is not None

    class Rounding(DynamicCache):
        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            first, second = (fmt.decode(fmt.encode(states), 16) for states in (key_states, value_states))
            return super().update(first, second, *args, **kwargs)

    expected = model(input_ids=TOKENS, past_key_values=Rounding(config=model.config), use_cache=True).logits
    torch.testing.assert_close(logits(packed(model, "int4")), expected)


@pytest.mark.parametrize("name", ["int8", "int3", "fp8"])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_decoding_token_by_token_gives_the_logits_of_the_whole_window(config: Any, name: str) -> None:
    model = packed(build(config), name)
    whole = logits(model)
    past, steps = None, []
    for token in TOKENS.split([5, *[1] * 7], dim=1):
        output = model(input_ids=token, past_key_values=past, use_cache=True)
        past = output.past_key_values
        steps.append(output.logits)
    assert isinstance(past, PackedCache)
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=1e-4, rtol=1e-4)


def test_the_cache_holds_bytes_and_as_many_as_stated() -> None:
    cache = packed(build(), "int4")(input_ids=TOKENS).past_key_values
    for layer in cache.layers:
        assert isinstance(layer, PackedLayer)
        for stored in (layer.keys, layer.values):
            assert stored.dtype == torch.uint8 and stored.shape == (3, 2, 12, 16 // 2 + 4)
    assert cache.bits == 4 + 32 / 16
    assert [pack_cache(build(), row_format(name)) for name in ("int8", "int4", "fp8")] == [10, 6, 8]


def test_sliding_windows_keep_no_more_than_their_window() -> None:
    model = packed(build(CONFIGS[-1]), "int8")
    for layer in model(input_ids=TOKENS).past_key_values.layers:
        assert layer.keys.shape == layer.values.shape == (3, 2, 5 - 1, 16 + 4)  # the next token completes the window


def test_without_a_format_nothing_changes() -> None:
    model = build()
    exact = logits(model)
    assert row_format("") is None and pack_cache(model, None) == 16
    assert torch.equal(logits(model), exact)
    assert model(input_ids=TOKENS, use_cache=False).past_key_values is None


def test_every_window_starts_from_an_empty_cache() -> None:
    model = packed(build(), "int8")
    first = logits(model)
    assert torch.equal(logits(model), first)


def test_generation_goes_through_the_packed_cache() -> None:
    """Greedy generation picks, step by step, what whole windows predict."""
    model = packed(build(), "int2")
    prompt = TOKENS[:1, :6]
    generated = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, do_sample=False)
    expected = prompt
    for _ in range(5):
        best = model(input_ids=expected).logits[:, -1].argmax(-1, keepdim=True)
        expected = torch.cat([expected, best], 1)
    assert torch.equal(generated, expected)


def test_beams_are_reordered() -> None:
    model = packed(build(), "int8")
    output = model(input_ids=TOKENS)
    output.past_key_values.reorder_cache(torch.tensor([2, 0, 1]))
    continued = model(input_ids=TOKENS[[2, 0, 1], :1], past_key_values=output.past_key_values).logits
    whole = model(input_ids=torch.cat([TOKENS, TOKENS[:, :1]], 1)[[2, 0, 1]]).logits[:, -1:]
    torch.testing.assert_close(continued, whole, atol=1e-4, rtol=1e-4)


def test_unknown_names_and_caches_are_refused() -> None:
    with pytest.raises(ValueError, match=r"method\.kv_cache=int9 is no format of keys and values: did you mean int"):
        row_format("int9")
    model = build()
    past = model(input_ids=TOKENS, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="cached in 16 bits before"):
        packed(model, "int8")(input_ids=TOKENS[:, :1], past_key_values=past)
    states = SimpleNamespace(layer_types=["linear_attention"], num_hidden_layers=1)
    states.get_text_config = lambda decoder: states
    with pytest.raises(ValueError, match="this model caches a LinearAttentionLayer; leave"):
        PackedCache(states, row_format("int8"))
