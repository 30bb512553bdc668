"""Which kernel takes a product, and that all of them compute it."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
import torch

from kernels import dispatch
from kernels.activations import ExceptOutliers, TokenScale, integers
from kernels.cpu import library
from kernels.dispatch import choose, multiply, using
from kernels.linear import QuantLinear
from kernels.minifloat import FixedPoint
from kernels.packed import PackedDense, PackedInteger
from kernels.packing import pack

needs_library = pytest.mark.skipif(library.load() is None, reason="there is no C++ compiler")
ROUNDED = TokenScale(integers(8))


def packed(bits: int = 4) -> PackedInteger:
    codes = pack(torch.randint(2**bits, (12, 256), generator=torch.Generator().manual_seed(0)), bits)
    return PackedInteger(codes, torch.rand(12, 2).half(), None, bits=bits, shape=(12, 256), group_size=128)


@needs_library
def test_the_table() -> None:
    x = torch.randn(20, 256)
    assert choose(packed(), x[:1]) == "cpu"
    assert choose(packed(), torch.randn(33, 256)) == "cpu-dequantized"
    assert choose(packed(), x) == "cpu"
    assert choose(packed(), x, ROUNDED) == "cpu"
    assert choose(packed(), torch.randn(33, 256), TokenScale(FixedPoint(3, 4))) == "cpu-dequantized"
    assert choose(packed(), x.double()) == "reference"
    assert choose(PackedDense(torch.ones(4, 256).half()), x) == "reference"
    assert choose(packed(), x.requires_grad_()) == "reference"
    with torch.no_grad():
        assert choose(packed(), x[:1]) == "cpu"


@needs_library
@pytest.mark.parametrize("kernel", ["reference", "cpu", "cpu-dequantized"])
@pytest.mark.parametrize("inputs", [None, ROUNDED, ExceptOutliers(ROUNDED, 2.0)])
def test_every_kernel_computes_what_the_layer_computes(kernel: str, inputs: TokenScale | None) -> None:
    matrix, bias, x = packed(3), torch.randn(12), torch.randn(2, 5, 256)
    expected = matrix(x if inputs is None else inputs(x), bias)
    with using(kernel):
        torch.testing.assert_close(QuantLinear(matrix, bias, inputs)(x), expected, rtol=1e-4, atol=1e-3)


def test_the_environment_sets_the_choice() -> None:
    program = "from kernels import dispatch; print(dispatch.FROM_ENVIRONMENT)"
    environment = os.environ | {"HAWQ_KERNEL": "cpu"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "cpu\n"


@needs_library
def test_buffers_that_are_replaced_are_seen() -> None:
    matrix, x = packed(), torch.randn(1, 256)
    first = multiply(matrix, x)
    matrix.scale = 2 * matrix.scale
    torch.testing.assert_close(multiply(matrix, x), 2 * first)


def test_what_is_asked_for_is_taken_or_refused() -> None:
    x, dense = torch.randn(1, 256), PackedDense(torch.ones(4, 256).half())
    with using("reference"):
        assert choose(packed(), x) == "reference"
    with using("cpu"), pytest.raises(ValueError, match="PackedDense is not a matrix of integers"):
        choose(dense, x)
    with pytest.raises(ValueError, match="there is no kernel 'gpu'"), using("gpu"):
        pass
    with using("cpu"), pytest.raises(ValueError, match=r"inputs are torch\.float64 on cpu"):
        choose(packed(), x.double())
    with using("triton"), pytest.raises(ValueError, match="the kernel 'triton' was asked for, but the"):
        choose(packed(), x.half())
    assert choose(dense, x) == "reference"


@needs_library
def test_a_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    dispatch._log.cache_clear()
    scattered = packed()
    scattered.group_index = torch.zeros(256, dtype=torch.int16)
    with caplog.at_level(logging.INFO, logger="kernels.dispatch"):
        for _ in range(2):
            multiply(packed(), torch.randn(1, 256))
            multiply(scattered, torch.randn(1, 256))
    assert len(caplog.records) == 2
    assert "kernel cpu" in caplog.messages[0]
    assert "kernel reference, since the columns of a group are not neighbours" in caplog.messages[1]
