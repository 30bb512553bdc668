import pytest

from methods.budget import Budget
from methods.formats.integer import Integer

SHAPES = [(8, 64), (16, 32)]


@pytest.mark.parametrize(
    ("budget", "name"),
    [
        (Budget(bits=4), "w4g128"),
        (Budget(bits=3, group_size=0, symmetric=True), "w3channel-sym"),
        (Budget(effective_bits=3.25), "b3.25g128"),
        (Budget(megabytes=3.5, group_size=32), "3.5MBg32"),
        (Budget(gigabops=0.4), "0.4GBOPsg128"),
        (Budget(microseconds=1500), "1500usg128"),
    ],
)
def test_names_say_what_is_bounded(budget: Budget, name: str) -> None:
    assert budget.name == name


def test_exactly_one_thing_is_bounded() -> None:
    with pytest.raises(ValueError, match=r"names one of budget\.bits, .*, not none"):
        Budget()
    with pytest.raises(ValueError, match="not bits and gigabops"):
        Budget(bits=4, gigabops=1.0)


def test_limits_are_bits_a_weight() -> None:
    stored = sum(Integer(3, 32).stored_bits(shape) for shape in SHAPES)
    assert Budget(bits=3, group_size=32).limit(SHAPES) == pytest.approx(stored / 1024)
    assert Budget(effective_bits=3.7).limit(SHAPES, 10**6) == 3.7
    # 1,000 bytes are 8,000 bits, of which 100 other parameters take 1,600.
    assert Budget(megabytes=1e-3).limit(SHAPES, 100) == pytest.approx(6400 / 1024)
    assert Budget(gigabops=1.0).limit(SHAPES) is None


def test_a_bound_names_no_width() -> None:
    with pytest.raises(ValueError, match=r"a bound of 3\.5 megabytes and names no single width"):
        Budget(megabytes=3.5).format()
    assert Budget(megabytes=3.5).format(4) == Integer(4, 128)
