"""Whether a loss still follows its own trend: calibrated on noise about laws that are known, against bends of known size."""

import numpy as np
import pytest

from fp8jax.monitor import trend

STEPS = np.arange(1, 301)
LAWS = {"power": 4 * STEPS**-0.1, "constant": np.full(300, 2.0), "logarithm": 4 - 0.3 * np.log(STEPS)}


def noisy(law, seed, at=300, factor=1.0):
    noise = np.random.default_rng(seed).normal(scale=0.02, size=300)
    return np.where(STEPS < at, law, law * factor) * np.exp(noise)


@pytest.mark.parametrize("law", LAWS)
def test_on_its_trend_the_excess_is_about_a_standard_normal(law):
    """About 0.2 above 0 where the law is a constant: of slopes that are noise, those that rise count as 0."""
    found = np.array([trend.excess(STEPS, noisy(LAWS[law], seed)) for seed in range(300)])
    assert abs(np.mean(found)) < 0.3 and 0.9 < np.std(found) < 1.3
    assert np.mean(found >= trend.ABOVE) < 0.01


def test_a_bend_of_two_percent_is_seen_within_the_recent_entries():
    """12 entries of noise 2% about a law that 64 fix: a standard error of about 0.7%."""
    found = np.array([trend.excess(STEPS, noisy(LAWS["power"], seed, at=289, factor=1.04)) for seed in range(100)])
    assert np.mean(found >= trend.ABOVE) > 0.8
    assert np.median(found) == pytest.approx(0.04 / (0.02 * np.sqrt(1 / 12 + 1 / 64 + 38**2 * 12 / (64**3))), rel=0.2)


def test_a_loss_that_falls_faster_is_not_above():
    assert trend.excess(STEPS, noisy(LAWS["power"], 0, at=289, factor=0.9)) < -4


def test_a_past_that_rises_is_nothing_to_go_on_with():
    rising = LAWS["constant"] * np.exp(0.01 * np.maximum(STEPS - 200, 0))
    assert trend.excess(STEPS, noisy(rising, 0)) > trend.ABOVE


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite(bad):
    losses = noisy(LAWS["power"], 0)
    losses[-3] = bad
    assert trend.excess(STEPS, losses) == np.inf and trend.stands_still(losses)
    losses = noisy(LAWS["power"], 0)
    losses[-40:-20] = bad
    assert abs(trend.excess(STEPS, losses)) < trend.ABOVE


def test_too_few_entries_say_nothing():
    losses = noisy(LAWS["constant"], 0, at=1, factor=3.0)
    assert trend.excess(STEPS[:trend.RECENT + trend.LEAST - 1], losses[:trend.RECENT + trend.LEAST - 1]) == 0
    assert not trend.stands_still(losses[:trend.PAST - 1])


def test_standing_still():
    falls = [trend.stands_still(noisy(LAWS["power"] * STEPS**-0.2, seed)) for seed in range(100)]
    stands = [trend.stands_still(noisy(LAWS["constant"], seed)) for seed in range(100)]
    assert np.mean(falls) < 0.02 and np.mean(stands) > 0.7  # of a normal deviate 84% lie above -1
