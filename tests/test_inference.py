"""Standard errors against published tables and statsmodels; bounds against dense linear algebra."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import statsmodels.api as sm
from jax.scipy.stats import norm

import fisherbook as fb

SPECTOR = sm.datasets.spector.load_pandas()
X = SPECTOR.exog[["GPA", "TUCE", "PSI"]].assign(const=1.0).to_numpy()
Y = SPECTOR.endog.to_numpy()

# Standard errors for GPA, TUCE, PSI and the constant, as printed by Stata's logit (vce(oim), vce(opg),
# and vce(robust) times sqrt(31/32)) and by R's glm and sandwich(type = "HC0").
PUBLISHED = {
    "expected": [1.262941, 0.141554, 1.064564, 4.931324],
    "observed": [1.262941, 0.141554, 1.064564, 4.931324],
    "opg": [1.373310, 0.178940, 1.214216, 4.843845],
    "sandwich": [1.267546, 0.117922, 0.964419, 5.197585],
}


def logit(t, x):
    return dist.Bernoulli(logits=x @ t)


def probit(t, x):
    return dist.Bernoulli(probs=norm.cdf(x @ t))


@pytest.fixture(scope="module")
def fit():
    return jnp.asarray(sm.Logit(Y, X).fit(disp=0, tol=1e-12).params)


@pytest.fixture(scope="module")
def found(fit):
    return fb.information(logit, fit, Y, X)


@pytest.mark.parametrize("kind", PUBLISHED)
def test_published_standard_errors_of_the_spector_logit(found, kind):
    np.testing.assert_allclose(found.standard_errors(kind), PUBLISHED[kind], atol=6e-7)  # the last digit printed


def test_probit_where_expected_and_observed_differ():
    fit = sm.GLM(Y, X, sm.families.Binomial(sm.families.links.Probit())).fit(tol=1e-13)
    found = fb.information(probit, jnp.asarray(fit.params), Y, X)
    # GLM's default is the expected information (IRLS), Probit's the observed one.
    np.testing.assert_allclose(found.standard_errors("expected"), fit.bse, rtol=1e-7)
    observed = sm.Probit(Y, X).fit(disp=0, tol=1e-12)
    np.testing.assert_allclose(found.standard_errors("observed"), observed.bse, rtol=1e-5)
    robust = sm.Probit(Y, X).fit(disp=0, tol=1e-12, cov_type="HC0")
    np.testing.assert_allclose(found.standard_errors("sandwich"), robust.bse, rtol=1e-5)
    gap = np.abs(found.standard_errors("expected") / found.standard_errors("observed") - 1)
    assert gap.max() > 0.01


def test_clusters_against_statsmodels(fit):
    groups = np.arange(32) // 4
    clustered = sm.Logit(Y, X).fit(
        disp=0, tol=1e-12, cov_type="cluster", cov_kwds={"groups": groups, "use_correction": False}
    )
    found = fb.information(logit, fit, Y, X, clusters=groups)
    np.testing.assert_allclose(found.standard_errors("sandwich"), clustered.bse, rtol=1e-6)
    named = fb.information(logit, fit, Y, X, clusters=[f"class {g}" for g in groups])
    np.testing.assert_array_equal(named.standard_errors("sandwich"), found.standard_errors("sandwich"))


def test_weights_count_rows_and_clusters_of_one_row_square_them(fit):
    weights = np.arange(32) % 3 + 1
    rows = np.repeat(np.arange(32), weights)
    weighted = fb.information(logit, fit, Y, X, weights=weights)
    repeated = fb.information(logit, fit, Y[rows], X[rows])
    assert weighted.n == len(rows)
    for kind in PUBLISHED:
        np.testing.assert_allclose(weighted.standard_errors(kind), repeated.standard_errors(kind), rtol=1e-9)
    sampling = fb.information(logit, fit, Y, X, weights=weights, clusters=range(32))
    S = fb.score(logit, fit, Y, X)
    meat = (weights[:, None] ** 2 * S).T @ S / weights.sum()
    np.testing.assert_allclose(sampling.meat, meat, rtol=1e-10)


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 1.0, 1.0, 3.0]])
def test_unconditional_model_in_closed_form(weights):
    y = jnp.array([0.5, -1.0, 2.0, 1.5, 0.0])
    w = np.ones(5) if weights is None else np.array(weights)
    m = np.average(y, weights=w)
    v = np.average((y - m) ** 2, weights=w)
    found = fb.information(
        lambda t: dist.Normal(t["m"], jnp.sqrt(t["v"])), {"m": jnp.asarray(m), "v": jnp.asarray(v)}, y, weights=weights
    )
    np.testing.assert_allclose(found.expected, np.diag([1 / v, 1 / (2 * v**2)]), atol=1e-10)
    np.testing.assert_allclose(found.observed, np.diag([1 / v, 1 / (2 * v**2)]), atol=1e-10)  # at the maximum
    errors = found.standard_errors("expected")
    np.testing.assert_allclose(errors["m"], np.sqrt(v / w.sum()), rtol=1e-9)
    fourth = np.average((y - m) ** 4, weights=w)
    np.testing.assert_allclose(found.opg[1, 1], (fourth / v**4 - 1 / v**2) / 4, rtol=1e-9)


def test_density_of_ones_own():
    y = jnp.array([0.2, 1.4, 0.7])
    own = fb.from_log_prob(lambda t, y: jnp.log(t) - t * y, support=dist.constraints.positive)
    found = fb.information(own, 1.3, y)
    np.testing.assert_allclose(found.expected, 1 / 1.3**2, rtol=1e-9)
    np.testing.assert_allclose(found.observed, 1 / 1.3**2, rtol=1e-12)
    np.testing.assert_allclose(found.opg, np.mean((1 / 1.3 - np.asarray(y)) ** 2), rtol=1e-12)


def test_the_table_shows_names_and_four_standard_errors(fit, found):
    theta = dict(zip(["GPA", "TUCE", "PSI", "const"], fit, strict=True))

    def model(t, x):
        return logit(jnp.stack([t["GPA"], t["TUCE"], t["PSI"], t["const"]]), x)

    table = fb.information(model, theta, Y, X)
    text, html = repr(table), table._repr_html_()
    for part in ("GPA", "const", "expected", "sandwich", "1.263", "1.373", "1.268", "n = 32"):
        assert part in text
        assert part in html
    assert "Newton" not in text
    assert "Newton step from here moves at most" in repr(
        fb.information(model, {**theta, "GPA": theta["GPA"] + 1}, Y, X)
    )


def test_singular_and_indefinite_information_have_no_standard_errors():
    def softmax(t):
        return dist.Categorical(logits=t)

    found = fb.information(softmax, jnp.zeros(3), jnp.array([0, 1, 2, 0]))
    with pytest.raises(ValueError, match=r"the expected information is singular: .*0.577 theta\[0\]"):
        found.standard_errors("expected")
    assert "none" in repr(found)
    assert "nan" not in repr(found)
    far = fb.information(lambda t: dist.Cauchy(t, 1.0), 5.0, jnp.array([0.0, 0.1]))
    with pytest.raises(ValueError, match=r"observed information is not positive definite: theta is not a maximum"):
        far.covariance("sandwich")


def test_information_is_a_pytree_and_passes_through_jit(fit, found):
    inside = jax.jit(lambda t: fb.information(logit, t, Y, X))(fit)
    np.testing.assert_allclose(inside.covariance("sandwich"), found.covariance("sandwich"), rtol=1e-8)
    errors = jax.jit(lambda t: fb.information(logit, t, Y, X).standard_errors("opg"))(fit)
    np.testing.assert_allclose(errors, PUBLISHED["opg"], atol=6e-7)


F = jnp.array([[4.0, 1.0, 0.5], [1.0, 3.0, -0.2], [0.5, -0.2, 2.0]])


def test_cramer_rao_is_the_inverse():
    np.testing.assert_allclose(fb.cramer_rao(F, n=10), np.linalg.inv(F) / 10, rtol=1e-12)
    G = np.array([[1.0, -1.0, 0.0], [0.0, 2.0, 1.0]])
    np.testing.assert_allclose(fb.cramer_rao(F, jacobian=G), G @ np.linalg.inv(F) @ G.T, rtol=1e-12)
    np.testing.assert_allclose(jax.jit(fb.cramer_rao)(F), np.linalg.inv(F), rtol=1e-12)
    assert fb.cramer_rao(0.5, n=2).item() == 1.0


@pytest.mark.parametrize("units", [1.0, 1e-9])
def test_cramer_rao_of_a_singular_information(units):
    """A softmax of three classes: differences of logits are estimable, logits are not, in whatever units."""
    p = np.array([0.2, 0.3, 0.5])
    D = np.diag([1.0, units, 1.0])
    softmax = D @ (np.diag(p) - np.outer(p, p)) @ D
    difference = np.array([1.0, -1.0, 0.0]) @ D
    bound = fb.cramer_rao(softmax, jacobian=difference)
    np.testing.assert_allclose(bound, 1 / 0.2 + 1 / 0.3, rtol=1e-9)  # log-odds of two classes
    with pytest.warns(UserWarning, match=r"F is singular along .*no unbiased estimator of theta\[0\]"):
        assert np.isinf(fb.cramer_rao(softmax)).all()
    with pytest.warns(UserWarning, match=r"estimator of g\[1\]"):
        both = np.asarray(fb.cramer_rao(softmax, jacobian=np.stack([difference, [1.0, 0.0, 0.0]])))
    assert np.isfinite(both[0, 0])
    assert np.isinf([both[1, 1], both[0, 1]]).all()


def test_nuisance_parameters():
    inverse = np.linalg.inv(F)
    np.testing.assert_allclose(
        fb.marginal_information(F, [2, 0]), np.linalg.inv(inverse[np.ix_([2, 0], [2, 0])]), rtol=1e-12
    )
    np.testing.assert_allclose(fb.marginal_information(F, 1), 1 / inverse[1, 1], rtol=1e-12)
    np.testing.assert_array_equal(fb.conditional_information(F, slice(1, 3)), F[1:, 1:])
    np.testing.assert_array_equal(fb.conditional_information(F, [False, True, True]), F[1:, 1:])
    np.testing.assert_array_equal(fb.marginal_information(F, [0, 1, 2]), F)
    twice = F[jnp.array([0, 1, 1])][:, jnp.array([0, 1, 1])]  # a nuisance parameter written down twice changes nothing
    np.testing.assert_allclose(fb.marginal_information(twice, 0), fb.marginal_information(F[:2, :2], 0), rtol=1e-9)
