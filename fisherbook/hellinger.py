"""The square-root density: its embedding, its Jacobian (4 J^T J is the Fisher information) and its distance."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from .checks import Health
from .expectation import Problem, Rows, evaluate, inspect, prepare, rows_weight
from .law import Exact, Law, refuse_data
from .model import Conditional, Model, flatten


def hellinger_embedding(model: Model, theta: Any, x: Any = None, *, law: Law = Exact()) -> jax.Array:  # noqa: B008
    r"""Map theta to the square-root density, a point of the unit sphere of L2.

    Entry k is :math:`\sqrt{r_k\, p_\theta(y_k)}`: the reference weight r_k is absorbed, so the Euclidean norm is
    the L2 norm, 1. With inputs, the embeddings of the rows follow one another, each divided by sqrt(n). The m
    coordinates of an `Independent` event follow one another too (norm sqrt(m)): their tangent vectors add as
    information does, but their Euclidean distance is not that of the joint law; see `hellinger_distance`.

    Args:
        model: `model(theta)` or `model(theta, x)`, a distribution.
        theta: parameter pytree with d scalars.
        x: inputs with leading axis n, for a conditional model.
        law: `Exact()` or `MonteCarlo(key, draws)`: where the outcomes and their weights come from.

    Returns:
        Array [rows], without units.

    Raises:
        ValueError: the law is `Data`, or cannot be exact for this distribution.

    Example:
        >>> import numpyro.distributions as dist
        >>> print(hellinger_embedding(lambda t: dist.Bernoulli(probs=t), 0.36).round(4))  # sqrt(1 - p), sqrt(p)
        [0.8 0.6]

    Derived in the chapter "The Hellinger embedding". Source: Amari (2016), section 2.2; Rao (1945).
    """
    refuse_data(law, "hellinger_embedding")
    problem = prepare(model, theta, x, law)
    return evaluate(problem, lambda p, f, r: _embed(p, f, r, jacobian=False), 0, 0)


def hellinger_jacobian(model: Model, theta: Any, x: Any = None, *, law: Law = Exact()) -> jax.Array:  # noqa: B008
    r"""Differentiate the square-root density, so that `4 * J.T @ J` is the Fisher information.

    Row k is :math:`\sqrt{r_k}\,\nabla_\theta \sqrt{p_\theta(y_k)}`: the reference weight r_k is absorbed, so the
    Euclidean product of columns is the L2 product of the tangent vectors. Rows are ordered as in
    `hellinger_embedding`, of which this is the Jacobian under `Exact()`.

    Args:
        model: `model(theta)` or `model(theta, x)`, a distribution.
        theta: parameter pytree with d scalars, interior to its domain; units u.
        x: inputs with leading axis n, for a conditional model.
        law: `Exact()` or `MonteCarlo(key, draws)`: where the outcomes and their weights come from.

    Returns:
        Array [rows, d] in 1/u, columns in `ravel_pytree` order.

    Raises:
        ValueError: the law is `Data`, or cannot be exact for this distribution; the message says what to pass.

    Example:
        >>> import numpyro.distributions as dist
        >>> J = hellinger_jacobian(lambda t: dist.Bernoulli(probs=t), 0.2)
        >>> print(f"{4 * (J.T @ J).item():.4f}")  # 1 / (0.2 * 0.8)
        6.2500

    Derived in the chapter "The Hellinger embedding". Source: Amari (2016), section 2.2.
    """
    refuse_data(law, "hellinger_jacobian")
    problem = prepare(model, theta, x, law)
    return evaluate(problem, lambda p, f, r: _embed(p, f, r, jacobian=True), 0, 0)


def _embed(problem: Problem, flat: jax.Array, rows: Rows, jacobian: bool) -> tuple[jax.Array, Health]:
    out = problem.outcomes(flat, rows)
    health, _, _ = inspect(problem, flat, rows, out)

    def root(f: jax.Array) -> jax.Array:
        log_root = 0.5 * (problem.log_prob(f, rows.x, out.y) + jax.lax.stop_gradient(out.log_r))
        root = jnp.where(out.log_r > -jnp.inf, jnp.exp(log_root), 0) / jnp.sqrt(float(problem.n))
        return jnp.moveaxis(root, 0, -1).reshape(-1)  # rows [n, m, k]

    return (jax.jacfwd(root) if jacobian else root)(flat), health


def hellinger_distance(
    model: Model,
    theta: Any,
    other: Any,
    x: Any = None,
    *,
    law: Law = Exact(),  # noqa: B008
) -> jax.Array:
    r"""Distance of two laws in L2, :math:`H = \left(\int (\sqrt{p_\theta} - \sqrt{p_\phi})^2\right)^{1/2}`.

    H^2 is not halved: it is 2 for laws with disjoint supports, and d^T F d / 4 to second order where the model
    is differentiable in quadratic mean. It needs no derivative, so a support that moves is no obstacle.

    Args:
        model: `model(theta)` or `model(theta, x)`, a distribution.
        theta: parameter pytree, where the outcomes are drawn under `MonteCarlo`.
        other: a second parameter, of the same structure.
        x: inputs with leading axis n; H^2 is then the mean over rows.
        law: `Exact()` or `MonteCarlo(key, draws)`; the latter has error O(1/sqrt(draws)) in H^2 and needs
            p_other to vanish where p_theta does.

    Returns:
        Scalar in [0, sqrt(2)], without units.

    Raises:
        ValueError: the law is `Data`, or cannot be exact for this distribution.

    Example:
        >>> import numpyro.distributions as dist
        >>> H = hellinger_distance(lambda t: dist.Normal(t, 1.0), 0.0, 2.0)
        >>> print(f"{H**2:.4f}")  # 2 - 2 exp(-(difference / sd)^2 / 8)
        0.7869

    Derived in the chapter "The Hellinger embedding". Source: van der Vaart (1998), section 7.2 and problem 14.2.
    """
    refuse_data(law, "hellinger_distance")
    second = _same_structure(theta, other)
    problem = prepare(model, theta, x, law, (second,))

    def kernel(problem: Problem, flat: jax.Array, rows: Rows) -> tuple[jax.Array, Health]:
        (second,) = problem.others
        out = problem.outcomes(flat, rows, (second,), prune=False)
        p = Conditional.of(model, problem.unravel(flat), rows.x, split=problem.plan.exact)
        q = Conditional.of(model, second, rows.x, split=problem.plan.exact)
        log_p = jnp.where(p.inside(out.y), p.log_prob(out.y), -jnp.inf)
        log_q = jnp.where(q.inside(out.y), q.log_prob(out.y), -jnp.inf)
        root_p, root_q = _root(log_p + out.log_r), _root(log_q + out.log_r)
        weight_p, weight_q, square = root_p**2, root_q**2, (root_p - root_q) ** 2  # [k, n, m]
        h2 = jnp.sum(square, 0)
        joint = -2 * jnp.expm1(jnp.sum(jnp.log1p(-jnp.minimum(h2 / 2, 1.0)), -1))  # affinities multiply
        health = Health(undefined=2.0 * jnp.any(jnp.isnan(log_p) | jnp.isnan(log_q)))
        if problem.plan.exact:
            tight = jnp.finfo(flat.dtype).eps < 1e-10
            mass = jnp.maximum(jnp.abs(jnp.sum(weight_p, 0) - 1), jnp.abs(jnp.sum(weight_q, 0) - 1))
            slack = (1e-7 if tight else 1e-3) + 100 * out.resolution
            health = health._replace(mass=jnp.max(mass / slack))
            if out.coarse is not None:
                coarse = jnp.asarray(out.coarse, flat.dtype)[:, None, None]
                change = sum(jnp.abs(jnp.sum((coarse - 1) * v, 0)) for v in (weight_p, weight_q, square))
                health = health._replace(refine=jnp.max(change / (slack / 100)))
        return jnp.sum(rows_weight(rows, flat.dtype) * joint), health

    h2 = evaluate(problem, kernel, 1) / problem.n
    return jnp.sqrt(jnp.where(h2 > 0, h2, 0))


def _root(log_weight: jax.Array) -> jax.Array:
    """Square root of a weight that may be 0, with a derivative of 0 there."""
    possible = log_weight > -jnp.inf
    return jnp.where(possible, jnp.exp(0.5 * jnp.where(possible, log_weight, 0)), 0)


def _same_structure(theta: Any, other: Any) -> Any:
    first, unravel = flatten(theta)
    second, _ = flatten(other, "other")
    if jax.tree.structure(theta) != jax.tree.structure(other) or first.size != second.size:
        raise ValueError(f"theta and other must have one structure, got {theta!r} and {other!r}")
    return unravel(second.astype(first.dtype))
