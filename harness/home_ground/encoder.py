"""A small BERT (Devlin et al., NAACL 2019): bidirectional attention, learned positions, GELU, norms after the residual
sums, and a class read off the first token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.home_ground.classifier import Classifier


class Attention(nn.Module):
    """Attention of every token to every token. Plain products, which can be differentiated twice."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(hidden, hidden) for _ in range(3))
        self.output = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, length, hidden] to the same shape."""
        query, key, value = (
            project(x).unflatten(2, (self.heads, -1)).transpose(1, 2)  # [batch, heads, length, hidden / heads]
            for project in (self.query, self.key, self.value)
        )
        weights = (query @ key.transpose(2, 3) * query.shape[-1] ** -0.5).softmax(-1)
        return self.output((weights @ value).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Attention and a two-layer perceptron, each with a residual sum and a norm after it."""

    def __init__(self, hidden: int, intermediate: int, heads: int) -> None:
        super().__init__()
        self.attention = Attention(hidden, heads)
        self.attention_norm = nn.LayerNorm(hidden)
        self.up, self.down = nn.Linear(hidden, intermediate), nn.Linear(intermediate, hidden)
        self.norm = nn.LayerNorm(hidden)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, length, hidden] to the same shape."""
        x = self.attention_norm(x + self.attention(x))
        return self.norm(x + self.down(F.gelu(self.up(x))))


class Encoder(Classifier):
    """Token and position embeddings, layers, and a linear on the first token.

    Args:
        examples: tokens, int64 [count, length]; the first of each is the class token.
        classes: number of classes.
    """

    def __init__(
        self,
        examples: Tensor,
        classes: int,
        hidden: int = 64,
        intermediate: int = 128,
        heads: int = 4,
        layers: int = 4,
    ) -> None:
        super().__init__(examples)
        self.tokens = nn.Embedding(int(examples.max()) + 1, hidden)
        self.positions = nn.Embedding(examples.shape[1], hidden)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)  # BERT's
        self.norm = nn.LayerNorm(hidden)
        self.blocks = nn.ModuleList(Layer(hidden, intermediate, heads) for _ in range(layers))
        self.head = nn.Linear(hidden, classes)

    def classify(self, inputs: Tensor) -> Tensor:
        places = torch.arange(inputs.shape[1], device=inputs.device)
        hidden = self.norm(self.tokens(inputs) + self.positions(places))
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden[:, 0])
