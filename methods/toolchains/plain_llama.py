"""A Llama in elementary operations, for tools that trace models and cannot follow the library's."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from torch.utils.data import TensorDataset

MODEL_TYPE = "llama"
AGREEMENT = 1e-3
"""Largest difference of logits, relative to the largest logit, that reordered sums may make."""
LINEAR = re.compile(r"layers\.(\d+)\.\w+\.(\w+)$")
PARTS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def why_not(model: nn.Module) -> str | None:
    """None, or one sentence that says why a model has no plain form."""
    kind = getattr(getattr(model, "config", None), "model_type", "unknown")
    return None if kind == MODEL_TYPE else f"this tool is given a plain form of Llamas; the model's type is {kind}"


def plain_name(name: str) -> str:
    """Where the linear of this name in the original is in `PlainLlama`: `blocks.3.q_proj`.

    Raises:
        ValueError: it is not in a block.
    """
    found = LINEAR.search(name)
    if found is None:
        raise ValueError(f"{name} is no linear of a block, as this tool needs it")
    return f"blocks.{found[1]}.{found[2]}"


class PlainLlama(nn.Module):
    """Embedded tokens [sequences, length, hidden] to logits [sequences · length, vocabulary].

    The linears of the blocks are the original's own modules; they alone have parameters, of which gradients are
    wanted of the weights. Their inputs are matrices
    [sequences · length, in], which is what tools made for images understand. Nothing depends on the data or on
    shapes, so that it can be traced symbolically.

    Args:
        model: a Llama of Hugging Face's.
        length: of all sequences.

    Raises:
        ValueError: on random tokens, this does not compute what the model computes.
    """

    gain: Tensor
    head: Tensor
    embedding: Tensor

    def __init__(self, model: Any, length: int) -> None:
        super().__init__()
        body = model.model
        positions = torch.arange(length)[None]
        embedding = model.get_input_embeddings().weight.detach()
        cos, sin = body.rotary_emb(embedding[None, :1], positions)
        self.blocks = nn.ModuleList([_Block(layer, cos, sin) for layer in body.layers])
        self.register_buffer("gain", body.norm.weight.detach().clone())
        self.register_buffer("head", model.get_output_embeddings().weight.detach().T.clone())
        self.register_buffer("embedding", embedding.clone())
        self.eps = body.norm.variance_epsilon
        for parameter in self.parameters():
            parameter.requires_grad_(parameter.ndim > 1)
        self._check(model, length)

    def text(self, tokens: Tensor) -> TensorDataset:
        """Inputs and the tokens [sequences, length] to predict from them, of tokens [sequences, length + 1]."""
        return TensorDataset(self.embedding[tokens[:, :-1]], tokens[:, 1:])

    def forward(self, embedded: Tensor) -> Tensor:
        x = embedded.flatten(0, 1)
        for block in self.blocks:
            x = block(x)
        return _normalized(x, self.gain, self.eps) @ self.head

    @torch.no_grad()
    def _check(self, model: Any, length: int) -> None:
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(len(self.embedding), (2, length), generator=generator)
        expected = model(input_ids=tokens, use_cache=False).logits.flatten(0, 1)
        error = (self(self.embedding[tokens]) - expected).abs().max() / expected.abs().max()
        if not error < AGREEMENT:
            raise ValueError(
                f"the plain form of this model misses its logits by {error:.2g} of the largest; "
                "it has something that a plain Llama has not"
            )


class _Block(nn.Module):
    """Attention and gated MLP on tokens [sequences · length, hidden]."""

    cos: Tensor
    sin: Tensor
    mask: Tensor
    attention_gain: Tensor
    mlp_gain: Tensor
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def __init__(self, layer: Any, cos: Tensor, sin: Tensor) -> None:
        super().__init__()
        self.length, self.width = cos.shape[-2:]
        for part in PARTS:
            self.add_module(part.split(".")[1], layer.get_submodule(part))
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)
        self.register_buffer("mask", torch.full((self.length, self.length), torch.finfo(cos.dtype).min).triu(1))
        self.register_buffer("attention_gain", layer.input_layernorm.weight.detach().clone())
        self.register_buffer("mlp_gain", layer.post_attention_layernorm.weight.detach().clone())
        self.eps = layer.input_layernorm.variance_epsilon
        self.repeats = layer.self_attn.num_key_value_groups

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._attention(_normalized(x, self.attention_gain, self.eps))
        h = _normalized(x, self.mlp_gain, self.eps)
        mlp: Tensor = self.down_proj(silu(self.gate_proj(h)) * self.up_proj(h))
        return x + mlp

    def _attention(self, h: Tensor) -> Tensor:
        query = self._turned(self._heads(self.q_proj(h)))
        key = self._turned(self._heads(self.k_proj(h))).repeat_interleave(self.repeats, 1)
        value = self._heads(self.v_proj(h)).repeat_interleave(self.repeats, 1)
        scores = (query @ key.transpose(-1, -2)) * self.width**-0.5 + self.mask
        mixed = scores.softmax(-1) @ value  # [sequences, heads, length, width]
        attention: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2).flatten(0, 1))
        return attention

    def _heads(self, x: Tensor) -> Tensor:
        """[sequences · length, heads · width] to [sequences, heads, length, width]."""
        return x.unflatten(-1, (-1, self.width)).unflatten(0, (-1, self.length)).transpose(1, 2)

    def _turned(self, x: Tensor) -> Tensor:
        """Rotary embedding (Su et al., RoFormer, 2021), in halves as Hugging Face stores it."""
        first, second = x.chunk(2, -1)
        return x * self.cos + torch.cat((-second, first), -1) * self.sin


def _normalized(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """RMSNorm."""
    return gain * (x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps))
