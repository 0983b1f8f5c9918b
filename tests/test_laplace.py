"""Laplace posteriors against conjugate models, dense linear algebra, quadrature and other software."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.integrate
import scipy.optimize
import scipy.stats
import statsmodels.api as sm

import fisherbook as fb
from fisherbook.laplace import laplace

RNG = np.random.default_rng(0)
X = np.column_stack([np.ones(40), RNG.normal(size=(40, 2))])
Y = X @ np.array([0.5, 1.0, -1.0]) + 0.3 * RNG.normal(size=40)
CLASSES = RNG.integers(0, 3, 40)
STRUCTURES = {
    "dense": fb.dense_fisher,
    "diagonal": fb.diagonal_fisher,
    "Kronecker": fb.kronecker_fisher,
    "low rank": partial(fb.low_rank_fisher, rank=3),
    "implicit": partial(fb.implicit_fisher, rtol=1e-13),
}
each = pytest.mark.parametrize("structure", STRUCTURES)


def regression(theta, x, sd=0.3):
    return dist.Normal(x @ theta, sd)


def conjugate(prior_precision, prior_mean, sd=0.3):
    """Posterior mean and covariance of a linear regression (Bishop, 2006, equations 3.50 and 3.51)."""
    P = np.diag(np.broadcast_to(prior_precision, 3)).astype(float)
    S = np.linalg.inv(P + X.T @ X / sd**2)
    return S @ (P @ np.broadcast_to(prior_mean, 3) + X.T @ Y / sd**2), S


def evidence(prior_precision, prior_mean, sd=0.3):
    """y is normal: mean X m, covariance sd^2 I + X P^-1 X^T."""
    C = sd**2 * np.eye(40) + X @ np.diag(1 / np.broadcast_to(prior_precision, 3)) @ X.T
    return scipy.stats.multivariate_normal.logpdf(Y, X @ np.broadcast_to(prior_mean, 3), C)


def network(theta, x):
    return dist.Categorical(logits=jnp.tanh(x @ theta["W1"] + theta["b1"]) @ theta["W2"])


def network_weights():
    keys = jax.random.split(jax.random.key(0), 2)
    return {
        "W1": jax.random.normal(keys[0], (3, 4)),
        "b1": jnp.zeros(4),
        "W2": jax.random.normal(keys[1], (4, 3)),
    }


@pytest.fixture(scope="module")
def built():
    quiet = pytest.warns(UserWarning, match="not the mode")
    with quiet:
        return {
            name: laplace(network, network_weights(), CLASSES, X, prior_precision=2.0, curvature=curvature)
            for name, curvature in STRUCTURES.items()
        }


PRIORS = [(2.0, 0.5), (np.array([0.1, 1.0, 10.0]), np.array([0.0, 1.0, -1.0]))]


@pytest.mark.parametrize(("precision", "mean"), PRIORS)
def test_linear_regression_is_exact(precision, mean):
    m, S = conjugate(precision, mean)
    posterior = laplace(regression, jnp.asarray(m), Y, X, prior_precision=precision, prior_mean=mean)
    np.testing.assert_allclose(posterior.covariance(), S, rtol=1e-10)
    np.testing.assert_allclose(posterior.standard_deviations(), np.sqrt(np.diag(S)), rtol=1e-10)
    np.testing.assert_allclose(posterior.log_marginal_likelihood(), evidence(precision, mean), rtol=1e-10)
    at = jnp.array([0.4, 1.1, -0.9])
    np.testing.assert_allclose(posterior.log_prob(at), scipy.stats.multivariate_normal.logpdf(at, m, S), rtol=1e-10)
    new = X[:5] + 0.1
    predicted = posterior.predictive(new)
    np.testing.assert_allclose(predicted.loc, new @ m, rtol=1e-10)
    np.testing.assert_allclose(predicted.variance, 0.3**2 + np.diag(new @ S @ new.T), rtol=1e-10)
    together = posterior.predictive(new, joint=True)
    np.testing.assert_allclose(together.covariance_matrix, 0.3**2 * np.eye(5) + new @ S @ new.T, rtol=1e-9)
    assert posterior.away < 1e-8


def test_normal_mean_is_exact():
    posterior = laplace(lambda t: dist.Normal(t, 2.0), jnp.asarray(Y.sum() / 4 / (40 / 4 + 3)), Y, prior_precision=3.0)
    np.testing.assert_allclose(posterior.standard_deviations(), (40 / 4 + 3) ** -0.5, rtol=1e-12)
    C = 4 * np.eye(40) + np.ones((40, 40)) / 3
    expected = scipy.stats.multivariate_normal.logpdf(Y, np.zeros(40), C)
    np.testing.assert_allclose(posterior.log_marginal_likelihood(), expected, rtol=1e-12)
    np.testing.assert_allclose(posterior.predictive().variance, 4 + 1 / 13, rtol=1e-12)


@each
def test_structures_against_their_own_matrix(built, structure):
    """Precision, covariance, draws' law, density and evidence are those of n F + 2 I for the matrix F that is kept."""
    posterior = built[structure]
    F, d = np.asarray(posterior.curvature.as_matrix()), 28
    P = 40 * F + 2 * np.eye(d)
    S = np.linalg.inv(P)
    np.testing.assert_allclose(posterior.covariance(), S, rtol=1e-7, atol=1e-9)
    sd = jax.flatten_util.ravel_pytree(posterior.standard_deviations())[0]
    np.testing.assert_allclose(sd, np.sqrt(np.diag(S)), rtol=1e-8)
    flat = np.asarray(posterior.flat)
    value = posterior.log_likelihood + d / 2 * np.log(2) - flat @ flat - np.linalg.slogdet(P)[1] / 2
    np.testing.assert_allclose(posterior.log_marginal_likelihood(), value, rtol=1e-9)
    draws = posterior.sample(jax.random.key(1), (4000,))
    white = np.concatenate([np.asarray(draws[k]).reshape(4000, -1) for k in ("W1", "W2", "b1")], 1) - flat
    white = white @ np.linalg.cholesky(P)
    np.testing.assert_allclose(np.cov(white.T), np.eye(d), atol=6 / np.sqrt(4000))


@each
def test_output_covariance(built, structure):
    posterior = built[structure]
    J = jax.jacobian(lambda t: network(t, X[:7]).logits)(posterior.mean)
    J = np.concatenate([np.asarray(J[k]).reshape(7, 3, -1) for k in ("W1", "W2", "b1")], 2)
    S = np.linalg.inv(40 * np.asarray(posterior.curvature.as_matrix()) + 2 * np.eye(28))
    outputs = posterior.output_distribution(X[:7])
    np.testing.assert_allclose(outputs.covariance_matrix, J @ S @ np.swapaxes(J, 1, 2), rtol=1e-6, atol=1e-9)
    joint = posterior.output_distribution(X[:7], joint=True)
    np.testing.assert_allclose(
        joint.covariance_matrix, J.reshape(21, -1) @ S @ J.reshape(21, -1).T, rtol=1e-6, atol=1e-9
    )


@each
def test_another_prior_is_a_new_posterior_without_the_data(built, structure):
    other = built[structure].with_prior(5.0)
    with pytest.warns(UserWarning, match="not the mode"):
        fresh = laplace(network, network_weights(), CLASSES, X, prior_precision=5.0, curvature=STRUCTURES[structure])
    np.testing.assert_allclose(other.log_marginal_likelihood(), fresh.log_marginal_likelihood(), rtol=1e-12)


def test_evidence_can_be_differentiated():
    m, _ = conjugate(2.0, 0.0)
    posterior = laplace(regression, jnp.asarray(m), Y, X, prior_precision=2.0)
    slope = jax.grad(lambda a: posterior.with_prior(a).log_marginal_likelihood())(2.0)
    _, S = conjugate(2.0, 0.0)
    np.testing.assert_allclose(slope, (3 / 2.0 - m @ m - np.trace(S)) / 2, rtol=1e-9)  # at a fixed mean

    def of_noise(sd):
        model = partial(regression, sd=sd)
        return laplace(model, jnp.asarray(m), Y, X, prior_precision=2.0).log_marginal_likelihood()

    step = 1e-5
    np.testing.assert_allclose(
        jax.grad(of_noise)(0.3), (of_noise(0.3 + step) - of_noise(0.3 - step)) / (2 * step), rtol=1e-6
    )


def test_flat_prior_gives_the_standard_errors_of_statsmodels():
    data = sm.datasets.spector.load_pandas()  # Spector and Mazzeo (1980)
    x, y = np.column_stack([np.ones(32), data.exog.to_numpy()]), data.endog.to_numpy()
    fit = sm.Logit(y, x).fit(disp=0, tol=1e-12)
    posterior = laplace(lambda t, x: dist.Bernoulli(logits=x @ t), jnp.asarray(fit.params), y, x, prior_precision=0.0)
    np.testing.assert_allclose(posterior.standard_deviations(), fit.bse, rtol=1e-7)
    with pytest.raises(ValueError, match="prior precision of 0 has no density"):
        posterior.log_marginal_likelihood()


def logistic():
    y = (X[:, 1] + RNG.normal(size=40) > 0).astype(int)
    model = lambda t, x: dist.Bernoulli(logits=x @ t)
    loss = lambda t: -model(t, X).log_prob(y).sum() + t @ t / 2
    mode = scipy.optimize.minimize(jax.value_and_grad(loss), np.zeros(3), jac=True, tol=1e-12).x
    return laplace(model, jnp.asarray(mode), y, X, prior_precision=1.0)


def test_binary_predictions_against_quadrature():
    """The average of the sigmoid over the normal law of the logit, which probit approximates to about 0.02."""
    posterior, new = logistic(), X[:6]
    outputs = posterior.output_distribution(new)
    mean, sd = np.asarray(outputs.mean[:, 0]), np.sqrt(np.asarray(outputs.covariance_matrix[:, 0, 0]))
    inner = lambda z, m, s: scipy.stats.norm.pdf(z) / (1 + np.exp(-m - s * z))
    exact = [scipy.integrate.quad(inner, -12, 12, args=(m, s))[0] for m, s in zip(mean, sd, strict=True)]
    np.testing.assert_allclose(posterior.predictive(new).probs, exact, atol=0.02)
    for method in ("linear_samples", "samples"):  # one layer: the same law
        mixture = posterior.predictive(new, method=method, key=jax.random.key(0), draws=20_000)
        np.testing.assert_allclose(np.exp(mixture.log_prob(jnp.ones(6, int))), exact, atol=5 * 0.5 / np.sqrt(20_000))


def test_logits_and_probabilities_are_one_model(built):
    probabilities = lambda t, x: dist.Categorical(probs=jax.nn.softmax(network(t, x).logits))
    with pytest.warns(UserWarning, match="not the mode"):
        other = laplace(probabilities, network_weights(), CLASSES, X, prior_precision=2.0)
    draw = lambda posterior: posterior.predictive(X[:3], method="linear_samples", key=jax.random.key(1), draws=20_000)
    a, b = (np.exp(draw(p).log_prob(jnp.array([0, 1, 2]))) for p in (built["dense"], other))
    np.testing.assert_allclose(a, b, atol=5 * 0.5 / np.sqrt(20_000))


def test_class_predictions(built):
    for method in ("probit", "bridge"):
        probs = built["dense"].predictive(X[:5], method=method).probs
        np.testing.assert_allclose(probs.sum(-1), 1, rtol=1e-12)
    exact = built["dense"].predictive(X[:5], method="linear_samples", key=jax.random.key(2), draws=20_000)
    found = np.exp(np.stack([exact.log_prob(jnp.full(5, c)) for c in range(3)], 1))
    np.testing.assert_allclose(probs, found, atol=0.1)
    certain = built["dense"].with_prior(1e12).predictive(X[:5]).probs  # no uncertainty: the network's own
    np.testing.assert_allclose(certain, jax.nn.softmax(network(network_weights(), X[:5]).logits), rtol=1e-6)


@pytest.mark.parametrize(
    "model",
    [
        lambda t, x: dist.Poisson(jnp.exp(x @ t)),
        lambda t, x: dist.Normal(x @ t, jnp.exp(x[:, 1] * t[0])),
        lambda t, x: dist.Gamma(jnp.exp(x @ t), 2.0),
        lambda t, x: dist.Normal(jnp.stack([x @ t, x @ t], 1), 0.5).to_event(1),
        lambda t, x: dist.NegativeBinomial2(jnp.exp(x @ t), 3.0),
    ],
)
def test_sampled_predictions_for_any_likelihood(model):
    theta = jnp.array([0.1, 0.2, -0.1])
    y = model(theta, X).sample(jax.random.key(3))
    with pytest.warns(UserWarning, match="not the mode"):
        posterior = laplace(model, theta, y, X, prior_precision=1e10, prior_mean=1.0)
    for method in ("linear_samples", "samples"):  # a posterior of no width: the model itself
        mixture = posterior.predictive(X[:4], method=method, key=jax.random.key(4), draws=3)
        np.testing.assert_allclose(mixture.log_prob(y[:4]), model(theta, X[:4]).log_prob(y[:4]), rtol=1e-3)


def test_no_mixture_where_the_support_depends_on_a_parameter():
    model = lambda t, x: dist.Binomial(5, logits=x @ t)
    with pytest.warns(UserWarning, match="not the mode"):
        posterior = laplace(model, jnp.ones(3), np.full(40, 2), X)
    with pytest.raises(ValueError, match="no mixture of Binomial"):
        posterior.predictive(X[:2], method="samples", key=jax.random.key(0))


def test_subset_is_the_posterior_with_the_rest_known(built):
    theta = network_weights()
    with pytest.warns(UserWarning, match="not the mode"):
        last = laplace(network, theta, CLASSES, X, prior_precision=2.0, subset=lambda t: t["W2"])
    whole = 40 * np.asarray(built["dense"].curvature.as_matrix()) + 2 * np.eye(28)
    np.testing.assert_allclose(last.covariance(), np.linalg.inv(whole[12:24, 12:24]), rtol=1e-9)
    assert last.mean.shape == (4, 3)
    assert last.sample(jax.random.key(0), (2, 5)).shape == (2, 5, 4, 3)


def test_passes_through_jit(built):
    found = jax.jit(lambda p: (p.log_marginal_likelihood(), p.predictive(X[:3]).probs))(built["dense"])
    np.testing.assert_allclose(found[0], built["dense"].log_marginal_likelihood(), rtol=1e-12)
    np.testing.assert_allclose(found[1], built["dense"].predictive(X[:3]).probs, rtol=1e-12)


def test_display_names_the_parameters():
    html = logistic()._repr_html_()
    assert "theta[0]" in html
    assert "standard deviations from its mode" in html


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prior_precision": -1.0}, "prior_precision must not be negative"),
        ({"prior_precision": np.nan}, "prior_precision is not finite"),
        ({"prior_precision": np.ones(2)}, "prior_precision must be a number"),
        ({"prior_precision": 0.0}, "n F \\+ prior is singular"),
        ({"subset": lambda t: ()}, "subset selects nothing"),
        ({"curvature": lambda *a, **k: np.eye(2)}, "curvature has shape"),
        ({"must_be_mode": True}, "theta is not the mode"),
        (
            {
                "prior_precision": {"W1": 1.0, "b1": 2.0, "W2": 1.0},
                "curvature": fb.kronecker_fisher,
            },
            "damping must be the same",
        ),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        laplace(network, network_weights(), CLASSES, X, **options)


def test_bad_observations():
    with pytest.raises(ValueError, match="impossible under the model"):
        laplace(network, network_weights(), CLASSES + 3, X)
    with pytest.raises(ValueError, match="x has 40 rows but y has 39"):
        laplace(network, network_weights(), CLASSES[:39], X)
    with pytest.raises(ValueError, match="theta is not finite"):
        laplace(network, network_weights() | {"b1": jnp.full(4, jnp.nan)}, CLASSES, X)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "linear"}, "does not fit Categorical"),
        ({"method": "mean"}, "method must be one of"),
        ({"method": "samples"}, "pass key="),
        ({"method": "probit", "joint": True}, "joint=True needs"),
        ({"method": "samples", "key": jax.random.key(0), "draws": 0}, "draws must be at least 1"),
    ],
)
def test_bad_predictions(built, options, message):
    with pytest.raises(ValueError, match=message):
        built["dense"].predictive(X[:2], **options)
