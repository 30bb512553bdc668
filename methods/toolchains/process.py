"""What a tool in a process and an environment of its own is asked, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True)
class Answer:
    """What came back.

    Attributes:
        tensors: what the tool's program returned.
        parameters: full name to new value of every other parameter of the model that the tool changed.
        seconds: from the loaded model to the quantized one.
        peak_bytes: the largest resident size of the process meanwhile.
    """

    tensors: dict[str, Tensor]
    parameters: dict[str, Tensor]
    seconds: float
    peak_bytes: int


class Tools(Protocol):
    """Runs tools on the model and the calibration text of a context."""

    def __call__(self, module: str, requirements: Sequence[str], settings: Mapping[str, Any]) -> Answer:
        """Call `run(model, work, settings)` of `module` where `requirements` are installed.

        Raises:
            ValueError: the environment cannot be made, or the program fails, hangs or answers nonsense; with the
                last lines it wrote.
        """
        ...
