"""Two classification tasks that need no download: handwritten digits, and which file of the standard library a passage
of 64 tokens comes from.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from tokenizers import Tokenizer
from torch import Tensor

from harness import corpus
from harness.train_tiny import END_OF_TEXT, TINY

FILES, PASSAGES = 16, 200  # the longest files, each with the same number of passages
LENGTH = 64  # tokens of a passage, with the class token that begins it


@dataclass(frozen=True)
class Examples:
    """Labelled examples in an order of their own, cut into splits.

    Attributes:
        inputs: [count, …].
        labels: int64 [count].
        classes: number of classes.
        splits: `train`, `calibration`, `scoring` and `test` to disjoint ranges of numbers.
    """

    inputs: Tensor
    labels: Tensor
    classes: int
    splits: dict[str, range]

    def sequences(self, split: str, size: int) -> Tensor:
        """Mini-batches of `size` examples as `Classifier` reads them, int64 [batches, size + 1]; a rest is left out."""
        rows = self.splits[split]
        starts = torch.arange(rows.start, rows.stop - size + 1, size).unsqueeze(1)
        return torch.cat([starts, self.labels[starts + torch.arange(size)]], dim=1)


def shuffled(inputs: Tensor, labels: Tensor, held_out: dict[str, int]) -> Examples:
    """Examples in an order drawn with a fixed seed; what `held_out` leaves is for training."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    splits, start = {}, len(labels) - sum(held_out.values())
    splits["train"] = range(start)
    for name, count in held_out.items():
        splits[name] = range(start, start + count)
        start += count
    return Examples(inputs[order], labels[order], int(labels.max()) + 1, splits)


def digits() -> Examples:
    """scikit-learn's 1797 handwritten digits (UCI, Alpaydin and Kaynak 1998): fp32 [count, 1, 8, 8] in [0, 1]."""
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32).div(16).unsqueeze(1)
    return shuffled(images, torch.tensor(found.target), {"calibration": 128, "scoring": 192, "test": 600})


def passages() -> Examples:
    """Passages from the longest files of the embedded corpus, int64 [count, length]; the file is the class.

    The text differs between Python versions, as the corpus does.
    """
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    documents = sorted(corpus.core_documents(), key=lambda document: len(document.text), reverse=True)[:FILES]
    generator, rows = torch.Generator().manual_seed(0), []
    for encoding in tokenizer.encode_batch([document.text for document in documents]):
        stream = torch.tensor(encoding.ids)
        cut = stream[: len(stream) // (LENGTH - 1) * (LENGTH - 1)].view(-1, LENGTH - 1)
        rows.append(cut[torch.randperm(len(cut), generator=generator)[:PASSAGES]])
    labels = torch.arange(FILES).repeat_interleave(torch.tensor([len(row) for row in rows]))
    first = torch.full((len(labels), 1), tokenizer.encode(END_OF_TEXT).ids[0])
    return shuffled(
        torch.cat([first, torch.cat(rows)], dim=1), labels, {"calibration": 128, "scoring": 256, "test": 480}
    )
