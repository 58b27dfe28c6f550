"""Is the canary worse? Intervals and a verdict that stay valid however often one looks, and whenever one stops.

A usual 95 % interval is wrong in one of twenty looks; watched after every answer it is wrong sooner or later. The
intervals here are confidence sequences: with the stated probability all of them are right, for all measures and at all
times. The difference of two means times its information (1 / variance) is a random walk, and a normal mixture bounds
it: with information I, effects expected to be about e, and eta = 1/e^2, the half-width is

    sqrt((I + eta) / I^2 * (log((I + eta) / eta) + 2 log(1 / alpha))).

Sources: Robbins, "Statistical methods related to the law of the iterated logarithm", 1970; Howard, Ramdas, McAuliffe
and Sekhon, "Time-uniform, nonparametric, nonasymptotic confidence sequences", 2021; Waudby-Smith, Arbour, Sinha,
Kennedy and Ramdas, "Time-uniform central limit theory and asymptotic confidence sequences", 2024.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from ropeway.experiment.analysis import Analysis, Errors, Measure
from ropeway.experiment.arms import MEASURES, Arm, Tally, Times, Trial

_TESTS: Final = len(MEASURES) + 2
"""Each measure, the rate of failures, and the first failures share what may go wrong."""

_LEAST_KEYS: Final = 30
"""Independent keys in each arm before a mean counts as normal."""

_NAMES = {"latency": "latency", "ttft": "time to the first token", "itl": "time between tokens"}


@dataclass(frozen=True, kw_only=True)
class Guard:
    """When a canary is stopped: it is proven worse, and by its estimate worse than what is tolerated.

    `alpha` is the chance that a canary which is no worse is ever stopped. `max_regression` is a ratio (0.1: times 10 %
    longer), `max_error_increase` a difference of rates (0.01: one more of a hundred answers fails). `min_samples` is
    the number of answers of each arm before times or rates are judged; what fails from the start is found earlier.
    """

    alpha: float = 0.01
    max_regression: float = 0.1
    max_error_increase: float = 0.01
    min_samples: int = 50


@dataclass(frozen=True)
class Change:
    """The canary less the control: an estimate, and the interval that holds it."""

    estimate: float
    low: float
    high: float


def half_width(information: float, effect: float, alpha: float) -> float:
    """Of a confidence sequence for a mean that is known with `information`, tightest for effects of size `effect`."""
    eta = 1 / effect**2
    bound = math.log1p(information / eta) - 2 * math.log(alpha)
    return math.sqrt((information + eta) * bound) / information


def alpha_of(guard: Guard, trial: int) -> float:
    """What the `trial`-th trial (from 1) of a canary may go wrong with: 1/2, 1/6, 1/12... of all, which sum up to 1."""
    return guard.alpha / (trial * (trial + 1))


def verdict(trial: Trial, guard: Guard, alpha: float) -> str | None:
    """Why the canary has to stop, in a sentence; None if it need not. Each test goes wrong with a fifth of `alpha`."""
    control, canary = trial.sums.control, trial.sums.canary
    share = canary.failures.mean - control.failures.mean
    if share >= guard.max_error_increase:
        change = _errors(control, canary, guard, alpha / _TESTS)
        proven = change is not None and change.low > 0
        if proven or trial.sums.first.evidence >= math.log(_TESTS / alpha):
            return (
                f"errors: {canary.failures.mean:.2%} of {canary.failures.count:,} answers of the canary failed, and "
                f"{control.failures.mean:.2%} of {control.failures.count:,} of the control."
            )
    for name in MEASURES:
        one, two = control.times[name], canary.times[name]
        if two.logs.mean - one.logs.mean < math.log1p(guard.max_regression):
            continue
        change = _ratio(one, two, guard, alpha / _TESTS)
        if change is not None and change.low > 0:
            return (
                f"{name}: the canary's {_NAMES[name]} is {change.estimate:.1%} longer (interval {change.low:.1%} to "
                f"{change.high:.1%}) after {two.logs.count:,} answers, and {one.logs.count:,} of the control."
            )
    return None


def analyze(trial: Trial, guard: Guard, alpha: float) -> Analysis:
    """All that `trial` has shown."""
    control, canary = trial.sums.control, trial.sums.canary
    latency, ttft, itl = (_measure(control.times[n], canary.times[n], guard, alpha / _TESTS) for n in MEASURES)
    one, two = control.failures, canary.failures
    change = _errors(control, canary, guard, alpha / _TESTS)
    return Analysis(
        latency=latency,
        ttft=ttft,
        itl=itl,
        errors=Errors(
            control_samples=one.count,
            canary_samples=two.count,
            control_percent=100 * one.mean,
            canary_percent=100 * two.mean,
            increase_percent=None if change is None else 100 * change.estimate,
            low_percent=None if change is None else 100 * change.low,
            high_percent=None if change is None else 100 * change.high,
        ),
        confidence_percent=100 * (1 - alpha),
        control_keys=one.independent,
        canary_keys=two.independent,
    )


def _change(control: Tally, canary: Tally, guard: Guard, effect: float, alpha: float, extra: float) -> Change | None:
    """None where there are too few answers, or too few keys to call their mean normal."""
    arms = (control, canary)
    if any(arm.count < guard.min_samples or arm.independent < _LEAST_KEYS for arm in arms):
        return None
    # Answers that are all alike to the last bit would be known without any error.
    variance = max(sum(arm.variance(extra) for arm in arms), 1e-15)
    half = half_width(1 / variance, effect, alpha)
    estimate = canary.mean - control.mean
    return Change(estimate, estimate - half, estimate + half)


def _ratio(control: Times, canary: Times, guard: Guard, alpha: float) -> Change | None:
    """Of the typical times, less 1."""
    logs = _change(control.logs, canary.logs, guard, math.log1p(guard.max_regression), alpha, 0.0)
    if logs is None:
        return None
    return Change(*(math.expm1(min(value, 700.0)) for value in (logs.estimate, logs.low, logs.high)))


def _errors(control: Arm, canary: Arm, guard: Guard, alpha: float) -> Change | None:
    # As if one more key of each arm had failed: an arm without failures is not known to have none.
    return _change(control.failures, canary.failures, guard, guard.max_error_increase, alpha, 1.0)


def _measure(control: Times, canary: Times, guard: Guard, alpha: float) -> Measure:
    change = _ratio(control, canary, guard, alpha)
    one, two = control.average, canary.average
    return Measure(
        control_samples=control.logs.count,
        canary_samples=canary.logs.count,
        control_avg_ms=_ms(one),
        canary_avg_ms=_ms(two),
        control_p95_ms=_ms(control.quantile(0.95)),
        canary_p95_ms=_ms(canary.quantile(0.95)),
        improvement_percent=100 * (1 - two / one) if one and two is not None else None,
        typical_percent=None if change is None else -100 * change.estimate,
        low_percent=None if change is None else -100 * change.high,
        high_percent=None if change is None else -100 * change.low,
    )


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1000 * seconds
