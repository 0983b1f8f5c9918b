"""The score, its covariance (the Fisher information) and the expected Hessian."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from .checks import Health, verdict
from .compilation import compile_once
from .expectation import Problem, Rows, evaluate, inspect, prepare, probes, rows_weight
from .law import Data, Exact, Law
from .model import Conditional, Model, call, is_traced


def score(model: Model, theta: Any, y: Any, x: Any = None) -> jax.Array:
    r"""Differentiate the log-density of each observation, :math:`s_i = \nabla_\theta \log p_\theta(y_i \mid x_i)`.

    Args:
        model: `model(theta)` or `model(theta, x)`, a distribution.
        theta: parameter pytree with d scalars, interior to its domain; units u.
        y: observations with leading axis m, inside the support.
        x: inputs with leading axis m, for a conditional model.

    Returns:
        Array [m, d] in 1/u, columns in `ravel_pytree` order.

    Raises:
        ValueError: lengths differ, `y` is outside the support, `theta` is not finite floating point, or the
            derivative is not finite at an observation.

    Example:
        >>> import numpyro.distributions as dist
        >>> s = score(lambda t: dist.Bernoulli(probs=t), 0.2, jnp.array([0, 1]))
        >>> print(s.ravel().round(4))  # -1 / (1 - p) and 1 / p
        [-1.25  5.  ]

    Derived in the chapter "The score". Source: Fisher (1925), section 4; van der Vaart (1998), section 5.5.
    """
    problem = prepare(model, theta, x, Data(y))
    scores = lambda flat, x, y: _scores(problem, flat, x, y)
    rows = problem.rows
    args = problem.flat, rows.x, rows.y[None] if x is not None else rows.y[:, None]
    values = (scores if is_traced(args) else compile_once(scores, *args))(*args)
    values = values[0] if x is not None else values[:, 0]
    return verdict(problem.law, values, Health(undefined=2.0 * ~jnp.all(jnp.isfinite(values))))


def _scores(problem: Problem, flat: jax.Array, x: Any, y: jax.Array) -> jax.Array:
    """Scores [k, n, d] of whole events y [k, n, ...], each by reverse mode of its own row."""

    def one(xi: Any, yi: jax.Array) -> jax.Array:
        row = None if xi is None else jax.tree.map(lambda a: a[None], xi)
        return jax.grad(lambda f: jnp.sum(problem.log_prob(f, row, yi[None, None])))(flat)

    inner = jax.vmap(one, in_axes=(None, 0))
    return jnp.moveaxis(jax.vmap(inner, in_axes=(None if x is None else 0, 1))(x, y), 0, 1)


def score_covariance(model: Model, theta: Any, x: Any = None, *, law: Law = Exact()) -> jax.Array:  # noqa: B008
    r"""Average the outer product of the score: the Fisher information :math:`F = E[s s^\top]` per observation.

    Args:
        model: `model(theta)` or `model(theta, x)`, a distribution.
        theta: parameter pytree with d scalars, interior to its domain; units u.
        x: inputs with leading axis n, for a conditional model; the answer is the mean over them.
        law: whose expectation: `Exact()` and `MonteCarlo(key, draws)` are the model's own and give the Fisher
            information (the latter with error O(1/sqrt(draws))); `Data(y)` is the labels' and gives the
            *empirical* Fisher.

    Returns:
        Array [d, d] in 1/u^2, symmetric and positive semi-definite.

    Raises:
        ValueError: the law cannot be exact for this distribution, the support moves with theta, the
            information is infinite, or an argument is malformed; the message says which and what to pass.

    Example:
        >>> import numpyro.distributions as dist
        >>> F = score_covariance(lambda t: dist.Poisson(t), 4.0)
        >>> print(f"{F.item():.4f}")  # 1 / rate
        0.2500

    Derived in the chapter "Information is the covariance of the score". Source: Fisher (1922), section 6;
    Lehmann and Casella (1998), section 2.5.
    """
    return weighted_score_covariance(model, theta, x, law, None)


def weighted_score_covariance(model: Model, theta: Any, x: Any, law: Law, weights: Any) -> jax.Array:
    """`score_covariance` with a weight for each row of x, whose mean must be 1."""
    problem = prepare(model, theta, x, law, weights=weights)
    size = _output_size(problem)
    small = 1 if size is None else size
    d = problem.flat.size
    F = evaluate(problem, _outer_products, small * d, small if size is not None else d)
    return (F + F.T) / (2 * problem.n)


def _output_size(problem: Problem) -> int | None:
    """Number of a row's distribution parameters, where that is less than outcomes and parameters; else None."""
    rows = problem.rows
    first = None if rows.x is None else jax.tree.map(lambda a: a[:1], rows.x)
    block = Conditional.of(problem.model, problem.unravel(problem.flat), first, split=problem.plan.exact)
    leaves = jax.tree.leaves(call(problem.model, problem.unravel(problem.flat), first))
    if (block.sites and problem.plan.exact) or not all(hasattr(leaf, "dtype") or jnp.isscalar(leaf) for leaf in leaves):
        return None
    size = sum(jnp.size(leaf) for leaf in leaves if jnp.issubdtype(jnp.result_type(leaf), jnp.floating))
    return size if 0 < size < min(problem.plan.size, problem.flat.size) else None


def _outer_products(problem: Problem, flat: jax.Array, rows: Rows) -> tuple[jax.Array, Health]:
    """Sum of row weight times E[s s^T] over a block of rows."""
    out = problem.outcomes(flat, rows)
    health, _, _ = inspect(problem, flat, rows, out)
    weight = jnp.where(out.log_r > -jnp.inf, out.weight, 0) * rows_weight(rows, flat.dtype)[:, None]
    if _output_size(problem) is None:
        return _direct(problem, flat, rows.x, out.y, weight), health
    return _through_outputs(problem, flat, rows.x, out.y, weight[:, :, 0]), health


def _direct(problem: Problem, flat: jax.Array, x: Any, y: jax.Array, weight: jax.Array) -> jax.Array:
    """Scores of all outcomes, a few outcomes at a time; coordinates of an `Independent` event one by one."""
    k, n, m = weight.shape

    def part(yk: jax.Array, wk: jax.Array) -> jax.Array:
        if m == 1:
            S = _scores(problem, flat, x, yk)[:, :, None]  # [k, n, 1, d]
        else:
            S = _site_scores(problem, flat, x, yk)
        S = jnp.where(wk[..., None] > 0, S, 0)
        return jnp.einsum("knmi,knmj->ij", wk[..., None] * S, S)

    pieces = min(k, -(-k * n * m * flat.size // 2**24))
    if pieces == 1:
        return part(y, weight)
    length = -(-k // pieces)
    pad = pieces * length - k
    y = jnp.concatenate([y, jnp.repeat(y[-1:], pad, 0)]).reshape(pieces, length, *y.shape[1:])
    weight = jnp.concatenate([weight, jnp.zeros((pad, n, m), weight.dtype)]).reshape(pieces, length, n, m)
    return jnp.sum(jax.lax.map(lambda both: part(*both), (y, weight)), 0)


def _site_scores(problem: Problem, flat: jax.Array, x: Any, y: jax.Array) -> jax.Array:
    """Scores [k, n, m, d] of single coordinates, by whichever of forward and reverse mode needs fewer passes."""

    def row(xi: Any, yi: jax.Array) -> jax.Array:
        one = None if xi is None else jax.tree.map(lambda a: a[None], xi)
        jacobian = jax.jacfwd if flat.size <= yi.shape[0] * yi[0].size else jax.jacrev
        return jacobian(lambda f: problem.log_prob(f, one, yi[:, None])[:, 0])(flat)

    return jnp.moveaxis(jax.vmap(row, in_axes=(None if x is None else 0, 1))(x, y), 0, 1)


def _through_outputs(problem: Problem, flat: jax.Array, x: Any, y: jax.Array, weight: jax.Array) -> jax.Array:
    """E[s s^T] by the chain rule: s = G^T a with a the score in a row's own q distribution parameters.

    Then F = sum_n G_n^T E[a a^T] G_n: one product with inner size n q instead of n k.
    """
    one = None if x is None else jax.tree.map(lambda a: a[:1], x)
    tree = jax.tree.structure(call(problem.model, problem.unravel(flat), one))

    def split(leaves: list[Any]) -> list[bool]:
        return [jnp.issubdtype(jnp.result_type(leaf), jnp.floating) for leaf in leaves]

    def outputs(f: jax.Array, xi: Any) -> tuple[jax.Array, list[Any]]:
        row = None if xi is None else jax.tree.map(lambda a: a[None], xi)
        leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(call(problem.model, problem.unravel(f), row))]
        smooth = [leaf.ravel() for leaf, keep in zip(leaves, split(leaves), strict=True) if keep]
        return jnp.concatenate(smooth), leaves

    def log_prob(phi: jax.Array, leaves: list[Any], yk: jax.Array) -> jax.Array:
        filled, at = [], 0
        for leaf, keep in zip(leaves, split(leaves), strict=True):
            filled.append(phi[at : at + leaf.size].reshape(leaf.shape).astype(leaf.dtype) if keep else leaf)
            at += leaf.size if keep else 0
        value = jax.tree.unflatten(tree, filled).log_prob(yk[None] if xi_axis is None else yk[None, None])
        return jnp.sum(value)

    def information(xi: Any, yi: jax.Array, wi: jax.Array) -> tuple[jax.Array, jax.Array]:
        phi, leaves = outputs(flat, xi)
        G = jax.jacrev(lambda f: outputs(f, xi)[0])(flat)  # [q, d]
        A = jax.vmap(jax.grad(log_prob), in_axes=(None, None, 0))(phi, leaves, yi)  # [k, q]
        reached = jnp.any(G != 0, -1)  # theta does not reach a constant: its derivative may be undefined
        A = jnp.where((wi > 0)[:, None] & (jnp.isfinite(A) | reached), A, 0)
        return G, jnp.einsum("kp,k,kq->pq", A, wi, A)

    xi_axis = None if x is None else 0
    G, B = jax.vmap(information, in_axes=(xi_axis, 1, 1))(x, y, weight)  # [n, q, d], [n, q, q]
    BG = jnp.einsum("npq,nqd->npd", B, G) if B.shape[-1] > 1 else B * G
    d = flat.size
    return BG.reshape(-1, d).T @ G.reshape(-1, d)


def expected_hessian(model: Model, theta: Any, x: Any = None, *, law: Law = Exact()) -> jax.Array:  # noqa: B008
    r"""Average the Hessian of the log-density, :math:`E[\nabla_\theta^2 \log p_\theta(y)]`, per observation.

    Under `Exact()` and regularity it is minus the Fisher information (Bartlett's identity); under `Data(y)` it
    is minus the observed information of the data, another matrix in general.

    Args:
        model: `model(theta)` or `model(theta, x)`, a distribution.
        theta: parameter pytree with d scalars, interior to its domain; units u.
        x: inputs with leading axis n, for a conditional model.
        law: whose expectation; `Data(y)` averages over the observations.

    Returns:
        Array [d, d] in 1/u^2, symmetric; negative definite only where the model is regular.

    Raises:
        ValueError: Bartlett's identity fails under `Exact()`, as for the location of a Laplace distribution,
            and the cases of `score_covariance`.

    Example:
        >>> import numpyro.distributions as dist
        >>> H = expected_hessian(lambda t: dist.Normal(t, 2.0), 0.0)
        >>> print(f"{H.item():.4f}")  # -1 / variance
        -0.2500

    Derived in the chapter "Fisher is not the Hessian". Source: Bartlett (1953); White (1982), section 3.
    """
    return weighted_hessian(model, theta, x, law, None)


def weighted_hessian(model: Model, theta: Any, x: Any, law: Law, weights: Any) -> jax.Array:
    """`expected_hessian` with a weight for each row of x, whose mean must be 1."""
    problem = prepare(model, theta, x, law, weights=weights)
    d = problem.flat.size

    def kernel(problem: Problem, flat: jax.Array, rows: Rows) -> tuple[Any, Health]:
        out = problem.outcomes(flat, rows)
        health, _, info = inspect(problem, flat, rows, out)
        w = jnp.where(out.log_r > -jnp.inf, out.weight, 0) * rows_weight(rows, flat.dtype)[:, None]
        H = jax.hessian(lambda f: jnp.sum(w * problem.log_prob(f, rows.x, out.y)))(flat)
        return (H, info), health

    H, info = evaluate(problem, kernel, d, d)
    if problem.plan.exact:
        H = _bartlett(problem, H, info)
    return (H + H.T) / (2 * problem.n)


def _bartlett(problem: Problem, H: jax.Array, info: jax.Array) -> jax.Array:
    U = jnp.asarray(probes(problem.flat.size, problem.plan, problem.n > 1, H.dtype))
    found = -jnp.einsum("pi,ij,pj->p", U, H, U)
    gap = jnp.abs(found - info) / jnp.maximum(jnp.maximum(jnp.abs(found), info), jnp.finfo(H.dtype).tiny)
    return verdict(problem.law, H, Health(regularity=jnp.max(gap) / 1e-2))
