from harness.memory import MemoryMeter

MEGABYTE = 2**20


def used(megabytes: int) -> None:
    """Touch so much memory, and let it go."""
    bytes(bytearray(b"x") * (megabytes * MEGABYTE))


def test_a_stretch_sees_its_own_peak_and_not_what_came_before() -> None:
    meter = MemoryMeter()
    whole = meter()
    used(200)
    base = meter()()
    small = meter()
    used(20)
    inner = small()
    outer = whole()
    assert inner < base + 100 * MEGABYTE
    assert outer > inner + 150 * MEGABYTE  # although the mark was reset meanwhile


def test_stretches_after_one_another_do_not_add_up() -> None:
    meter = MemoryMeter()
    first = meter()
    used(200)
    peak = first()
    second = meter()
    assert second() < peak - 100 * MEGABYTE
