"""Outcomes and reference weights: enumeration for counts, double-exponential quadrature for the line.

A rule for a distribution p is a set of outcomes y_k and weights r_k with
E_p[g] = sum_k r_k p(y_k) g(y_k). For finite and countable outcomes r_k = 1; for scalar continuous
ones the r_k are those of tanh-sinh and exp-sinh quadrature (Takahasi and Mori, 1974) on panels that
start and end at the distribution's own centre, where the nodes are densest.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .distributions import log_density

LEVELS = 5  # halvings of the step after the first; 700 nodes become 11 000 to 22 000


class Rule(NamedTuple):
    """Outcomes y [k, n, *sites, *event], log r [k, n, m]; `coarse` [k] weighs the nested rule of twice the step."""

    y: jax.Array
    log_r: jax.Array
    coarse: np.ndarray | None
    resolution: jax.Array | float  # rounding of an outcome near the centre, in units of the scale


def half_line(level: int, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """log t and log dt of exp-sinh nodes on (0, inf): t = exp(pi/2 sinh u)."""
    largest = float(np.log(jnp.finfo(dtype).max))
    low, high = np.arcsinh(-0.7 * largest * 2 / np.pi), np.arcsinh(0.35 * largest * 2 / np.pi)
    h = 2.0 ** -(5 + level)
    u = h * np.arange(2 * int(low / h / 2), 2 * int(high / h / 2) + 1)
    log_t = np.pi / 2 * np.sinh(u)
    return log_t, log_t + np.log(np.pi / 2 * np.cosh(u) * h)


def unit_interval(level: int, dtype: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tanh-sinh on (0, 1): distance to the left end, to the right end, log weight, each accurate near its end."""
    largest = float(np.log(jnp.finfo(dtype).max))
    reach = np.arcsinh(0.7 * largest / np.pi)
    h = 2.0 ** -(5 + level)
    count = 2 * int(reach / h / 2)
    u = h * np.arange(-count, count + 1)
    z = np.pi * np.sinh(u)
    log_left, log_right = -np.logaddexp(0, -z), -np.logaddexp(0, z)
    return np.exp(log_left), np.exp(log_right), log_left + log_right + np.log(np.pi * np.cosh(u) * h)


def bounds(support: Any) -> tuple[Any, Any]:
    """Lower and upper end of a support; None where it is unbounded."""
    return getattr(support, "lower_bound", None), getattr(support, "upper_bound", None)


def locate(distribution: Any) -> tuple[list[Any], Any]:
    """Centres (where the nodes are to be densest) and a scale, from what the distribution knows of itself."""
    components = getattr(distribution, "component_distributions", None)
    if components is None and getattr(distribution, "component_distribution", None) is not None:
        centres, scale = locate(distribution.component_distribution)
        axis = distribution.mixture_dim
        split = [jnp.moveaxis(jnp.asarray(c), axis, 0) for c in centres]
        scale = jnp.asarray(scale)
        return [c for group in split for c in group], jnp.max(scale, axis=axis) if scale.ndim else scale
    if components is not None:
        found = [locate(c) for c in components]
        scales = jnp.stack(jnp.broadcast_arrays(*[jnp.asarray(s) for _, s in found]))
        return [c for centres, _ in found for c in centres], jnp.max(scales, axis=0)
    centre, scale = _moments(distribution)
    shape = tuple(distribution.batch_shape)
    return [jnp.broadcast_to(centre, shape)], jnp.broadcast_to(scale, shape)


def _moments(distribution: Any) -> tuple[jax.Array, jax.Array]:
    """Location and scale; else mean and standard deviation where they are a good centre, else a search."""
    unbounded = bounds(distribution.support) == (None, None)  # the location of a lognormal is not on its own axis
    own = _attributes(distribution, "loc", "scale") if unbounded else None
    if own is not None:
        return own
    centre, scale = _search(distribution)
    moments = _attributes(distribution, "mean", "variance")
    if moments is None:
        return centre, scale
    mean, spread = moments[0], jnp.sqrt(moments[1])
    good = jnp.isfinite(mean) & jnp.isfinite(spread) & (spread > 0)
    # a mean far out in the tail (Pareto) is a poor centre; a hint only, so an error of log_prob decides nothing
    with contextlib.suppress(Exception):
        good &= log_density(distribution, jnp.where(good, mean, centre)) > -700
    return jnp.where(good, mean, centre), jnp.where(good, spread, scale)


def _attributes(distribution: Any, place: str, width: str) -> tuple[jax.Array, jax.Array] | None:
    """Two attributes as arrays, or None where the distribution does not have them."""
    try:
        centre, scale = getattr(distribution, place), getattr(distribution, width)
    except (AttributeError, NotImplementedError, ZeroDivisionError):
        return None
    if any(value is None or callable(value) for value in (centre, scale)):
        return None
    return jnp.asarray(centre, float), jnp.asarray(scale, float)


def _search(distribution: Any) -> tuple[jax.Array, jax.Array]:
    """The highest point of the log-density on a logarithmic grid, and the distance at which it has fallen by one."""
    low, high = bounds(distribution.support)
    shape = tuple(distribution.batch_shape)
    steps = jnp.asarray(np.logspace(-6, 8, 29))
    if low is not None and high is not None:
        fraction = jax.nn.sigmoid(jnp.linspace(-14.0, 14.0, 57))
        grid = [low + (high - low) * f for f in fraction]
    elif low is not None:
        grid = [low + s for s in steps]
    elif high is not None:
        grid = [high - s for s in steps]
    else:
        grid = [jnp.zeros(()), *steps, *(-steps)]
    points = jnp.stack([jnp.broadcast_to(jnp.asarray(g, float), shape) for g in grid])

    def density(y: jax.Array) -> jax.Array:
        value = log_density(distribution, y)
        if value.shape != y.shape:
            raise ValueError(
                f"log_prob of {type(distribution).__name__} has shape {value.shape} for outcomes of shape {y.shape}, "
                "but must give one number per observation"
            )
        return jnp.where(jnp.isfinite(value) & distribution.support(y), value, -jnp.inf)

    values = density(points)
    centre = jnp.take_along_axis(points, jnp.argmax(values, 0)[None], 0)[0]
    best = jnp.max(values, 0)
    around = jnp.maximum(density(centre + steps.reshape(-1, *[1] * len(shape))), 0 * best - jnp.inf)
    below = jnp.maximum(density(centre - steps.reshape(-1, *[1] * len(shape))), 0 * best - jnp.inf)
    fallen = jnp.maximum(around, below) < best - 1
    return centre, jnp.where(jnp.any(fallen, 0), steps[jnp.argmax(fallen, 0)], 1.0)


def line_rule(distributions: Sequence[Any], level: int, breakpoints: Sequence[Any], around: Any) -> Rule:
    """Panels over the hull of the supports, split at every centre, support end and breakpoint."""
    shape = tuple(distributions[0].batch_shape)
    located = [locate(d) for d in distributions]
    if around is not None:
        located = [([jnp.asarray(a, float) for a in np.atleast_1d(around)], located[0][1]), *located[1:]]
    dtype = jnp.result_type(float, *[c for centres, _ in located for c in centres])
    tiny = float(jnp.finfo(dtype).tiny)

    def full(value: Any) -> jax.Array:
        return jnp.broadcast_to(jnp.asarray(value, dtype), shape)

    ends = [bounds(d.support) for d in distributions]
    points = [full(c) for centres, _ in located for c in centres] + [full(b) for b in breakpoints]
    points += [full(e) for pair in ends for e in pair if e is not None]
    low = None if any(a is None for a, _ in ends) else jnp.min(jnp.stack([full(a) for a, _ in ends]), 0)
    high = None if any(b is None for _, b in ends) else jnp.max(jnp.stack([full(b) for _, b in ends]), 0)
    knots = jnp.sort(jnp.clip(jnp.stack(points), low, high), axis=0)
    scale = jnp.max(jnp.stack([full(s) for _, s in located]), 0)
    resolution = (
        jnp.finfo(dtype).eps * jnp.max(jnp.abs(knots), 0) / jnp.min(jnp.stack([full(s) for _, s in located]), 0)
    )

    column = (slice(None),) + (None,) * len(shape)
    log_t, log_w = (jnp.asarray(a, dtype)[column] for a in half_line(level, dtype))
    left, right, log_v = (jnp.asarray(a, dtype)[column] for a in unit_interval(level, dtype))
    y, log_r = [], []
    if low is None:
        y.append((knots[0] - scale * jnp.exp(log_t))[::-1])
        log_r.append((log_w + jnp.log(scale))[::-1])
    for a, b in itertools.pairwise(knots):
        y.append(jnp.where(left < right, a + (b - a) * left, b - (b - a) * right))
        log_r.append(jnp.where(b > a, log_v + jnp.log(jnp.where(b > a, b - a, 1)), -jnp.inf))
    if high is None:
        y.append(knots[-1] + scale * jnp.exp(log_t))
        log_r.append(log_w + jnp.log(scale))
    coarse = np.concatenate([2.0 * (np.arange(len(part)) % 2 == 0) for part in y])
    nodes = jnp.concatenate([jnp.broadcast_to(part, part.shape[:1] + shape) for part in y])
    if low is not None:  # an end itself is outside most supports, and log(0) is no log-density
        nodes = jnp.maximum(nodes, jnp.maximum(jnp.nextafter(low, jnp.full_like(low, jnp.inf)), low + tiny**0.48))
    if high is not None:
        nodes = jnp.minimum(nodes, jnp.minimum(jnp.nextafter(high, jnp.full_like(high, -jnp.inf)), high - tiny))
    return Rule(nodes, jnp.concatenate([jnp.broadcast_to(w, w.shape[:1] + shape) for w in log_r]), coarse, resolution)


def normal_rule(distributions: Sequence[Any], level: int) -> Rule:
    """Tensor trapezoidal rule for a multivariate normal, in its own standard coordinates.

    The trapezoidal rule of step h errs by about exp(-2 pi^2 / h^2) on a normal density: 3e-54 at 0.4.
    """
    loc, covariance = distributions[0].mean, distributions[0].covariance_matrix
    dtype, dim = jnp.result_type(loc, covariance), loc.shape[-1]
    h = 0.4 * 2.0**-level
    count = 2 * int(13 / h / 2)
    z = h * np.arange(-count, count + 1)
    grid = np.stack(np.meshgrid(*[z] * dim, indexing="ij"), -1).reshape(-1, dim)
    even = 2.0 * (np.arange(len(z)) % 2 == 0)
    coarse = np.prod(np.stack(np.meshgrid(*[even] * dim, indexing="ij"), -1).reshape(-1, dim), -1)
    root = jnp.linalg.cholesky(covariance)
    y = loc + jnp.einsum("...ij,kj->k...i", root, jnp.asarray(grid, dtype))
    log_r = dim * np.log(h) + jnp.sum(jnp.log(jnp.diagonal(root, axis1=-2, axis2=-1)), -1)
    resolution = jnp.finfo(dtype).eps * jnp.max(jnp.abs(loc), -1) / jnp.min(jnp.diagonal(root, axis1=-2, axis2=-1), -1)
    return Rule(y, jnp.broadcast_to(log_r, (len(grid), *log_r.shape)), coarse, resolution)


def count_window(distributions: Sequence[Any], outcomes: int) -> jax.Array:
    """Consecutive counts [outcomes, *batch] around the mean, or from the lower end where there is no mean."""
    lows = []
    for d in distributions:
        lower = jnp.asarray(bounds(d.support)[0])
        own = _attributes(d, "mean", "mean")
        mean = jnp.asarray(lower, float) if own is None else own[0]
        start = jnp.where(jnp.isfinite(mean), jnp.floor(mean), lower) - outcomes // 2
        lows.append(jnp.broadcast_to(jnp.maximum(start, lower), tuple(d.batch_shape)))
    low = jnp.min(jnp.stack(lows), 0).astype(int)
    return low + jnp.arange(outcomes).reshape(-1, *[1] * low.ndim)
