import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

import pytest

from methods.base import Method, Parts, Quantized, Registry


@pytest.mark.parametrize(
    ("module", "registry", "name"),
    [
        ("methods.allocation.base", "SOLVERS", "pareto"),
        ("methods.sensitivity.base", "METRICS", "kfac"),
        ("methods.rounding.base", "ROUNDINGS", "gptq"),
        ("methods.transforms.base", "TRANSFORMS", "awq"),
        ("methods.base", "METHODS", "mixed"),
    ],
)
def test_a_name_is_found_although_nobody_imported_its_module(module: str, registry: str, name: str) -> None:
    code = f"from {module} import {registry} as r; assert {name!r} not in r; print(r[{name!r}].name)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == name, done.stderr


def test_two_classes_cannot_share_a_name() -> None:
    registry: Registry[Any] = Registry("thing", "methods.rounding")
    registry.register("one")(type("First", (), {}))
    with pytest.raises(ValueError, match="two things are called 'one'"):
        registry.register("one")(type("Second", (), {}))
    with pytest.raises(ValueError, match="unknown thing 'on': did you mean one"):
        registry["on"]


def test_a_label_names_the_options_that_differ() -> None:
    @dataclass(frozen=True)
    class Sample(Method):
        plain: int = 1
        many: tuple[int, ...] = (2, 3)
        options: dict[str, Any] = field(default_factory=dict)

        def quantize(self, ctx: Any) -> Quantized:
            raise NotImplementedError

    Sample.name = "sample"
    assert Sample().label == "sample"
    assert Sample(2, (4, 8), {"a": 0.5, "b": True}).label == "sample plain=2 many=4,8 options=a:0.5,b:true"
    assert Sample().parts == Parts("integer", "none", "nearest", "uniform")
