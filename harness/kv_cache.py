"""A cache of packed keys and values, and how a model is made to compute with it.

Perplexity is measured on whole windows, without a cache. With packed keys and values every window goes through an
empty cache of its own: attention reads exactly what it would read if the window came token by token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from kernels.kv_cache import ROW_FORMATS, RowFormat
from methods.base import hint

UNQUANTIZED_BITS = 16.0


def row_format(name: str) -> RowFormat | None:
    """The format of cached keys and values of that name; None for the empty name, which leaves them in 16 bits.

    Raises:
        ValueError: there is no such format; names the nearest, or all.
    """
    if name and name not in ROW_FORMATS:
        raise ValueError(f"method.kv_cache={name} is no format of keys and values: {hint(name, ROW_FORMATS)}")
    return ROW_FORMATS.get(name)


class PackedLayer(DynamicLayer):
    """One layer's keys and values as packed rows, uint8 [batch, heads, length, bytes].

    All that attention reads is decoded from them, the keys and values of the call's own tokens too.

    Attributes:
        cached: numbers that went in.
        stored: bytes that they took.
    """

    def __init__(self, fmt: RowFormat, **options: Any) -> None:
        super().__init__(**options)
        self.format, self.cached, self.stored = fmt, 0, 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Cache keys and values [batch, heads, new tokens, head_dim]; returns those of all tokens, in their dtype."""
        keys, values = super().update(self._encode(key_states), self._encode(value_states), *args, **kwargs)
        return self._decode(keys, key_states), self._decode(values, value_states)

    def _encode(self, states: Tensor) -> Tensor:
        rows = self.format.encode(states)
        self.cached += states.numel()
        self.stored += rows.numel()
        return rows

    def _decode(self, rows: Tensor, like: Tensor) -> Tensor:
        return self.format.decode(rows, like.shape[-1]).to(like.dtype)


class PackedSlidingWindowLayer(PackedLayer, DynamicSlidingWindowLayer):
    """The same for the tokens of a sliding window."""


KINDS: dict[type[CacheLayerMixin], type[PackedLayer]] = {
    DynamicLayer: PackedLayer,
    DynamicSlidingWindowLayer: PackedSlidingWindowLayer,
}
"""What replaces each kind of layer."""


class PackedCache(DynamicCache):
    """The cache that `config` asks for, with packed keys and values.

    Raises:
        ValueError: the model keeps another state than keys and values.
    """

    def __init__(self, config: Any, fmt: RowFormat) -> None:
        super().__init__(config=config)
        self.layers = [_packed(layer, fmt) for layer in self.layers]

    @property
    def bits(self) -> float:
        """Stored bits a number, of all that was cached."""
        layers = [layer for layer in self.layers if isinstance(layer, PackedLayer)]
        return 8 * sum(layer.stored for layer in layers) / sum(layer.cached for layer in layers)


def _packed(layer: Any, fmt: RowFormat) -> PackedLayer:
    if type(layer) not in KINDS:
        raise ValueError(
            f"method.kv_cache packs the keys and values of full and sliding-window attention, and this model caches "
            f"a {type(layer).__name__}; leave method.kv_cache empty"
        )
    options = {"sliding_window": layer.sliding_window} if isinstance(layer, DynamicSlidingWindowLayer) else {}
    return KINDS[type(layer)](fmt, **options)


@torch.no_grad()
def pack_cache(model: nn.Module, fmt: RowFormat | None) -> float:
    """Make every forward pass of a causal language model read its keys and values from packed rows, in place.

    Generation continues the cache of its first pass. Returns the stored bits of a cached number, counted from the
    cache of one token; 16 without a format, which changes nothing.
    """
    if fmt is None:
        return UNQUANTIZED_BITS

    def give(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        past = kwargs.get("past_key_values")
        if not isinstance(past, PackedCache):
            if past is not None and past.get_seq_length():
                raise ValueError("keys and values were cached in 16 bits before; start from an empty cache")
            past = PackedCache(module.config, fmt)
        return args, {**kwargs, "past_key_values": past, "use_cache": True}

    model.register_forward_pre_hook(give, with_kwargs=True)
    probe = torch.zeros(1, 1, dtype=torch.int64, device=next(model.parameters()).device)
    cache: PackedCache = model(input_ids=probe).past_key_values
    return cache.bits
