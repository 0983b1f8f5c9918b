"""The checks that make `Exact()` exact, and what each failure means.

They use nothing of the three definitions: the total mass of the rule, the mean of directional derivatives
of log p (zero where differentiation passes through the integral), the same sums on the nested rule of
twice the step, and what the outermost outcomes still contribute.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .model import is_traced, require_all
from .outcomes import Outcomes


class Health(NamedTuple):
    """Largest error of each check in units of what is tolerated; above 1 is a failure."""

    mass: Any = 0.0
    score: Any = 0.0
    refine: Any = 0.0
    tail: Any = 0.0
    undefined: Any = 0.0
    edge: Any = 0.0
    dependent: Any = 0.0
    regularity: Any = 0.0
    leak: Any = 0.0


@partial(jax.jit, static_argnames=("kind", "exact"))
def measure(
    log_p: jax.Array,
    slope: jax.Array,
    out: Outcomes,
    weight: jax.Array,
    leak: jax.Array,
    largest: jax.Array,
    kind: str,
    exact: bool,
) -> tuple[Health, jax.Array]:
    """The checks as ratios to what is tolerated, and the information along each direction, summed over rows."""
    dtype, eps = log_p.dtype, float(jnp.finfo(log_p.dtype).eps)
    w = jnp.where(out.log_r > -jnp.inf, out.weight, 0.0)
    bad = jnp.any(jnp.isnan(log_p) & (w > 0)) | jnp.any(~jnp.isfinite(slope) & (w > 0))
    slope = jnp.where(w > 0, slope, 0.0)
    square = (jnp.sqrt(w) * slope) ** 2
    info = jnp.sum(square, 1)  # [p, n, m]
    total = jnp.sum(weight[:, None] * info, (1, 2))
    tolerance, fine = (1e-7, 1e-9) if eps < 1e-10 else (2e3 * eps, 1e3 * eps)
    slack = tolerance + 100 * out.resolution
    # rounding: a slope is no more accurate than eps in units of 1 / |theta|
    floor = 1e-6 * jnp.max(jnp.sqrt(info), (1, 2), keepdims=True) + 1e3 * eps / (tolerance * (1e-3 + largest))
    if not exact:
        return Health(undefined=2.0 * bad, leak=jnp.max(leak / (slack * jnp.maximum(jnp.sqrt(info), floor)))), total

    mass = jnp.sum(w, 0)
    mean = jnp.abs(jnp.sum(w * slope, 1))
    health = Health(
        mass=jnp.max(jnp.abs(mass - 1) / slack),
        score=jnp.max(mean / (slack * jnp.maximum(jnp.sqrt(info), floor))),
        leak=jnp.max(leak / (slack * jnp.maximum(jnp.sqrt(info), floor))),
        undefined=2.0 * bad,
        edge=2.0 * out.edge,
    )
    scaled = square / jnp.maximum(info, floor**2)[:, None]  # [p, k, n, m]
    if out.coarse is not None:
        excess = jnp.asarray(out.coarse, dtype)[:, None, None] - 1
        refine = jnp.maximum(jnp.abs(jnp.sum(excess * w, 0)), jnp.max(jnp.abs(jnp.sum(excess * scaled, 1)), 0))
        health = health._replace(refine=jnp.max(refine / (fine + 100 * out.resolution)))
    if kind in ("line", "counts"):
        last = jnp.where(outermost(w, kind), jnp.maximum(w, jnp.max(scaled, 0)), 0)
        health = health._replace(tail=jnp.max(last) / fine)
    return health, total


def outermost(w: jax.Array, kind: str) -> jax.Array:
    """Outcomes [k, n, m] beside one of weight zero or at the end of the rule; a count at the start has mass there."""
    some = w > 0
    none = jnp.zeros_like(some[:1])
    last = some & ~(jnp.concatenate([none, some[:-1]]) & jnp.concatenate([some[1:], none]))
    return last.at[0].set(False) if kind == "counts" else last


MESSAGES = {  # in the order in which they explain each other
    "dependent": "the rows of the model depend on each other: log_prob of a row changes with the rows beside it "
    "(a batch mean?); an information per observation needs rows that are independent given theta",
    "undefined": "log_prob or its derivative is not finite at a possible outcome: is theta inside its domain, "
    "and is log_prob differentiable there?",
    "edge": "theta is at the edge of its set: an outcome impossible at theta is possible beside it, so the score, "
    "Hellinger and KL definitions differ there; move theta inside",
    "tail": "the integral does not converge: the outermost outcomes still contribute, so the information is infinite, "
    "or log_prob cannot be evaluated far enough out; if it is finite, reparametrise, pass law=MonteCarlo(key, draws), "
    "or, for counts under jit, a wider window law=Exact(outcomes=...)",
    "refine": "the quadrature did not converge, as with a kink, a jump or a narrow peak inside the support: "
    "pass law=Exact(breakpoints=(...)) at those points, or law=MonteCarlo(key, draws); an infinite information "
    "does not converge either",
    "mass": "the outcomes have total probability other than 1: the density is not normalised, or the rule missed "
    "a mode or a tail (pass law=Exact(around=..., breakpoints=...))",
    "score": "the mean score is not 0, so differentiation does not pass through the integral: the support moves with "
    "theta (as for Uniform(0, theta)), or the density is normalised at this theta only; no Fisher information exists",
    "leak": "probability crosses the ends of the support as theta moves (as for Uniform(theta, theta + 1)), so "
    "differentiation does not pass through the integral; no Fisher information exists",
    "regularity": "the second derivative of log p misses part of the curvature (a kink that moves with theta, as for "
    "Laplace location): Bartlett's identity fails; use score_covariance or hellinger_jacobian",
}


def verdict(law: Any, value: Any, health: Health, flat: Any = None) -> Any:
    """Raise for the first failed check: at once where values are known, through `equinox` under jit.

    `flat` are parameters that `flatten` left to be checked here, under jit.
    """
    ratios = health if is_traced(health) else Health(*map(float, health))
    fine = {name: getattr(ratios, name) <= 1 for name in MESSAGES}  # NaN fails too
    checks = [(fine[name], f"{type(law).__name__}: {message}") for name, message in MESSAGES.items()]
    if is_traced(flat):
        checks.insert(0, (jnp.all(jnp.isfinite(flat)), "theta is not finite"))
    return require_all(checks, value)
