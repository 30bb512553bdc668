"""Perplexity, KL and intervals against closed forms."""

import math
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from harness.evaluate import (
    LOGITS_PER_BATCH,
    batch_size,
    evaluate,
    reference,
)
from harness.intervals import interval, paired_difference
from methods.network import Network

VOCAB, WINDOWS, LENGTH = 50, 7, 12


class Bigram(nn.Module):
    """Logits of the next token are a row of a table."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        del use_cache
        return SimpleNamespace(logits=self.table[input_ids])


def bigram(table: Tensor) -> Network:
    return Network(Bigram(table), ())


def random_table(seed: int, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(VOCAB, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(0))


def test_perplexity_of_a_uniform_model_is_the_vocabulary(tokens: Tensor) -> None:
    result = evaluate(bigram(torch.full((VOCAB, VOCAB), 3.0)), tokens)
    assert result.ppl_token.value == pytest.approx(VOCAB, rel=1e-6)
    assert result.ppl_token.low == pytest.approx(VOCAB, rel=1e-6)
    assert (result.tokens, result.length) == (WINDOWS * (LENGTH - 1), LENGTH)


def test_nll_is_of_the_next_token(tokens: Tensor) -> None:
    log_p = random_table(1).log_softmax(-1)
    expected = [-np.mean([log_p[a, b].item() for a, b in pairwise(row)]) for row in tokens]
    result = evaluate(bigram(random_table(1)), tokens)
    assert result.nll == pytest.approx(expected, rel=1e-5)
    assert result.ppl_token.value == pytest.approx(math.exp(np.mean(expected)), rel=1e-5)


def test_word_perplexity_divides_the_same_nll_by_words(tokens: Tensor) -> None:
    result = evaluate(bigram(random_table(1)), tokens, words=20)
    assert result.ppl_word == pytest.approx(math.exp(np.mean(result.nll) * result.tokens / 20))
    assert evaluate(bigram(random_table(1)), tokens).ppl_word is None


def test_a_model_agrees_with_itself(tokens: Tensor) -> None:
    network = bigram(random_table(1, scale=5.0))
    result = evaluate(network, tokens, reference(network, tokens))
    assert result.kl is not None and result.agreement is not None
    assert 0 <= result.kl.value < 1e-6
    assert result.agreement.value == 1


def test_kl_of_two_categorical_models(tokens: Tensor) -> None:
    p, q = random_table(1)[0].softmax(-1), random_table(2)[0].softmax(-1)
    full, quantized = bigram(p.log().expand(VOCAB, -1)), bigram(q.log().expand(VOCAB, -1))
    result = evaluate(quantized, tokens, reference(full, tokens))
    expected = (p * (p / q).log()).sum().item()
    reverse = (q * (q / p).log()).sum().item()
    assert abs(expected - reverse) > 0.1
    assert result.kl is not None and result.agreement is not None
    assert result.kl.value == pytest.approx(expected, rel=1e-3)
    assert result.agreement.value == float(p.argmax() == q.argmax())


def test_agreement_counts_tokens(tokens: Tensor) -> None:
    table = random_table(1)
    changed = table.clone()
    changed[:10] = -table[:10]  # after tokens 0 to 9 another token is the likeliest
    result = evaluate(bigram(changed), tokens, reference(bigram(table), tokens))
    assert result.agreement is not None
    assert result.agreement.value == pytest.approx((tokens[:, :-1] >= 10).float().mean().item())


def test_batch_size_does_not_matter(tokens: Tensor) -> None:
    full, quantized = bigram(random_table(1)), bigram(random_table(2))
    one, many = (evaluate(quantized, tokens, reference(full, tokens, b), batch=b) for b in (1, 4))
    assert one == many


def test_batch_size_bounds_the_logits() -> None:
    assert batch_size(512, 2048) * 512 * 2048 <= LOGITS_PER_BATCH
    assert batch_size(2048, 128_000) == 1
    assert batch_size(128, 2048) > batch_size(512, 2048) > batch_size(512, 32_000)


def test_a_logit_that_is_not_finite_names_its_window(tokens: Tensor) -> None:
    tokens = tokens % (VOCAB - 1)
    tokens[4, 3] = VOCAB - 1
    for bad in (math.nan, math.inf):
        table = random_table(1)
        table[VOCAB - 1, 5] = bad
        with pytest.raises(FloatingPointError, match="window 4"):
            evaluate(bigram(table), tokens, batch=3)


def test_a_reference_of_other_windows_is_refused(tokens: Tensor) -> None:
    network = bigram(random_table(1))
    with pytest.raises(ValueError, match="7 windows of 12"):
        evaluate(network, tokens, reference(network, tokens[:3]))


def test_interval_covers_the_mean_95_times_in_100() -> None:
    rng = np.random.default_rng(1)
    repetitions = 300
    intervals = [interval(rng.normal(3.0, 0.5, size=64).tolist(), resamples=500) for _ in range(repetitions)]
    covered = sum(i.low <= 3.0 <= i.high for i in intervals)
    assert 0.90 < covered / repetitions < 0.99
    width = np.mean([i.high - i.low for i in intervals])
    assert width == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(64), rel=0.1)


def test_interval_is_reproducible_and_needs_two_windows() -> None:
    values = [1.0, 2.0, 4.0]
    assert interval(values) == interval(values)
    with pytest.raises(ValueError, match="test_sequences"):
        interval([1.0])


def test_paired_difference_sees_what_separate_intervals_hide() -> None:
    rng = np.random.default_rng(2)
    easy_to_hard = rng.normal(3.0, 1.0, size=64)
    a, b = easy_to_hard + 0.02 + 0.005 * rng.random(64), easy_to_hard
    difference = paired_difference(a.tolist(), b.tolist())
    assert 0 < difference.low < difference.value < difference.high
    assert difference.value == pytest.approx((a - b).mean())
    assert interval(a.tolist()).low < interval(b.tolist()).high  # unpaired, they overlap
    assert paired_difference(b.tolist(), a.tolist()).high < 0
