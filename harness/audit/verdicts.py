"""From what each version holds to a verdict a version."""

from __future__ import annotations

from collections.abc import Sequence

HOLDS, NEVER, UNCHECKED = "holds", "never held", "not checked"
ENDED, BEGAN = "no longer holds since", "holds only since"

LEGEND = (
    f"Each row is a sentence of the survey put to one published version of a package. *{HOLDS}*: it is true of this "
    f"version. *{ENDED} V*: it was true of an earlier version inspected, and V is the first inspected in which it is "
    f"not. *{BEGAN} V*: it is not true here, and first becomes true in V. *{NEVER}*: it is true of no version "
    f"inspected. *{UNCHECKED}*: this version could not be read; the reason is given. Versions between those inspected "
    "may differ. Evidence is the first place found, or how many text files (sources, documents, configurations, "
    "metadata) were searched in vain: compiled code and websites are not searched."
)


def verdicts(held: Sequence[bool | None]) -> list[tuple[str, int | None]]:
    """The verdict of each version, and the index of the version that it names.

    Args:
        held: whether the sentence is true of each version, oldest first; None where it was not checked.
    """
    return [_verdict(held, index) for index in range(len(held))]


def _verdict(held: Sequence[bool | None], index: int) -> tuple[str, int | None]:
    if held[index] is None:
        return UNCHECKED, None
    if held[index]:
        return HOLDS, None
    before = [i for i in range(index) if held[i]]
    if before:
        return ENDED, next(i for i in range(before[-1], index + 1) if held[i] is False)
    after = [i for i in range(index, len(held)) if held[i]]
    return (BEGAN, after[0]) if after else (NEVER, None)
