"""Families whose Fisher information is known in closed form, to test the package against.

Every `information` here is NumPy and SciPy arithmetic on a formula: nothing of the package, no automatic
differentiation. Matrices are per observation (the mean over the rows of `x` for a conditional model) and in
`ravel_pytree` order, which sorts the keys of a dictionary: concentration before loc before scale.

Two lists:
- `CASES`: regular models; all three definitions must give `information` within `tolerance`. Each family
  also appears in extreme but legal corners, one at a time, named "family, corner".
- `IRREGULAR`: models at which a condition fails, and what each function must then do.

The `log_prob` of numpyro 0.22 on JAX 0.10.2 was compared with `scipy.stats` at every corner. It agrees to
rounding, but for these:
- `NegativeBinomial2`, `NegativeBinomialProbs` and `BetaBinomial` are wrong by up to 1e-6 for y >= 7:
  `jax.scipy.special.betaln(a, b)` is wrong for b >= 8 (its `algdiv` sets x = h / (1 + h) where the series
  needs x = 1 / (1 + h); still so in 0.12.0.1). The package exchanges them for its own.
- `Beta` near y = 1 takes 1 - y in floating point: outcomes closer to 1 than 1.1e-16 do not exist (y = 1
  itself has density infinity), so with a shape a < 1 at that end a mass of order eps^a is out of reach: a
  looser tolerance.
- `VonMises` at concentration k = 1e4 is right, but the curvature of its log I_0, 1/(2 k^2) = 5e-9, is a
  difference of terms of order 1: a looser tolerance. Outside [-pi, pi] its `log_prob` is -inf unless
  validate_args=False.
- `InverseGamma` is +inf for y below 1e-154 and -inf above 1e154: y / (1 / y) under- and overflows in its Jacobian.
- `Bernoulli(probs=...)` and `Binomial(probs=...)` clip p to [tiny, 1 - eps]: harmless at p = 1e-6, but the
  derivative is cut off at p = 0 exactly (see "Bernoulli(theta^2) at 0").
- With validation on (the default) an outcome outside the support has log_prob -inf and a warning, not an
  error; `Pareto` and `Gamma` have open supports, so the edge itself is outside.
- `BinomialLogits` has no `enumerate_support`; von Mises, Cauchy and mixtures have no usable `icdf` or
  variance.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import scipy.stats
from numpyro.distributions import constraints
from scipy.special import beta as beta_function
from scipy.special import expit, ive, log_ndtr, polygamma

jax.config.update("jax_enable_x64", True)  # the table is float64; theta must not be rounded on the way in

EPS = np.finfo(np.float64).eps
EULER = np.euler_gamma
FINITE = 1e-10
TRIGAMMA, DIGAMMA = (lambda a: polygamma(1, a)), (lambda a: polygamma(0, a))


def elsewhere(loc=0.0, scale=1.0):
    """Tolerance off finite supports: y - loc is known to eps |loc|, so scores to eps |loc| / scale."""
    return max(1e-8, 100 * EPS * float(np.max(np.abs(loc) / scale)))


@dataclass(frozen=True, eq=False)
class Case:
    name: str
    model: Callable
    theta: Any
    information: np.ndarray
    source: str
    x: Any = None
    kind: str = "continuous"  # or "finite", "countable"
    tolerance: float = 1e-8
    exact_kwargs: dict = field(default_factory=dict)
    note: str = ""  # why the tolerance is looser than FINITE or elsewhere(...)
    may_raise: bool = False  # log_prob cannot resolve this corner: an error is right too, a wrong number is not
    slow: bool = False

    @property
    def dimension(self) -> int:
        return self.information.shape[0]


def scaled_error(measured, information) -> float:
    """max |dF_ij| / sqrt(F_ii F_jj): invariant to the units of theta. NaN counts as infinite."""
    scale = np.sqrt(np.diag(information))
    error = np.abs(np.asarray(measured) - information) / np.outer(scale, scale)
    return float(np.max(np.where(np.isnan(error), np.inf, error)))


def _score_covariance(*args, **law):
    import fisherbook as fb

    return fb.score_covariance(*args, **law)


def _hellinger(*args, **law):
    import fisherbook as fb

    J = fb.hellinger_jacobian(*args, **law)
    return 4 * J.T @ J


def _kl_curvature(*args, **law):
    import fisherbook as fb

    return fb.kl_curvature(*args, **law)


# The three definitions, each `(model, theta, x, law=...) -> [d, d]`: what is tested, imported only when called.
DEFINITIONS = {"score_covariance": _score_covariance, "hellinger": _hellinger, "kl_curvature": _kl_curvature}


def _case(name, model, theta, information, source, **rest):
    # kind sets the default tolerance; float64 leaves; at least a matrix
    rest.setdefault("tolerance", FINITE if rest.get("kind") == "finite" else 1e-8)
    theta = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), theta)
    if rest.get("x") is not None:
        rest["x"] = jnp.asarray(rest["x"], jnp.float64)
    return Case(name, model, theta, np.atleast_2d(np.asarray(information, np.float64)), source, **rest)


def _named(family, corner):
    return f"{family}, {corner}" if corner else family


# --- finite supports ----------------------------------------------------------------------------------------


def bernoulli(p, corner=""):
    return _case(
        _named("Bernoulli, probs", corner),
        lambda t: dist.Bernoulli(probs=t["p"]),
        {"p": p},
        1 / (p * (1 - p)),
        "score (y - p) / (p (1 - p)), Var y = p (1 - p)",
        kind="finite",
    )


def bernoulli_logit(eta, corner=""):
    return _case(
        _named("Bernoulli, logits", corner),
        lambda t: dist.Bernoulli(logits=t["eta"]),
        {"eta": eta},
        expit(eta) * expit(-eta),
        "score y - p, Var y = p (1 - p)",
        kind="finite",
    )


def categorical(free, corner=""):
    # written with the same sum as the model's, so that a remainder of 1e-6 is the same float on both sides
    free = np.asarray(free)
    return _case(
        _named("categorical, free probabilities", corner),
        lambda t: dist.Categorical(probs=jnp.append(t["p"], 1 - jnp.sum(t["p"]))),
        {"p": free},
        np.diag(1 / free) + 1 / (1 - free.sum()),
        "score 1[y = i] / p_i - 1[y = C] / p_C: F = diag(1 / p_i) + 1 / p_C",
        kind="finite",
    )


def categorical_logits(eta, corner=""):
    p = np.exp(eta - scipy.special.logsumexp(eta))
    return _case(
        _named("categorical, logits (singular)", corner),
        lambda t: dist.Categorical(logits=t["eta"]),
        {"eta": np.asarray(eta)},
        np.diag(p) - np.outer(p, p),
        "score e_y - p: F = Cov e_y = diag(p) - p p^T, with kernel (1, ..., 1)",
        kind="finite",
    )


def binomial(m, p, corner=""):
    return _case(
        _named("binomial", corner),
        lambda t: dist.Binomial(m, probs=t["p"]),
        {"p": p},
        m / (p * (1 - p)),
        "score (y - m p) / (p (1 - p)), Var y = m p (1 - p)",
        kind="finite",
    )


def binomial_logit(m, eta):
    return _case(
        "binomial, logits",
        lambda t: dist.Binomial(m, logits=t["eta"]),
        {"eta": eta},
        m * expit(eta) * expit(-eta),
        "score y - m p, Var y = m p (1 - p)",
        kind="finite",
    )


def bernoulli_pixels(eta):
    p = expit(eta)
    return _case(
        "independent Bernoulli pixels",
        lambda t: dist.Bernoulli(logits=t["eta"]).to_event(1),
        {"eta": np.asarray(eta)},
        np.diag(p * (1 - p)),
        "additivity over independent coordinates",
        kind="finite",
    )


def bernoulli_pixels_shared(pixels):
    """Many pixels, two parameters: eta_k = bias + slope a_k. Enumerated: 2^pixels outcomes."""
    a = np.sin(np.arange(pixels))
    bias, slope = -0.3, 0.8
    features = np.stack([np.ones(pixels), a], axis=1)
    p = expit(bias + slope * a)
    return _case(
        f"independent Bernoulli pixels, {pixels} sharing two parameters",
        lambda t: dist.Bernoulli(logits=t["bias"] + t["slope"] * jnp.asarray(a)).to_event(1),
        {"bias": bias, "slope": slope},
        (features * (p * (1 - p))[:, None]).T @ features,
        "additivity: F = sum_k p_k (1 - p_k) a_k a_k^T",
        kind="finite",
    )


# --- countable supports -------------------------------------------------------------------------------------


def geometric(p, corner="", **rest):
    return _case(
        _named("geometric", corner),
        lambda t: dist.Geometric(probs=t["p"]),
        {"p": p},
        1 / (p**2 * (1 - p)),
        "score 1 / p - y / (1 - p), Var y = (1 - p) / p^2 (y = failures before the first success)",
        kind="countable",
        **rest,
    )


def poisson(rate, corner=""):
    return _case(
        _named("Poisson, rate", corner),
        lambda t: dist.Poisson(t["rate"]),
        {"rate": rate},
        1 / rate,
        "score y / rate - 1, Var y = rate; Lehmann and Casella (1998), section 2.5",
        kind="countable",
    )


def poisson_log_rate(eta, corner=""):
    return _case(
        _named("Poisson, log rate", corner),
        lambda t: dist.Poisson(jnp.exp(t["eta"])),
        {"eta": eta},
        np.exp(eta),
        "score y - rate, Var y = rate",
        kind="countable",
    )


def _negative_binomial_concentration(mean, concentration):
    # psi(a + y) - psi(a) = sum_{j < y} 1 / (a + j), differentiated once more: F_aa is this sum
    a = concentration
    tail = scipy.stats.nbinom(a, a / (a + mean))
    j = np.arange(int(tail.isf(1e-18)) + 1)
    return np.sum(tail.sf(j) / (a + j) ** 2) - mean / (a * (a + mean))


def _negative_binomial_logits(mean, concentration):
    # mean = exp(logits) concentration
    return dist.NegativeBinomialLogits(concentration, jnp.log(mean) - jnp.log(concentration))


def negative_binomial_mean(mean, concentration):
    return _case(
        "negative binomial, mean",
        lambda t: _negative_binomial_logits(t["mean"], concentration),
        {"mean": mean},
        concentration / (mean * (mean + concentration)),
        "score y / m - (a + y) / (a + m), Var y = m + m^2 / a",
        kind="countable",
    )


def negative_binomial(mean, concentration, corner="", build=_negative_binomial_logits, **rest):
    F_mm = concentration / (mean * (mean + concentration))
    return _case(
        _named("negative binomial, mean and concentration", corner),
        lambda t: build(t["mean"], t["concentration"]),
        {"mean": mean, "concentration": concentration},
        np.diag([_negative_binomial_concentration(mean, concentration), F_mm]),
        "mean and concentration orthogonal; F_aa = sum_j P(Y > j) / (a + j)^2 - m / (a (a + m)): minus the "
        "expected second derivative, with psi'(a) - psi'(a + y) = sum_{j < y} 1 / (a + j)^2",
        kind="countable",
        **rest,
    )


def beta_binomial(a, b, n):
    y = np.arange(n + 1)
    shared = DIGAMMA(a + b) - DIGAMMA(n + a + b)
    scores = np.stack([DIGAMMA(y + a) - DIGAMMA(a) + shared, DIGAMMA(n - y + b) - DIGAMMA(b) + shared])
    return _case(
        "beta-binomial",
        lambda t: dist.BetaBinomial(t["a"], t["b"], n),
        {"a": a, "b": b},
        (scores * scipy.stats.betabinom(n, a, b).pmf(y)) @ scores.T,
        "score psi(y + a) - psi(a) + psi(a + b) - psi(n + a + b), summed over scipy's probabilities",
        kind="finite",
    )


def zero_inflated_poisson(gate, rate):
    zero, p0 = np.exp(-rate), gate + (1 - gate) * np.exp(-rate)
    F_gg = (1 - zero) ** 2 / p0 + (1 - zero) / (1 - gate)
    F_gr = -(1 - zero) * (1 - gate) * zero / p0 - zero
    F_rr = (1 - gate) ** 2 * zero**2 / p0 + (1 - gate) * (1 / rate - zero)
    return _case(
        "zero-inflated Poisson",
        lambda t: dist.ZeroInflatedPoisson(t["gate"], t["rate"]),
        {"gate": gate, "rate": rate},
        [[F_gg, F_gr], [F_gr, F_rr]],
        "scores (1 - e^-r, -(1 - g) e^-r) / p_0 at y = 0, (-1 / (1 - g), y / r - 1) at y > 0",
        kind="countable",
    )


# --- location and scale on the line -------------------------------------------------------------------------


def location_scale(family, build, loc, scale, unit, source, corner="", **rest):
    """`unit` is the information at loc 0, scale 1: information goes as 1 / scale^2."""
    return _case(
        _named(family, corner),
        lambda t: build(t["loc"], t["scale"]),
        {"loc": loc, "scale": scale},
        np.asarray(unit) / scale**2,
        source,
        tolerance=elsewhere(loc, scale),
        **rest,
    )


def normal(loc, scale, corner=""):
    source = "scores z / scale, (z^2 - 1) / scale; Var z = 1, Var z^2 = 2; Lehmann and Casella (1998), section 2.5"
    return location_scale("normal", dist.Normal, loc, scale, np.diag([1, 2]), source, corner)


def gumbel(loc, scale, corner=""):
    unit = [[1, EULER - 1], [EULER - 1, np.pi**2 / 6 + (1 - EULER) ** 2]]
    source = "exp(-z) is Exponential(1), whose moments E[w^k (log w)^j] are derivatives of the gamma function"
    return location_scale("Gumbel", dist.Gumbel, loc, scale, unit, source, corner)


def logistic(loc, scale, corner=""):
    source = (
        "u = expit(z) is uniform; score of the location 2 u - 1: 1/3, of the scale "
        "z (2 u - 1) - 1: (3 + pi^2) / 9; Lehmann and Casella (1998), section 2.5, for 1/3"
    )
    return location_scale("logistic", dist.Logistic, loc, scale, np.diag([1 / 3, (3 + np.pi**2) / 9]), source, corner)


def cauchy(loc, scale, corner=""):
    source = "with z = tan u, u uniform: the scores are sin 2u / scale and -cos 2u / scale, each of variance 1/2"
    return location_scale("Cauchy", dist.Cauchy, loc, scale, np.diag([0.5, 0.5]), source, corner)


def student_t(df, loc, scale, corner=""):
    unit = np.diag([(df + 1) / (df + 3), 2 * df / (df + 3)])
    source = "Lange, Little and Taylor (1989), appendix (expected information of the t), one dimension"
    return location_scale("Student t, df fixed", lambda m, s: dist.StudentT(df, m, s), loc, scale, unit, source, corner)


def student_t_free(df, loc, scale, corner=""):
    F_dd = (TRIGAMMA(df / 2) - TRIGAMMA((df + 1) / 2)) / 4 - (df + 5) / (2 * df * (df + 1) * (df + 3))
    F_ds = -2 / (scale * (df + 1) * (df + 3))
    return _case(
        _named("Student t, df free", corner),
        lambda t: dist.StudentT(t["df"], t["loc"], t["scale"]),
        {"df": df, "loc": loc, "scale": scale},
        [[F_dd, 0, F_ds], [0, (df + 1) / (df + 3) / scale**2, 0], [F_ds, 0, 2 * df / (df + 3) / scale**2]],
        "Lange, Little and Taylor (1989), appendix (expected information of the t), one dimension",
        tolerance=elsewhere(loc, scale),
    )


def normal_mixture(weight, loc, scale, corner=""):
    """Weight of the first component, both locations, both scales. No closed form: integrated here, with
    scores written by hand, by composite Gauss-Legendre quadrature on panels one standard deviation wide."""
    loc, scale = np.asarray(loc), np.asarray(scale)
    edges = np.unique((loc[:, None] + scale[:, None] * np.linspace(-38, 38, 77)).ravel())
    node, node_weight = np.polynomial.legendre.leggauss(32)
    half = np.diff(edges)[:, None] / 2
    y = (edges[:-1, None] + half * (node + 1)).ravel()
    dy = (half * node_weight).ravel()

    z = (y[:, None] - loc) / scale
    log_joint = np.log([weight, 1 - weight]) + scipy.stats.norm.logpdf(z) - np.log(scale)
    log_p = scipy.special.logsumexp(log_joint, axis=1, keepdims=True)
    r = np.exp(log_joint - log_p)  # responsibilities [m, 2]
    scores = np.column_stack([r * z / scale, r * (z**2 - 1) / scale, r[:, 0] / weight - r[:, 1] / (1 - weight)])
    information = (scores * (dy * np.exp(log_p[:, 0]))[:, None]).T @ scores

    def model(t):
        weights = jnp.stack([t["weight"], 1 - t["weight"]])
        return dist.MixtureSameFamily(dist.Categorical(probs=weights), dist.Normal(t["loc"], t["scale"]))

    return _case(
        _named("mixture of two normals", corner),
        model,
        {"loc": loc, "scale": scale, "weight": weight},
        information,
        "no closed form; E[s s^T] by quadrature, where s is the responsibility times the component's score "
        "(Fisher's identity: the score is the conditional mean of the complete-data score)",
        tolerance=elsewhere(loc, scale.min()),
    )


# --- the half-line ------------------------------------------------------------------------------------------


def lognormal(loc, scale, corner=""):
    return _case(
        _named("lognormal", corner),
        lambda t: dist.LogNormal(t["loc"], t["scale"]),
        {"loc": loc, "scale": scale},
        np.diag([1, 2]) / scale**2,
        "information is invariant to the one-to-one map y -> log y, which gives the normal's",
    )


def exponential(rate, corner=""):
    return _case(
        _named("exponential", corner),
        lambda t: dist.Exponential(t["rate"]),
        {"rate": rate},
        1 / rate**2,
        "score 1 / rate - y, Var y = 1 / rate^2",
    )


def gamma(concentration, rate, corner=""):
    return _case(
        _named("gamma", corner),
        lambda t: dist.Gamma(t["concentration"], t["rate"]),
        {"concentration": concentration, "rate": rate},
        [[TRIGAMMA(concentration), -1 / rate], [-1 / rate, concentration / rate**2]],
        "Hessian of the log-partition log Gamma(a) - a log b of an exponential family in (log y, -y)",
    )


def inverse_gamma(concentration, rate, corner=""):
    return _case(
        _named("inverse gamma", corner),
        lambda t: dist.InverseGamma(t["concentration"], t["rate"]),
        {"concentration": concentration, "rate": rate},
        [[TRIGAMMA(concentration), -1 / rate], [-1 / rate, concentration / rate**2]],
        "information is invariant to the one-to-one map y -> 1 / y, which gives the gamma's",
    )


def weibull(scale, concentration, corner=""):
    k, s = concentration, scale
    return _case(
        _named("Weibull", corner),
        lambda t: dist.Weibull(t["scale"], t["concentration"]),
        {"concentration": concentration, "scale": scale},
        [
            [(np.pi**2 / 6 + (1 - EULER) ** 2) / k**2, (EULER - 1) / s],
            [(EULER - 1) / s, k**2 / s**2],
        ],
        "-log y is Gumbel(-log s, 1 / k): F = J^T F_Gumbel J with J = d(loc, scale) / d(k, s)",
    )


def half_normal(scale, corner=""):
    return _case(
        _named("half-normal", corner),
        lambda t: dist.HalfNormal(t["scale"]),
        {"scale": scale},
        2 / scale**2,
        "score (z^2 - 1) / scale, Var z^2 = 2: |y| is sufficient for the scale of a normal with known mean",
    )


def half_cauchy(scale):
    return _case(
        "half-Cauchy",
        lambda t: dist.HalfCauchy(t["scale"]),
        {"scale": scale},
        0.5 / scale**2,
        "|y| is sufficient for the scale of a Cauchy with known centre",
    )


def rayleigh(scale):
    return _case(
        "Rayleigh",
        lambda t: dist.Weibull(np.sqrt(2) * t["scale"], 2.0),
        {"scale": scale},
        4 / scale**2,
        "score (y^2 / scale^2 - 2) / scale, y^2 / scale^2 chi-squared on 2 degrees of freedom, of variance 4",
    )


def pareto(alpha, corner=""):
    return _case(
        _named("Pareto, shape", corner),
        lambda t: dist.Pareto(1.5, t["alpha"]),  # the scale is the edge of the support: not a regular parameter
        {"alpha": alpha},
        1 / alpha**2,
        "log(y / scale) is Exponential(alpha)",
    )


def levy(scale):
    return _case(
        "Levy, scale",
        lambda t: dist.Levy(0.5, t["scale"]),
        {"scale": scale},
        0.5 / scale**2,
        "score (1 - c / (y - loc)) / (2 c), c / (y - loc) chi-squared on 1 degree of freedom, of variance 2",
    )


def truncated_normal(loc, scale, corner=""):
    alpha = -loc / scale
    hazard = np.exp(scipy.stats.norm.logpdf(alpha) - log_ndtr(-alpha))
    return _case(
        _named("truncated normal, location", corner),
        lambda t: dist.TruncatedNormal(t["loc"], scale, low=0.0),
        {"loc": loc},
        (1 + alpha * hazard - hazard**2) / scale**2,
        "score (y - E y) / scale^2, Var y = scale^2 (1 + a h - h^2), h the normal hazard at a = -loc / scale",
    )


# --- an interval, a circle ----------------------------------------------------------------------------------


def beta(a, b, corner="", **rest):
    shared = -TRIGAMMA(a + b)
    return _case(
        _named("beta", corner),
        lambda t: dist.Beta(t["concentration1"], t["concentration0"]),
        {"concentration0": b, "concentration1": a},
        [[TRIGAMMA(b) + shared, shared], [shared, TRIGAMMA(a) + shared]],
        "Hessian of log B(a, b), the log-partition of an exponential family in (log y, log(1 - y))",
        **rest,
    )


def kumaraswamy(a, b):
    """With u = y^a ~ Beta(1, b); needs b > 2."""
    F_aa = 1 / a**2 + b * (b - 1) / a**2 * beta_function(2, b - 2) * (
        (DIGAMMA(2) - DIGAMMA(b)) ** 2 + TRIGAMMA(2) - TRIGAMMA(b)
    )
    F_ab = b / a * beta_function(2, b - 1) * (DIGAMMA(2) - DIGAMMA(b + 1))
    return _case(
        "Kumaraswamy",
        lambda t: dist.Kumaraswamy(t["concentration1"], t["concentration0"]),
        {"concentration0": b, "concentration1": a},
        [[1 / b**2, F_ab], [F_ab, F_aa]],
        "minus expected second derivatives; integrals of u log(u)^j (1 - u)^k are derivatives of B(2, k + 1)",
    )


def _von_mises_units(k):
    """k A(k) and A'(k) = Var cos(y), with A = I_1 / I_0; the closed form of A' cancels when k is large."""
    A = ive(1, k) / ive(0, k)
    if k < 100:
        return k * A, 1 - A / k - A**2
    # A = 1 - 1/(2k) - 1/(8k^2) - 1/(8k^3) - 25/(128k^4) - 13/(32k^5) - ...; differentiated term by term
    return k * A, 1 / (2 * k**2) + 1 / (4 * k**3) + 3 / (8 * k**4) + 25 / (32 * k**5) + 65 / (32 * k**6)


def von_mises(loc, concentration, corner="", **rest):
    F_loc, F_concentration = _von_mises_units(concentration)
    return _case(
        _named("von Mises", corner),
        lambda t: dist.VonMises(t["loc"], t["concentration"]),
        {"concentration": concentration, "loc": loc},
        np.diag([F_concentration, F_loc]),
        "A' = 1 - A / k - A^2 and k A, with A = I_1 / I_0; Mardia and Jupp (2000), chapter 5",
        **rest,
    )


# --- vectors ------------------------------------------------------------------------------------------------


def normal_vector():
    loc, scale = np.array([0.3, -1.2, 2.0]), 0.7
    return _case(
        "normal vector, one scale",
        lambda t: dist.Normal(t["loc"], t["scale"]).to_event(1),
        {"loc": loc, "scale": scale},
        np.diag([1, 1, 1, 6]) / scale**2,
        "additivity over independent coordinates: three times 2 / scale^2 for the scale",
        tolerance=elsewhere(loc, scale),
    )


_COVARIANCE = np.array([[1.3, 0.4, -0.2], [0.4, 0.9, 0.1], [-0.2, 0.1, 0.6]])


def normal_means(d):
    covariance = _COVARIANCE[:d, :d]
    return _case(
        f"normal in {d} dimensions, means",
        lambda t: dist.MultivariateNormal(t["loc"], covariance_matrix=jnp.asarray(covariance)),
        {"loc": np.linspace(-1.0, 2.0, d)},
        np.linalg.inv(covariance),
        "score C^-1 (y - loc), Cov y = C",
    )


def bivariate_normal(loc, scale, correlation, corner=""):
    """Both means, both scales, the correlation."""
    (s1, s2), r = scale, correlation
    covariance = np.array([[s1**2, r * s1 * s2], [r * s1 * s2, s2**2]])
    derivatives = [
        np.array([[0, s1 * s2], [s1 * s2, 0]]),
        np.array([[2 * s1, r * s2], [r * s2, 0]]),
        np.array([[0, r * s1], [r * s1, 2 * s2]]),
    ]
    solved = [np.linalg.solve(covariance, d) for d in derivatives]
    shape = np.array([[np.trace(a @ b) / 2 for b in solved] for a in solved])  # correlation, scale 1, scale 2
    information = np.zeros((5, 5))  # order: correlation, loc, scale
    information[1:3, 1:3] = np.linalg.inv(covariance)
    information[np.ix_([0, 3, 4], [0, 3, 4])] = shape

    def model(t):
        off = t["correlation"] * t["scale"][0] * t["scale"][1]
        diagonal = t["scale"] ** 2
        matrix = jnp.stack([jnp.stack([diagonal[0], off]), jnp.stack([off, diagonal[1]])])
        return dist.MultivariateNormal(t["loc"], covariance_matrix=matrix)

    return _case(
        _named("bivariate normal", corner),
        model,
        {"correlation": correlation, "loc": np.asarray(loc), "scale": np.asarray(scale)},
        information,
        "F_ij = m_i^T C^-1 m_j + tr(C^-1 C_i C^-1 C_j) / 2, the derivatives of mean and covariance; "
        "Kay (1993), section 3.9",
        tolerance=elsewhere(loc, np.min(scale)),
    )


# --- regressions --------------------------------------------------------------------------------------------

# Joint temperature in degrees Fahrenheit at the 23 shuttle launches before Challenger; Dalal, Fowlkes and
# Hoadley (1989). Centred at 70, in units of 10 degrees, with a column of ones before it.
_TEMPERATURE = np.array(
    [66, 70, 69, 68, 67, 72, 73, 70, 57, 63, 70, 78, 67, 53, 67, 75, 70, 81, 76, 79, 75, 76, 58], np.float64
)
X = np.column_stack([np.ones(23), (_TEMPERATURE - 70) / 10])
BETA = np.array([-1.2, -1.9])


def _weighted_gram(weights, inputs=X):
    return (inputs * weights[:, None]).T @ inputs / len(inputs)


def logistic_regression():
    p = expit(X @ BETA)
    return _case(
        "logistic regression",
        lambda t, x: dist.Bernoulli(logits=x @ t["beta"]),
        {"beta": BETA},
        _weighted_gram(p * (1 - p)),
        "McCullagh and Nelder (1989), section 4.4: X^T diag(p (1 - p)) X / n",
        x=X,
        kind="finite",
    )


def probit_regression():
    eta = X @ (BETA / 1.7)
    weights = np.exp(2 * scipy.stats.norm.logpdf(eta) - log_ndtr(eta) - log_ndtr(-eta))
    return _case(
        "probit regression",
        lambda t, x: dist.Bernoulli(probs=jax.scipy.stats.norm.cdf(x @ t["beta"])),
        {"beta": BETA / 1.7},
        _weighted_gram(weights),
        "Bernoulli information 1 / (P (1 - P)) times (dP / d eta)^2 = phi^2: weights phi^2 / (Phi (1 - Phi))",
        x=X,
        kind="finite",
    )


def ordered_logistic():
    """Four ordered classes: P(y <= k) = expit(cut_k - x slope)."""
    cut, slope = np.array([-1.0, 0.4, 2.1]), -0.9
    inputs = X[:, 1]
    density = expit(cut - inputs[:, None] * slope) * expit(inputs[:, None] * slope - cut)  # d P(y <= k) / d cut_k
    cumulative = np.column_stack([np.zeros(23), expit(cut - inputs[:, None] * slope), np.ones(23)])
    p = np.diff(cumulative, axis=1)  # [n, 4]
    gradient = np.zeros((23, 4, 4))  # row, class, (slope, cut_1, cut_2, cut_3)
    for k in range(3):
        gradient[:, k, 1 + k] += density[:, k]
        gradient[:, k + 1, 1 + k] -= density[:, k]
        gradient[:, k, 0] -= density[:, k] * inputs
        gradient[:, k + 1, 0] += density[:, k] * inputs
    return _case(
        "ordered logistic regression",
        lambda t, x: dist.OrderedLogistic(x * t["beta"], t["cut"]),
        {"beta": slope, "cut": cut},
        np.einsum("nki,nkj,nk->ij", gradient, gradient, 1 / p) / 23,
        "F = mean over rows of sum_k grad p_k grad p_k^T / p_k; McCullagh (1980), for the model",
        x=inputs,
        kind="finite",
    )


def pixel_regression():
    """Three pixels per row, each a logistic regression of its own: weights [2, 3]."""
    W = np.array([[0.3, -0.5, 1.0], [0.8, 0.1, -0.6]])
    p = expit(X @ W)
    F = np.einsum("nk,ni,nj,kl->ikjl", p * (1 - p), X, X, np.eye(3)) / len(X)
    return _case(
        "independent Bernoulli pixels, regression",
        lambda t, x: dist.Bernoulli(logits=x @ t["W"]).to_event(1),
        {"W": W},
        F.reshape(6, 6),
        "additivity over pixels of logistic regression",
        x=X,
        kind="finite",
    )


def softmax_regression():
    W = np.array([[0.3, -0.5, 1.0], [0.8, 0.1, -0.6]])
    p = np.exp(X @ W - scipy.special.logsumexp(X @ W, axis=1, keepdims=True))
    blocks = np.einsum("nk,kl->nkl", p, np.eye(3)) - np.einsum("nk,nl->nkl", p, p)
    F = np.einsum("nkl,ni,nj->ikjl", blocks, X, X) / len(X)
    return _case(
        "softmax regression (singular)",
        lambda t, x: dist.Categorical(logits=x @ t["W"]),
        {"W": W},
        F.reshape(6, 6),
        "mean over rows of x x^T kron (diag(p) - p p^T)",
        x=X,
        kind="finite",
    )


def poisson_regression():
    beta = np.array([0.7, -0.4])
    return _case(
        "Poisson regression",
        lambda t, x: dist.Poisson(jnp.exp(x @ t["beta"])),
        {"beta": beta},
        _weighted_gram(np.exp(X @ beta)),
        "McCullagh and Nelder (1989), section 2.5: canonical link, weights equal the variance exp(x beta)",
        x=X,
        kind="countable",
    )


def negative_binomial_regression():
    beta, a = np.array([0.7, -0.4]), 1.8
    mean = np.exp(X @ beta)
    F = np.zeros((3, 3))
    F[:2, :2] = _weighted_gram(mean * a / (a + mean))
    F[2, 2] = np.mean([_negative_binomial_concentration(m, a) for m in mean])
    return _case(
        "negative binomial regression",
        lambda t, x: _negative_binomial_logits(jnp.exp(x @ t["beta"]), t["concentration"]),
        {"beta": beta, "concentration": a},
        F,
        "as the negative binomial above, with dm / d beta = m x",
        x=X,
        kind="countable",
    )


def normal_regression():
    scale = 0.8
    F = np.zeros((3, 3))
    F[:2, :2] = X.T @ X / len(X) / scale**2
    F[2, 2] = 2 / scale**2
    return _case(
        "normal regression, unknown scale",
        lambda t, x: dist.Normal(x @ t["beta"], t["scale"]),
        {"beta": np.array([1.5, -0.7]), "scale": scale},
        F,
        "X^T X / (n scale^2) and 2 / scale^2, mean and scale orthogonal",
        x=X,
    )


def gamma_regression():
    """Mean exp(x beta), shape unknown."""
    beta, a = np.array([0.5, -0.8]), 2.4
    F = np.zeros((3, 3))
    F[:2, :2] = a * X.T @ X / len(X)
    F[2, 2] = TRIGAMMA(a) - 1 / a
    return _case(
        "gamma regression, log link",
        lambda t, x: dist.Gamma(t["concentration"], t["concentration"] * jnp.exp(-x @ t["beta"])),
        {"beta": beta, "concentration": a},
        F,
        "Var y = mean^2 / a gives a X^T X / n; psi'(a) - 1 / a for the shape, orthogonal to the mean",
        x=X,
    )


NEAR_ONE = "1 - y is not representable below 1.1e-16: a mass of order eps^0.6 = 4e-10, times log(eps)^2"
BETA_CORNER = {"tolerance": 1e-6, "note": NEAR_ONE, "may_raise": True, "slow": True}

CASES = [
    bernoulli(0.3),
    bernoulli(1e-6, "p = 1e-6"),
    bernoulli(1 - 1e-6, "p = 1 - 1e-6"),
    bernoulli_logit(-0.4),
    bernoulli_logit(-14.0, "logit -14"),
    bernoulli_logit(14.0, "logit 14"),
    categorical([0.2, 0.5, 0.1]),
    categorical([1e-6, 0.5, 0.1], "p_1 = 1e-6"),
    categorical([0.25, 0.749999], "remainder 1e-6"),
    categorical_logits([0.3, -1.0, 0.8, 0.0]),
    categorical_logits([0.0, -14.0, 1.0], "one logit -14"),
    binomial(12, 0.35),
    binomial(12, 1e-6, "p = 1e-6"),
    binomial(1000, 0.35, "1000 trials"),
    binomial_logit(12, -0.6),
    bernoulli_pixels([0.5, -1.0, 2.0, 0.0]),
    bernoulli_pixels_shared(1000),
    geometric(0.3),
    geometric(1e-4, "p = 1e-4"),
    geometric(1e-6, "p = 1e-6", exact_kwargs={"max_outcomes": 2**27}, slow=True),
    poisson(3.2),
    poisson(1e-3, "rate 1e-3"),
    poisson(1e4, "rate 1e4"),
    poisson_log_rate(1.1),
    poisson_log_rate(-7.0, "log rate -7"),
    negative_binomial_mean(3.0, 1.7),
    negative_binomial(3.0, 1.7),
    negative_binomial(3.0, 0.1, "concentration 0.1"),
    negative_binomial(
        3.0,
        1.7,
        "as NegativeBinomial2",
        build=dist.NegativeBinomial2,
    ),
    beta_binomial(2.0, 3.5, 30),
    zero_inflated_poisson(0.3, 2.5),
    normal(0.7, 1.3),
    normal(0.7, 1e-4, "scale 1e-4"),
    normal(0.7, 1e4, "scale 1e4"),
    normal(1e6, 1.3, "location 1e6"),
    gumbel(0.7, 1.3),
    gumbel(0.7, 1e-4, "scale 1e-4"),
    gumbel(0.7, 1e4, "scale 1e4"),
    gumbel(1e6, 1.3, "location 1e6"),
    logistic(0.7, 1.3),
    logistic(0.7, 1e-4, "scale 1e-4"),
    logistic(0.7, 1e4, "scale 1e4"),
    logistic(1e6, 1.3, "location 1e6"),
    cauchy(0.7, 1.3),
    cauchy(0.7, 1e-4, "scale 1e-4"),
    cauchy(0.7, 1e4, "scale 1e4"),
    cauchy(1e6, 1.3, "location 1e6"),
    student_t(4.0, 0.7, 1.3),
    student_t(4.0, 1e6, 1.3, "location 1e6"),
    student_t(4.0, 0.7, 1e-4, "scale 1e-4"),
    student_t_free(4.0, 0.7, 1.3),
    student_t_free(1.5, 0.7, 1.3, "df 1.5"),
    student_t_free(50.0, 0.7, 1.3, "df 50"),
    normal_mixture(0.3, [-1.0, 1.5], [0.8, 1.2]),
    normal_mixture(0.3, [-20.0, 20.0], [1.0, 1.0], "modes 40 sd apart"),
    normal_mixture(0.3, [0.2, 0.5], [1e-3, 10.0], "scales 1e-3 and 10"),
    lognormal(0.7, 0.9),
    lognormal(0.7, 3.0, "scale 3"),
    exponential(1.7),
    exponential(1e-4, "rate 1e-4"),
    exponential(1e4, "rate 1e4"),
    gamma(2.3, 1.7),
    gamma(0.6, 1.7, "shape 0.6"),
    gamma(2.3, 1e-4, "rate 1e-4"),
    gamma(2.3, 1e4, "rate 1e4"),
    inverse_gamma(2.3, 1.7),
    inverse_gamma(0.6, 1.7, "shape 0.6"),
    weibull(1.3, 1.8),
    weibull(1.3, 0.6, "shape 0.6"),
    weibull(1e4, 1.8, "scale 1e4"),
    half_normal(1.3),
    half_normal(1e-4, "scale 1e-4"),
    half_cauchy(1.3),
    rayleigh(1.3),
    pareto(2.3),
    pareto(0.6, "shape 0.6"),
    levy(1.3),
    truncated_normal(0.7, 1.3),
    truncated_normal(-3.0, 1.3, "edge 2.3 sd above the location"),
    beta(2.3, 3.1),
    beta(0.6, 3.1, "first shape 0.6"),
    beta(2.3, 0.6, "second shape 0.6", **BETA_CORNER),
    beta(0.6, 0.6, "both shapes 0.6", **BETA_CORNER),
    kumaraswamy(1.6, 3.4),
    von_mises(0.7, 2.2),
    von_mises(0.7, 1e-3, "concentration 1e-3"),
    von_mises(
        0.7,
        1e4,
        "concentration 1e4",
        tolerance=1e-6,
        note="curvature 5e-9 is a difference of terms of order 1 in log I_0: eps / 5e-9 = 4e-8 at the least",
    ),
    von_mises(3.14, 2.2, "location near pi"),
    normal_vector(),
    normal_means(2),
    normal_means(3),
    bivariate_normal([0.7, -0.4], [1.3, 0.6], 0.5),
    bivariate_normal([0.7, -0.4], [1.3, 0.6], -0.99, "correlation -0.99"),
    logistic_regression(),
    probit_regression(),
    ordered_logistic(),
    pixel_regression(),
    softmax_regression(),
    poisson_regression(),
    negative_binomial_regression(),
    normal_regression(),
    gamma_regression(),
]


# --- where a condition fails --------------------------------------------------------------------------------

RAISES = "raises"  # the call must raise, and say why
INFINITE = "infinite"  # the integral diverges: the call must raise or return inf, never a finite number


@dataclass(frozen=True, eq=False)
class Irregular:
    """What each function must do: a matrix, RAISES, INFINITE, or a tuple of the answers that are right.

    `build()` returns the model; it imports the package only when called.
    """

    name: str
    build: Callable
    theta: Any
    source: str
    score_covariance: Any
    hellinger: Any  # 4 J^T J
    kl_curvature: Any
    expected_hessian: Any  # the value of E[grad^2 log p], with its sign
    exact_kwargs: dict = field(default_factory=dict)
    tolerance: float = 1e-8


def _own(log_prob, support, **hints):
    from fisherbook import from_log_prob

    return from_log_prob(log_prob, support=support, **hints)


def _irregular(name, build, theta, source, F=None, **answers):
    """`F` is the answer of all three definitions, -F of the expected Hessian, where not said otherwise."""
    matrix = F if F is None or isinstance(F, str) else np.atleast_2d(np.asarray(F, np.float64))
    negative = -matrix if isinstance(matrix, np.ndarray) else matrix
    defaults = {
        "score_covariance": matrix,
        "hellinger": matrix,
        "kl_curvature": matrix,
        "expected_hessian": negative,
    }
    theta = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), theta)
    return Irregular(name, build, theta, source, **(defaults | answers))


def _matrix(value):
    return np.atleast_2d(np.asarray(value, np.float64))


def uniform_edge():
    return lambda t: dist.Uniform(0.0, t)


def uniform_edge_own():
    def log_prob(t, y):
        return jnp.where((y >= 0) & (y <= t), -jnp.log(t), -jnp.inf)

    return _own(log_prob, lambda t: constraints.interval(0.0, t))


def shifted_exponential():
    def log_prob(t, y):
        return jnp.where(y >= t, -(y - t), -jnp.inf)

    return _own(log_prob, lambda t: constraints.greater_than(t), location=lambda t: t, scale=1.0)


def laplace_location():
    return lambda t: dist.Laplace(t, 0.8)


def shifted_beta():
    def log_prob(t, y):
        z = y - t
        inside = (z > 0) & (z < 1)
        safe = jnp.where(inside, z, 0.5)
        return jnp.where(inside, 3 * jnp.log(safe) + 3 * jnp.log1p(-safe) + jnp.log(140.0), -jnp.inf)

    return _own(log_prob, lambda t: constraints.interval(t, t + 1))


def shifted_gamma():
    def log_prob(t, y):
        z = y - t
        safe = jnp.where(z > 0, z, 1.0)
        return jnp.where(z > 0, 3 * jnp.log(safe) - safe - jnp.log(6.0), -jnp.inf)

    return _own(log_prob, lambda t: constraints.greater_than(t))


def cubic_location():
    return lambda t: dist.Normal(t**3, 1.0)


def squared_probability():
    return lambda t: dist.Bernoulli(probs=t**2)


def softmax_overparametrised():
    return lambda t: dist.Categorical(logits=t)


def mixture_weight(variance, largest=700.0):
    """(1 - w) N(0, 1) + w N(0, variance), in a form smooth at w = 0: log p_0 + log(1 + w (ratio - 1)).

    The ratio is cut at exp(largest): further out p_0 is below the smallest float.
    """

    def log_prob(w, y):
        base = -0.5 * y**2 - 0.5 * jnp.log(2 * jnp.pi)
        log_ratio = 0.5 * y**2 * (1 - 1 / variance) - 0.5 * jnp.log(variance)
        return base + jnp.log1p(w * jnp.expm1(jnp.minimum(log_ratio, largest)))

    return _own(log_prob, constraints.real, location=0.0, scale=1.0)


def _weight_information(variance):
    return 1 / np.sqrt(variance * (2 - variance)) - 1


_P = np.exp([0.3, -1.0, 0.8]) / np.exp([0.3, -1.0, 0.8]).sum()
_MOVES = "the support moves and the density does not vanish at its edge: E s is not 0, KL is not quadratic"

IRREGULAR = [
    _irregular("Uniform(0, theta)", uniform_edge, 1.4, _MOVES, RAISES),
    _irregular("Uniform(0, theta), own density", uniform_edge_own, 1.4, _MOVES, RAISES),
    _irregular("shifted exponential", shifted_exponential, 0.5, _MOVES, RAISES),
    *[
        _irregular(
            name,
            laplace_location,
            loc,
            "differentiable in quadratic mean, score sign(y - loc) / b; KL is |d|/b + exp(-|d|/b) - 1",
            1 / 0.8**2,
            kl_curvature=(_matrix(1 / 0.8**2), RAISES),
            expected_hessian=RAISES,  # or warns: 0 is the number, and Bartlett's identity fails
        )
        # near 0 a step relative to |loc| is below the rounding of KL, and shows nothing
        for name, loc in (("Laplace location", 0.3), ("Laplace location 1e-5", 1e-5), ("Laplace location 0", 0.0))
    ],
    # KL(p_theta || p_phi) is infinite for every phi != theta (for every phi > theta for the gamma): p_phi
    # vanishes where p_theta does not. So its Hessian may be refused, though minus the expected Hessian is F.
    _irregular(
        "shifted Beta(4, 4)",
        shifted_beta,
        0.3,
        "score 3/(1 - z) - 3/z; E[1/z^2] = 7, E[1/(z (1 - z))] = 14/3 by beta functions: 9 (14 - 28/3)",
        42.0,
        kl_curvature=(_matrix(42.0), RAISES),
    ),
    _irregular(
        "shifted gamma, shape 4",
        shifted_gamma,
        0.3,
        "score 1 - 3/z; E[1/z] = 1/3, E[1/z^2] = 1/6: 1 / (shape - 2)",
        0.5,
        kl_curvature=(_matrix(0.5), RAISES),
    ),
    _irregular("N(theta^3, 1) at 0", cubic_location, 0.0, "score 3 theta^2 (y - theta^3); identified, yet F = 0", 0.0),
    _irregular(
        "Bernoulli(theta^2) at 0",
        squared_probability,
        0.0,
        "y = 1 never happens at 0, but sqrt p(1) = |theta| has slope 1: not differentiable in quadratic mean",
        score_covariance=(_matrix(0.0), RAISES),
        hellinger=(_matrix(4.0), RAISES),
        kl_curvature=(_matrix(2.0), RAISES),
        expected_hessian=(_matrix(-2.0), RAISES),
    ),
    _irregular(
        "over-parametrised softmax",
        softmax_overparametrised,
        np.array([0.3, -1.0, 0.8]),
        "diag(p) - p p^T, singular: that is the answer",
        np.diag(_P) - np.outer(_P, _P),
    ),
    *[
        _irregular(
            f"mixture weight at 0, variance {v:g}",
            lambda v=v: mixture_weight(v),
            0.0,
            "chi-squared divergence of N(0, v) from N(0, 1): 1 / sqrt(v (2 - v)) - 1 for v < 2",
            _weight_information(v) if v < 2 else INFINITE,
        )
        for v in (0.5, 1.5, 1.9, 2.0, 3.0)
    ],
    # 0 * inf far out, where the density is 0: the right number or an error, never NaN
    _irregular(
        "mixture weight at 0, variance 1.5, log_prob NaN far out",
        lambda: mixture_weight(1.5, np.inf),
        0.0,
        "as above; expm1(log ratio) overflows from |y| = 65 on",
        **dict.fromkeys(("score_covariance", "hellinger", "kl_curvature"), (_matrix(_weight_information(1.5)), RAISES)),
        expected_hessian=(_matrix(-_weight_information(1.5)), RAISES),
    ),
]
