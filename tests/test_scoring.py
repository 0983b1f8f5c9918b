"""Fisher scoring against statsmodels' fits and iterates, SciPy's optimisers and closed forms."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.optimize
import scipy.stats
import statsmodels.api as sm
from jax.scipy.stats import norm
from scipy.special import digamma

import fisherbook as fb
from fisherbook import likelihood
from fisherbook.scoring import fisher_scoring
from fisherbook.separation import separating_direction

SPECTOR = sm.datasets.spector.load_pandas()
X = SPECTOR.exog[["GPA", "TUCE", "PSI"]].assign(const=1.0).to_numpy()
Y = SPECTOR.endog.to_numpy()
ZERO = jnp.zeros(4)
BINOMIAL = sm.families.Binomial
LINKS = sm.families.links


def logit(t, x):
    return dist.Bernoulli(logits=x @ t)


def probit(t, x):
    return dist.Bernoulli(probs=norm.cdf(x @ t))


def cloglog(t, x):
    return dist.Bernoulli(probs=-jnp.expm1(-jnp.exp(x @ t)))


def poisson(t, x):
    return dist.Poisson(jnp.exp(x @ t))


def unfinished(message, *args, **kwargs):
    with pytest.warns(UserWarning, match=message):
        fit = fisher_scoring(*args, **kwargs)
    assert not fit.converged
    return fit


# ---- against statsmodels ----


@pytest.mark.parametrize(
    ("model", "family"),
    [(logit, BINOMIAL()), (probit, BINOMIAL(LINKS.Probit())), (cloglog, BINOMIAL(LINKS.CLogLog()))],
    ids=["logit", "probit", "cloglog"],
)
def test_each_step_is_one_of_iteratively_reweighted_least_squares(model, family):
    fit = fisher_scoring(model, ZERO, Y, X)
    glm = sm.GLM(Y, X, family)
    for steps in (1, 2, 3, 4):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that so few steps do not converge
            theirs = glm.fit(start_params=np.zeros(4), maxiter=steps, tol=0)
        np.testing.assert_allclose(fit.history[steps].theta, theirs.params, rtol=1e-9)
    assert all(step.length == 1 for step in fit.history[:-1])
    final = glm.fit(start_params=np.zeros(4), tol=1e-15, maxiter=100)
    np.testing.assert_allclose(fit.theta, final.params, rtol=1e-8)
    np.testing.assert_allclose(fit.log_likelihood, final.llf, rtol=1e-12)
    np.testing.assert_allclose(fit.standard_errors(), final.bse, rtol=1e-7)


def test_poisson_regression_of_visits_to_a_doctor():
    data = sm.datasets.randhie.load_pandas()
    x, y = data.exog.assign(const=1.0).to_numpy()[::8], data.endog.to_numpy()[::8]
    fit = fisher_scoring(poisson, jnp.zeros(x.shape[1]), y, x, law=fb.Exact(outcomes=128))
    theirs = sm.Poisson(y, x).fit(method="newton", tol=1e-14, disp=0)
    np.testing.assert_allclose(fit.theta, theirs.params, rtol=1e-8)
    np.testing.assert_allclose(fit.standard_errors("observed"), theirs.bse, rtol=1e-7)
    assert fit.converged


def test_gamma_regression_with_its_shape():
    data = sm.datasets.scotland.load_pandas()
    x = (data.exog / data.exog.std()).assign(const=1.0).to_numpy()
    y = data.endog.to_numpy()

    def model(t, x):
        shape = jnp.exp(t["log_shape"])
        return dist.Gamma(shape, shape / jnp.exp(x @ t["beta"]))

    start = {"beta": jnp.zeros(x.shape[1]).at[-1].set(4.0), "log_shape": 0.0}
    fit = fisher_scoring(model, start, y, x)
    theirs = sm.GLM(y, x, sm.families.Gamma(LINKS.Log())).fit(tol=1e-15, maxiter=200)
    np.testing.assert_allclose(fit.theta["beta"], theirs.params, rtol=1e-8)
    # given the means, the shape solves log a - digamma(a) = half the mean deviance
    half = theirs.deviance / (2 * len(y))
    shape = scipy.optimize.brentq(lambda a: np.log(a) - digamma(a) - half, 1, 1e6, xtol=1e-10)
    np.testing.assert_allclose(np.exp(fit.theta["log_shape"]), shape, rtol=1e-8)
    scale = np.sqrt(1 / shape / theirs.scale)  # statsmodels takes the dispersion from Pearson's statistic
    np.testing.assert_allclose(fit.standard_errors()["beta"], theirs.bse * scale, rtol=1e-7)


def test_negative_binomial_regression_with_its_dispersion():
    data = sm.datasets.randhie.load_pandas()
    x, y = data.exog.assign(const=1.0).to_numpy()[:400, [0, 4, 9]], data.endog.to_numpy()[:400]

    def model(t, x):
        return dist.NegativeBinomial2(jnp.exp(x @ t["beta"]), jnp.exp(-t["log_alpha"]))

    fit = fisher_scoring(model, {"beta": jnp.array([0.0, 0.0, 1.0]), "log_alpha": 0.5}, y, x)
    theirs = sm.NegativeBinomial(y, x).fit(
        start_params=[*np.asarray(fit.theta["beta"]) + 0.01, 1.0], method="newton", tol=1e-12, disp=0
    )
    np.testing.assert_allclose(fit.theta["beta"], theirs.params[:3], rtol=1e-8)
    np.testing.assert_allclose(np.exp(fit.theta["log_alpha"]), theirs.params[3], rtol=1e-8)
    np.testing.assert_allclose(fit.log_likelihood, theirs.llf, rtol=1e-12)


# ---- other models, other arguments ----


def test_curved_model_is_nonlinear_least_squares():
    x = np.linspace(0.0, 4.0, 30)
    y = 3 * np.exp(-0.7 * x) + 0.1 * np.cos(37.0 * np.arange(30))
    model = lambda t, x: dist.Normal(t["height"] * jnp.exp(-t["rate"] * x), jnp.exp(t["log_sigma"]))
    fit = fisher_scoring(model, {"height": 1.0, "rate": 0.2, "log_sigma": 0.0}, y, x)
    curve = lambda x, height, rate: height * np.exp(-rate * x)
    (height, rate), covariance = scipy.optimize.curve_fit(curve, x, y, (1, 0.2), xtol=1e-15, ftol=1e-15, gtol=1e-15)
    rss = np.sum((y - curve(x, height, rate)) ** 2)
    np.testing.assert_allclose([fit.theta["height"], fit.theta["rate"]], [height, rate], rtol=1e-8)
    np.testing.assert_allclose(fit.theta["log_sigma"], np.log(rss / 30) / 2, rtol=1e-9)
    errors = fit.standard_errors()
    factor = np.sqrt(28 / 30)  # curve_fit divides by n - 2
    theirs = np.sqrt(np.diag(covariance)) * factor
    np.testing.assert_allclose([errors["height"], errors["rate"]], theirs, rtol=1e-5)  # its Jacobian is a difference


def test_unconditional_model_and_weights():
    y = np.array([0.3, -1.2, 2.0, 0.4, 0.9])
    w = np.array([1.0, 2.0, 1.0, 0.0, 3.0])
    model = lambda t: dist.Normal(t["m"], jnp.exp(t["s"]))
    fit = fisher_scoring(model, {"m": 0.0, "s": 0.0}, y, weights=w)
    mean = np.average(y, weights=w)
    sd = np.sqrt(np.average((y - mean) ** 2, weights=w))
    np.testing.assert_allclose([fit.theta["m"], fit.theta["s"]], [mean, np.log(sd)], rtol=1e-9)
    np.testing.assert_allclose(fit.standard_errors()["m"], sd / np.sqrt(7), rtol=1e-8)
    np.testing.assert_allclose(fit.log_likelihood, w @ scipy.stats.norm.logpdf(y, mean, sd), rtol=1e-13)


def test_weights_of_rows_with_inputs_are_repeated_rows():
    w = np.arange(32) % 3 + 1
    weighted = fisher_scoring(logit, ZERO, Y, X, weights=w)
    theirs = sm.GLM(Y, X, BINOMIAL(), freq_weights=w).fit(tol=1e-14)
    np.testing.assert_allclose(weighted.theta, theirs.params, rtol=1e-8)
    np.testing.assert_allclose(weighted.standard_errors(), theirs.bse, rtol=1e-7)
    np.testing.assert_allclose(weighted.log_likelihood, theirs.llf, rtol=1e-12)


@pytest.mark.parametrize("model", [logit, probit], ids=["logit", "probit"])
def test_steps_agree_under_an_affine_change_of_coordinates(model):
    rng = np.random.default_rng(0)
    A, c = rng.normal(size=(4, 4)) * [1, 10, 0.1, 3], rng.normal(size=4) / 20
    start = np.linalg.solve(A, -c)  # theta = A phi + c is 0 there
    moved = fisher_scoring(lambda phi, x: model(A @ phi + c, x), jnp.asarray(start), Y, X)
    straight = fisher_scoring(model, ZERO, Y, X)
    for ours, theirs in zip(straight.history[:6], moved.history[:6], strict=True):
        np.testing.assert_allclose(A @ theirs.theta + c, ours.theta, atol=1e-9)
        np.testing.assert_allclose(theirs.decrement, ours.decrement, rtol=1e-6, atol=1e-18)


def test_a_step_out_of_the_domain_is_halved():
    y = np.array([9.0, 11.0, 10.0])
    model = lambda t: dist.Exponential(t)  # F^-1 g = t (1 - 10 t): from t = 1 the full step ends at -8
    fit = fisher_scoring(model, 1.0, y)
    assert fit.history[0].length == 1 / 16  # the first power of 1/2 for which 1 - 9 t > 0
    np.testing.assert_allclose(fit.theta, 0.1, rtol=1e-9)
    # y = 0 has a finite log-likelihood at a negative rate, though no law is there
    identity = lambda t, x: dist.Poisson(x @ t)
    x = np.stack([np.ones(1500), np.linspace(1, 0, 1500)], 1)
    counts = (np.arange(1500) < 400) * 1.0
    fit = unfinished("", identity, jnp.array([1.0, 1.0]), counts, x, max_steps=8)
    assert np.min(x @ fit.theta) > 0


def test_cauchy_from_a_bad_start_needs_the_line_search():
    y = np.array([-1.3, 0.2, 0.5, 0.9, 8.0])
    fit = fisher_scoring(lambda t: dist.Cauchy(t, 1.0), 4.0, y, max_steps=200)
    minus = lambda t: np.sum(np.log1p((y - t) ** 2))
    best = scipy.optimize.minimize_scalar(minus, bounds=(-1, 2), method="bounded", options={"xatol": 1e-10})
    np.testing.assert_allclose(fit.theta, best.x, rtol=1e-6)  # the minimum of a function is known to sqrt(eps)
    increases = np.diff([step.log_likelihood for step in fit.history])
    assert np.all(increases > -1e-12)


def test_float32():
    with jax.enable_x64(False):
        x, y = jnp.asarray(X, jnp.float32), jnp.asarray(Y, jnp.float32)
        fit = fisher_scoring(logit, jnp.zeros(4, jnp.float32), y, x)
        assert fit.theta.dtype == jnp.float32
        assert fit.converged
        theirs = sm.GLM(Y, X, BINOMIAL()).fit(tol=1e-14)
        off = np.abs(np.asarray(fit.theta) - theirs.params) / theirs.bse
        assert off.max() < 1e-3
        separated = unfinished("infinity", logit, jnp.zeros(2, jnp.float32), jnp.array([0.0, 0, 1, 1]), LINE32())
        assert separated.history[-1].decrement < 1e-3


def LINE32():
    return jnp.asarray(LINE, jnp.float32)


def test_sampled_law_moves_the_path_not_the_maximum():
    law = fb.MonteCarlo(jax.random.key(0), 50)
    sampled = fisher_scoring(logit, ZERO, Y, X, law=law, max_steps=200)
    np.testing.assert_allclose(sampled.theta, fisher_scoring(logit, ZERO, Y, X).theta, rtol=1e-7)


def test_two_programs_serve_all_steps(monkeypatch):
    made = []
    compile_once = likelihood.compile_once
    monkeypatch.setattr(likelihood, "compile_once", lambda *args: made.append(args) or compile_once(*args))
    fit = fisher_scoring(logit, ZERO, Y, X)
    assert fit.steps > 4
    assert len(made) == 2


# ---- singular information and separation ----

LINE = np.array([[1.0, -2.0], [1.0, -1.0], [1.0, 1.0], [1.0, 2.0]])


def test_singular_information_is_named_and_damping_gets_past_it():
    x = np.column_stack([X, X[:, 0] + X[:, 2]])
    names = dict.fromkeys(["GPA", "TUCE", "PSI", "const", "both"], 0.0)
    model = lambda t, x: logit(jnp.stack([t["GPA"], t["TUCE"], t["PSI"], t["const"], t["both"]]), x)
    with pytest.raises(ValueError, match=r"F is singular at the start along .*GPA.*PSI.*both.*damping="):
        fisher_scoring(model, names, Y, x)
    damped = fisher_scoring(model, names, Y, x, damping=1e-3, max_steps=500)
    full = fisher_scoring(logit, ZERO, Y, X)
    np.testing.assert_allclose(damped.log_likelihood, full.log_likelihood, rtol=1e-9)
    np.testing.assert_allclose(damped.theta["TUCE"], full.theta[1], rtol=1e-4)
    with pytest.raises(ValueError, match="singular"):
        damped.standard_errors()
    assert "none" in repr(damped)
    with pytest.raises(ValueError, match="F is singular at the start along"):  # a parameter that does nothing
        fisher_scoring(lambda t: dist.Normal(t[0], 1.0), jnp.zeros(2), np.array([0.1, 0.2]))


@pytest.mark.parametrize(
    ("model", "y"),
    [(logit, [0, 0, 1, 1]), (probit, [0, 0, 1, 1]), (cloglog, [0, 1, 1, 1])],
    ids=["logit", "probit", "cloglog"],
)
def test_an_estimate_that_runs_to_infinity_is_reported(model, y):
    fit = unfinished(r"infinity.*separating_direction", model, jnp.zeros(2), np.array(y), LINE)
    v = np.asarray(fit.history[-1].theta) - np.asarray(fit.history[-3].theta)
    assert np.all((2 * np.array(y) - 1) * (LINE @ v) > 0)  # it runs along a separating direction
    assert "Not converged" in repr(fit)
    # neither does the same fit taken up again where the slope is negligible call itself converged
    unfinished("infinity", model, fit.theta, np.array(y), LINE, tolerance=1e-3)


def test_quasi_complete_separation_and_a_rate_of_zero():
    x, y = np.c_[np.ones(8), np.arange(8) < 4], np.array([1, 1, 1, 1, 0, 1, 0, 0])
    fit = unfinished("infinity", logit, jnp.zeros(2), y, x)
    np.testing.assert_allclose(fit.theta[0], np.log(1 / 3), atol=1e-2)  # the group that is not separated
    unfinished("infinity", poisson, jnp.zeros(2), np.array([0, 0, 0, 0, 1, 2, 3, 1]), x)


def test_separating_direction_of_real_and_of_constructed_data():
    from sklearn.datasets import load_breast_cancer

    data = load_breast_cancer()
    x = np.c_[np.ones(569), data.data]
    assert separating_direction(x[:, :11], data.target) is None
    v = separating_direction(x, data.target)
    assert np.min((2 * data.target - 1) * (x @ v)) > 0.999
    np.testing.assert_array_less(
        0, (2 * np.array([0, 0, 1, 1]) - 1) * (LINE @ separating_direction(LINE, [0, 0, 1, 1]))
    )
    assert separating_direction(LINE, [0, 1, 0, 1]) is None
    # quasi-complete: the group of ones is separated, the mixed group stays at 0
    x, y = np.c_[np.ones(8), np.arange(8) < 4], np.array([1, 1, 1, 1, 0, 1, 0, 0])
    margins = (2 * y - 1) * (x @ separating_direction(x, y))
    np.testing.assert_allclose(margins, [1, 1, 1, 1, 0, 0, 0, 0], atol=1e-6)
    assert separating_direction(np.ones((3, 1)), [1, 1, 1]) is not None


def test_overlap_agrees_with_the_fit_and_with_units():
    rng = np.random.default_rng(3)
    found = {True: 0, False: 0}
    for _ in range(12):
        x = np.c_[np.ones(9), rng.normal(size=(9, 3))]
        y = rng.integers(0, 2, 9)
        separated = separating_direction(x, y) is not None
        assert (separating_direction(x * [1, 1e6, 1e-6, 1], y) is not None) == separated
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert fisher_scoring(logit, ZERO, y, x).converged != separated
        found[separated] += 1
    assert min(found.values()) >= 3, "both happen"


# ---- reports and bad input ----


def test_too_few_steps_are_reported():
    fit = unfinished("max_steps", logit, ZERO, Y, X, max_steps=2)
    assert fit.steps == 2
    assert len(fit.history) == 3
    assert fit.history[-1].length == 0
    again = fisher_scoring(logit, fit.theta, Y, X)
    np.testing.assert_allclose(again.theta, fisher_scoring(logit, ZERO, Y, X).theta, rtol=1e-9)


def test_the_maximum_itself_as_a_start():
    best = fisher_scoring(logit, ZERO, Y, X).theta
    fit = fisher_scoring(logit, best, Y, X)
    assert fit.converged
    np.testing.assert_allclose(fit.theta, best, rtol=1e-12)
    exact = fisher_scoring(lambda t: dist.Normal(t, 1.0), 0.5, np.array([0.0, 1.0]))
    assert exact.converged
    assert exact.theta == 0.5


def test_the_table_has_names_estimates_errors_and_z():
    names = dict.fromkeys(["const", "<psi>"], 0.0)
    fit = fisher_scoring(lambda t, x: logit(jnp.stack([t["const"], t["<psi>"]]), x), names, Y, X[:, [3, 2]])
    text, page = repr(fit), fit._repr_html_()
    error = float(fit.standard_errors()["const"])
    for part in ("const", f"{float(fit.theta['const']):.4g}", f"{error:.4g}", "Converged", "n = 32"):
        assert part in text
        assert part in page
    assert "<psi>" in text
    assert "&lt;psi&gt;" in page
    assert fit.information is fit.information


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(y=2 * Y), r"y\[4\] = 2.* is impossible"),
        (dict(y=Y * np.nan), "impossible"),
        (dict(y=Y[:30]), "x has 32 rows but y has 30"),
        (dict(x=np.where(np.arange(32)[:, None] == 7, np.nan, X)), "x is not finite at row 7"),
        (dict(theta=ZERO * np.inf), "theta is not finite"),
        (dict(weights=-np.ones(32)), "weights must be"),
        (dict(weights=np.ones(3)), "weights has shape"),
        (dict(law=fb.Data(Y)), "outer product"),
        (dict(damping=-1.0), "damping must be"),
        (dict(tolerance=-1.0), "tolerance must be"),
        (dict(max_steps=1.5), "max_steps must be"),
    ],
)
def test_bad_input_is_named(change, message):
    given = dict(model=logit, theta=ZERO, y=Y, x=X) | change
    with pytest.raises(ValueError, match=message):
        fisher_scoring(**given)


def test_traced_values_are_refused():
    with pytest.raises(ValueError, match="outside jit"):
        jax.jit(lambda y: fisher_scoring(logit, ZERO, y, X).theta)(Y)
    with pytest.raises(ValueError, match="outside jit"):
        jax.jit(lambda y: separating_direction(X, y))(Y)


def test_a_start_without_a_finite_slope_is_refused():
    with pytest.raises(ValueError, match=r"not finite at the start|outside its domain"):
        fisher_scoring(lambda t: dist.Normal(0.0, jnp.sqrt(t)), 0.0, np.array([1.0]))


def test_a_failure_on_the_way_says_where():
    # the sampler's law is fine at the start and has no exact expectation once the support moves
    model = lambda t: dist.Uniform(0.0, jnp.where(t > 0.4, 2.0 + t, 2.0)) if t is None else moving(t)
    with pytest.raises(ValueError, match=r"after 1 steps of fisher_scoring, at theta = \[0.5"):
        fisher_scoring(model, 0.0, np.array([0.5]))


def moving(t):
    """Normal(t, 1) written as a density whose mass is wrong from t = 0.4 on."""
    return fb.from_log_prob(lambda t, y: norm.logpdf(y, t) + jnp.where(t > 0.4, 0.1, 0.0))(t)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (LINE, [0, 1, 2, 1], r"y\[2\] = 2"),
        (LINE, [0, 1, 1], "x has 4 rows but y has shape"),
        (LINE * np.nan, [0, 1, 1, 1], r"x\[0\] is not finite"),
        (LINE[:, 0], [0, 1, 1, 1], "x must be a matrix"),
    ],
)
def test_separating_direction_names_bad_input(x, y, message):
    with pytest.raises(ValueError, match=message):
        separating_direction(x, y)
