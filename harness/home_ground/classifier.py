"""A classifier that answers as a causal language model does, so that what scores, allocates and rounds works on it
unchanged.

A sequence of m + 1 tokens stands for a mini-batch of m examples: the first token is the number of its first example,
the others are the classes of m consecutive examples from there on. To predict the next token is then to classify;
the mean loss of a token is the mean cross-entropy of the mini-batch, and its Hessian the one that HAWQ takes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Answer:
    """What `Network` expects of a model.

    Attributes:
        logits: [sequences, m + 1, classes]; the last position predicts nothing and is zero.
    """

    logits: Tensor


class Classifier(nn.Module, ABC):
    """A classifier with the examples that it can be asked about.

    `blocks` of a subclass is a ModuleList, each of whose elements takes the previous one's output.

    Args:
        examples: [count, …], what sequences refer to by number.
    """

    examples: Tensor

    def __init__(self, examples: Tensor) -> None:
        super().__init__()
        self.register_buffer("examples", examples, persistent=False)
        self.config: Any = SimpleNamespace(
            _attn_implementation="eager"
        )  # the only one here: it is twice differentiable

    @abstractmethod
    def classify(self, inputs: Tensor) -> Tensor:
        """Logits [batch, classes] of inputs [batch, …]."""

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Answer:
        """The logits of sequences, int64 [sequences, m + 1]."""
        del use_cache
        rows = input_ids[:, :1] + torch.arange(input_ids.shape[1] - 1, device=input_ids.device)  # [sequences, m]
        scores = self.classify(self.examples[rows.flatten()]).unflatten(0, rows.shape)
        return Answer(F.pad(scores, (0, 0, 0, 1)))

    def get_input_embeddings(self) -> None:
        """None: no embedding that storage would report apart."""

    def get_output_embeddings(self) -> None:
        """None, likewise."""

    def finish(self) -> None:
        """Rewrite a trained model into the form in which it is quantized; nothing by default."""
