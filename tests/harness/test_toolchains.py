"""Tools in processes of their own: what they answer, and what becomes of those that crash, hang or lie."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from harness.toolchains import service
from harness.toolchains.environments import Environments
from harness.toolchains.service import ToolRunner
from methods.base import Budget, Context
from methods.formats.integer import Integer
from methods.network import Network
from methods.rtn import RTN
from methods.toolchains.base import Toolchain, on_grid

PROGRAM = '''
"""A tool that rounds to nearest, and misbehaves when told to."""
import time
import torch
from methods.formats.integer import Integer

IMPORTS = ("json",)

def run(model, work, settings):
    if settings["fault"] == "crash":
        raise RuntimeError("the tool fell over")
    if settings["fault"] == "hang":
        time.sleep(60)
    answer = {}
    for name in work.linears:
        weight = model.get_submodule(name).weight.detach().float()
        grid = Integer(settings["bits"], settings["group_size"]).fit(weight)
        answer[f"{name}/weight"] = grid.snap(weight)
        answer[f"{name}/scale"], answer[f"{name}/zero"] = grid.scale, grid.zero
    if settings["fault"] == "nan":
        answer[f"{work.linears[0]}/weight"][0, 0] = torch.nan
    if settings["fault"] == "lie":
        answer[f"{work.linears[0]}/weight"] *= 1.37
    if settings["fault"] == "shift":
        for name in work.linears:
            answer[f"{name}/zero"] -= 1
            answer[f"{name}/weight"] += answer[f"{name}/scale"].repeat_interleave(settings["group_size"], 1)
    if settings["fault"] == "skip":
        del answer[f"{work.linears[0]}/weight"]
    with torch.no_grad():
        model.get_submodule("model.norm").weight.mul_(2)
    return answer
'''


@dataclass(frozen=True)
class Fake(Toolchain):
    fault: str = ""
    name: ClassVar[str] = "fake"
    requirements: ClassVar[tuple[str, ...]] = ()
    in_original_coordinates: ClassVar[bool] = True

    def settings(self, budget: Budget) -> dict[str, Any]:
        return {"bits": budget.bits, "group_size": budget.group_size, "fault": self.fault}


class NoTokenizer:
    def save_pretrained(self, folder: Path) -> None:
        assert folder.exists()


class ThisPython:
    def python(self, name: str, requirements: tuple[str, ...]) -> Path:
        return Path(sys.executable)


@pytest.fixture
def tooled(
    small_llama: Callable[..., Network],
    context: Callable[..., Context],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Context:
    """A context whose tools find the fake program beside this project's packages."""
    for package in ("methods", "kernels"):
        (tmp_path / package).symlink_to(service.ROOT / package)
    (tmp_path / "toolbox").mkdir()
    (tmp_path / "toolbox" / "__init__.py").touch()
    (tmp_path / "toolbox" / "fake.py").write_text(PROGRAM)
    monkeypatch.setattr(service, "ROOT", tmp_path)
    monkeypatch.setattr(Fake, "__module__", "toolbox.fake")
    network = small_llama()
    ctx = context(network, Budget(bits=3, group_size=32))
    ctx.tools = ToolRunner(ThisPython(), network, NoTokenizer(), ctx.tokens, minutes=1.0)  # type: ignore[arg-type]
    return ctx


def test_the_answer_is_packed_as_ours_is(tooled: Context, context: Callable[..., Context]) -> None:
    done = Fake().quantize(tooled)
    ours = RTN().quantize(tooled)
    for name in tooled.network.linears:
        assert torch.equal(done.packed[name].dequantize(), ours.packed[name].dequantize())
        assert done.packed[name].stored_bits() == ours.packed[name].stored_bits()
    assert list(done.parameters) == ["model.norm.weight"]
    torch.testing.assert_close(done.parameters["model.norm.weight"], 2 * tooled.network.module("model.norm").weight)
    assert done.spent is not None
    assert done.spent[0] > 0
    assert done.spent[1] > 10**7


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("crash", "fake ended with code 1.*the tool fell over"),
        ("nan", "returned NaN or infinity in"),
        ("lie", "do not lie on the 3-bit grid"),
        ("shift", r"squared error is 1\d times that of rounding to nearest"),
        ("skip", "returned nothing for"),
    ],
)
def test_a_fault_is_one_sentence(tooled: Context, fault: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Fake(fault).quantize(tooled)


def test_a_tool_that_hangs_is_stopped(tooled: Context) -> None:
    runner = tooled.tools
    assert isinstance(runner, ToolRunner)
    tooled.tools = ToolRunner(runner.environments, runner.network, runner.tokenizer, runner.tokens, minutes=0.2)
    with pytest.raises(ValueError, match=r"stopped after 0.2 minutes"):
        Fake("hang").quantize(tooled)


def test_without_the_harness_a_tool_says_so(
    small_llama: Callable[..., Network], context: Callable[..., Context]
) -> None:
    with pytest.raises(ValueError, match="only the harness"):
        Fake().quantize(context(small_llama()))


def test_grids_are_recovered_and_checked() -> None:
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    for fmt in (Integer(3, 16), Integer(4, 0, symmetric=True)):
        grid = fmt.fit(weight)
        rounded = grid.snap(weight)
        packed = on_grid(rounded.half(), grid.scale, None if fmt.symmetric else grid.zero, fmt)
        assert torch.equal(packed.dequantize(), rounded)
        assert packed.stored_bits() == fmt.stored_bits((6, 40))
    sides = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0]).view(6, 1)
    packed = on_grid(rounded * sides, grid.scale * sides, None, fmt)  # the additional code on either side
    assert torch.equal(packed.dequantize(), rounded * sides)
    with pytest.raises(ValueError, match="cannot be stored"):
        on_grid(rounded * 1e8, grid.scale * 1e8, None, fmt)
    with pytest.raises(ValueError, match="scales of shape"):
        on_grid(rounded, grid.scale[:, :0], None, fmt)
    with pytest.raises(ValueError, match="4-bit grid"):
        on_grid(rounded * 4, grid.scale, None, fmt)  # on the lattice, but beyond its last point


def wheel(folder: Path, version: str) -> str:
    """A package of one module, as pip installs it."""
    path = folder / f"oddity-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("oddity.py", f"VERSION = {version!r}\n")
        info = f"oddity-{version}.dist-info"
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: oddity\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return str(path)


def test_environments_lie_on_top_of_ours_and_are_made_once(tmp_path: Path) -> None:
    environments = Environments(tmp_path / "environments")
    first, second = wheel(tmp_path, "1.0"), wheel(tmp_path, "2.0")
    ask = "import json, oddity, torch; print(json.dumps([oddity.VERSION, torch.__version__]))"
    python = environments.python("odd", [first])
    assert json.loads(subprocess.check_output([python, "-c", ask])) == ["1.0", torch.__version__]
    made = (python.parent.parent / "requirements.json").stat().st_mtime_ns
    assert environments.python("odd", [first]) == python
    assert (python.parent.parent / "requirements.json").stat().st_mtime_ns == made
    environments.python("odd", [second])
    assert json.loads(subprocess.check_output([python, "-c", ask]))[0] == "2.0"
    assert subprocess.run([sys.executable, "-c", "import oddity"], capture_output=True).returncode
    with pytest.raises(ValueError, match="cannot be installed here"):
        environments.python("odd", [str(tmp_path / "absent.whl")])
