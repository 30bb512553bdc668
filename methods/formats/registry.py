"""Formats by the names that tables show and users type. Integer formats have options, and no entry here."""

from __future__ import annotations

from methods.base import hint
from methods.formats.base import Format
from methods.formats.codebook import Codebook
from methods.formats.dense import Dense
from methods.formats.floats import FP8, FP8_NAMES, MX, MX_NAMES, NVFP4
from methods.formats.normal_float import NF4
from methods.formats.superblock import KQUANTS

FORMATS: dict[str, Format] = {
    fmt.name: fmt
    for fmt in (
        *(FP8(element) for element in FP8_NAMES),
        *(MX(element, ceil) for ceil in (False, True) for element in MX_NAMES),
        NVFP4(),
        NF4(),
        NF4(double=True),
        *KQUANTS.values(),
        *(Codebook(width) for width in range(2, 6)),
        Dense(),
    )
}


def named_format(name: str) -> Format:
    """The format of that name.

    Raises:
        ValueError: there is none; names the nearest, or all.
    """
    if name not in FORMATS:
        raise ValueError(f"unknown format {name!r}: {hint(name, FORMATS)}")
    return FORMATS[name]
