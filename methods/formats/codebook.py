"""A table of weights for every output channel, fitted by weighted one-dimensional k-means."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.packed_codebook import PackedCodebook
from kernels.packing import PLANES, pack, row_bytes
from methods.formats.base import Format, Grid

CELLS = 128
ITERATIONS = 50
ROOM = 2**20  # numbers that a step of the search handles at once


@dataclass(frozen=True)
class Codebook(Format):
    """2**width free values per output channel, in fp16.

    Args:
        width: bits of a code, 1 to 8.
    """

    width: int

    def __post_init__(self) -> None:
        if self.width not in PLANES:
            raise ValueError(f"codebooks have {min(PLANES)} to {max(PLANES)} bits, not {self.width}")

    @property
    def name(self) -> str:
        return f"codebook{self.width}"

    @property
    def bits(self) -> float:
        return self.width

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> CodebookGrid:
        """The codebook of least squared error in each row.

        Args:
            importance: factor of each squared error, [out, in], not negative; 1 by default. A row without any
                importance counts all its weights alike.
        """
        mass = torch.ones_like(weight) if importance is None else importance
        return CodebookGrid(self, weighted_kmeans(weight, mass, 2**self.width), weight.shape[1])

    def stored_bits(self, shape: tuple[int, int]) -> int:
        out, columns = shape
        return 8 * out * row_bytes(columns, self.width) + 16 * 2**self.width * out


class CodebookGrid(Grid):
    """The codebooks of one weight matrix. All columns of a row share one, so that their order does not matter.

    Args:
        fmt: the format.
        codebook: [out, 2**width], each row ascending; rounded to fp16, as it is stored.
        columns: of the matrix.

    Raises:
        FloatingPointError: values that fp16 cannot hold.
    """

    def __init__(self, fmt: Codebook, codebook: Tensor, columns: int) -> None:
        self.format, self.group_size = fmt, columns
        self.codebook = codebook.to(torch.float16).float()
        if not self.codebook.isfinite().all():
            raise FloatingPointError(
                f"fp16 cannot hold codebooks of weights up to {codebook.abs().max():g}; check them"
            )
        self.bounds = _midpoints(self.codebook)

    def refit(self, group: int, weight: Tensor) -> None:  # noqa: ARG002
        fresh = self.format.fit(weight)
        self.codebook, self.bounds = fresh.codebook, fresh.bounds

    def encode(self, weight: Tensor, start: int = 0) -> Tensor:  # noqa: ARG002
        return torch.searchsorted(self.bounds, weight.contiguous()).to(torch.uint8)

    def decode(self, codes: Tensor, start: int = 0) -> Tensor:  # noqa: ARG002
        return self.codebook.gather(1, codes.long())

    def permuted(self, order: Tensor) -> CodebookGrid:  # noqa: ARG002
        return self

    def pack(self, codes: Tensor, order: Tensor | None = None) -> PackedCodebook:
        codes = codes if order is None else codes[:, torch.argsort(order)]
        return PackedCodebook(
            pack(codes, self.format.width),
            self.codebook.to(torch.float16),
            bits=self.format.width,
            shape=(codes.shape[0], codes.shape[1]),
        )


def weighted_kmeans(values: Tensor, mass: Tensor, count: int, iterations: int = ITERATIONS) -> Tensor:
    """The centers that minimize Σⱼ massⱼ · minₖ (valueⱼ − centerₖ)² of each row: fp32 [rows, count], ascending.

    Clusters are runs of the sorted values. The search starts from the best choice among the boundaries of CELLS cells
    of each row, found by dynamic programming; for rows of no more values this is the optimum. In longer rows, Lloyd's
    algorithm then moves the boundaries to a minimum nearby, while random starts may end far from the optimum.

    Args:
        values: [rows, n].
        mass: [rows, n], not negative; if a row has none, its values count alike.
        iterations: most steps of Lloyd's algorithm.
    """
    rows = max(1, ROOM // max(values.shape[1], CELLS**2))
    batches = zip(values.split(rows), mass.split(rows), strict=True)
    return torch.cat([_Points(v, m).cluster(count, iterations) for v, m in batches])


class _Points:
    """Rows of points with mass, in ascending order.

    A partition into runs is given by its cuts [rows, runs − 1], the index of the first point of each run but the
    first. Prefix sums tell the mass and the moments of any run.
    """

    def __init__(self, values: Tensor, mass: Tensor) -> None:
        mass = torch.where(mass.any(dim=1, keepdim=True), mass, 1.0).double()
        mass = mass / mass.sum(1, keepdim=True)
        self._mean = (mass * values).sum(1, keepdim=True)
        centered = torch.where(mass > 0, values - self._mean, 0)  # points that do not count must not stretch the row
        self._at, order = centered.sort(dim=1)  # [rows, n]
        self._each = mass.gather(1, order)
        self._mass, self._first, self._second = (
            F.pad((self._each * self._at**power).cumsum(1), (1, 0)) for power in range(3)
        )  # [rows, n + 1]

    def cluster(self, count: int, iterations: int) -> Tensor:
        """The centers of `count` clusters: fp32 [rows, count]."""
        cuts = self._best_cuts(count)
        centers = self._means(cuts, self._at.gather(1, self._edges(cuts)[:, :-1].clamp(max=self._at.shape[1] - 1)))
        for _ in range(iterations):
            previous, cuts = cuts, torch.searchsorted(self._at, _midpoints(centers))
            if torch.equal(cuts, previous):
                break
            centers = self._means(cuts, centers)
        return (centers + self._mean).float()

    def _edges(self, cuts: Tensor) -> Tensor:
        """Where runs begin, and where the last one ends: [rows, runs + 1]."""
        return F.pad(F.pad(cuts, (1, 0)), (0, 1), value=self._at.shape[1])

    def _means(self, cuts: Tensor, otherwise: Tensor) -> Tensor:
        """The mean of each run, or `otherwise` where it has no mass: [rows, runs]."""
        edges = self._edges(cuts)
        mass, first = (sums.gather(1, edges).diff(dim=1) for sums in (self._mass, self._first))
        low = self._at.gather(1, edges[:, :-1].clamp(max=self._at.shape[1] - 1))
        high = self._at.gather(1, (edges[:, 1:] - 1).clamp(min=0))
        # Differences of prefix sums are inexact for a run with next to no mass: keep its mean inside.
        return torch.where(mass > 0, (first / mass).clamp(low, high), otherwise)

    def _best_cuts(self, count: int) -> Tensor:
        """The cuts into `count` runs with the least squared error, among the cell boundaries: [rows, count − 1]."""
        edges = self._cells(count)
        cells = edges.shape[1] - 1
        if cells <= count:
            return F.pad(edges[:, 1:-1], (0, count - cells), value=self._at.shape[1])
        error = self._errors(edges)
        least, choices = error[:, 0], []  # of the cells before each edge, in one run
        for _ in range(count - 1):
            least, choice = (least.unsqueeze(2) + error).min(1)
            choices.append(choice)
        cut = edges.new_full((len(edges), 1), cells)
        cuts = [cut := choice.gather(1, cut) for choice in reversed(choices)]
        return edges.gather(1, torch.cat(cuts[::-1], dim=1))

    def _cells(self, count: int) -> Tensor:
        """The edges of cells of points: [rows, cells + 1].

        Of few points, each is a cell; many are divided into max(CELLS, count) cells with equal integrals of the cube
        root of the mass density, the density of the optimal centers where they are many (Bennett, 1948).
        """
        n = self._at.shape[1]
        cells = max(CELLS, count)
        if n <= cells:
            return torch.arange(n + 1, device=self._at.device).expand(len(self._at), -1)
        between = (self._each[:, 1:] + self._each[:, :-1]) / 2
        level = F.pad((between * self._at.diff(dim=1).square()).pow(1 / 3).cumsum(1), (1, 0))  # [rows, n]
        steps = torch.arange(1, cells, device=level.device) / cells
        return self._edges(torch.searchsorted(level, level[:, -1:] * steps))

    def _errors(self, edges: Tensor) -> Tensor:
        """Squared error of one run from edge i to edge j, infinite for j < i: [rows, edges, edges]."""
        mass, first, second = (
            (at := sums.gather(1, edges)).unsqueeze(1) - at.unsqueeze(2)
            for sums in (self._mass, self._first, self._second)
        )
        error = torch.where(mass > 0, second - first.square() / mass, 0).clamp_(min=0)
        backwards = torch.ones(error.shape[1:], dtype=torch.bool, device=error.device).tril(-1)
        return error.masked_fill_(backwards, torch.inf)


def _midpoints(centers: Tensor) -> Tensor:
    """Where the nearest of ascending centers [rows, count] changes: [rows, count − 1]."""
    return ((centers[:, 1:] + centers[:, :-1]) / 2).contiguous()
