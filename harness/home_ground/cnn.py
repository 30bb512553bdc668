"""A small residual network whose convolutions are linears on patches: the same function as `Conv2d`, and open to every
format, metric and rounding that works on linears.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.home_ground.classifier import Classifier


class Convolution(nn.Module):
    """A convolution with batch normalization, as a linear on the patches that `unfold` cuts out.

    The weight is [out, in · kernel · kernel], a `Conv2d` weight flattened; its columns are ordered by input channel.
    """

    def __init__(self, channels: int, out: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride
        self.linear = nn.Linear(channels * kernel**2, out)
        nn.init.kaiming_normal_(self.linear.weight, nonlinearity="relu")
        nn.init.zeros_(self.linear.bias)
        self.norm: nn.Module = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, height, width] to [batch, out, height / stride, width / stride]."""
        patches = F.unfold(
            x, self.kernel, padding=self.kernel // 2, stride=self.stride
        )  # [batch, in · kernel², places]
        height = (x.shape[2] + self.stride - 1) // self.stride
        return self.norm(self.linear(patches.transpose(1, 2)).transpose(1, 2).unflatten(2, (height, -1)))

    @torch.no_grad()
    def fold(self) -> None:
        """Move the normalization, with the statistics that it has gathered, into the linear, as HAWQ does before it
        quantizes. The function in evaluation mode is unchanged."""
        norm = self.norm
        if not isinstance(norm, nn.BatchNorm2d) or norm.running_mean is None or norm.running_var is None:
            raise ValueError("the normalization of this convolution is folded already")
        gain = norm.weight / (norm.running_var + norm.eps).sqrt()
        self.linear.weight.mul_(gain.unsqueeze(1))
        self.linear.bias.sub_(norm.running_mean).mul_(gain).add_(norm.bias)
        self.norm = nn.Identity()


class Stem(nn.Module):
    """The first convolution."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv = Convolution(channels, out)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, height, width] to [batch, out, height, width]."""
        return self.conv(x).relu()


class Residual(nn.Module):
    """Two 3×3 convolutions around which the input goes; past a change of shape, through a 1×1 convolution."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = Convolution(channels, out, stride=stride)
        self.conv2 = Convolution(out, out)
        changed = channels != out or stride != 1
        self.shortcut = Convolution(channels, out, kernel=1, stride=stride) if changed else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, height, width] to [batch, out, height / stride, width / stride]."""
        return (self.conv2(self.conv1(x).relu()) + self.shortcut(x)).relu()


class CNN(Classifier):
    """A stem, stages of residual blocks, each but the first at half the resolution, and a linear on the mean.

    Args:
        examples: images [count, channels, height, width].
        classes: number of classes.
        widths: channels of each stage.
        depth: residual blocks of each stage.
    """

    def __init__(self, examples: Tensor, classes: int, widths: tuple[int, ...] = (16, 24, 32), depth: int = 2) -> None:
        super().__init__(examples)
        layers: list[nn.Module] = [Stem(examples.shape[1], widths[0])]
        channels = widths[0]
        for stage, width in enumerate(widths):
            for index in range(depth):
                layers.append(Residual(channels, width, stride=2 if stage and not index else 1))
                channels = width
        self.blocks = nn.ModuleList(layers)
        self.head = nn.Linear(channels, classes)

    def classify(self, inputs: Tensor) -> Tensor:
        hidden = inputs
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden.mean((2, 3)))

    def finish(self) -> None:
        """Fold every normalization."""
        for module in self.modules():
            if isinstance(module, Convolution):
                module.fold()
