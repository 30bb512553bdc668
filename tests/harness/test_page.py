"""The page: what it shows is what the files say, it needs no other file, and a browser can sort and filter it."""

from __future__ import annotations

import base64
import gzip
import hashlib
import itertools
import json
import math
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from harness.report import page
from harness.report.grid import Cell, generic, interval, printed

EVIL = "<script>alert('x')</script>"
SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" width="300" height="200" viewBox="0 0 300 200">'
    '<text id="t" font-family="sans">{}</text><rect width="300" height="200"/></svg>'
)
COMPARISON = """<!-- Made by hand from 3 records. -->

# Comparison

What the columns mean, with `code` and ![a picture](http://example.org/x.png) and <img src=x onerror=alert(1)>.

## tiny on text

| Budget   | Method  |         Perplexity ↓ |
|:---------|:--------|---------------------:|
| –        | fp16    |           9.5 ± 1.00 |
| w4       | rtn     |     **10.2 ± 1.10** † |
| w4       | gptq    |           skip (1) |
| w8       | &lt;script&gt;alert('x')&lt;/script&gt; | **1,000.5 ± 1.20** |

(1) gptq at w4 skipped: the reason why
"""
VOID = {"meta", "img", "br", "hr", "input", "link", "col"}


class Elements(HTMLParser):
    """Every element with its attributes, its text, and the ids of what it stands in."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.all: list[dict[str, Any]] = []
        self._open: list[dict[str, Any]] = []
        self.feed(content)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        ids = [e["attrs"].get("id") for e in self._open]
        element = {"tag": tag, "attrs": dict(attrs), "text": "", "inside": [i for i in ids if i]}
        self.all.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()["tag"] == tag

    def handle_data(self, data: str) -> None:
        for element in self._open:
            element["text"] += data

    def tags(self, *names: str) -> list[dict[str, Any]]:
        return [element for element in self.all if element["tag"] in names]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A small folder of results; names, reasons and files are hostile."""
    tables, figures = tmp_path / "tables", tmp_path / "figures"
    tables.mkdir()
    (figures / "claims").mkdir(parents=True)
    rows = {
        "method": ["fp16", "rtn #2", "gptq", EVIL],
        "budget": ["–", "w4", "w4", "w8"],
        "perplexity": [9.5, 10.2, math.nan, 1000.5],
        "created": ["2030-01-02T00:00:00", "2030-01-01T00:00:00", "", ""],
        "git": ["abcdef0123456789", "0" * 16, "", ""],
        "section": "tiny on text",
    }
    pd.DataFrame(rows).to_csv(tables / "comparison.csv", index=False)
    (tables / "comparison.md").write_text(COMPARISON)
    (tables / "failures.csv").write_text(f'model,reason\ntiny,"{EVIL}"\n')
    (tables / "baselines_failures.csv").write_text("model,reason\n")
    rows = "row,seconds,seconds_low,seconds_high\na,2,1.5,2.5\nb,,,\n"
    (tables / "bench_x.csv").write_text(f"# a machine; torch 2\n{rows}")
    (tables / "<script>x.csv").write_text("a b\n1\n")
    for name in ("pareto_tiny", "bench_x", "claims/C01", "<script>y"):
        (figures / f"{name}.svg").write_text(SVG.format(name.replace("<", "&lt;")))
    return tmp_path


def with_ledger(results: Path) -> Path:
    claims = [
        ("C01", "1", "a claim", "supported", "0.5", "0.4", "0.6"),
        ("C02", "1", EVIL, "refuted", "-0.25", "-0.5", "0"),
        ("C03", "2", "a third", "supported", "", "", ""),
        ("C04", "2", "a fourth", "undreamt of", "", "", ""),
        ("C05", "2", "a fifth", "partly supported", "", "", ""),
    ]
    columns = ["id", "section", "sentence", "verdict", "effect", "low", "high"]
    frame = pd.DataFrame(claims, columns=columns).assign(
        hypothesis="what would be true", unit="nats", test="bootstrap", reason=EVIL, figure=""
    )
    frame.to_csv(results / "tables" / "claims.csv", index=False)
    return results


def rows_of(elements: Elements, identifier: str) -> list[list[str]]:
    """The texts of a table's body, row by row, where the table stands in the element `identifier`."""
    rows: list[list[str]] = []
    for element in elements.tags("tr", "td"):
        if identifier in element["inside"]:
            if element["tag"] == "tr":
                rows.append([])
            else:
                rows[-1].append(element["text"].strip())
    return [row for row in rows if row]


def test_the_page_refers_to_nothing_outside_itself(results: Path) -> None:
    content = page.build(with_ledger(results))
    elements = Elements(content)
    for element in elements.all:
        attributes = dict(element["attrs"])
        link = attributes.pop("href", "") if element["tag"] == "a" else ""
        assert not re.match(r"(?!https?:)\w+:", link), "a link is a place in the page, a file beside it, or a site"
        loading = {k: v for k, v in attributes.items() if k in ("src", "href", "srcset", "action", "poster", "data")}
        assert all(value.startswith("data:") for value in loading.values())
        assert not any(name.startswith("on") for name in attributes)
    assert not elements.tags("link", "iframe", "object", "embed", "base")
    styles = " ".join(element["text"] for element in elements.tags("style"))
    assert "@import" not in styles
    assert all(target.startswith("data:") for target in re.findall(r"url\([\"']?([^)]*)", styles))


def test_the_policy_allows_the_one_script_only(results: Path) -> None:
    elements = Elements(page.build(with_ledger(results)))
    (script,) = elements.tags("script")
    digest = base64.b64encode(hashlib.sha256(script["text"].encode()).digest()).decode()
    (policy,) = [e["attrs"]["content"] for e in elements.tags("meta") if "http-equiv" in e["attrs"]]
    assert f"'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


def test_every_figure_is_there_once(results: Path) -> None:
    images = Elements(page.build(with_ledger(results))).tags("img")
    shown = sorted(gzip.decompress(base64.b64decode(image["attrs"]["data-svg"])).decode() for image in images)
    assert shown == sorted(path.read_text() for path in results.rglob("*.svg"))
    assert all(image["attrs"]["alt"] for image in images)
    assert {(image["attrs"]["width"], image["attrs"]["height"]) for image in images} == {("300", "200")}


def test_a_figure_stands_beside_its_table(results: Path) -> None:
    figures = {e["attrs"]["id"]: e["inside"] for e in Elements(page.build(with_ledger(results))).tags("figure")}
    assert "section-comparison" in figures["figure-pareto_tiny"]
    assert "section-bench_x" in figures["figure-bench_x"]
    assert "claim-C01" in figures["figure-claims%2FC01"]
    assert figures["figure-%3Cscript%3Ey"][-1] == "figures"


def test_every_table_is_there_with_all_rows(results: Path) -> None:
    elements = Elements(page.build(results))
    assert rows_of(elements, "table-comparison") == [
        ["fp16", "–", "9.500"],
        ["rtn #2", "w4", "10.20"],
        ["gptq", "w4", ""],
        [EVIL, "w8", "1000"],
    ]
    assert rows_of(elements, "table-failures") == [["tiny", EVIL]]
    assert rows_of(elements, "table-bench_x") == [["a", "2.000 ± 0.500"], ["b", ""]]
    assert rows_of(elements, "table-%3Cscript%3Ex") == [["1"]]
    assert {"table-baselines_failures"} <= {e["attrs"].get("id") for e in elements.tags("p")}
    files = {e["attrs"]["href"] for e in elements.tags("a")}
    assert {"tables/comparison.csv", "tables/bench_x.csv", "tables/%3Cscript%3Ex.csv"} <= files


def test_the_printed_table_is_the_markdown_one(results: Path) -> None:
    elements = Elements(page.build(results))
    assert rows_of(elements, "table-comparison-1") == [
        ["–", "fp16", "9.5 ± 1.00"],
        ["w4", "rtn", "10.2 ± 1.10 †"],
        ["w4", "gptq", "skip (1)"],
        ["w8", EVIL, "1,000.5 ± 1.20"],
    ]
    best = [e["text"] for e in elements.tags("td") if "best" in e["attrs"]["class"].split()]
    assert best == ["10.2 ± 1.10 †", "1,000.5 ± 1.20"]
    orders = [
        e["attrs"]["data-order"]
        for e in elements.tags("td")
        if "table-comparison-1" in e["inside"] and e["attrs"]["class"].startswith("num")
    ]
    assert orders == ["9.5", "10.2", "", "1000.5"]
    assert [e["text"] for e in elements.tags("p") if e["attrs"].get("class") == "note"] == [
        "(1) gptq at w4 skipped: the reason why"
    ]


def test_hostile_text_is_text(results: Path) -> None:
    content = page.build(with_ledger(results))
    elements = Elements(content)
    assert len(elements.tags("script")) == 1
    assert EVIL not in content.replace(elements.tags("script")[0]["text"], "")
    assert not [image for image in elements.tags("img") if "data-svg" not in image["attrs"]]
    legend = next(e["text"] for e in elements.tags("p") if e["attrs"].get("class") == "legend")
    assert "<img src=x onerror=alert(1)>" in legend
    assert EVIL in next(e["text"] for e in elements.tags("tr") if e["attrs"].get("id") == "claim-C02")


def test_verdicts_are_counted(results: Path) -> None:
    elements = Elements(page.build(with_ledger(results)))
    counts = {e["attrs"]["data-verdict"]: e["text"] for e in elements.tags("button")}
    assert {name: int(re.search(r"\d+", text)[0]) for name, text in counts.items()} == {  # type: ignore[index]
        "supported": 2,
        "partly supported": 1,
        "refuted": 1,
        "undreamt of": 1,
    }
    assert all(name in text for name, text in counts.items())
    effects = [row[4] for row in rows_of(elements, "table-claims")]
    assert effects == ["0.500 ± 0.100", "−0.250 ± 0.250", "", "", ""]


def test_without_a_ledger_the_page_says_how_to_make_it(results: Path) -> None:
    section = next(e for e in Elements(page.build(results)).tags("section") if e["attrs"]["id"] == "claims")
    assert "has not been made yet" in section["text"]
    assert "make claims" in section["text"]
    assert "has not been made yet" not in page.build(with_ledger(results))


def test_provenance_is_that_of_the_newest_record(results: Path) -> None:
    facts = [e["text"] for e in Elements(page.build(results)).tags("dd")]
    assert facts == ["2030-01-02T00:00:00", "abcdef012345", "a machine; torch 2"]


def test_readers_that_speak_find_their_way(results: Path) -> None:
    elements = Elements(page.build(with_ledger(results)))
    assert elements.tags("html")[0]["attrs"]["lang"] == "en"
    levels = [int(e["tag"][1]) for e in elements.tags("h1", "h2", "h3", "h4", "h5", "h6")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    ids = [e["attrs"]["id"] for e in elements.all if "id" in e["attrs"]]
    assert len(ids) == len(set(ids))
    assert {e["attrs"]["href"][1:] for e in elements.tags("a") if e["attrs"]["href"].startswith("#")} <= {*ids}
    assert all(e["attrs"]["scope"] == "col" for e in elements.tags("th"))
    assert len(elements.tags("caption")) == len(elements.tags("table"))


def test_the_same_files_give_the_same_bytes(results: Path) -> None:
    path = page.write(results)
    first = path.read_bytes()
    assert path == results / "report.html"
    assert page.write(results).read_bytes() == first


def test_a_folder_without_tables_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="make tables"):
        page.build(tmp_path)


@pytest.mark.parametrize(
    ("value", "low", "high", "text", "hint"),
    [
        (12.3456, 12.0, 12.5, "12.35 ± 0.25", "12.00 to 12.50"),
        (-0.5, -0.75, -0.25, "−0.500 ± 0.250", "−0.7500 to −0.2500"),
        (3e-6, 1e-6, 5e-6, "3.0e−6 ± 2.0e−6", "1.0e−6 to 5.0e−6"),
        (2.0, math.nan, math.nan, "2.000", ""),
        (math.nan, math.nan, math.nan, "", ""),
    ],
)
def test_intervals(value: float, low: float, high: float, text: str, hint: str) -> None:
    cell = interval(value, low, high)
    assert (cell.text, cell.hint) == (text, hint)
    assert (float(cell.order) == value) if text else cell.order == ""


def test_columns_that_nobody_reads_are_left_out() -> None:
    frame = pd.DataFrame(
        {
            "name": [*"abcd"],
            "peak_bytes": [1.5e6, 2e6, 3e6, math.nan],
            "device": "cpu",
            "reason": "",
            "key": [*"wxyz"],
            "kl": [0.5, 1.0, 2.0, 3.0],
            "kl_low": [0.4, 0.9, 1.9, 2.9],
            "kl_high": [0.6, 1.1, 2.1, 3.1],
            "count": [1, 20000, -3, 4],
        }
    )
    grid = generic(frame)
    assert [(head.text, head.kind) for head in grid.heads] == [
        ("Name", "text"),
        ("Peak MB", "num"),
        ("KL", "num"),
        ("Count", "num"),
    ]
    assert [[cell.text for cell in row] for row in grid.rows[:2]] == [
        ["a", "1.500", "0.500 ± 0.100", "1"],
        ["b", "2.000", "1.000 ± 0.100", "20,000"],
    ]
    assert grid.shared == {"Device": "cpu"}


@pytest.mark.parametrize(
    ("text", "order"),
    [
        ("11.40 ± 1.25 †", "11.40"),
        ("−0.004 ± 0.005", "-0.004"),
        ("+0.86 [+0.76, +0.93]", "+0.86"),
        ("1.5e-7", "1.5e-7"),
        ("12,345", "12345"),
        ("256 × 768", "256"),
        ("99.96%", "99.96"),
        ("skip (1)", ""),
        ("–", ""),
    ],
)
def test_printed_numbers_sort_by_their_value(text: str, order: str) -> None:
    grid = printed(["head"], [[Cell("1")], [Cell("2")], [Cell(text)]])
    assert grid.heads[0].kind == "num"
    assert grid.rows[2][0].order == order


def test_names_with_digits_are_no_numbers() -> None:
    grid = printed(["head"], [[Cell(text)] for text in ("w4g128", "7B-block", "3d")])
    assert grid.heads[0].kind == "text"
    assert grid.heads[0].choices == ()  # each value is there once
    grid = printed(["head"], [[Cell(text)] for text in ("a", "b", "a", "b")])
    assert grid.heads[0].choices == ("a", "b")


# What a reader does, and what came of it. Errors are caught from before the page's own script on.
WATCH = """<script>window.errors = [];
for (const kind of ["error", "unhandledrejection"])
  addEventListener(kind, (event) => errors.push(String(event.message ?? event.reason ?? event.target.outerHTML)), true);
for (const kind of ["error", "warn"]) console[kind] = (...told) => errors.push(told.join(" "));
alert = () => errors.push("alert");</script>"""
DRIVE = """<script type="module">
while (!document.documentElement.dataset.ready) await new Promise((done) => setTimeout(done, 20));
const wait = () => new Promise((done) => setTimeout(done, 50));
const column = (id, n) => [...document.querySelectorAll(`#${id} tbody tr`)].map((row) => row.cells[n].textContent);
const shown = {tables: [...document.querySelectorAll("table.data")].map((t) => t.classList.contains("dataTable"))};
const head = document.querySelectorAll("#table-comparison-1 th")[2];
const sort = async () => { head.querySelector(".dt-column-order").click(); await wait(); };
const control = head.querySelector("[role=button]") ?? head;
shown.reachable = control.tabIndex >= 0;
await sort(); shown.up = column("table-comparison-1", 2); shown.said = head.getAttribute("aria-sort");
await sort(); shown.down = column("table-comparison-1", 2);
const select = document.querySelector("#table-comparison-1 select");
select.value = "w4"; select.dispatchEvent(new Event("change")); await wait();
shown.chosen = column("table-comparison-1", 0);
document.querySelector("[data-verdict=supported]").click(); await wait();
shown.supported = column("table-claims", 0);
shown.pressed = document.querySelector("[data-verdict=supported]").ariaPressed;
const search = document.querySelector("#table-all input");
search.value = "needle"; search.dispatchEvent(new Event("input", {bubbles: true})); await wait();
shown.found = column("table-all", 0);
document.querySelectorAll("details").forEach((d) => (d.open = true));
shown.images = [...document.querySelectorAll("img[data-svg]")].map((image) => image.naturalWidth);
shown.loaded = performance.getEntriesByType("resource").map((entry) => entry.name.slice(0, 5));
shown.errors = errors;
document.documentElement.dataset.shown = JSON.stringify(shown);
</script>"""


def dumped(content: str, folder: Path) -> str:
    """The document as Chromium leaves it, without a network."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    browser = next((path for path in map(shutil.which, names) if path), None)
    if browser is None:
        pytest.skip("no Chromium here to open the page in")
    path = folder / "opened.html"
    path.write_text(content)
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    options += ["--disable-component-update", "--disable-sync", f"--user-data-dir={folder / 'profile'}"]
    options += ["--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=8000", "--dump-dom", path.as_uri()]
    return subprocess.run([browser, *options], capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.fixture
def searched(results: Path) -> Path:
    """With a table that is long enough to be searched."""
    rows = "".join(f"{name},{i}\n" for i, name in enumerate(["hay", "needle", "hay two", "straw", "grass", "dust"]))
    (results / "tables" / "all.csv").write_text(f"what,n\n{rows}")
    return with_ledger(results)


def test_a_browser_sorts_filters_and_loads_nothing(searched: Path, tmp_path: Path) -> None:
    content = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.build(searched))  # for the driver
    content = content.replace("<head>", f"<head>{WATCH}").replace("</body>", f"{DRIVE}</body>")
    found = re.search(r'data-shown="([^"]*)"', dumped(content, tmp_path))
    assert found, "the page's script did not come to its end"
    shown = json.loads(unescape(found[1]))
    assert shown["errors"] == []
    assert shown["tables"]
    assert all(shown["tables"])
    assert shown["reachable"]
    assert shown["up"] == ["9.5 ± 1.00", "10.2 ± 1.10 †", "1,000.5 ± 1.20", "skip (1)"]
    assert shown["said"] == "ascending"
    assert shown["down"] == ["1,000.5 ± 1.20", "10.2 ± 1.10 †", "9.5 ± 1.00", "skip (1)"]
    assert shown["chosen"] == ["w4", "w4"]
    assert shown["supported"] == ["C01", "C03"]
    assert shown["pressed"] == "true"
    assert shown["found"] == ["needle"]
    assert shown["images"] == [300] * 4
    assert {name[:5] for name in shown["loaded"]} <= {"data:", "blob:"}


def test_the_page_works_under_its_own_policy(searched: Path, tmp_path: Path) -> None:
    opened = Elements(dumped(page.build(searched), tmp_path))
    assert opened.tags("html")[0]["attrs"].get("data-ready") == "true"
    tables = opened.tags("table")
    assert tables
    assert all("dataTable" in e["attrs"]["class"].split() for e in tables)
    assert all(e["attrs"]["src"].startswith("blob:") for e in opened.tags("img"))
