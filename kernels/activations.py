"""Rounding of activations at run time."""

from __future__ import annotations

import torch
from torch import Tensor


def round_tokens(x: Tensor, bits: int) -> Tensor:
    """Round each token of x [..., in] to a symmetric grid of its own: the same shape and dtype.

    The scale is max|x| / (2^(bits−1) − 1) of the token (dynamic, per token, as in ZeroQuant and SmoothQuant O1); a
    token of zeros stays as it is.
    """
    top = 2 ** (bits - 1) - 1
    scale = x.float().abs().amax(-1, keepdim=True) / top
    scale = torch.where(scale == 0, 1.0, scale)
    return (torch.round(x.float() / scale).clamp_(-top, top) * scale).to(x.dtype)
