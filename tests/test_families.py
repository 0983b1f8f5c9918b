"""The closed forms, one row each, against formulas, the exact law and high-precision arithmetic."""

from dataclasses import dataclass
from decimal import Decimal, getcontext, localcontext
from fractions import Fraction
from itertools import product
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.stats
from cases import EPS, scaled_error
from jax.flatten_util import ravel_pytree
from scipy.special import expit, polygamma

import fisherbook as fb
from fisherbook.distributions import adapt
from fisherbook.families import FAMILIES, find_family, own_parameters, push_forward

getcontext().prec = 900  # 1 - p of a class 2000 nats ahead has 870 zeros


@dataclass(frozen=True)
class Row:
    """`F` is the information of the parameters that are not fixed, in their own order."""

    build: Any
    values: tuple
    F: np.ndarray
    source: str
    kwargs: dict
    tolerance: float = 20 * EPS  # of a closed form with a handful of roundings on each side
    exact: bool = True  # compared with fb.score_covariance here; cases are by test_accuracy, and some have no exact law

    def model(self, values):
        return self.build(*values, **self.kwargs)


def row(build, values, F, source, tolerance=20 * EPS, exact=True, **kwargs):
    values = tuple(jnp.asarray(v, jnp.float64) for v in values)
    return Row(build, values, np.atleast_2d(F), source, kwargs, tolerance, exact)


def of_case(build, values, case, order=None, **rest):
    F = case.information
    return row(build, values, F if order is None else F[np.ix_(order, order)], case.source, **rest)


def multivariate_normal(loc, L):
    """By loops over the entries of loc and L; above the diagonal L is no parameter."""
    k, C = len(loc), L @ L.T
    zero, mean, moved = np.zeros(k), [], []
    for i in range(k):
        mean.append(np.eye(k)[i]), moved.append(np.zeros((k, k)))
    for i, j in product(range(k), range(k)):
        dL = np.zeros((k, k))
        dL[i, j] = i >= j
        mean.append(zero), moved.append(dL @ L.T + L @ dL.T)
    A, m = [np.linalg.solve(C, c) for c in moved], np.array(mean)
    F = m @ np.linalg.solve(C, m.T) + np.array([[np.trace(a @ b) / 2 for b in A] for a in A])
    return row(
        lambda loc, L: dist.MultivariateNormal(loc, scale_tril=L),
        (loc, L),
        F,
        "F_ij = m_i^T C^-1 m_j + tr(C^-1 C_i C^-1 C_j) / 2; Kay (1993), section 3.9",
        tolerance=200 * EPS,  # the formula's: it solves with C, whose condition is 20
    )


def multinomial(n, p):
    """Sum of p s s^T over all outcomes, with scipy's probabilities and the score y / p."""
    y = np.array([y for y in product(range(n + 1), repeat=len(p)) if sum(y) == n])
    score = y / p
    return (score * scipy.stats.multinomial(n, p).pmf(y)[:, None]).T @ score


P = np.array([0.2, 0.5, 0.3])
LOGITS = np.array([0.3, -1.2, 0.8, 0.05])
# tangents of probabilities sum to 0: two free ones, the last class takes the rest
TO_SIMPLEX = np.array([[1.0, 0.0, -1.0], [0.0, 1.0, -1.0]])
L2 = np.array([[1.3, 0.0], [-0.4, 0.7]])
NEGATIVE_BINOMIAL = "a / (m (m + a)) for the mean m = a / rate, times m'(rate)^2"


def negative_binomial(a, m):
    return cases.negative_binomial_mean(m, a).information * (m * m / a) ** 2  # rate = a / m, dm / d rate = -m^2 / a


TABLE = [
    of_case(dist.Normal, (0.7, 1.3), cases.normal(0.7, 1.3)),
    of_case(dist.LogNormal, (0.7, 0.9), cases.lognormal(0.7, 0.9), exact=False),
    row(
        dist.Laplace,
        (0.7, 1.3),
        np.eye(2) / 1.69,
        "scores sign(z) / b and (|z| - 1) / b, |z| exponential of variance 1; van der Vaart (1998), example 7.9",
    ),
    of_case(dist.Cauchy, (0.7, 1.3), cases.cauchy(0.7, 1.3)),
    of_case(dist.Logistic, (0.7, 1.3), cases.logistic(0.7, 1.3)),
    of_case(dist.Gumbel, (0.7, 1.3), cases.gumbel(0.7, 1.3)),
    of_case(dist.Weibull, (1.3, 1.8), cases.weibull(1.3, 1.8), order=[1, 0]),
    of_case(lambda m, s: dist.StudentT(4.0, m, s), (0.7, 1.3), cases.student_t(4.0, 0.7, 1.3)),
    multivariate_normal(np.array([0.7, -0.4]), L2),
    of_case(dist.HalfNormal, (1.3,), cases.half_normal(1.3)),
    of_case(dist.HalfCauchy, (1.3,), cases.half_cauchy(1.3), exact=False),
    of_case(lambda s: dist.Levy(0.5, s), (1.3,), cases.levy(1.3), exact=False),
    of_case(lambda a: dist.Pareto(1.5, a), (2.3,), cases.pareto(2.3), exact=False),
    of_case(dist.Exponential, (1.7,), cases.exponential(1.7)),
    of_case(dist.Gamma, (2.3, 1.7), cases.gamma(2.3, 1.7)),
    of_case(dist.InverseGamma, (2.3, 1.7), cases.inverse_gamma(2.3, 1.7), exact=False),
    row(dist.Chi2, (4.6,), polygamma(1, 2.3) / 4, "the gamma of shape df / 2 and rate 1/2"),
    of_case(dist.Beta, (2.3, 3.1), cases.beta(2.3, 3.1), order=[1, 0]),
    of_case(dist.BernoulliLogits, (-0.4,), cases.bernoulli_logit(-0.4)),
    of_case(dist.BernoulliProbs, (0.3,), cases.bernoulli(0.3)),
    of_case(dist.BinomialLogits, (-0.6,), cases.binomial_logit(12, -0.6), total_count=12, exact=False),
    of_case(dist.BinomialProbs, (0.35,), cases.binomial(12, 0.35), total_count=12),
    of_case(dist.CategoricalLogits, (LOGITS,), cases.categorical_logits(LOGITS)),
    row(
        dist.CategoricalProbs,
        (P,),
        np.diag(1 / P),
        "score e_y / p; only differences of tangents are meant",
        exact=False,
    ),
    row(
        dist.MultinomialLogits,
        (np.log(P),),
        3 * (np.diag(P) - np.outer(P, P)),
        "a sum of n independent categoricals",
        total_count=3,
        exact=False,
    ),
    row(
        dist.MultinomialProbs,
        (P,),
        3 * np.diag(1 / P),
        "a sum of n independent categoricals; only differences of tangents are meant",
        total_count=3,
        exact=False,
    ),
    of_case(dist.Poisson, (3.2,), cases.poisson(3.2)),
    row(lambda r: dist.GammaPoisson(1.7, r), (1.7 / 3,), negative_binomial(1.7, 3.0), NEGATIVE_BINOMIAL),
    row(
        lambda l: dist.NegativeBinomialLogits(1.7, l),
        (-0.4,),
        1.7 * expit(-0.4),
        "mean a e^l: a / (m (a + m)) m^2",
    ),
    row(dist.GeometricLogits, (-0.4,), expit(0.4), "1 / (p^2 (1 - p)) (p (1 - p))^2"),
    of_case(dist.GeometricProbs, (0.3,), cases.geometric(0.3), exact=False),
]


def name(r):
    return type(r.model(r.values)).__name__


EACH = pytest.mark.parametrize("r", TABLE, ids=name)


def varying(d):
    family = find_family(d)
    return [name not in family.fixed for name in family.parameters]


def filled(moving, tangents):
    left = iter(tangents)
    return tuple(next(left) if moves else None for moves in moving)


def linear_map(r, values):
    """S as a function of the tangents of the parameters that move, and its matrix by pushing unit tangents."""
    d = r.model(values)
    moving = varying(d)
    start = tuple(jnp.zeros_like(v) for v, m in zip(own_parameters(d), moving, strict=True) if m)
    flat, unravel = ravel_pytree(start)
    S = lambda v: push_forward(d, filled(moving, unravel(v)))
    return S, flat


def matrix(S, flat):
    return np.asarray(jax.jit(jax.vmap(S, out_axes=-1))(jnp.eye(flat.size, dtype=flat.dtype)))


def test_every_family_has_a_row():
    named = {type(r.model(r.values)) for r in TABLE}
    named |= {type(adapt(r.model(r.values))) for r in TABLE}
    aliases = {dist.NegativeBinomial2, dist.NegativeBinomialProbs}  # see test_negative_binomials
    assert named | aliases == set(FAMILIES)


@EACH
def test_closed_form(r):
    S = matrix(*linear_map(r, r.values))
    assert scaled_error(nonzero(S.T @ S), nonzero(r.F)) < r.tolerance


@EACH
def test_closed_form_in_float32_under_jit(r):
    values = tuple(v.astype(jnp.float32) for v in r.values)
    S = np.asarray(jax.jit(lambda values: jax.vmap(linear_map(r, values)[0])(jnp.eye(dim(r), dtype="f4")))(values))
    assert S.dtype == np.float32
    # the closed form is that of the float64 values: theta's own rounding moves F by a few eps
    S = S.astype(np.float64)
    assert scaled_error(nonzero(S @ S.T), nonzero(r.F)) < 40 * np.finfo(np.float32).eps * max(
        1, r.tolerance / (20 * EPS)
    )


def dim(r):
    return linear_map(r, r.values)[1].size


@EACH
def test_linear_and_transposable(r):
    S, flat = linear_map(r, r.values)
    rng = np.random.default_rng(0)
    u, v, rows = (jnp.asarray(rng.normal(size=n)) for n in (flat.size, flat.size, jax.eval_shape(S, flat).shape))

    @jax.jit
    def apply(u, v, rows):
        return S(2 * u - 3 * v), 2 * S(u) - 3 * S(v), jax.linear_transpose(S, flat)(rows)[0]

    both, apart, pulled = apply(u, v, rows)
    np.testing.assert_allclose(both, apart, atol=1e-13)
    np.testing.assert_allclose(jnp.vdot(pulled, 2 * u - 3 * v), jnp.vdot(rows, both), rtol=1e-12)


@pytest.mark.parametrize("r", [r for r in TABLE if r.exact], ids=name)
def test_agrees_with_the_exact_law(r):
    S = matrix(*linear_map(r, r.values))
    assert scaled_error(nonzero(S.T @ S), nonzero(fb.score_covariance(r.model, r.values))) < 1e-8


def nonzero(F):
    """Without the entry above the diagonal of a Cholesky factor, which is no parameter."""
    F = np.asarray(F)
    keep = np.diag(F) > 0
    return F[np.ix_(keep, keep)]


@EACH
def test_a_parameter_alone_has_its_own_rows_only(r):
    d = r.model(r.values)
    moving = varying(d)
    values, at = own_parameters(d), 0
    for i, value in enumerate(values):
        if not moving[i]:
            continue
        alone = lambda v, i=i: push_forward(d, tuple(v if i == j else None for j in range(len(values))))
        units = jnp.eye(value.size).reshape(-1, *value.shape)
        S = np.asarray(jax.vmap(alone, out_axes=-1)(units))
        block = slice(at, at + value.size)
        at += value.size
        assert scaled_error(nonzero(S.T @ S), nonzero(r.F[block, block])) < r.tolerance
        if value.ndim == 0:
            assert S.shape == (1, 1)
    nothing = push_forward(d, (None,) * len(values))
    assert nothing.shape == (*d.batch_shape, 0)


def first_of_each(all_cases):
    """Cases with a closed form; of those that differ in theta alone, the first."""
    kept = {}
    for case in all_cases:
        d = case.model(case.theta) if case.x is None else case.model(case.theta, case.x)
        if find_family(d) is not None:
            kept.setdefault((case.model.__code__, type(d)), case)
    return list(kept.values())


CASES = first_of_each(cases.CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_chain_rule(case):
    """F = J^T F_out J for the models of tests/cases.py, regressions and vectors among them."""
    flat, unravel = ravel_pytree(case.theta)
    model = lambda f: case.model(unravel(f)) if case.x is None else case.model(unravel(f), case.x)
    J = jax.jit(jax.jacfwd(lambda f: own_parameters(model(f))))(flat)
    tangents = tuple(j if np.any(j) else None for j in J)
    family = find_family(model(flat))

    @jax.jit
    def root(f, tangents):
        d = model(f)
        return jax.vmap(lambda t: push_forward(d, t), in_axes=-1, out_axes=-1)(tangents)

    if any(t is not None and n in family.fixed for t, n in zip(tangents, family.parameters, strict=True)):
        with pytest.raises(ValueError, match="must not depend on theta"):
            root(flat, tangents)
        return
    S, n = np.asarray(root(flat, tangents)).reshape(-1, flat.size), 1 if case.x is None else len(case.x)
    assert scaled_error(S.T @ S / n, case.information) < max(case.tolerance, 1e-10)


def test_most_cases_have_a_closed_form():
    assert len(CASES) >= 35, "a family of tests/cases.py is no longer recognised"


# --- shapes -------------------------------------------------------------------------------------------------


def test_independent_outputs_broadcast_their_parameters():
    x = jnp.linspace(-1.0, 1.0, 10).reshape(5, 2)
    d = dist.Independent(dist.Normal(x, 0.5).to_event(1), 0)  # any depth
    loc, scale = own_parameters(d)
    assert loc.shape == scale.shape == (5, 2)
    rows = push_forward(d, (x, jnp.ones((5, 2))))
    assert rows.shape == (5, 2, 2)
    np.testing.assert_allclose(rows, np.stack([x / 0.5, np.full((5, 2), np.sqrt(2) / 0.5)], -1), rtol=1e-15)


def test_shapes_of_events():
    (logits,) = own_parameters(dist.Categorical(logits=jnp.zeros((4, 3))))
    assert logits.shape == (4, 3)
    loc, L = own_parameters(dist.MultivariateNormal(jnp.zeros((4, 2)), scale_tril=jnp.asarray(L2)))
    assert (loc.shape, L.shape) == ((4, 2), (4, 2, 2))
    loc, L = own_parameters(dist.MultivariateNormal(0.0, scale_tril=jnp.asarray(L2)))  # a scalar loc
    assert (loc.shape, L.shape) == ((2,), (2, 2))
    logits, n = own_parameters(dist.Multinomial(jnp.array([3, 4]), logits=jnp.zeros(3)))
    assert (logits.shape, n.shape) == ((2, 3), (2,))
    assert push_forward(dist.Multinomial(jnp.array([3, 4]), logits=jnp.zeros(3)), (jnp.ones((2, 3)), None)).shape == (
        2,
        2,  # C - 1 rows carry all there is
    )


def test_a_single_class_carries_no_information():
    d = dist.Categorical(logits=jnp.zeros((4, 1)))
    np.testing.assert_array_equal(push_forward(d, (jnp.ones((4, 1)),)), np.zeros((4, 1)))
    F = fb.implicit_fisher(lambda t: dist.Categorical(logits=t), jnp.zeros(1))
    assert F.trace() == 0


def test_integers_beside_float32_stay_float32():
    logits = jnp.zeros(3, jnp.float32)
    for d in (dist.Binomial(12, logits=logits), dist.Binomial(np.array([1, 2, 3]), logits=logits)):
        assert {v.dtype for v in own_parameters(d)} == {np.dtype("float32")}
    assert own_parameters(dist.Poisson(3))[0].dtype == np.dtype("float64")


def test_under_vmap():
    scales = jnp.array([0.5, 2.0])
    rows = jax.vmap(lambda s: push_forward(dist.Gumbel(0.0, s), (jnp.array(1.0), None)))(scales)
    np.testing.assert_allclose(rows[:, 0], 1 / scales)


@pytest.mark.parametrize("k", [1, 5])
def test_multivariate_normal_of_any_dimension(k):
    rng = np.random.default_rng(k)
    L = np.tril(rng.normal(size=(k, k))) + 2 * np.eye(k)
    r = multivariate_normal(rng.normal(size=k), L)
    S, flat = linear_map(r, r.values)
    assert S(flat).shape == (k + k * (k + 1) // 2,)
    S = matrix(S, flat)
    np.testing.assert_allclose(S.T @ S, r.F, atol=1e-13)
    above = r.values[1] + np.triu(np.ones((k, k)), 1)  # what numpyro ignores, S ignores
    above = dist.MultivariateNormal(r.values[0], scale_tril=above, validate_args=False)
    tangents = jnp.ones(k), jnp.ones((k, k))
    np.testing.assert_allclose(push_forward(above, tangents), push_forward(r.model(r.values), tangents), rtol=1e-13)


def test_negative_binomials():
    """The mean of `NegativeBinomial2`, the probability of `NegativeBinomialProbs`, by the chain rule, as they are
    and as the package exchanges them."""

    def information(model, t, change):
        rate_dot = jax.jvp(lambda t: own_parameters(change(model(t)))[1], (t,), (1.0,))[1]
        return push_forward(change(model(t)), (None, rate_dot))[0] ** 2

    for change in (adapt, lambda d: d):
        F = information(lambda m: dist.NegativeBinomial2(m, 1.7), 3.0, change)
        np.testing.assert_allclose(F, 1.7 / (3.0 * 4.7), rtol=1e-14)
        F = information(lambda p: dist.NegativeBinomialProbs(1.7, p), 0.4, change)
        np.testing.assert_allclose(F, 1.7 / (0.4 * 0.6**2), rtol=1e-14)  # m = a p / (1 - p), m' = a / (1 - p)^2


def test_probabilities_along_the_simplex():
    r"""In free coordinates (the last class takes the rest) diag(p) inverse gives the covariance's inverse."""
    rows = jax.vmap(lambda t: push_forward(dist.Categorical(probs=jnp.asarray(P)), (t,)))(jnp.asarray(TO_SIMPLEX))
    np.testing.assert_allclose(rows @ rows.T, cases.categorical(P[:2]).information, rtol=1e-14)
    np.testing.assert_allclose(rows @ np.sqrt(P), 0, atol=1e-15)  # mean score
    d = dist.Multinomial(3, probs=jnp.asarray(P))
    rows = jax.vmap(lambda t: push_forward(d, (t, None)))(jnp.asarray(TO_SIMPLEX))
    np.testing.assert_allclose(rows @ rows.T, TO_SIMPLEX @ multinomial(3, P) @ TO_SIMPLEX.T, rtol=1e-13)


# --- exactness ----------------------------------------------------------------------------------------------

BERNOULLI_NUMBERS = [Fraction(b) for b in ("1/6", "-1/30", "1/42", "-1/30", "5/66", "-691/2730", "7/6", "-3617/510")]


def decimal(x):
    return Decimal(float(x))


def trigamma(x):
    """By recurrence up to 100 and Euler-Maclaurin: the first term left out, B_18 / 100^19, is below 1e-36."""
    with localcontext() as context:
        context.prec = 50
        total = Decimal(0)
        while x < 100:
            total, x = total + 1 / (x * x), x + 1
        tail = sum(Decimal(b.numerator) / b.denominator / x ** (2 * k + 3) for k, b in enumerate(BERNOULLI_NUMBERS))
        return total + 1 / x + 1 / (2 * x * x) + tail


def test_reference_trigamma():
    found = [float(trigamma(decimal(a))) for a in (1.0, 0.3, 2.3, 500.0)]
    np.testing.assert_allclose(found, [np.pi**2 / 6, *polygamma(1, [0.3, 2.3, 500.0])], rtol=1e-14)


def exact_product(S):
    """S^T S of floats in decimals: nothing under- or overflows."""
    S = np.vectorize(decimal, otypes=[object])(S)
    return S.T @ S


def exact_error(S, F):
    """max |S^T S - F|_ij / sqrt(F_ii F_jj)."""
    G = exact_product(S)
    pairs = product(range(len(F)), repeat=2)
    return max(float(abs(G[i, j] - F[i][j]) / (F[i][i] * F[j][j]).sqrt()) for i, j in pairs)


SHAPES = [1e-10, 1e-3, 0.1, 0.5, 1.0, 2.3, 15.9, 16.1, 1e3, 1e9]
FLOATS = pytest.mark.parametrize("dtype", [np.float32, np.float64])


@FLOATS
@pytest.mark.parametrize("family", [dist.Gamma, dist.Beta])
def test_gamma_and_beta_at_any_shape(family, dtype):
    """Entries to 8 eps, and so the determinant, of matrices that are singular to 1e-9 where both shapes are 1e9."""
    A, B = (grid.ravel().astype(dtype) for grid in np.meshgrid(SHAPES, SHAPES))
    zero, one = np.zeros_like(A), np.ones_like(A)
    d = family(A, B)
    columns = [push_forward(d, t) for t in ((one, zero), (zero, one))]
    for a, b, S in zip(A, B, np.stack(columns, -1), strict=True):
        a, b = decimal(a), decimal(b)
        u, v, w = trigamma(a), trigamma(b), trigamma(a + b)
        F = [[u - w, -w], [-w, v - w]] if family is dist.Beta else [[u, -1 / b], [-1 / b, a / b**2]]
        assert exact_error(S, F) < 8 * np.finfo(dtype).eps
        G = exact_product(S)
        determinant = F[0][0] * F[1][1] - F[0][1] ** 2
        found = G[0, 0] * G[1, 1] - G[0, 1] ** 2
        assert abs(float(found / determinant - 1)) < 8 * np.finfo(dtype).eps


def expit_of(l):
    return 1 / (1 + (-l).exp())


SCALAR_LOGITS = {  # F as a function of p = expit(l) and 1 - p
    "Bernoulli": (lambda l: dist.Bernoulli(logits=l), lambda p, rest: p * rest),
    "binomial": (lambda l: dist.Binomial(12, logits=l), lambda p, rest: 12 * p * rest),
    "negative binomial": (
        lambda l: dist.NegativeBinomialLogits(np.float32(1.5), l),
        lambda p, rest: Decimal("1.5") * p,
    ),
    "geometric": (lambda l: dist.Geometric(logits=l), lambda p, rest: rest),
}


@FLOATS
@pytest.mark.parametrize("name", SCALAR_LOGITS)
def test_confident_logits(name, dtype):
    """Logits of 1 times 20 and times 1000 too: exact wherever S is a number that the dtype has, and 0 beyond."""
    build, closed = SCALAR_LOGITS[name]
    scales = np.array([0.0, 1e-8, 0.3, 1.0, 20.0, 80.0, 160.0, 1000.0, 1000.0 * 1000])
    logits = np.concatenate([-scales, scales]).astype(dtype)

    @jax.jit  # numpyro checks values that it sees: e^-l of a negative binomial must not overflow
    def root(l):
        d = build(l)
        return push_forward(d, filled(varying(d), [jnp.ones_like(l)]))[:, 0]

    found = np.asarray(root(logits))
    assert found.dtype == dtype
    for l, s in zip(logits, found, strict=True):
        expected = float(closed(expit_of(decimal(l)), expit_of(-decimal(l))).sqrt())
        if expected > np.finfo(dtype).tiny:
            np.testing.assert_allclose(float(s), expected, rtol=8 * np.finfo(dtype).eps)
        else:
            assert 0 <= s <= np.finfo(dtype).tiny


@FLOATS
@pytest.mark.parametrize("factor", [1, 20, 1000])
@pytest.mark.parametrize("build", [dist.CategoricalLogits, lambda l: dist.MultinomialLogits(l, 9)])
def test_confident_classes(build, factor, dtype):
    logits = (LOGITS * factor).astype(dtype)
    d = build(jnp.asarray(logits))
    rest = (None,) * (len(own_parameters(d)) - 1)
    S = np.asarray(jax.vmap(lambda t: push_forward(d, (t, *rest)), out_axes=-1)(jnp.eye(4, dtype=dtype)))
    assert S.dtype == dtype
    e = [(decimal(l) - decimal(max(logits))).exp() for l in logits]
    p, n = [x / sum(e) for x in e], 9 if rest else 1
    F = [[n * p[i] * ((1 - p[i]) if i == j else -p[j]) for j in range(4)] for i in range(4)]
    tiny = np.finfo(dtype).tiny
    there = [i for i in range(4) if float(F[i][i].sqrt()) > tiny / np.finfo(dtype).eps]
    np.testing.assert_array_equal(S[:, [i for i in range(4) if i not in there]], 0)
    assert len(there) >= 2 or dtype == np.float32
    # l_k - l_top is rounded once, to half an eps of itself, and exponentiated
    span = max(float(decimal(max(logits)) - decimal(logits[i])) for i in there) if there else 0
    S, F = S[:, there], [[F[i][j] for j in there] for i in there]
    assert not there or exact_error(S, F) < (8 + span) * np.finfo(dtype).eps


@FLOATS
@pytest.mark.parametrize("top", [[0.0, -0.3], [0.1, 0.7, 0.2]])
def test_confident_about_a_group_of_classes(top, dtype):
    """A shift of all the likely classes at once: P (1 - P), P their total, where 1 - P is far below eps."""
    logits = np.array([*top, -40.0, -60.0], dtype)
    shift = np.array([*[1] * len(top), 0, 0], dtype)
    e = [decimal(l).exp() for l in logits]
    rest = sum(e[len(top) :]) / sum(e)
    (found,) = np.diag(exact_product(push_forward(dist.Categorical(logits=jnp.asarray(logits)), (shift,))[:, None]))
    assert abs(float(found / (rest * (1 - rest)) - 1)) < (8 + 61) * np.finfo(dtype).eps  # as in the test above


def test_masked_and_tied_classes():
    d = dist.Categorical(logits=jnp.array([0.3, -jnp.inf, 0.3]), validate_args=False)
    S = jax.vmap(lambda t: push_forward(d, (t,)), out_axes=-1)(jnp.eye(3))
    np.testing.assert_allclose(S.T @ S, [[0.25, 0, -0.25], [0, 0, 0], [-0.25, 0, 0.25]], atol=1e-16)


@FLOATS
def test_impossible_outcomes_with_zero_tangents(dtype):
    """A probability of 0 or 1 that theta does not move carries no information; a derivative there is no NaN either."""
    zero, one = np.zeros(3, dtype), np.ones(3, dtype)
    ends = np.array([0, 1, 0.5], dtype)
    for d, count in (
        (dist.BernoulliProbs(ends), 1),
        (dist.BinomialProbs(ends, 12), 2),
        (dist.CategoricalProbs(np.array([0, 0.4, 0.6], dtype)), 1),
        (dist.Poisson(zero), 1),
        (dist.GeometricProbs(ends), 1),
    ):
        np.testing.assert_array_equal(push_forward(d, (zero, None)[:count]), 0)
        assert np.all(np.isfinite(push_forward(d, (one, None)[:count])))
    slope = jax.grad(lambda p: push_forward(dist.BernoulliProbs(p), (dtype(0),))[0])
    assert slope(dtype(0)) == slope(dtype(1)) == 0


@FLOATS
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_no_square_of_a_scale_under_or_overflows(scale, dtype):
    for d in (
        dist.Gumbel(0.0, dtype(scale)),
        dist.Gamma(dtype(1.0), dtype(scale)),
        dist.Weibull(dtype(scale), dtype(1)),
    ):
        one = np.ones((), own_parameters(d)[0].dtype)
        first, second = push_forward(d, (one, None)), push_forward(d, (None, one))
        both = push_forward(d, (one, one))
        assert np.all(np.isfinite(both))
        assert min(first[0], second[0]) > 0


# --- derivatives in the values ------------------------------------------------------------------------------


def own_information(build, t):
    """F_out of a distribution with one parameter array t."""
    d = build(t)
    S = jax.vmap(lambda u: push_forward(d, (u.reshape(jnp.shape(t)),)), out_axes=-1)(jnp.eye(jnp.size(t)))
    return S.T @ S


DERIVATIVES = {  # a model, a point, and the information as a smooth formula
    "Bernoulli at 0": (lambda t: dist.Bernoulli(logits=t), 0.0, lambda t: 1 / (2 + jnp.exp(t) + jnp.exp(-t))),
    "Bernoulli": (lambda t: dist.Bernoulli(logits=t), 1.3, lambda t: 1 / (2 + jnp.exp(t) + jnp.exp(-t))),
    "probability": (lambda t: dist.Bernoulli(probs=t), 0.3, lambda t: 1 / (t * (1 - t))),
    "geometric at 0": (lambda t: dist.Geometric(logits=t), 0.0, lambda t: 1 / (1 + jnp.exp(t))),
    "tied classes": (
        lambda t: dist.Categorical(logits=t),
        np.zeros(3),
        lambda t: jnp.diag(jax.nn.softmax(t)) - jnp.outer(jax.nn.softmax(t), jax.nn.softmax(t)),
    ),
    "Chi2": (lambda t: dist.Chi2(t), 4.6, lambda t: jax.scipy.special.polygamma(1, t / 2) / 4),
    "normal scale": (lambda t: dist.HalfNormal(t), 1.5, lambda t: 2 / t**2),
}


@pytest.mark.parametrize("name", DERIVATIVES)
def test_derivatives_in_the_values(name):
    build, t, closed = DERIVATIVES[name]
    found, expected = lambda t: jnp.squeeze(own_information(build, t)), closed
    for _ in range(2):
        found, expected = jax.jacfwd(found), jax.jacrev(expected)
    np.testing.assert_allclose(jax.jit(found)(t), jax.jit(expected)(t), atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("family", [dist.Beta, dist.Gamma, dist.Normal])
def test_derivative_where_one_parameter_stands_still(family):
    """d/dt of F_22 is twice that of its root: by finite differences."""
    value = lambda t: push_forward(family(2.3, t), (None, jnp.array(1.0)))[0] ** 2
    slope = (value(1.7 + 1e-5) - value(1.7 - 1e-5)) / 2e-5
    np.testing.assert_allclose(jax.grad(value)(1.7), slope, rtol=1e-8)


# --- refusals -----------------------------------------------------------------------------------------------


class OwnNormal(dist.Normal):
    """A subclass, whose log_prob may be anything."""


def test_no_family():
    for d in (dist.VonMises(0.0, 1.0), OwnNormal(0.0, 1.0).expand([2]).to_event(1), OwnNormal(0.0, 1.0), object()):
        assert find_family(d) is None
    with pytest.raises(ValueError, match="VonMises has no closed form here: take the information under a law"):
        own_parameters(dist.VonMises(jnp.zeros(2), 1.0).to_event(1))
    with pytest.raises(ValueError, match="OwnNormal has no closed form here"):
        push_forward(OwnNormal(0.0, 1.0), (jnp.array(1.0), None))


def test_refusals():
    one = jnp.array(1.0)
    with pytest.raises(ValueError, match="StudentT has no closed form for df, which must not depend on theta"):
        push_forward(dist.StudentT(4.0), (one, one, None))
    with pytest.raises(ValueError, match="NegativeBinomial2 has no closed form for concentration"):
        push_forward(dist.NegativeBinomial2(3.0, 1.7), (one, one))
    with pytest.raises(ValueError, match=r"Normal has the parameters \('loc', 'scale'\), but there are 1 tangents"):
        push_forward(dist.Normal(0.0, 1.0), (one,))
    with pytest.raises(ValueError, match=r"the tangent of loc has the shape \(\), but loc has \(3,\)"):
        push_forward(dist.Normal(jnp.zeros(3), 1.0), (one, None))


def test_edges_of_a_support_and_other_parameters_without_a_closed_form_are_fixed():
    fixed = {(cls.__name__, name) for cls, family in FAMILIES.items() for name in family.fixed}
    assert {("Pareto", "scale"), ("Levy", "loc"), ("StudentT", "df"), ("GammaPoisson", "concentration")} <= fixed
