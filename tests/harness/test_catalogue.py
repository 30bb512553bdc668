from harness import catalogue
from methods.allocation.base import SOLVERS
from methods.base import METHODS, discover
from methods.sensitivity.base import METRICS


def test_every_method_is_listed_with_its_parts_needs_and_source() -> None:
    rows = {row[0]: row for row in catalogue.methods()}
    assert set(rows) == set(discover()) == set(METHODS)
    assert all(all(row) for row in rows.values())
    assert rows["awq"][2] == "awq"
    assert rows["gptq"][3] == "gptq"
    assert "gram" in rows["gptq"][5]
    assert rows["hawq_v2"][4] == "hawq_v2 × pareto"
    assert rows["hawq_v2"][5] == "second derivatives (fp32)"
    assert "rl" in rows["autoq"][5]
    assert "arXiv 2011.10680" in rows["hawq_v3"][6]


def test_every_metric_and_part_has_a_sentence() -> None:
    metrics = {row[0]: row for row in catalogue.metrics()}
    assert set(metrics) == set(METRICS)
    assert metrics["kfac"][1:3] == ("loss of a linear in a format", "gram, gradients")
    assert all(all(row) for row in metrics.values())
    solvers = dict(catalogue.parts(SOLVERS))
    assert set(solvers) == set(SOLVERS)
    assert all(len(sentence.split()) > 2 and not sentence.endswith(".") for sentence in solvers.values())


def test_abbreviations_do_not_end_a_sentence() -> None:
    class Sample:
        """After Dong et al. Nothing (et al., 2020) ends here, says the rest. And this is cut."""

    assert catalogue.summary(Sample) == "After Dong et al. Nothing (et al., 2020) ends here, says the rest"
