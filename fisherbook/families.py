"""The information of a distribution in its own parameters, in closed form, as a linear root S: S^T S = F_out.

For a model theta -> phi(theta) the root of the Fisher information is then R v = S (d phi / d theta v), with neither
outcomes nor draws. A family is added in `FAMILIES`, at the end, with one row in tests/test_families.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

from .distributions import BernoulliLogits, BinomialLogits, GammaPoisson

Values = tuple[jax.Array, ...]
Push = Callable[[Values, tuple[Any, ...], Any], jax.Array]


class Family(NamedTuple):
    """A root of the information of one class of distributions.

    `parameters` are attribute names. `push(values, tangents, d)` applies S for the distribution d: [*batch, r], linear
    in the tangents, of which at least one is not None. `fixed` names the parameters that must not depend on theta.
    """

    parameters: tuple[str, ...]
    push: Push
    fixed: tuple[str, ...] = ()


def find_family(distribution: Any) -> Family | None:
    """Look up the root of a distribution's information, or of what `Independent` wraps.

    Args:
        distribution: any distribution. Its class itself must be in `FAMILIES`: a subclass may have another log_prob.

    Returns:
        The family, or None where there is no closed form here.

    Example:
        >>> find_family(dist.Normal(jnp.zeros(3), 1.0).to_event(1)).parameters
        ('loc', 'scale')
    """
    return FAMILIES.get(type(innermost(distribution)))


def own_parameters(distribution: Any) -> tuple[jax.Array, ...]:
    """Read the family's parameters off a distribution, broadcast to the batch of what `Independent` wraps.

    Args:
        distribution: a numpyro distribution that `find_family` knows.

    Returns:
        For each of the family's `parameters` an array [*batch, *its own event], all of one floating-point dtype; n rows
        of K independent outputs have the batch [n, K].

    Raises:
        ValueError: the distribution has no closed form here.

    Example:
        >>> loc, scale = own_parameters(dist.Normal(jnp.zeros((2, 3)), 1.0).to_event(1))
        >>> loc.shape, scale.shape
        ((2, 3), (2, 3))
    """
    d, family = innermost(distribution), find_family(distribution)
    if family is None:
        raise ValueError(f"{type(d).__name__} has no closed form here: take the information under a law")
    values = [jnp.asarray(getattr(d, name)) for name in family.parameters]
    dtype = jnp.result_type(*values, float)
    shapes = [_shape(d, name, value) for name, value in zip(family.parameters, values, strict=True)]
    return tuple(jnp.broadcast_to(v.astype(dtype), shape) for v, shape in zip(values, shapes, strict=True))


def push_forward(distribution: Any, tangents: tuple[jax.Array | None, ...]) -> jax.Array:
    r"""Apply the root of the output information, :math:`S \dot\phi` with :math:`S^\top S = F_{out}(\phi)`.

    Args:
        distribution: a numpyro distribution that `find_family` knows, its parameters inside their domain.
        tangents: for each of the family's `parameters` an array of the shape that `own_parameters` gives, or None
            where theta does not move the parameter: the rows of S that belong to it alone are left out.

    Returns:
        Array [*batch, r], linear in the tangents, whose squared norm is their squared length under F_out.

    Raises:
        ValueError: there is no closed form for the distribution, or for a parameter that has a tangent; or the
            tangents do not match the parameters.

    Example:
        >>> d, one = dist.Normal(0.0, 2.0), jnp.array(1.0)
        >>> print(push_forward(d, (one, one)).round(4))  # 1 / scale, sqrt(2) / scale
        [0.5    0.7071]
        >>> print(push_forward(d, (one, None)))
        [0.5]

    Derived in the chapter "Fisher at scale". Source: Lehmann and Casella (1998), section 2.5.
    """
    d, values = innermost(distribution), own_parameters(distribution)
    names, push, fixed = FAMILIES[type(d)]
    if len(tangents) != len(names):
        raise ValueError(f"{type(d).__name__} has the parameters {names}, but there are {len(tangents)} tangents")
    moved = [(name, v, t) for name, v, t in zip(names, values, tangents, strict=True) if t is not None]
    for name, value, tangent in moved:
        if name in fixed:
            what = f"{type(d).__name__} has no closed form for {name}, which must not depend on theta"
            raise ValueError(f"{what}: hold it fixed, or take the information under a law")
        if jnp.shape(tangent) != value.shape:
            raise ValueError(f"the tangent of {name} has the shape {jnp.shape(tangent)}, but {name} has {value.shape}")
    return push(values, tuple(tangents), d) if moved else jnp.zeros((*d.batch_shape, 0), values[0].dtype)


def innermost(distribution: Any) -> Any:
    while type(distribution) is dist.Independent:
        distribution = distribution.base_dist
    return distribution


def _shape(d: Any, name: str, value: jax.Array) -> tuple[int, ...]:
    # a subclass may declare other parameters than those it inherits
    declared = [getattr(cls, "arg_constraints", {}) for cls in type(d).__mro__]
    axes = next((constraints[name].event_dim for constraints in declared if name in constraints), 0)
    event = np.broadcast_shapes(value.shape[value.ndim - axes :], d.event_shape) if axes else ()  # loc=0.0 has length 1
    return (*d.batch_shape, *event)


# --- roots of one and of two numbers ------------------------------------------------------------------------


def _one(root: Callable[..., Any]) -> Push:
    """One parameter moves, the information is root(*values)^2."""
    return lambda values, tangents, d: (root(*values) * next(t for t in tangents if t is not None))[..., None]


def _two(triangle: Callable[..., Any]) -> Push:
    """The last two parameters move, S = [[s11, s12], [0, s22]] = triangle(*values); one row where one of them does."""

    def push(values: Values, tangents: tuple[Any, ...], d: Any) -> jax.Array:
        (s11, s12, s22), (first, second) = triangle(*values), tangents[-2:]
        if first is None:
            return (jnp.hypot(s12, s22) * second)[..., None]
        if second is None:
            return (s11 * first)[..., None]
        return jnp.stack([s11 * first + s12 * second, s22 * second], -1)

    return push


def _location_scale(loc: float, scale: float) -> Push:
    """The information is diag(loc, scale) / scale^2."""
    return _two(lambda _, s: (math.sqrt(loc) / s, 0.0 * s, math.sqrt(scale) / s))


def _multivariate_normal(values: Values, tangents: tuple[Any, ...], d: Any) -> jax.Array:
    """With A = L^-1 dL the covariance moves by L (A + A^T) L^T, of information |A + A^T|^2 / 2; Kay (1993), 3.9."""
    (_, L), (dloc, dL) = values, tangents
    solve = lambda b: jax.lax.linalg.triangular_solve(L, b.astype(L.dtype), left_side=True, lower=True)
    i, j = np.tril_indices(L.shape[-1])
    rows = [] if dloc is None else [solve(dloc[..., None])[..., 0]]
    if dL is not None:  # what stands above the diagonal is no part of the distribution
        rows.append(solve(jnp.tril(dL))[..., i, j] * jnp.asarray(np.where(i == j, math.sqrt(2), 1), L.dtype))
    return jnp.concatenate(rows, -1)


# --- counts -------------------------------------------------------------------------------------------------


def _sqrt(p: jax.Array) -> jax.Array:
    """sqrt(p) to divide by: 0 is read as the least normal number, so that a zero tangent gives 0 and not NaN."""
    return jnp.sqrt(jnp.maximum(p, jnp.finfo(p.dtype).tiny))


def _sqrt_rest(p: jax.Array) -> jax.Array:
    """sqrt(1 - p) to divide by: 0 is read as eps / 2, the least that 1 - p can be otherwise."""
    return jnp.sqrt(jnp.maximum(1 - p, jnp.finfo(p.dtype).eps / 2))


def _sqrt_expit(l: jax.Array) -> jax.Array:
    """sqrt(p), p = 1 / (1 + e^-l), on either side of 0 in the form that does not overflow."""
    half = jnp.exp(jnp.where(l < 0, l, -l) / 2)  # at 0 either is right, with all derivatives
    return jnp.where(l < 0, half, 1) / jnp.sqrt(1 + half**2)


def _sqrt_variance(l: jax.Array) -> jax.Array:
    """sqrt(p (1 - p)) = e^(l/2) / (1 + e^l), an even function of l: taken at -|l|."""
    l = jnp.where(l < 0, l, -l)
    return jnp.exp(l / 2) / (1 + jnp.exp(l))


def _class_logits(values: Values, tangents: tuple[Any, ...], d: Any) -> jax.Array:
    """s_k = sqrt(p_k) (dl_k - p . dl), relative to the likeliest class, whose 1 - p_k then does not cancel."""
    l, dl = values[0], tangents[0]
    top = jax.nn.one_hot(jnp.argmax(l, -1), l.shape[-1], dtype=l.dtype)
    half = jnp.exp((l - jax.lax.stop_gradient(jnp.max(l, -1, keepdims=True))) / 2)
    sqrt_p = half / jnp.sqrt(jnp.sum(half**2, -1, keepdims=True))
    dl = dl - jnp.sum(top * dl, -1, keepdims=True)
    s = dl - jnp.sum(sqrt_p**2 * dl, -1, keepdims=True)
    # s is orthogonal to sqrt(p): reflected to minus the last axis it has C - 1 numbers (one for a single class)
    rows = sqrt_p * (s - s[..., -1:] * sqrt_p[..., -1:] / (1 + sqrt_p[..., -1:]))
    return _sqrt_trials(values) * rows[..., : max(l.shape[-1] - 1, 1)]


def _class_probs(values: Values, tangents: tuple[Any, ...], d: Any) -> jax.Array:
    """dp_k / sqrt(p_k), for tangents along the simplex: sum_k dp_k = 0.

    numpyro takes log(probs) without dividing by their sum. A tangent off the simplex leads out of the distributions:
    the rows are then still those of E[s s^T], but the mean score, sqrt(p) . rows, is not 0.
    """
    return _sqrt_trials(values) * (tangents[0] / _sqrt(values[0]))


def _sqrt_trials(values: Values) -> Any:
    return jnp.sqrt(values[1])[..., None] if len(values) > 1 else 1.0


# --- gamma and beta -----------------------------------------------------------------------------------------

SHIFT = 16  # the series serves from here on: the first term left out is below 1e-15 of h
SERIES = [-691 / 2730, 0, 5 / 66, 0, -1 / 30, 0, 1 / 42, 0, -1 / 30, 0, 1 / 6, 1 / 2]  # DLMF 5.15.8, times z^2


def _excess(a: jax.Array, c: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """h(a), h(c), (h(a) - h(c)) / (c - a), where h(a) = a^2 (trigamma(a) - 1/a) falls from 1 at 0 to 1/2.

    In these every sum of trigammas below has positive terms only, so that nothing cancels. As trigamma(a) - 1/a =
    1 / (a^2 (a + 1)) + trigamma(a + 1) - 1 / (a + 1), h is a sum of (a / (a + j))^2 / (a + j + 1) and a series.
    """
    h_a, h_c, slope = jnp.zeros_like(a), jnp.zeros_like(c), jnp.zeros_like(a)
    for j in range(SHIFT + 1):
        r, t, next_j = a / (a + j), c / (c + j), min(j + 1, SHIFT)
        x, y, q, u, fall = 1 / (a + next_j), 1 / (c + next_j), 0.0, 0.0, 0.0
        for k in [1, 0] if j < SHIFT else SERIES:  # Horner's rule: q, u and their divided difference
            q, u, fall = q * x + k, u * y + k, fall * x + u
        h_a, h_c = h_a + r**2 * q, h_c + t**2 * u
        slope = slope + t**2 * (fall * x * y) - (r + t) * q * (j / (a + j) / (c + j))
    return h_a, h_c, slope


def _gamma(a: jax.Array, b: jax.Array) -> tuple[jax.Array, ...]:
    """[[trigamma(a), -1 / b], [-1 / b, a / b^2]]."""
    h = _excess(a, a)[0]
    return jnp.sqrt(h + a) / a, -a / jnp.sqrt(h + a) / b, jnp.sqrt(h * (a / (h + a))) / b


def _beta(a: jax.Array, b: jax.Array) -> tuple[jax.Array, ...]:
    """diag(trigamma(a), trigamma(b)) - trigamma(s), s = a + b, of determinant D / (a b s)."""
    s = a + b
    h_a, h_s, slope_a = _excess(a, s)
    h_b, _, slope_b = _excess(b, s)
    m = slope_a + h_s * (1 + a / s) / s + a / s  # a^2 (trigamma(a) - trigamma(s)) / b
    D = h_a + a * slope_b + h_a * (b / s) * slope_b + h_b * (a / s) * slope_a + 2 * h_a * h_b / s
    return jnp.sqrt(b * m) / a, -(h_s + s) * (a / s) / s / jnp.sqrt(b * m), jnp.sqrt(D * (a / s) / m) / b


_A, _N = "concentration", "total_count"
_GUMBEL = float(np.euler_gamma) - 1, math.pi / math.sqrt(6)  # e^-z is exponential: moments are derivatives of gamma

FAMILIES: dict[type, Family] = {
    **dict.fromkeys((dist.Normal, dist.LogNormal), Family(("loc", "scale"), _location_scale(1, 2))),
    dist.Laplace: Family(("loc", "scale"), _location_scale(1, 1)),
    dist.Cauchy: Family(("loc", "scale"), _location_scale(1 / 2, 1 / 2)),
    dist.Logistic: Family(("loc", "scale"), _location_scale(1 / 3, (3 + math.pi**2) / 9)),
    dist.Gumbel: Family(("loc", "scale"), _two(lambda _, s: (1 / s, _GUMBEL[0] / s, _GUMBEL[1] / s))),
    dist.Weibull: Family(("scale", _A), _two(lambda s, k: (k / s, _GUMBEL[0] / k, _GUMBEL[1] / k))),
    dist.StudentT: Family(  # Lange, Little and Taylor (1989), appendix
        ("df", "loc", "scale"),
        _two(lambda f, _, s: (jnp.sqrt((f + 1) / (f + 3)) / s, 0.0 * s, jnp.sqrt(2 * f / (f + 3)) / s)),
        ("df",),
    ),
    dist.MultivariateNormal: Family(("loc", "scale_tril"), _multivariate_normal),
    dist.HalfNormal: Family(("scale",), _one(lambda s: math.sqrt(2) / s)),
    dist.HalfCauchy: Family(("scale",), _one(lambda s: math.sqrt(0.5) / s)),
    dist.Levy: Family(("loc", "scale"), _one(lambda _, s: math.sqrt(0.5) / s), ("loc",)),
    dist.Pareto: Family(("scale", "alpha"), _one(lambda _, alpha: 1 / alpha), ("scale",)),
    dist.Exponential: Family(("rate",), _one(lambda rate: 1 / rate)),
    **dict.fromkeys((dist.Gamma, dist.InverseGamma), Family((_A, "rate"), _two(_gamma))),
    dist.Chi2: Family(("df",), _one(lambda df: _gamma(df / 2, df)[0] / 2)),
    dist.Beta: Family(("concentration1", "concentration0"), _two(_beta)),
    dist.BernoulliLogits: Family(("logits",), _one(_sqrt_variance)),
    dist.BernoulliProbs: Family(("probs",), _one(lambda p: 1 / (_sqrt(p) * _sqrt_rest(p)))),
    dist.BinomialLogits: Family(("logits", _N), _one(lambda l, n: jnp.sqrt(n) * _sqrt_variance(l)), (_N,)),
    dist.BinomialProbs: Family(("probs", _N), _one(lambda p, n: jnp.sqrt(n) / _sqrt(p) / _sqrt_rest(p)), (_N,)),
    dist.CategoricalLogits: Family(("logits",), _class_logits),
    dist.CategoricalProbs: Family(("probs",), _class_probs),
    dist.MultinomialLogits: Family(("logits", _N), _class_logits, (_N,)),
    dist.MultinomialProbs: Family(("probs", _N), _class_probs, (_N,)),
    dist.Poisson: Family(("rate",), _one(lambda rate: 1 / _sqrt(rate))),
    dist.GammaPoisson: Family((_A, "rate"), _one(lambda a, rate: jnp.sqrt(a / (1 + rate)) / rate), (_A,)),
    dist.NegativeBinomialLogits: Family((_N, "logits"), _one(lambda n, l: jnp.sqrt(n) * _sqrt_expit(l)), (_N,)),
    dist.GeometricLogits: Family(("logits",), _one(lambda l: _sqrt_expit(-l))),
    dist.GeometricProbs: Family(("probs",), _one(lambda p: 1 / (_sqrt(p) ** 2 * _sqrt_rest(p)))),
}
# the same parameters and law under another name; the last three are what distributions.adapt puts in their place
_ALIASES = (dist.NegativeBinomial2, dist.NegativeBinomialProbs, BernoulliLogits, BinomialLogits, GammaPoisson)
FAMILIES |= {cls: FAMILIES[cls.__mro__[1]] for cls in _ALIASES}
