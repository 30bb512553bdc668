from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import linregress
from torch import Tensor
from torch.func import functional_call

from harness.bench import beside, figures, hessian, peer, plans, tables
from harness.bench.measure import SIZES, Measurement, Point, Size, dtype, measure, measure_alone, random_network
from harness.bench.scaling import Grid, Limits, fit, predict, run, summarize
from harness.checkpoints import ASSETS
from harness.report.figures import save
from methods.budget import Budget
from methods.network import Network

TINY = Size(hidden=32, blocks=1, heads=2, vocabulary=64)
ENDLESS = Limits(seconds=1e9, total=1e9, free=lambda: 10**15)


def point(kind: str = "metric", name: str = "fisher_trace", size: Size = TINY, **options: object) -> Point:
    return Point(kind, name, size, 16, 2, options, group_size=16, threads=1)


def law(seconds: float = 1e-6, extra: float = 10.0) -> Callable[[Point], Measurement]:
    """Seconds and bytes proportional to parameters and length."""

    def measured(p: Point) -> Measurement:
        work = p.size.parameters * p.length
        return Measurement((seconds * work, 1.2 * seconds * work, 0.9 * seconds * work), 3, 0, int(extra * work))

    return measured


def rows(*names: str, lengths: tuple[int, ...] = (1, 2), sizes: tuple[str, ...] = ("1M", "4M", "16M")) -> Grid:
    return Grid({(name, n, s): Point("metric", name, SIZES[s], n, 8) for name in names for n in lengths for s in sizes})


class TestFit:
    def test_recovers_a_power_law(self) -> None:
        x = [1e6, 4e6, 1.6e7, 6.4e7]
        found = fit(x, [3e-5 * v**1.7 for v in x])
        assert found.exponent == pytest.approx(1.7)
        assert found.factor == pytest.approx(3e-5)
        assert found.error == pytest.approx(0, abs=1e-9)

    def test_error_is_that_of_linear_regression(self) -> None:
        x = np.array([1.0, 3.0, 10.0, 40.0, 90.0])
        y = x**1.3 * np.array([1.1, 0.8, 1.3, 0.9, 1.05])
        expected = linregress(np.log(x), np.log(y))
        found = fit(list(x), list(y))
        assert found.exponent == pytest.approx(expected.slope)
        assert found.error == pytest.approx(expected.stderr)

    def test_too_few_points(self) -> None:
        assert np.isnan(fit([1.0], [2.0]).exponent)
        two = fit([1.0, 2.0], [1.0, 4.0])
        assert two.exponent == pytest.approx(2)
        assert np.isnan(two.error)
        assert fit([1.0, 2.0, 4.0], [1.0, 0.0, 4.0]).points == 2  # nothing was measurable at one size


class TestPredict:
    def test_extrapolates_the_last_two(self) -> None:
        assert predict([1, 2, 4], [7.0, 4.0, 16.0], 8) == pytest.approx(64)

    def test_at_least_linear(self) -> None:
        assert predict([1, 2], [1.0, 1.1], 4) == pytest.approx(2.2)
        assert predict([2], [3.0], 4) == pytest.approx(6)
        assert predict([], [], 4) == 0


class TestRun:
    def test_skips_what_would_take_too_long(self) -> None:
        seen: list[Point] = []

        def measured(p: Point) -> Measurement:
            seen.append(p)
            return law()(p)

        frame = run(rows("fisher_trace", lengths=(1,)), replace(ENDLESS, seconds=5.0), measured)
        assert [p.size for p in seen] == [SIZES["1M"], SIZES["4M"]]
        last = frame[frame["size"] == "16M"].iloc[0]
        assert last["status"] == "not measured"
        assert np.isnan(last["seconds"])
        expected = 1e-6 * SIZES["16M"].parameters  # the law is linear, and so is the prediction from the median
        assert f"about {expected:.0f} s" in last["reason"]

    def test_skips_what_would_not_fit(self) -> None:
        limits = replace(ENDLESS, free=lambda: 100_000_000)  # 16M: 64 MB of weights and 160 MB beyond
        frame = run(rows("fisher_trace", lengths=(1,)), limits, law())
        assert list(frame["status"]) == ["measured", "measured", "not measured"]
        assert "are free" in frame["reason"].iloc[-1]

    def test_cheapest_first(self) -> None:
        order: list[tuple[int, int]] = []

        def measured(p: Point) -> Measurement:
            order.append((p.length, p.size.parameters))
            return law()(p)

        run(rows("fisher_trace", lengths=(1, 3), sizes=("1M", "4M")), ENDLESS, measured)
        work = [length * parameters for length, parameters in order]
        assert work == sorted(work)

    def test_total_time(self) -> None:
        frame = run(rows("fisher_trace"), replace(ENDLESS, total=3.0), law())
        measured = frame[frame["status"] == "measured"]
        assert 0 < len(measured) < len(frame)
        assert frame["reason"].dropna().str.contains("whole run").all()

    def test_failure_ends_a_row_only(self) -> None:
        tried: list[str] = []

        def measured(p: Point) -> Measurement | str:
            tried.append(p.name)
            return "it broke" if p.name == "kfac" else law()(p)

        frame = run(rows("kfac", "fisher_trace"), ENDLESS, measured)
        assert (frame[frame["row"] == "fisher_trace"]["status"] == "measured").all()
        failed = frame[frame["row"] == "kfac"]
        assert (failed["status"] == "not measured").all()
        assert failed["reason"].str.contains("it broke").all()
        assert tried.count("kfac") == 1

    def test_charges_the_whole_work(self) -> None:
        grid = rows("fisher_trace", lengths=(1,), sizes=("1M",))
        once = run(grid, ENDLESS, law()).iloc[0]
        times = run(replace(grid, times={"fisher_trace": 4}), ENDLESS, law()).iloc[0]
        for column in ("seconds", "seconds_low", "seconds_high", "passes"):
            assert times[column] == pytest.approx(4 * once[column])
        assert times["extra_bytes"] == once["extra_bytes"]

    def test_ratio_to_the_unit(self) -> None:
        def measured(p: Point) -> Measurement:
            return law(1e-6 if p.name == "gptq_loss" else 1e-6 * p.size.parameters)(p)

        found = summarize(run(rows("gptq_loss", "fisher_trace", lengths=(1,)), ENDLESS, measured), unit="gptq_loss")
        other = found[found["row"] == "fisher_trace"].iloc[0]
        counts = [SIZES[size].parameters for size in ("1M", "4M", "16M")]
        assert [other["ratio_low"], other["ratio"], other["ratio_high"]] == pytest.approx(counts)
        assert other["seconds_exponent"] == pytest.approx(2)


class TestMeasure:
    @pytest.mark.parametrize(("kind", "name"), [("forward", "forward"), ("metric", "kfac"), ("method", "awq")])
    def test_here(self, kind: str, name: str) -> None:
        found = measure(replace(point(kind, name), repeats=2))
        assert len(found.seconds) == 2
        assert all(0 < seconds < 60 for seconds in found.seconds)
        assert found.peak_bytes >= found.base_bytes > 0

    def test_alone(self) -> None:
        found = measure_alone(point(sequences=2), 60)
        assert isinstance(found, Measurement)
        assert np.isfinite([*found.seconds, found.base_bytes, found.peak_bytes]).all()
        assert found.passes == 4  # a forward and a backward pass of each sequence
        assert "no_such_option" in str(measure_alone(point(no_such_option=1), 60))
        assert "stopped" in str(measure_alone(point("metric", "hutchinson", tolerance=0.0, max_probes=10**6), 0.5))

    def test_passes_include_the_statistics(self) -> None:
        assert measure(point("metric", "output_mse")).passes == 1
        assert measure(point("metric", "kfac", sequences=2)).passes == 1 + 4

    def test_parameters(self) -> None:
        network = random_network(point())
        assert sum(out * columns for out, columns in network.shapes) == TINY.parameters

    def test_sizes_are_called_what_they_are(self) -> None:
        units = {"M": 1e6, "B": 1e9}
        for name, size in SIZES.items():
            if name[:-1].replace(".", "").isdigit():
                assert size.parameters == pytest.approx(float(name[:-1]) * units[name[-1]], rel=0.1)
            assert size.hidden % (2 * size.heads) == 0  # rotary embeddings halve a head
        settings = json.loads((ASSETS / "tiny" / "config.json").read_text())
        assert (SIZES["tiny"].hidden, SIZES["tiny"].blocks) == (settings["hidden_size"], settings["num_hidden_layers"])
        assert replace(SIZES["7B"], blocks=1) == SIZES["7B-block"]

    def test_precision(self) -> None:
        assert dtype(point("metric", "hutchinson")) == dtype(point()) == torch.float32
        assert dtype(replace(point("metric", "hutchinson"), device="cuda")) == torch.float32
        assert dtype(replace(point(), device="cuda")) == dtype(replace(point("method", "gptq"), device="cuda"))
        assert dtype(replace(point(), device="cuda")) == torch.bfloat16


def dense_trace(network: Network, tokens: Tensor, linear: str) -> float:
    """Trace of the Hessian of the mean next-token loss, from the whole matrix."""

    def loss(flat: Tensor) -> Tensor:
        parameters = {f"{linear}.weight": flat.view(network.shape(linear))}
        logits = functional_call(network.model, parameters, kwargs={"input_ids": tokens, "use_cache": False}).logits
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    with torch.enable_grad():
        return float(torch.autograd.functional.hessian(loss, network.weight(linear).flatten()).trace())


class TestPeer:
    @pytest.fixture
    def tokens(self) -> Tensor:
        return torch.randint(96, (4, 6), generator=torch.Generator().manual_seed(0))

    @pytest.fixture
    def minute_llama(self, small_llama: Callable[..., Network]) -> Network:
        return small_llama(
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            attn_implementation="eager",
        )

    @pytest.mark.parametrize("batch", [0, 2])
    def test_unbiased(self, batch: int, minute_llama: Network, tokens: Tensor) -> None:
        pytest.importorskip("pyhessian", reason="PyHessian is an extra")
        before = [parameter.requires_grad for parameter in minute_llama.model.parameters()]
        for name in (minute_llama.linears[0], minute_llama.linears[-1]):
            found = peer.draw(minute_llama, tokens, name, 200, seed=1, batch=batch)
            trace = dense_trace(minute_llama, tokens, name)
            error = found.samples.std(ddof=1) / 200**0.5
            assert abs(found.samples.mean() - trace) < 4 * error
        assert [parameter.requires_grad for parameter in minute_llama.model.parameters()] == before
        assert all(parameter.grad is None for parameter in minute_llama.model.parameters())

    def test_own_rule_is_that_of_pyhessian(self, minute_llama: Network, tokens: Tensor) -> None:
        tool = pytest.importorskip("pyhessian", reason="PyHessian is an extra").hessian
        name = minute_llama.linears[-1]
        samples = peer.draw(minute_llama, tokens, name, 100, seed=3).samples
        with peer.differentiable(minute_llama, tokens, [name]), torch.random.fork_rng():
            torch.manual_seed(3)
            model = peer._NextToken(minute_llama)
            drawn = tool(model, peer._criterion, data=(tokens, tokens), cuda=False).trace(maxIter=100, tol=1e-3)
        minute_llama.linear(name).weight.grad = None
        assert peer.stops_after(samples[None])[0] == len(drawn)

    def test_own_rule(self) -> None:
        samples = np.array([[1.0, 1.0, 9.0, 9.0], [1.0, 2.0, 1.5, 9.0], [-1.0, -9.0, 1.0, 1.0], [1.0, 2.0, 4.0, 9.0]])
        assert list(peer.stops_after(samples)) == [2, 3, 2, 4]

    def test_probes_for_an_error(self) -> None:
        assert peer.needed(4.0, 0.5) == 16
        assert peer.needed(0.0, 0.5) == 1
        drawn = peer.Probes(np.array([1.0, 3.0, 5.0]), setup=2.0, seconds=0.5)  # variance 4
        found = peer.charge(drawn, 0.5, np.random.default_rng(0))
        assert (found.probes, found.seconds) == (16, 10.0)
        assert (found.trace, found.error) == (3.0, pytest.approx(2 / 3**0.5))
        assert found.own_seconds == pytest.approx(2 + 0.5 * found.own_probes)

    def test_extrapolation(self) -> None:
        certain = {f"l{i}": peer.Probes(np.full(5, 2.0), setup=1.0 + i, seconds=0.5) for i in range(2)}
        total, replicates = peer.total_seconds(certain, {"l0": 1.0, "l1": 1.0}, 8, np.random.default_rng(0))
        assert total == pytest.approx(8 * (1.5 + 2.5) / 2)  # a probe each
        assert set(replicates) == {8 * 1.5, 8 * 2.0, 8 * 2.5}
        value, low, high = peer.ratio(total, replicates, [4.0, 8.0, 16.0], np.random.default_rng(0))
        assert value == pytest.approx(2)
        assert low < value < high

    def test_references(self) -> None:
        assert beside.references({"a": -4.0, "b": 1.0, "c": 2.0}) == {"a": 4.0, "b": 2.0, "c": 2.0}


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> beside.Comparison:
    def drawn(network: Network, tokens: Tensor, linear: str, probes: int, seed: int, batch: int) -> peer.Probes:
        return peer.Probes(np.random.default_rng(seed).normal(1, 0.1, probes), 0.1, 0.2)

    monkeypatch.setattr(beside, "draw", drawn)
    monkeypatch.setitem(SIZES, "minute", TINY)
    config = beside.PeerConfig("minute", 4, 12, 0.5, 8, every=3, probes=4, repeats=2, group_size=16)
    return beside.compare(replace(config, effective_bits=4.5), "cpu")


class TestBeside:
    def test_all_linears(self, compared: beside.Comparison) -> None:
        frame = compared.linears
        assert len(frame) == 7
        assert frame["pyhessian_trace"].notna().sum() == 3  # every third
        assert np.isfinite(frame[["hutchinson", "hutchinson_error", "gauss_newton", "gauss_newton_error"]]).all(None)
        assert (frame["gauss_newton"] > 0).all()
        assert 0 <= compared.plans.agreement <= 1

    def test_plans_of_opposite_rankings(self) -> None:
        network = random_network(point())
        tokens = torch.randint(TINY.vocabulary, (6, 12), generator=torch.Generator().manual_seed(0))
        formats = [Budget(bits=width, group_size=16).format() for width in (2, 8)]
        narrow, wide = (f.stored_bits((16, 16)) / 256 for f in formats)
        # A quarter of the weights may be wide: down_proj, or all of attention.
        budget = Budget(effective_bits=(3 * narrow + wide) / 4, group_size=16)
        first = {name: {f: (10.0**i) / f.bits for f in formats} for i, name in enumerate(network.linears)}
        last = {name: {f: (10.0**-i) / f.bits for f in formats} for i, name in enumerate(network.linears)}
        text = plans.Text(network, tokens[:3], tokens[3:])
        found, same = plans.plans(text, budget, first, last), plans.plans(text, budget, last, last)
        assert found.agreement == 2 / 7  # gate_proj and up_proj
        (h, _), (g, _) = found.rises
        assert h != g
        assert found.difference[0] == pytest.approx(g - h)
        assert (same.agreement, same.difference) == (1, (0, 0))
        assert same.rises[0] == same.rises[1] == found.rises[1]

    def test_page(self, compared: beside.Comparison) -> None:
        page = beside.page(compared, "a machine")
        for text in ("a machine", "Gauss-Newton", "PyHessian, same error", "own rule", "Spearman"):
            assert text in page

    def test_missing_extra_is_one_sentence(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(peer, "available", lambda: False)
        monkeypatch.setattr(hessian, "console", hessian.Console(width=200))
        hessian.beside_pyhessian(hessian.HessianBench(folder=str(tmp_path)))
        assert "[bench]" in capsys.readouterr().out
        assert not list(tmp_path.iterdir())
        with pytest.raises(ValueError, match=r"\[bench\]"):
            peer.draw(random_network(point()), torch.zeros(1, 4, dtype=torch.int64), "", 1, 0)


class TestConfig:
    def test_options_follow_the_text(self) -> None:
        config = hessian.HessianBench(sizes=["4M", "1M"], lengths=[64], sequences=3, metrics=["kfac", "eigenvalue"])
        grid = hessian.grid(config)
        assert [size for row, _, size in grid.points if row == "kfac"] == ["1M", "4M"]
        assert grid.points["kfac", 64, "1M"].options == {"context": 64, "sequences": 3}
        assert grid.points["eigenvalue", 64, "1M"].options["context"] == 64
        assert grid.times == {"eigenvalue": 5}
        assert {row for row, _, _ in grid.points} == {"forward", "gptq", "awq", "kfac", "eigenvalue"}

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"sizes": ["2M"]}, "unknown size"),
            ({"metrics": ["kfca"]}, "kfac"),
            ({"options": {"kfac": {"sequencse": 3}}}, "sequences"),
            ({"metrics": ["hawq_v2"], "methods": ["hawq_v2"]}, "metric and of a method"),
        ],
    )
    def test_mistakes(self, change: dict[str, list[str]], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            hessian.grid(replace(hessian.HessianBench(), **change))


class TestFiles:
    @pytest.fixture
    def frame(self) -> pd.DataFrame:
        limits = replace(ENDLESS, seconds=20.0)
        return run(rows("gptq", "forward", "kfac", "eigenvalue"), limits, law())

    @pytest.fixture(autouse=True)
    def methods_are_named_as_metrics(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("harness.bench.scaling.dtype", lambda point: torch.float32)

    def test_csv_names_the_machine(self, frame: pd.DataFrame) -> None:
        text = tables.csv(frame, tables.machine(2, "cpu"))
        assert text.startswith("# ")
        assert torch.__version__ in text.splitlines()[0]
        assert "/" not in text.splitlines()[0].replace("AMD/", "")
        read = pd.read_csv(io.StringIO(text), comment="#")
        assert list(read["seconds"].dropna()) == pytest.approx(list(frame["seconds"].dropna()), rel=1e-5)

    def test_page(self, frame: pd.DataFrame) -> None:
        page = tables.scaling_page(frame, "a machine", {"kfac": "2 sequences"})
        assert "## 2 tokens a sequence" in page
        assert "1.00 ± 0.00" in page  # the law is linear, where three sizes were measured
        assert "1 \\[1, 1\\]" in page
        assert "## Not measured" in page
        assert "more than the limit of 20 s" in page

    def test_figure(self, frame: pd.DataFrame, tmp_path: Path) -> None:
        figure = figures.cost_against_size(frame, "title")
        assert len(figure.axes) == 4  # seconds and memory by two lengths
        paths = save(figure, tmp_path / "bench_hessian")
        assert [path.suffix for path in paths] == [".png", ".svg", ".pdf"]
        assert all(path.stat().st_size > 1000 for path in paths)
