"""Whether a loss still follows its own trend: calibrated on noise about laws that are known, against bends of known size."""

import json

import numpy as np
import pytest

from fp8jax.monitor import trend

STEPS = np.arange(1, 301)
LAWS = {
    "power": 4 * STEPS**-0.1,
    "constant": np.full(300, 2.0),
    "logarithm": 4 - 0.3 * np.log(STEPS),
}


def noisy(law, seed, at=300, factor=1.0):
    noise = np.random.default_rng(seed).normal(scale=0.02, size=300)
    return np.where(STEPS < at, law, law * factor) * np.exp(noise)


@pytest.mark.parametrize("law", LAWS)
def test_on_its_trend_the_excess_is_about_a_standard_normal(law):
    """About 0.2 above 0 where the law is a constant: of slopes that are noise, those that rise count as 0."""
    found = np.array([trend.excess(STEPS, noisy(LAWS[law], seed)) for seed in range(300)])
    assert abs(np.mean(found)) < 0.3 and 0.9 < np.std(found) < 1.3
    assert np.mean(found >= trend.ABOVE) < 0.01


def test_who_looks_often_must_see_more():
    """Of healthy runs of 3,000 entries about one in a hundred is found above its trend, where a fixed 4 finds one in four of them."""
    steps = np.arange(300, 3300)
    runs = [
        9 * steps**-0.25 + 0.03 * np.random.default_rng(seed).normal(size=len(steps))
        for seed in range(40)
    ]
    window = trend.PAST + trend.RECENT
    worst = [
        max(trend.excess(steps[:end], run[:end]) for end in range(window, len(steps), 3))
        for run in runs
    ]
    assert (
        np.mean(np.array(worst) > trend.above(3000)) <= 1 / 40
        and np.mean(np.array(worst) > trend.ABOVE) > 0.1
    )
    assert [round(trend.above(entries), 1) for entries in (1, 300, 3_000, 100_000)] == [
        4.0,
        4.3,
        5.2,
        6.5,
    ]


def test_a_bend_of_two_percent_is_seen_within_the_recent_entries():
    """12 entries of noise 2% about a law that 64 fix: a standard error of about 0.7%."""
    found = np.array(
        [
            trend.excess(STEPS, noisy(LAWS["power"], seed, at=289, factor=1.04))
            for seed in range(100)
        ]
    )
    assert np.mean(found >= trend.ABOVE) > 0.8
    assert np.median(found) == pytest.approx(
        0.04 / (0.02 * np.sqrt(1 / 12 + 1 / 64 + 38**2 * 12 / (64**3))), rel=0.2
    )


def test_a_loss_that_falls_faster_is_not_above():
    assert trend.excess(STEPS, noisy(LAWS["power"], 0, at=289, factor=0.9)) < -4


def test_a_past_that_rises_is_nothing_to_go_on_with():
    rising = LAWS["constant"] * np.exp(0.01 * np.maximum(STEPS - 200, 0))
    assert trend.excess(STEPS, noisy(rising, 0)) > trend.ABOVE


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite(bad):
    losses = noisy(LAWS["power"], 0)
    losses[-3] = bad
    assert trend.excess(STEPS, losses) == np.inf and still(losses)
    assert not still(np.concatenate([losses, noisy(LAWS["power"], 1)[200:]]))  # long ago
    losses = noisy(LAWS["power"], 0)
    losses[-40:-20] = bad
    assert abs(trend.excess(STEPS, losses)) < trend.ABOVE


def test_too_few_entries_say_nothing():
    losses = noisy(LAWS["constant"], 0, at=1, factor=3.0)
    assert (
        trend.excess(
            STEPS[: trend.RECENT + trend.LEAST - 1], losses[: trend.RECENT + trend.LEAST - 1]
        )
        == 0
    )
    assert not still(losses[: trend.PAST - 1])


def test_standing_still():
    falls = [still(noisy(LAWS["power"] * STEPS**-0.2, seed)) for seed in range(100)]
    stands = [still(noisy(LAWS["constant"], seed)) for seed in range(100)]
    assert np.mean(falls) < 0.02 and np.mean(stands) > 0.7  # of a normal deviate 84% lie above -1


# Losses against steps, the noise of one, steps: 0.1 and 4 million tokens a step, constants of Hoffmann et al. 2022 for the second.
RUNS = {
    "390m": (lambda step: 1.9 + 9.0 * step**-0.25, 0.03, 50_000),
    "70b": (lambda step: 1.69 + 5.8 * step**-0.28, 0.012, 120_000),
}


def course(law, noise, every, steps, related=0.0, seed=0, look=25):
    """Which of every `look`-th entry finds that the loss stands still."""
    rng, watch, found, off = np.random.default_rng(seed), trend.Course(), [], 0.0
    for step in range(every, steps + 1, every):
        off = related * off + rng.normal(scale=noise * np.sqrt(1 - related**2))
        watch.add(step, law(step) + off)
        if step // every % look == 0 and watch.stands_still():
            found.append(step)
    return found


@pytest.mark.parametrize("size", RUNS)
@pytest.mark.parametrize(("every", "related"), [(10, 0.0), (10, 0.6), (1, 0.0)])
def test_a_healthy_long_run_never_stands_still(size, every, related):
    """Whose loss falls by less than its noise over any 64 entries; also where neighbours in time are alike."""
    law, noise, steps = RUNS[size]
    assert law(steps) - law(steps + 64 * every) < noise / 4
    assert course(law, noise, every, steps if every > 1 else 20_000, related) == []


@pytest.mark.parametrize("size", RUNS)
@pytest.mark.parametrize("at", [2_000, 20_000])
def test_a_long_run_that_stops_falling_or_rises_is_found(size, at):
    """Before it has taken as many steps again; and stays found."""
    law, noise, _ = RUNS[size]
    for after in (
        lambda step: law(min(step, at)),
        lambda step: law(min(step, at)) + 0.1 * max(step / at - 1, 0),
    ):
        found = course(after, noise, 10, 3 * at)
        late = [step for step in found if step > 2 * at]
        assert at < found[0] < 1.7 * at and len(late) > at / 250 / 2, found[:3]


def test_a_course_goes_on_from_what_was_saved():
    """Through JSON, in the middle of a bucket; and from a step to which a run has gone back."""
    law, noise, _ = RUNS["390m"]
    rng = np.random.default_rng(0)
    entries = [(step, law(step) + rng.normal(scale=noise)) for step in range(10, 20_000, 10)]
    one, other = trend.Course(), trend.Course()
    for entry in entries[:1501]:
        one.add(*entry)
    other = trend.Course(json.loads(json.dumps(one.saved())))
    for entry in entries[1501:]:
        one.add(*entry)
        other.add(*entry)
    assert one.saved() == other.saved() and len(one.saved()["means"]) <= trend.BUCKETS
    other.add(*entries[1000])
    assert max(other.saved()["steps"]) < np.log(entries[1000][0]) and not other.stands_still()


def still(losses):
    """Whether one loss a step stands still in the end."""
    watch = trend.Course()
    for step, loss in enumerate(losses, start=1):
        watch.add(step, loss)
    return watch.stands_still()
