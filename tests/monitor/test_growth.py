"""Growth laws: recovered from noisy series, forecasts against the law that made them, against NumPy's least squares."""

import numpy as np
import pytest

from fp8jax.monitor import growth

TOKENS = np.arange(1, 41) * 5120.0
SERIES = {
    "logarithmic": lambda t: 3.0 + 0.8 * np.log(t / TOKENS[0]),
    "power": lambda t: 2.0 * (t / TOKENS[0]) ** 0.9,
    "exponential": lambda t: 3.0 * np.exp(3.0 * t / TOKENS[-1]),
}


def noisy(values, scale=0.01, seed=0):
    return values * np.exp(scale * np.random.default_rng(seed).normal(size=values.shape))


@pytest.mark.parametrize("law", SERIES)
@pytest.mark.parametrize("seed", range(5))
def test_the_law_that_made_a_series_is_chosen(law, seed):
    found = growth.fit(TOKENS, noisy(SERIES[law](TOKENS)[None], seed=seed))
    assert growth.LAWS[found.law[0]] == law
    assert found.error[0] < 0.03


@pytest.mark.parametrize("law", SERIES)
def test_a_forecast_reaches_the_limit_where_the_law_does(law):
    later = 1.3 * TOKENS[-1]
    limit = SERIES[law](later)
    exact = growth.fit(TOKENS, SERIES[law](TOKENS)[None])
    assert exact.reaches(np.array([limit]))[0] == pytest.approx(later, rel=1e-6)
    assert exact.at(later)[0] == pytest.approx(limit, rel=1e-6)
    rough = growth.fit(TOKENS, noisy(SERIES[law](TOKENS)[None]))
    assert rough.reaches(np.array([limit]))[0] == pytest.approx(later, rel=0.1)


def test_of_laws_that_predict_alike_the_slower_is_taken():
    """Noise of a constant lets a growing law win by chance: a forecast from that would be an alarm about nothing."""
    found = growth.fit(TOKENS, noisy(np.full((400, 40), 5.0), scale=0.05))
    assert np.mean(found.law == 0) > 0.8
    errors = np.stack(
        [
            growth._error(law, TOKENS / TOKENS[-1], noisy(np.full((400, 40), 5.0), scale=0.05), 27)
            for law in growth.LAWS
        ]
    )
    assert (
        np.mean(errors.argmin(axis=0) == 0) < 0.7
        and (errors[found.law, np.arange(400)] <= growth.SIMPLER * errors.min(axis=0)).all()
    )


def test_what_does_not_grow_reaches_nothing():
    falling = SERIES["power"](TOKENS)[::-1]
    found = growth.fit(TOKENS, np.stack([np.full(40, 5.0), falling]))
    assert np.all(np.isinf(found.reaches(np.array([1e3, 1e3]))))


def test_lines_are_least_squares():
    values = noisy(np.stack([SERIES["power"](TOKENS), SERIES["exponential"](TOKENS)]), scale=0.3)
    t = TOKENS / TOKENS[-1]
    for i, law in enumerate(("power", "exponential")):
        slope, intercept = np.polyfit(growth._coordinates(law, t), np.log(values[i]), 1)
        found = growth._line(law, t, values)
        assert (found[0][i], found[1][i]) == pytest.approx((intercept, slope), rel=1e-9)
    slope, intercept = np.polyfit(np.log(t), values[0], 1, w=1 / values[0])
    found = growth._line("logarithmic", t, values)
    assert (found[0][0], found[1][0]) == pytest.approx((intercept, slope), rel=1e-9)
