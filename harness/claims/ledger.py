"""The ledger as data: one entry a claim in `conf/claims/*.yaml`, typed and checked before anything runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from harness.claims.analysis import ANALYSES, Analysis
from harness.config import build
from methods.base import hint

FOLDER = Path(__file__).parents[2] / "conf" / "claims"
SCALES = ("cpu", "gpu")


@dataclass(frozen=True)
class Claim:
    """A sentence of the survey and how it is put to the test.

    Attributes:
        id: `C01` … for claims, `S01` … for its factual slips.
        section: of the survey.
        sentence: the survey's, in a few words.
        kind: empirical, code, bibliographic or opinion.
        hypothesis: what would be true if the sentence were.
        rule: the verdict rule in words, fixed before measuring.
        parts: what is tested; a claim that nothing can decide has none.
        untestable: why nothing here can decide it; else empty.
        note: what a reader should know beside the verdict, such as what was published.
    """

    id: str
    section: str
    sentence: str
    kind: str
    hypothesis: str
    rule: str
    parts: tuple[Analysis, ...] = ()
    untestable: str = ""
    note: str = ""


def load(folder: Path = FOLDER) -> dict[str, Claim]:
    """Every claim by its id, in the order of the files.

    Raises:
        ValueError: an entry is incomplete, has an unknown option, or an id twice; one sentence names it.
    """
    claims: dict[str, Claim] = {}
    for path in sorted(folder.glob("*.yaml")):
        entries = OmegaConf.to_container(OmegaConf.load(path))
        if not isinstance(entries, dict):
            raise ValueError(f"{path} is not a mapping of ids to claims")
        for key, entry in entries.items():
            if key in claims:
                raise ValueError(f"{path}: claim {key} is there twice")
            claims[str(key)] = _claim(str(key), dict(entry))
    return claims


def chosen(claims: Mapping[str, Claim], wanted: list[str]) -> dict[str, Claim]:
    """The claims of these ids; all for none.

    Raises:
        ValueError: an unknown id.
    """
    for key in wanted:
        if key not in claims:
            raise ValueError(f"unknown claim {key!r}: {hint(key, claims)}")
    return {key: claims[key] for key in wanted or claims}


def _claim(key: str, entry: dict[str, Any]) -> Claim:
    parts = [_part(f"{key}.parts[{i}]", dict(part)) for i, part in enumerate(entry.pop("parts", []))]
    known = [f.name for f in dataclasses.fields(Claim)]
    for name in entry:
        if name not in known:
            raise ValueError(f"unknown entry {name!r} in claim {key}: {hint(name, known)}")
    try:
        claim = Claim(key, **{name: str(value).strip() for name, value in entry.items()}, parts=tuple(parts))
    except TypeError as error:
        raise ValueError(f"claim {key} is incomplete: {error}") from error
    if bool(claim.parts) == bool(claim.untestable):
        raise ValueError(f"claim {key} needs either parts or a reason why it is untestable")
    return claim


def _part(where: str, entry: dict[str, Any]) -> Analysis:
    name = str(entry.pop("analysis", ""))
    if name not in ANALYSES.complete():
        raise ValueError(f"{where}: unknown analysis {name!r}: {hint(name, ANALYSES)}")
    part = build(ANALYSES[name], entry, where)
    if part.scale not in SCALES:
        raise ValueError(f"{where}.scale={part.scale} is not one of {', '.join(SCALES)}")
    return part
