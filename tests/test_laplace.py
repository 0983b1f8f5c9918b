"""Laplace posteriors against conjugate models, dense linear algebra, quadrature and other software."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.integrate
import scipy.optimize
import scipy.special
import scipy.stats
import statsmodels.api as sm

import fisherbook as fb
from fisherbook.laplace import forms, laplace
from fisherbook.laplace.posterior import assemble

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


def scaled(theta, x):
    h = jnp.tanh(x @ theta["W"] + theta["b"])
    return dist.Normal(h @ theta["V"], jnp.exp(h[:, 0] * theta["s"])[:, None] * jnp.ones(2)).to_event(1)


def convolved(theta, x):
    image = x.reshape(len(x), 6, 6, 1)
    axes = ("NHWC", "HWIO", "NHWC")
    h = jax.nn.relu(jax.lax.conv_general_dilated(image, theta["K"], (1, 1), "SAME", dimension_numbers=axes))
    return dist.Categorical(logits=h.mean((1, 2)) @ theta["V"])


def normalised(theta, x):
    h = jnp.tanh(x @ theta["W"])
    h = (h - h.mean(1, keepdims=True)) / jnp.sqrt(h.var(1, keepdims=True) + 0.1) * theta["scale"] + theta["shift"]
    return dist.Poisson(jnp.exp(0.3 * h @ theta["V"]))


def draw(k, *shape):
    return jax.random.normal(jax.random.key(k), shape)


CASES = {  # model, theta, inputs, and the outputs [n, q] in coordinates without an edge
    "MLP": (
        network,
        {"W1": draw(0, 3, 4), "b1": draw(1, 4), "W2": draw(2, 4, 3)},
        X,
        lambda t, x: network(t, x).logits,
    ),
    "with a scale": (
        scaled,
        {"W": draw(3, 3, 4), "b": draw(4, 4), "V": draw(5, 4, 2), "s": jnp.array(0.3)},
        X,
        lambda t, x: jnp.concatenate([(d := scaled(t, x).base_dist).loc, jnp.log(d.scale)], 1),
    ),
    "convolution": (
        convolved,
        {"K": draw(6, 3, 3, 1, 2), "V": draw(7, 2, 3)},
        np.asarray(draw(8, 20, 36)),
        lambda t, x: convolved(t, x).logits,
    ),
    "LayerNorm": (
        normalised,
        {"W": draw(9, 3, 5), "scale": draw(10, 5), "shift": draw(11, 5), "V": draw(12, 5)},
        X,
        lambda t, x: jnp.log(normalised(t, x).rate)[:, None],
    ),
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


@pytest.mark.parametrize("d", [512, 513, 1301])
def test_covariance_of_many_parameters(d):
    """More than are inverted at once."""
    x = np.asarray(draw(20, 40, d)) / np.sqrt(d)
    y = np.zeros(40)
    posterior = laplace(lambda t, x: dist.Normal(x @ t, 0.1), jnp.zeros(d), y, x, prior_precision=2.0)
    expected = np.linalg.inv(x.T @ x / 0.01 + 2 * np.eye(d))
    np.testing.assert_allclose(posterior.covariance(), expected, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(posterior.standard_deviations(), np.sqrt(np.diag(expected)), rtol=1e-9)


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
def test_a_prior_for_each_leaf(built, structure):
    b1 = 1.0 if structure == "Kronecker" else 0.2  # one number for a layer with its bias
    posterior = built[structure].with_prior({"W1": 1.0, "W2": 3.0, "b1": b1})
    D = np.concatenate([np.full(12, 1.0), np.full(12, 3.0), np.full(4, b1)])
    P, flat = 40 * np.asarray(posterior.curvature.as_matrix()) + np.diag(D), np.asarray(posterior.flat)
    np.testing.assert_allclose(posterior.covariance(), np.linalg.inv(P), rtol=1e-7, atol=1e-9)
    value = posterior.log_likelihood + (np.log(D).sum() - flat @ (D * flat) - np.linalg.slogdet(P)[1]) / 2
    np.testing.assert_allclose(posterior.log_marginal_likelihood(), value, rtol=1e-9)


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


@pytest.mark.parametrize("structure", ["dense", "diagonal", "Kronecker", "corrected"])
@pytest.mark.parametrize("model", ["MLP", "with a scale", "convolution", "LayerNorm"])
def test_output_covariance_through_layers(model, structure, monkeypatch):
    """Many inputs, in blocks, against the Jacobian of the outputs written out; no row of it is formed in between."""
    model, theta, x, outputs = CASES[model]
    curvature = partial(fb.kronecker_fisher, corrected=True) if structure == "corrected" else STRUCTURES[structure]
    y = model(theta, x).sample(jax.random.key(9))
    with pytest.warns(UserWarning, match="not the mode"):
        posterior = laplace(model, theta, y, x, prior_precision=0.5, curvature=curvature)
    flat, unravel = jax.flatten_util.ravel_pytree(theta)
    J = jax.jacobian(lambda f: outputs(unravel(f), x))(flat)  # [n, q, d]
    S = np.linalg.inv(len(y) * np.asarray(posterior.curvature.as_matrix()) + 0.5 * np.eye(len(flat)))
    expected = J @ S @ np.swapaxes(J, 1, 2)
    monkeypatch.setattr(forms, "HELD", 20_000)
    found = posterior.output_distribution(x)
    np.testing.assert_allclose(found.mean, outputs(theta, x), atol=1e-12)
    np.testing.assert_allclose(found.covariance_matrix, expected, rtol=1e-8, atol=1e-10)


def test_no_jacobian_is_held(monkeypatch):
    """Diagonal and Kronecker: memory of the compiled program, far below n q d scalars."""
    keys = jax.random.split(jax.random.key(0), 3)
    theta = {"W": jax.random.normal(keys[0], (50, 200)), "V": jax.random.normal(keys[1], (200, 10))}
    x = jax.random.normal(keys[2], (500, 50))
    model = lambda t, x: dist.Categorical(logits=jnp.tanh(x @ t["W"]) @ t["V"])
    for curvature in (fb.diagonal_fisher, fb.kronecker_fisher):
        F = curvature(model, theta, x)
        posterior = assemble(
            model, None, theta, F, jnp.asarray(500.0), jnp.ones(()), jnp.zeros(()), 0.0, jnp.zeros(12_000)
        )
        program = jax.jit(lambda p, x: p.predictive(x).probs).lower(posterior, x).compile()
        assert program.memory_analysis().temp_size_in_bytes < 500 * 10 * 12_000 * 8 / 10


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


@each
@pytest.mark.filterwarnings("ignore:theta is not the mode")
def test_evidence_can_be_differentiated_in_every_structure(structure):
    theta, y = {"W": draw(0, 3, 4), "b": draw(1, 4), "V": draw(3, 4, 2)}, np.asarray(draw(9, 40, 2))

    @jax.jit
    def evidence(noise, precision):
        model = lambda t, x: dist.Normal(jnp.tanh(x @ t["W"] + t["b"]) @ t["V"], noise).to_event(1)
        posterior = laplace(model, theta, y, X, prior_precision=precision, curvature=STRUCTURES[structure])
        return posterior.log_marginal_likelihood()

    slopes = jax.grad(evidence, (0, 1))(0.3, 2.0)
    for k, slope in enumerate(slopes):
        there = [evidence(*np.add([0.3, 2.0], 1e-4 * m * np.eye(2)[k])) for m in (-2, -1, 1, 2)]
        np.testing.assert_allclose(slope, np.dot(there, [1, -8, 8, -1]) / 12e-4, rtol=1e-8)


def test_flat_prior_gives_the_standard_errors_of_stata_and_statsmodels():
    data = sm.datasets.spector.load_pandas()  # Spector and Mazzeo (1980)
    x, y = np.column_stack([np.ones(32), data.exog.to_numpy()]), data.endog.to_numpy()
    fit = sm.Logit(y, x).fit(disp=0, tol=1e-12)
    posterior = laplace(lambda t, x: dist.Bernoulli(logits=x @ t), jnp.asarray(fit.params), y, x, prior_precision=0.0)
    np.testing.assert_allclose(posterior.standard_deviations(), fit.bse, rtol=1e-7)
    printed = [4.931324, 1.262941, 0.141554, 1.064564]  # by Stata's logit and R's glm: constant, GPA, TUCE, PSI
    np.testing.assert_allclose(posterior.standard_deviations(), printed, atol=6e-7)  # the last digit printed
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
    sampled = built["dense"].predictive(X[:5], method="linear_samples", key=jax.random.key(2), draws=20_000)
    found = np.exp(np.stack([sampled.log_prob(jnp.full(5, c)) for c in range(3)], 1))
    outputs = built["dense"].output_distribution(X[:5])
    rng = np.random.default_rng(0)
    for law, m, C in zip(found, outputs.mean, outputs.covariance_matrix, strict=True):
        by_hand = scipy.special.softmax(rng.multivariate_normal(m, C, 20_000), 1).mean(0)
        np.testing.assert_allclose(law, by_hand, atol=5 * 0.5 * np.sqrt(2 / 20_000))  # a probability's sd is below 1/2
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


def test_mixture_of_binomials_with_their_own_numbers_of_trials():
    trials = jnp.array([5, 7, 9])
    model = lambda t, x: dist.Binomial(trials[x[:, 0].astype(int)], logits=x[:, 1:] @ t)
    x = jnp.column_stack([jnp.arange(3.0), jnp.asarray(X[:3, :2])])
    with pytest.warns(UserWarning, match="not the mode"):
        posterior = laplace(model, jnp.ones(2), jnp.array([2, 3, 4]), x)
    key = jax.random.key(0)
    mixture = posterior.predictive(x, method="samples", key=key, draws=50)
    each = jax.vmap(lambda t: jnp.exp(model(t, x).log_prob(jnp.array([1, 2, 3]))))(posterior.sample(key, (50,)))
    np.testing.assert_allclose(jnp.exp(mixture.log_prob(jnp.array([1, 2, 3]))), each.mean(0), rtol=1e-10)
    total = sum(jnp.exp(mixture.log_prob(jnp.minimum(k, trials))) * (k <= trials) for k in range(10))
    np.testing.assert_allclose(total, 1, rtol=1e-10)
    drawn = mixture.sample(jax.random.key(1), (4000,))
    assert drawn.shape == (4000, 3)
    assert (drawn <= trials).all()
    error = jnp.sqrt(mixture.variance / 4000)
    np.testing.assert_array_less(abs(drawn.mean(0) - mixture.mean), 5 * error)
    np.testing.assert_allclose(drawn.var(0), mixture.variance, rtol=0.15)


def test_mixture_has_an_event_and_no_inputs():
    model = lambda t: dist.Normal(t, 1.0).to_event(1)
    y = jnp.array([[0.0, 1.0], [2.0, 1.0]])
    posterior = laplace(model, y.sum(0) / 3, y)
    mixture = posterior.predictive(method="samples", key=jax.random.key(0), draws=4000)
    expected = scipy.stats.multivariate_normal.pdf([0.5, 0.5], y.sum(0) / 3, (1 + 1 / 3) * np.eye(2))
    np.testing.assert_allclose(jnp.exp(mixture.log_prob(jnp.array([0.5, 0.5]))), expected, rtol=0.02)
    assert mixture.sample(jax.random.key(1), (2, 3)).shape == (2, 3, 2)


def test_subset_is_the_posterior_with_the_rest_known(built):
    theta = network_weights()
    with pytest.warns(UserWarning, match="not the mode"):
        last = laplace(network, theta, CLASSES, X, prior_precision=2.0, subset=lambda t: t["W2"])
    whole = 40 * np.asarray(built["dense"].curvature.as_matrix()) + 2 * np.eye(28)
    np.testing.assert_allclose(last.covariance(), np.linalg.inv(whole[12:24, 12:24]), rtol=1e-9)
    assert last.mean.shape == (4, 3)
    assert last.sample(jax.random.key(0), (2, 5)).shape == (2, 5, 4, 3)


def subnetwork(theta):
    """A whole leaf, entries of another in an order of their own, and rows of a third."""
    return {"all": theta["b1"], "few": theta["W1"].ravel()[[7, 2, 4]], "rows": theta["W2"][1:3]}


CHOSEN = np.r_[24:28, 7, 2, 4, 15:21]  # where they are among W1, W2, b1


@pytest.mark.filterwarnings("ignore:theta is not the mode")
@pytest.mark.parametrize("structure", ["dense", "implicit", "diagonal", "Kronecker"])
def test_subset_selects_entries_of_leaves(built, structure):
    theta = network_weights()
    part = laplace(network, theta, CLASSES, X, curvature=STRUCTURES[structure], subset=subnetwork)
    precision = 40 * np.asarray(built["dense"].curvature.as_matrix())[np.ix_(CHOSEN, CHOSEN)] + np.eye(13)
    if structure == "diagonal":
        precision = np.diag(np.diag(precision))
    if structure == "Kronecker":  # the bias is a layer of its own; what no layer has whole is in one block
        precision = scipy.linalg.block_diag(precision[:4, :4], precision[4:, 4:])
    np.testing.assert_allclose(part.covariance(), np.linalg.inv(precision), rtol=1e-8, atol=1e-12)
    flat, unravel = jax.flatten_util.ravel_pytree(theta)
    np.testing.assert_array_equal(jax.flatten_util.ravel_pytree(part.mean)[0], flat[CHOSEN])
    J = jax.jacobian(lambda f: network(unravel(f), X[:3]).logits)(flat)[..., CHOSEN]
    found = part.output_distribution(X[:3]).covariance_matrix
    np.testing.assert_allclose(found, J @ np.linalg.inv(precision) @ np.swapaxes(J, 1, 2), rtol=1e-7, atol=1e-10)
    draws = part.sample(jax.random.key(0), (5,))
    assert jax.tree.map(jnp.shape, draws) == {"all": (5, 4), "few": (5, 3), "rows": (5, 2, 3)}


@pytest.mark.parametrize(
    ("curvature", "rtol"),  # conjugate gradients stop at a residual of 1e-8
    [(fb.dense_fisher, 1e-12), (fb.implicit_fisher, 1e-8), (fb.kronecker_fisher, 1e-12)],
)
@pytest.mark.parametrize("subset", [lambda t: t["W2"], subnetwork], ids=["leaf", "entries"])
def test_a_part_can_be_fitted_inside_a_program(curvature, rtol, subset):
    def last(theta):
        options = {"curvature": curvature, "subset": subset}
        posterior = laplace(network, theta, CLASSES, X, prior_precision=2.0, **options)
        return posterior, posterior.log_marginal_likelihood()

    with pytest.warns(UserWarning, match="not the mode"):
        expected = last(network_weights())
    posterior, evidence = jax.jit(last)(network_weights())
    np.testing.assert_allclose(evidence, expected[1], rtol=rtol)
    found = jax.jit(lambda p: p.predictive(X[:3]).probs)(posterior)
    np.testing.assert_allclose(found, expected[0].predictive(X[:3]).probs, rtol=rtol)


def test_passes_through_jit(built):
    found = jax.jit(lambda p: (p.log_marginal_likelihood(), p.predictive(X[:3]).probs))(built["dense"])
    np.testing.assert_allclose(found[0], built["dense"].log_marginal_likelihood(), rtol=1e-12)
    np.testing.assert_allclose(found[1], built["dense"].predictive(X[:3]).probs, rtol=1e-12)


def test_display_names_the_parameters():
    posterior = logistic()
    html = posterior._repr_html_()
    assert "standard deviations from its mode" in html
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", html)]
    assert rows[0] == ["parameter", "mean", "standard deviation", "95 % interval"]
    assert [row[0] for row in rows[1:]] == [f"theta[{i}]" for i in range(len(posterior.mean))]
    for row, mean, sd in zip(rows[1:], posterior.mean, posterior.standard_deviations(), strict=True):
        shown = [float(number) for number in (row[1], row[2], *row[3].split(" to "))]
        np.testing.assert_allclose(shown, [mean, sd, mean - 1.959964 * sd, mean + 1.959964 * sd], atol=6e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prior_precision": -1.0}, "prior_precision must not be negative"),
        ({"prior_precision": np.nan}, "prior_precision is not finite"),
        ({"prior_precision": np.ones(2)}, "prior_precision must be a number"),
        ({"prior_precision": 0.0}, "n F \\+ prior is singular"),
        ({"subset": lambda t: ()}, "subset selects nothing"),
        ({"subset": lambda t: t["W1"] * 2}, "subset must return leaves of theta"),
        ({"subset": lambda t: (t["b1"], t["b1"])}, "subset must return leaves of theta"),
        ({"subset": lambda t: t["b1"][[0, 0]]}, "subset must return leaves of theta, or entries of them"),
        ({"subset": lambda t: (t["W1"], t["W1"][0])}, "subset must return leaves of theta, or entries of them"),
        ({"subset": lambda t: jnp.ravel(t["W1"])[:2]}, "subset must return leaves of theta, or entries of them"),
        ({"subset": lambda t: t["b1"][:0]}, "subset selects nothing"),
        ({"curvature": fb.operators.observed_information}, r"pass law=Data\(y\)"),
        ({"curvature": lambda *a, **k: np.eye(2)}, "curvature has shape"),
        ({"must_be_mode": True}, "theta is not the mode"),
        (
            {
                "prior_precision": {"W1": 1.0, "b1": 2.0, "W2": 1.0},
                "curvature": fb.kronecker_fisher,
            },
            "prior_precision must be the same for all the leaves of W1, b1",
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
