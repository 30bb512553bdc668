"""The audit of packages, on toy wheels and sdists whose content is known."""

from __future__ import annotations

import io
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import yaml

from harness.audit import archives, packages, report
from harness.audit.archives import Contents
from harness.audit.definitions import definitions
from harness.audit.inspections import Defines, File, Mentions, Metadata
from harness.audit.packages import SDIST, WHEEL, Packages, Unavailable
from harness.audit.questions import asked, load
from harness.audit.verdicts import verdicts
from harness.claims import ledger

METADATA = "Metadata-Version: 2.1\nName: toy\nKeywords: nas,HAWQ\n\nKeywords: of the description, autoq\n"
OLD = {"toy/strategy/hawq.py": "class Hawq:\n    pass\n", "toy/core.py": "def fit(bits=4): ...\n"}
NEW = {"toy/core.py": "def fit(bits=3): ...\ndef gptq(): ...\n", "toy/py2.py": "print 'odd'\n"}


@pytest.fixture
def cache(tmp_path: Path) -> Callable[..., Path]:
    """Puts toy archives where downloads go, and returns that folder."""

    def put(version: str, files: dict[str, str], kind: str = WHEEL) -> Path:
        home = tmp_path / "packages" / "toy" / version
        home.mkdir(parents=True)
        if kind == WHEEL:
            with zipfile.ZipFile(home / f"toy-{version}-py3-none-any.whl", "w") as wheel:
                for path, text in {**files, f"toy-{version}.dist-info/METADATA": METADATA}.items():
                    wheel.writestr(path, text)
        else:
            with tarfile.open(home / f"toy-{version}.tar.gz", "w:gz") as tar:
                for path, text in {**files, "PKG-INFO": METADATA}.items():
                    entry = tarfile.TarInfo(f"toy-{version}/{path}")
                    entry.size = len(text.encode())
                    tar.addfile(entry, io.BytesIO(text.encode()))
        return tmp_path / "packages"

    return put


def conf(folder: Path, questions: list[dict[str, object]], **options: object) -> Path:
    """A folder of questions with one file."""
    folder.mkdir(exist_ok=True)
    tool = {"tool": "Toy", "package": "toy", "versions": ["1.0", "1.10"], "questions": questions} | options
    (folder / "toy.yaml").write_text(yaml.safe_dump(tool))
    return folder


def ask(folder: Path, found: Packages) -> pd.DataFrame:
    """The table of these questions, as the command makes it."""
    questions = load(folder)
    given = {}
    for (_, version, _), told in report.answers(questions, lambda source: archives.read(found.archive(*source))):
        given |= {(question, version): answer for question, answer in told.items()}
    return report.table(questions, given)


def question(text: str, look: dict[str, object], **options: object) -> dict[str, object]:
    return {"claims": ["C01"], "question": text, "look": look} | options


# -- definitions


def found(source: str) -> dict[str, tuple[int, str]]:
    return {d.name: (d.line, d.value) for d in definitions(source)}


def test_definitions_are_qualified_and_carry_their_values():
    source = """\
import enum

class Metric(enum.Enum):
    HESSIAN = "hessian"

    class Inner:
        field: int = 3
        bare: str

        async def run(self, a, b=1, /, c=None, *args, d, e='x', **rest):
            local = 5
            def helper(): ...

if True:
    LIMIT = OTHER = 1.50
else:
    LATE = 2
try:
    FAST = 1
except ImportError:
    SLOW = 1
obj.attribute = 7
"""
    assert found(source) == {
        "Metric": (3, ""),
        "Metric.HESSIAN": (4, "'hessian'"),
        "Metric.Inner": (6, ""),
        "Metric.Inner.field": (7, "3"),
        "Metric.Inner.bare": (8, ""),
        "Metric.Inner.run": (10, ""),
        "Metric.Inner.run.self": (10, ""),
        "Metric.Inner.run.a": (10, ""),
        "Metric.Inner.run.b": (10, "1"),
        "Metric.Inner.run.c": (10, "None"),
        "Metric.Inner.run.d": (10, ""),
        "Metric.Inner.run.e": (10, "'x'"),
        "Metric.Inner.run.local": (11, "5"),
        "Metric.Inner.run.helper": (12, ""),
        "LIMIT": (15, "1.5"),
        "OTHER": (15, "1.5"),
        "LATE": (17, "2"),
        "FAST": (19, "1"),
        "SLOW": (21, "1"),
    }


@pytest.mark.parametrize("source", ["print 'Python 2'", "a\x00b", "(" * 5000, "x = " + "-" * 5000 + "1"])
def test_what_is_no_python_is_refused(source):
    with pytest.raises(ValueError):
        definitions(source)


# -- inspections

CONTENTS = Contents(
    paths=("a.bin", "a/m.py", "a/n.py", "readme.md", "x.dist-info/METADATA"),
    texts={
        "a/m.py": "class A:\n    bits = 4\n    # Hawq\n",
        "a/n.py": "hawq = HAWQ = 1\nclass A:\n    bits = 8\n",
        "readme.md": "bits",
        "x.dist-info/METADATA": METADATA,
    },
)


@pytest.mark.parametrize(
    ("look", "there", "evidence"),
    [
        (Defines(name="A.bits"), True, "a/m.py:2"),
        (Defines(name="A.bits", value="8"), True, "a/n.py:3"),
        (Defines(name="A.bits", value="2"), False, "a/m.py:2 gives 4"),
        (Defines(name="bits"), False, "0 definitions in 2 files"),
        (Defines(name="A.bits", files="n.py$"), True, "a/n.py:3"),
        (Mentions(pattern="hawq"), True, "a/m.py:3; 3 hits in 3 of 4 files"),
        (Mentions(pattern="hawq", files=r"\.py$"), True, "a/m.py:3; 2 hits in 2 of 2 files"),
        (Mentions(pattern="^class A:$", files="n.py$"), True, "a/n.py:2; 1 hit in 1 of 1 file"),
        (Mentions(pattern="gptq"), False, "0 hits in 4 files"),
        (File(path=r"\.bin$"), True, "a.bin"),
        (File(path="^m.py"), False, "not among 5 files"),
        (Metadata(field="keywords", pattern="hawq"), True, "x.dist-info/METADATA:3"),
        (Metadata(field="Keywords", pattern="autoq"), False, "0 hits in 1 line of Keywords"),
    ],
)
def test_inspections_find_what_is_there(look, there, evidence):
    assert (look.look(CONTENTS).there, look.look(CONTENTS).evidence) == (there, evidence)


def test_absence_is_not_concluded_from_a_file_that_cannot_be_parsed():
    contents = Contents(("old.py", "new.py"), {"old.py": "print 'bits'\n", "new.py": "bits = 4\n"})
    assert Defines(name="bits").look(contents).there
    assert not Defines(name="elsewhere").look(contents).there  # no file with that word is unreadable
    with pytest.raises(Unavailable, match=r"^old\.py cannot be parsed"):
        Defines(name="A.bits").look(contents)


# -- archives


def test_a_wheel_and_an_sdist_read_alike(cache):
    files = {"toy/core.py": "x = 'ü'\n", "toy/core.so": "\x7fELF"}
    folder = cache("1.0", files)
    cache("1.1", files, SDIST)
    wheel, sdist = (archives.read(Packages(folder, offline=True).archive("toy", v, "")) for v in ("1.0", "1.1"))
    assert wheel.texts["toy/core.py"] == sdist.texts["toy/core.py"] == "x = 'ü'\n"
    assert "toy/core.so" in wheel.paths and "toy/core.so" in sdist.paths
    assert "toy/core.so" not in wheel.texts
    assert [value for _, _, value in sdist.metadata("Keywords")] == ["nas,HAWQ"]


def test_absurd_and_broken_archives_are_refused(cache, monkeypatch, tmp_path):
    path = Packages(cache("1.0", OLD), offline=True).archive("toy", "1.0", WHEEL)
    for limit, value, told in [
        ("MAX_FILE", 10, "longer than"),
        ("MAX_TOTAL", 30, "of text"),
        ("MAX_MEMBERS", 2, "2 f"),
    ]:
        with monkeypatch.context() as patch, pytest.raises(Unavailable, match=told):
            patch.setattr(archives, limit, value)
            archives.read(path)
    for name in ("broken.whl", "broken.tar.gz"):
        (tmp_path / name).write_bytes(b"no archive")
        with pytest.raises(Unavailable, match=f"{name} cannot be read"):
            archives.read(tmp_path / name)
    cache("1.1", OLD, SDIST)
    with monkeypatch.context() as patch, pytest.raises(Unavailable, match="unpacks to more than"):
        patch.setattr(archives, "MAX_UNPACKED", 600)
        archives.read(Packages(path.parents[2], offline=True).archive("toy", "1.1", SDIST))
    cut = tmp_path / "cut.tar.gz"
    with tarfile.open(cut, "w:gz") as tar:
        entry = tarfile.TarInfo("toy/a.py")
        entry.size = 100_000
        tar.addfile(entry, io.BytesIO(bytes(i * i % 251 for i in range(100_000))))
    cut.write_bytes(cut.read_bytes()[:200])
    with pytest.raises(Unavailable, match=r"cut\.tar.gz cannot be read"):
        archives.read(cut)


# -- verdicts


@pytest.mark.parametrize(
    ("held", "told"),
    [
        ([True, True], [("holds", None), ("holds", None)]),
        ([False, False], [("never held", None)] * 2),
        (
            [True, None, False, False],
            [("holds", None), ("not checked", None), *[("no longer holds since", 2)] * 2],
        ),
        ([False, None, True], [("holds only since", 2), ("not checked", None), ("holds", None)]),
        (
            [True, False, True, False],
            [("holds", None), ("no longer holds since", 1), ("holds", None), ("no longer holds since", 3)],
        ),
        ([None, False], [("not checked", None), ("never held", None)]),
    ],
)
def test_verdicts_compare_versions_in_order(held, told):
    assert verdicts(held) == told


def test_every_verdict_in_one_table(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("asked the index for what is there"))
    folder = cache("1.0", OLD)
    cache("1.10", NEW)
    asking = conf(
        tmp_path / "conf",
        [
            question("has a strategy", {"file": {"path": r"strategy/hawq\.py$"}}),
            question("has GPTQ", {"defines": {"name": "gptq"}}),
            question("defaults to 2 bits", {"defines": {"name": "fit.bits", "value": "2"}}),
            question("no AWQ", {"mentions": {"pattern": "awq", "files": r"core\.py$"}}, present=False),
            question("no C", {"mentions": {"pattern": "int", "files": r"\.cpp$"}}, present=False),
            question("broken", {"defines": {"name": "odd"}}, versions=["1.10"]),
            question("later", {"defines": {"name": "gptq"}}, versions=["1.10", "2.0"], claims=["C01", "C02"]),
        ],
    )
    table = ask(asking, Packages(folder, offline=True))
    told = {
        (row["claim"], row["question"], row["version"]): (row["verdict"], row["evidence"])
        for row in table.to_dict("records")
    }
    assert told == {
        ("C01", "has a strategy", "1.0"): ("holds", "toy/strategy/hawq.py"),
        ("C01", "has a strategy", "1.10"): ("no longer holds since 1.10", "not among 3 files"),
        ("C01", "has GPTQ", "1.0"): ("holds only since 1.10", "0 definitions in 2 files"),
        ("C01", "has GPTQ", "1.10"): ("holds", "toy/core.py:2"),
        ("C01", "defaults to 2 bits", "1.0"): ("never held", "toy/core.py:1 gives 4"),
        ("C01", "defaults to 2 bits", "1.10"): ("never held", "toy/core.py:1 gives 3"),
        ("C01", "no AWQ", "1.0"): ("holds", "0 hits in 1 file"),
        ("C01", "no AWQ", "1.10"): ("holds", "0 hits in 1 file"),
        ("C01", "no C", "1.0"): ("not checked", "nothing to search: 0 hits in 0 files"),
        ("C01", "no C", "1.10"): ("not checked", "nothing to search: 0 hits in 0 files"),
        ("C01", "broken", "1.10"): (
            "not checked",
            "toy/py2.py cannot be parsed: Missing parentheses in call to 'print'. Did you mean print(...)?",
        ),
        ("C01", "later", "1.10"): ("holds", "toy/core.py:2"),
        ("C01", "later", "2.0"): ("not checked", "not downloaded yet, and this run is offline"),
        ("C02", "later", "1.10"): ("holds", "toy/core.py:2"),
        ("C02", "later", "2.0"): ("not checked", "not downloaded yet, and this run is offline"),
    }


def test_the_table_survives_the_disk_and_hostile_text(cache, tmp_path):
    folder = cache("1.0", {"toy/<b>|#x.py": "hawq\n"})
    asking = conf(
        tmp_path / "conf", [question('a | *b*, "c"', {"mentions": {"pattern": "hawq", "files": "b"}})], versions=["1.0"]
    )
    paths = report.write(ask(asking, Packages(folder, offline=True)), {"C01": "<i>s</i>"}, tmp_path)
    row = pd.read_csv(paths[0], comment="#").iloc[0]
    assert row["question"] == 'a | *b*, "c"' and row["verdict"] == "holds"
    assert row["evidence"] == "toy/<b>|x.py:1; 1 hit in 1 of 1 file"
    page = paths[1].read_text()
    assert "<b>" not in page and "<i>" not in page and r"a \| \*b\*" in page


# -- downloads


class Pip:
    """Stands in for pip: puts a toy wheel into `--dest`, or fails."""

    def __init__(self, fails: str = "", hangs: bool = False) -> None:
        self.calls: list[list[str]] = []
        self.fails, self.hangs = fails, hangs

    def __call__(self, command, **options):
        self.calls.append(command)
        if self.hangs:
            raise subprocess.TimeoutExpired(command, options["timeout"])
        if not self.fails:
            name, version = command[-1].split("==")
            with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / f"{name}-{version}.whl", "w") as wheel:
                wheel.writestr("toy/core.py", "x = 1\n")
        return subprocess.CompletedProcess(command, bool(self.fails), "", self.fails)


def test_a_package_is_downloaded_once(tmp_path, monkeypatch):
    pip = Pip()
    monkeypatch.setattr(subprocess, "run", pip)
    found = Packages(tmp_path / "cache")
    assert found.archive("toy", "1.0", WHEEL) == found.archive("toy", "1.0", WHEEL)
    assert Packages(tmp_path / "cache", offline=True).archive("toy", "1.0", WHEEL).name == "toy-1.0.whl"
    assert len(pip.calls) == 1
    assert {"--no-deps", "download", "toy==1.0"} <= set(pip.calls[0])


@pytest.mark.parametrize(
    ("pip", "told"),
    [
        (Pip("WARNING: of /secret\nERROR: no version 9 (from versions: 1, 2)\n"), "^pip: no version 9$"),
        (Pip("WARNING: of /secret\n"), "^pip: no archive"),
        (Pip(hangs=True), f"^no download within {packages.MINUTES:g} minutes$"),
    ],
)
def test_what_cannot_be_had_is_told_and_tried_again(tmp_path, monkeypatch, pip, told):
    monkeypatch.setattr(subprocess, "run", pip)
    for attempt in (1, 2):
        with pytest.raises(Unavailable, match=told):
            Packages(tmp_path / "cache").archive("toy", "9", WHEEL)
        assert len(pip.calls) == attempt
    assert [p for p in (tmp_path / "cache" / "toy").iterdir() if p.suffix != ".lock"] == []


def test_pip_takes_an_sdist_without_running_it(tmp_path, monkeypatch):
    (tmp_path / "index").mkdir()
    trap = tmp_path / "ran"
    files = {
        "setup.py": f"open({str(trap)!r}, 'w')\nfrom setuptools import setup\nsetup(name='toy', version='1.0')\n",
        "PKG-INFO": "Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n",
    }
    with tarfile.open(tmp_path / "index" / "toy-1.0.tar.gz", "w:gz") as tar:
        for path, text in files.items():
            entry = tarfile.TarInfo(f"toy-1.0/{path}")
            entry.size = len(text)
            tar.addfile(entry, io.BytesIO(text.encode()))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    path = Packages(tmp_path / "cache").archive("toy", "1.0", SDIST)
    assert archives.read(path).texts["setup.py"] == files["setup.py"]
    assert not trap.exists()
    with pytest.raises(Unavailable, match=r"^pip: .*toy==2\.0"):
        Packages(tmp_path / "cache").archive("toy", "2.0", SDIST)


# -- questions


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"look": {"menitons": {"pattern": "x"}}},
            r"^toy\.yaml: questions\[0\]: unknown inspection 'menitons': did you",
        ),
        ({"look": {"mentions": {"patern": "x"}}}, r"look\.mentions\.patern: did you mean pattern"),
        ({"look": {"mentions": {"pattern": "("}}}, r"pattern '\(' is no regular expression"),
        ({"look": {"mentions": {"pattern": ["x"]}}}, r"look\.mentions"),
        ({"look": {"mentions": {}}}, r"look\.mentions is incomplete: .*pattern"),
        ({"look": {"mentions": "hawq"}}, r"look\.mentions must be a mapping"),
        ({"look": {}}, r"look must name one inspection, and names 0"),
        ({"presnt": False}, r"questions\[0\]\.presnt: did you mean present"),
        ({"present": "perhaps"}, r"questions\[0\]: .*perhaps"),
        ({"claims": []}, r"names no claims"),
    ],
)
def test_a_bad_question_is_one_sentence(tmp_path, change, told):
    with pytest.raises(ValueError, match=told) as error:
        load(conf(tmp_path / "conf", [question("q", {"mentions": {"pattern": "x"}}) | change]))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("tool: [", r"^toy\.yaml is no YAML: line 1"),
        ("- a\n- b\n", r"^toy\.yaml must be a mapping"),
        ("tool: T\npackage: p\n", r"^toy\.yaml is incomplete: .*versions"),
        (
            "tool: T\npackage: p\nversions: [1]\narchive: egg\n",
            r"^toy\.yaml: unknown archive 'egg': there are sdist, wheel",
        ),
        ("tool: T\npackage: p\nversions: [1]\nquestions: [a]\n", r"^toy\.yaml: questions\[0\] must be a mapping"),
    ],
)
def test_a_bad_file_is_one_sentence(tmp_path, text, told):
    (tmp_path / "toy.yaml").write_text(text)
    with pytest.raises(ValueError, match=told) as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


def test_the_committed_questions_fit_the_ledger():
    questions = load()
    audited = {p.claim for claim in ledger.load().values() for p in claim.parts if hasattr(p, "claim")}
    assert {claim for q in questions for claim in q.claims} == audited
    assert [q.question for q in asked(questions, ["C44"])] == [q.question for q in questions if "C44" in q.claims]
    with pytest.raises(ValueError, match="no question bears on 'C444': did you mean C44"):
        asked(questions, ["C444"])
    for q in questions:
        assert all(isinstance(v, str) and v[0].isdigit() for v in q.versions)
        numbers = [tuple(int(part) for part in v.split(".")) for v in q.versions]
        assert numbers == sorted(set(numbers)), f"{q.package}: oldest first"
