"""Kullback-Leibler divergence and its curvature at coincidence, the Fisher information."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from .checks import Health, outermost
from .expectation import Problem, Rows, evaluate, inspect, prepare, rows_weight
from .law import Exact, Law, refuse_data
from .model import Conditional, Model, flatten


def kl_divergence(
    model: Model,
    theta: Any,
    other: Any,
    x: Any = None,
    *,
    law: Law = Exact(),  # noqa: B008
) -> jax.Array:
    r"""Average the log-ratio, :math:`\mathrm{KL}(p_\theta \| p_\phi) = E_\theta[\log p_\theta(y) - \log p_\phi(y)]`.

    Args:
        model: `model(theta)` or `model(theta, x)`, a distribution.
        theta: parameter pytree of the law the expectation is under.
        other: the second parameter phi, of the same structure.
        x: inputs with leading axis n; the answer is the mean over them.
        law: `Exact()` or `MonteCarlo(key, draws)` with error O(1/sqrt(draws)).

    Returns:
        Scalar in nats, infinite where p_other excludes an outcome that p_theta allows.

    Raises:
        ValueError: the law is `Data`, or cannot be exact for this distribution, or the integral does not converge.

    Example:
        >>> import numpyro.distributions as dist
        >>> kl = kl_divergence(lambda t: dist.Bernoulli(probs=t), 0.5, 0.51)
        >>> print(f"{15_000 * kl:.2f}")  # 15 000 tosses, in nats
        3.00

    Derived in the chapter "KL curvature". Source: Kullback and Leibler (1951).
    """
    refuse_data(law, "kl_divergence")
    first, unravel = flatten(theta)
    second_flat, _ = flatten(other, "other")
    if jax.tree.structure(theta) != jax.tree.structure(other) or first.size != second_flat.size:
        raise ValueError(f"theta and other must have one structure, got {theta!r} and {other!r}")
    second = unravel(second_flat.astype(first.dtype))
    problem = prepare(model, theta, x, law, (second,))

    def kernel(problem: Problem, flat: jax.Array, rows: Rows) -> tuple[jax.Array, Health]:
        (second,) = problem.others
        out = problem.outcomes(flat, rows, (second,))
        w = jnp.where(out.log_r > -jnp.inf, out.weight, 0)
        q = Conditional.of(model, second, rows.x, split=problem.plan.exact)
        log_p = problem.log_prob(flat, rows.x, out.y)
        log_q = jnp.where(q.inside(out.y), q.log_prob(out.y), -jnp.inf)
        terms = jnp.where(w > 0, w * (log_p - log_q), 0)
        health = Health(undefined=2.0 * jnp.any(jnp.isnan(terms)))
        total = jnp.sum(rows_weight(rows, flat.dtype)[:, None] * jnp.sum(terms, 0))
        if problem.plan.exact:
            health = _converged(problem, out, w, terms, health)
        return total, health

    return evaluate(problem, kernel, 1) / problem.n


def _converged(problem: Problem, out: Any, w: jax.Array, terms: jax.Array, health: Health) -> Health:
    """Total mass 1, the nested rule agrees, and the outermost outcomes add nothing."""
    tight = jnp.finfo(w.dtype).eps < 1e-10
    slack = (1e-7 if tight else 1e-3) + 100 * out.resolution
    finite = jnp.where(jnp.isfinite(terms), terms, 0)
    size = 1 + jnp.sum(jnp.abs(finite), 0)
    health = health._replace(mass=jnp.max(jnp.abs(jnp.sum(w, 0) - 1) / slack))
    if out.coarse is not None:
        coarse = jnp.asarray(out.coarse, w.dtype)[:, None, None] - 1
        change = jnp.abs(jnp.sum(coarse * w, 0)) + jnp.abs(jnp.sum(coarse * finite, 0)) / size
        health = health._replace(refine=jnp.max(change / (slack / 100)))
    if problem.plan.kind in ("line", "counts"):
        last = jnp.where(outermost(w, problem.plan.kind), jnp.abs(finite) / size, 0)
        health = health._replace(tail=jnp.max(last / (slack / 100)))
    return health


def kl_curvature(model: Model, theta: Any, x: Any = None, *, law: Law = Exact()) -> jax.Array:  # noqa: B008
    r"""Differentiate the divergence twice at coincidence: the Hessian is the Fisher information.

    :math:`F = \nabla_\phi^2 \mathrm{KL}(p_\theta \| p_\phi)` at :math:`\phi = \theta`, differentiated under
    the integral. Where that misses curvature (a kink that moves with theta), the
    divergence itself, evaluated on both sides of theta, shows it, and the call raises.

    Args:
        model: `model(theta)` or `model(theta, x)`, a distribution.
        theta: parameter pytree with d scalars, interior to its domain; units u.
        x: inputs with leading axis n, for a conditional model; the answer is the mean over them.
        law: `Exact()` or `MonteCarlo(key, draws)` with error O(1/sqrt(draws)).

    Returns:
        Array [d, d] in 1/u^2, symmetric.

    Raises:
        ValueError: the law is `Data`, or cannot be exact for this distribution, or differentiation does not
            pass through the integral.

    Example:
        >>> import numpyro.distributions as dist
        >>> F = kl_curvature(lambda t: dist.Normal(t["mean"], t["sd"]), {"mean": 0.0, "sd": 2.0})
        >>> print(jnp.diagonal(F).round(4))  # 1 / sd^2, 2 / sd^2
        [0.25 0.5 ]

    Derived in the chapter "KL curvature". Source: Kullback (1959), section 2.6; Amari (2016), section 1.3.
    """
    refuse_data(law, "kl_curvature")
    problem = prepare(model, theta, x, law)
    d = problem.flat.size
    F = evaluate(problem, _curvature, d * d, d)
    return (F + F.T) / (2 * problem.n)


def _curvature(problem: Problem, flat: jax.Array, rows: Rows) -> tuple[jax.Array, Health]:
    """Hessian of the summed divergence of a block, checked against the divergence itself."""
    out = problem.outcomes(flat, rows)
    health, directions, info = inspect(problem, flat, rows, out)
    w = jnp.where(out.log_r > -jnp.inf, out.weight, 0) * rows_weight(rows, flat.dtype)[:, None]
    log_p = jax.lax.stop_gradient(problem.log_prob(flat, rows.x, out.y))

    def divergence(other: jax.Array) -> jax.Array:
        return jnp.sum(w * (log_p - problem.log_prob(other, rows.x, out.y)))

    F = jax.hessian(divergence)(flat)
    full = directions * (0.05 / jnp.sqrt(jnp.maximum(info / jnp.sum(w), jnp.finfo(flat.dtype).tiny)))[:, None]
    full = jnp.where(jnp.isfinite(full), full, 0)
    noise = 1e3 * jnp.finfo(flat.dtype).eps * jnp.sum(w * (1 + jnp.abs(log_p)))

    def gap(v: jax.Array) -> jax.Array:
        """How far the second difference of the divergence is from v^T F v, in units of what is tolerated."""
        second, found = divergence(flat + v) + divergence(flat - v), v @ F @ v
        size = jnp.maximum(jnp.abs(second), jnp.abs(found))
        # along the kernel of F the step is so long that theta + v keeps no digit of theta: nothing to see there
        seen = (size > 10 * noise) & (jnp.max(jnp.abs(v)) < 1e6 * (1 + jnp.max(jnp.abs(flat))))
        return jnp.where(seen, jnp.abs(second - found) / (0.2 * size), jnp.nan)

    # Steps from a twentieth of a standard error down. A long one may leave the domain, a short one drown in
    # rounding (nan); a kink shows in every step that can be told from rounding.
    gaps = jax.vmap(lambda scale: jax.vmap(gap)(scale * full))(jnp.asarray([1.0, 10**-1.5, 1e-3, 10**-4.5]))
    smallest = jnp.min(jnp.where(jnp.isnan(gaps), jnp.inf, gaps), 0)
    regularity = jnp.max(jnp.where(jnp.all(jnp.isnan(gaps), 0), 0, smallest))
    return F, health._replace(regularity=regularity)
