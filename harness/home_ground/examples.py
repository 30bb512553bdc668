"""Two classification tasks that need no download: handwritten digits, and a cloze test, BERT's own pretraining task:
which of the commonest tokens stands in a gap in the embedded corpus.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from tokenizers import Tokenizer
from torch import Tensor

from harness import corpus
from harness.train_tiny import END_OF_TEXT, TINY

FILES = 200  # the longest of the corpus: 2 million tokens
GAPS = 40_000
CONTEXT = 8  # tokens on each side of a gap
CHOICES = 64  # the commonest tokens, each a class


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


def cloze() -> Examples:
    """Gaps where one of the commonest tokens stood, int64 [count, 1 + 2·CONTEXT]: a token that stands for the gap, then
    what stood before and after it; the missing token is the class. After the masked language model of Devlin et al.
    (NAACL 2019, section 3.1).

    The text differs between Python versions, as the corpus does.
    """
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    documents = sorted(corpus.core_documents(), key=lambda document: len(document.text), reverse=True)[:FILES]
    stream = torch.cat([torch.tensor(found.ids) for found in tokenizer.encode_batch([d.text for d in documents])])
    common = torch.bincount(stream, minlength=tokenizer.get_vocab_size()).argsort(descending=True, stable=True)
    choice = torch.full_like(common, -1).index_copy(0, common[:CHOICES], torch.arange(CHOICES))
    gaps = CONTEXT + (choice[stream[CONTEXT:-CONTEXT]] >= 0).nonzero().flatten()
    gaps = gaps[torch.randperm(len(gaps), generator=torch.Generator().manual_seed(0))[:GAPS]]
    around = torch.cat([torch.arange(-CONTEXT, 0), torch.arange(1, CONTEXT + 1)])
    mask = torch.full((len(gaps), 1), tokenizer.encode(END_OF_TEXT).ids[0])
    inputs = torch.cat([mask, stream[gaps.unsqueeze(1) + around]], dim=1)
    return shuffled(inputs, choice[stream[gaps]], {"calibration": 256, "scoring": 512, "test": 1920})
