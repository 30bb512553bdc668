"""What rounding one quantization group changes in a linear's output: the objective of searches for clipping
thresholds and scales, which treat every row and group on its own.

With δ the change of a row's weights in the group, and G the group's block on the diagonal of the input's Gram
matrix, that is δᵀ G δ: the squared change of the output on the tokens behind G, without forming any output.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def diagonal_blocks(gram: Tensor, size: int) -> list[Tensor]:
    """The blocks on the diagonal of `gram` [in, in], one for each `size` columns; the last may be smaller."""
    return [gram[start : start + size, start : start + size] for start in range(0, len(gram), size)]


def group_errors(delta: Tensor, blocks: Sequence[Tensor]) -> Tensor:
    """δᵀ G δ of every row and group: [out, groups].

    Args:
        delta: change of the weights [out, in].
        blocks: G of each group, see `diagonal_blocks`.
    """
    parts = zip(delta.split(len(blocks[0]), dim=1), blocks, strict=True)
    return torch.stack([(part @ block * part).sum(1) for part, block in parts], dim=1)
