"""Predictions of a Laplace posterior for any likelihood, against the model's own average over the same draws."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.stats

import fisherbook as fb

pytestmark = pytest.mark.filterwarnings("ignore:theta is not the mode")
RNG = np.random.default_rng(5)
X = jnp.asarray(RNG.normal(size=(30, 2)))
THETA, KEY, DRAWS = jnp.array([0.3, -0.2, 0.5]), jax.random.key(0), 4000


def two(theta, x):
    return jnp.stack([x @ theta[:2], x @ theta[1:]], -1)


def mixture(theta, x):
    loc = jnp.stack([x @ theta[:2], x @ theta[:2] + theta[2]], -1)
    return dist.MixtureSameFamily(dist.Categorical(probs=jnp.ones((len(x), 2)) / 2), dist.Normal(loc, 1.0))


own = fb.from_log_prob(
    lambda t, y, x: -0.5 * (y - x @ t[:2] - t[2]) ** 2 - 0.5 * jnp.log(2 * jnp.pi),
    sample=lambda key, t, x: x @ t[:2] + t[2] + jax.random.normal(key),
)
cuts = lambda t: jnp.stack([-jnp.ones(()), jnp.exp(t[2])])
spread = lambda t: jnp.array([[1.0, 0.0], [0.3, 0.0]]) + jnp.exp(t[0]) * jnp.array([[0.0, 0.0], [0.0, 1.0]])
NOISE = jnp.array([[1.0, 0.3], [0.3, 2.0]])
MODELS = {  # with what theta moves, or None where there are no outputs to linearise
    "concentration": (lambda t, x: dist.NegativeBinomial2(jnp.exp(x @ t[:2]), jnp.exp(t[2])), "concentration, rate"),
    "degrees of freedom": (lambda t, x: dist.StudentT(jnp.exp(t[2]) + 2, x @ t[:2], 1.0), "df, loc"),
    "a density of one's own": (own, None),
    "mixture": (mixture, None),
    "truncated": (lambda t, x: dist.TruncatedNormal(x @ t[:2], 1.0, low=-1.0), None),
    "covariance": (lambda t, x: dist.MultivariateNormal(two(t, x), covariance_matrix=NOISE), "loc"),
    "triangular root": (lambda t, x: dist.MultivariateNormal(two(t, x), scale_tril=spread(t)), "loc, scale_tril"),
    "ordered": (lambda t, x: dist.OrderedLogistic(x @ t[:2], jnp.array([-1.0, 1.0])), "predictor"),
    "cut points": (lambda t, x: dist.OrderedLogistic(x @ t[:2], cuts(t)), "predictor, cutpoints"),
    "reference class": (lambda t, x: dist.Categorical(logits=jnp.stack([0 * x[:, 0], x @ t[:2]], -1)), "logits"),
    "binary": (lambda t, x: dist.Bernoulli(logits=x @ t[:2]), "logits"),
}


@pytest.fixture(scope="module", params=MODELS)
def fitted(request):
    model, moved = MODELS[request.param]
    y = model(THETA, X).sample(jax.random.key(3))
    posterior = fb.laplace(model, THETA, y, X, prior_precision=20.0)
    each = jax.vmap(lambda t: model(t, X[:4]).log_prob(y[:4]))(posterior.sample(KEY, (DRAWS,)))
    return posterior, y[:4], jax.nn.logsumexp(each, 0) - np.log(DRAWS), moved


def test_sampled_weights_average_the_model(fitted):
    posterior, y, expected, _ = fitted
    law = posterior.predictive(X[:4], method="samples", key=KEY, draws=DRAWS)
    np.testing.assert_allclose(law.log_prob(y), expected, rtol=1e-10)
    drawn = law.sample(jax.random.key(1), (50,))
    assert drawn.shape == (50, *y.shape)
    assert np.all(np.isfinite(law.log_prob(drawn)))


def test_linearised_outputs_are_all_that_theta_moves(fitted):
    """The posterior is narrow enough for both averages to agree; a parameter held at the mode would not be."""
    posterior, y, expected, moved = fitted
    if moved is None:
        with pytest.raises(ValueError, match="use method='samples'"):
            posterior.predictive(X[:4])
        return
    law = posterior.predictive(X[:4], method="linear_samples", key=KEY, draws=DRAWS)
    np.testing.assert_allclose(law.log_prob(y), expected, atol=0.03)
    with pytest.raises(ValueError, match=f"whose {moved} move|must be one of"):
        posterior.predictive(X[:4], method="probit" if moved not in ("logits",) else "none")


def test_a_parameter_without_a_closed_form_is_uncertain_too():
    """Held at the mode, the concentration would leave the mean where it is, and take the variance's spread away."""
    model, _ = MODELS["concentration"]
    posterior = fb.laplace(model, THETA, model(THETA, X).sample(KEY), X, prior_precision=1.0)
    outputs = posterior.output_distribution(X[:3])
    C = np.asarray(posterior.covariance())
    np.testing.assert_allclose(outputs.variance[:, 0], np.full(3, C[2, 2]), rtol=1e-9)  # log concentration is theta[2]
    np.testing.assert_allclose(outputs.mean[:, 0], THETA[2], rtol=1e-12)


def test_a_vector_with_known_noise_has_a_closed_form():
    model, _ = MODELS["covariance"]
    posterior = fb.laplace(model, THETA, model(THETA, X).sample(KEY), X)
    law, outputs = posterior.predictive(X[:3]), posterior.output_distribution(X[:3])
    np.testing.assert_allclose(law.covariance_matrix, outputs.covariance_matrix + NOISE, rtol=1e-10)
    joint = posterior.predictive(X[:3], joint=True)
    J = np.asarray(jax.jacobian(lambda t: two(t, X[:3]).ravel())(THETA))
    expected = J @ posterior.covariance() @ J.T + np.kron(np.eye(3), NOISE)
    np.testing.assert_allclose(joint.covariance_matrix, expected, rtol=1e-9, atol=1e-12)


def test_bridge_in_two_forms_of_two_classes():
    """A logit, and two logits whose sum is zero, are one model; the Dirichlet law for two classes is a beta law."""
    y = jnp.asarray(RNG.integers(0, 2, 30))
    one = lambda t, x: dist.Bernoulli(logits=x @ t)
    pair = lambda t, x: dist.Categorical(logits=jnp.stack([-x @ t, x @ t], -1) / 2)
    binary, classes = (fb.laplace(model, THETA[:2], y, X).predictive(X[:4], method="bridge") for model in (one, pair))
    np.testing.assert_allclose(binary.probs, classes.probs[:, 1], rtol=1e-9)
    model, _ = MODELS["reference class"]
    posterior = fb.laplace(model, THETA, y, X)
    with pytest.raises(ValueError, match="needs logits that all vary"):
        posterior.predictive(X[:4], method="bridge")


def test_probabilities_and_centred_logits_predict_alike():
    def centred(t, x):
        f = jnp.tanh(x @ t["in"]) @ t["out"]
        return f - f.mean(-1, keepdims=True)

    theta = {"in": jnp.asarray(RNG.normal(size=(2, 4))), "out": jnp.asarray(RNG.normal(size=(4, 3)))}
    y = jnp.asarray(RNG.integers(0, 3, 30))
    laws = (
        lambda t, x: dist.Categorical(logits=centred(t, x)),
        lambda t, x: dist.Categorical(probs=jax.nn.softmax(centred(t, x))),
    )
    a, b = (fb.laplace(law, theta, y, X) for law in laws)
    for method in ("probit", "bridge"):
        found, expected = (q.predictive(X[:5], method=method).probs for q in (a, b))
        np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_mixture_of_drawn_laws_has_the_moments_of_its_draws():
    model, _ = MODELS["truncated"]
    posterior = fb.laplace(model, THETA[:2], model(THETA, X).sample(KEY), X)
    law = posterior.predictive(X[:2], method="samples", key=KEY, draws=2000)
    thetas = np.asarray(posterior.sample(KEY, (2000,)))
    loc = np.asarray(X[:2]) @ thetas.T
    means = scipy.stats.truncnorm.mean(-1 - loc, np.inf, loc, 1.0)
    inside = scipy.stats.truncnorm.var(-1 - loc, np.inf, loc, 1.0)
    np.testing.assert_allclose(law.mean, means.mean(1), rtol=1e-6)
    np.testing.assert_allclose(law.variance, inside.mean(1) + means.var(1), rtol=1e-5)
    drawn = law.sample(jax.random.key(1), (3000,))
    np.testing.assert_array_less(abs(drawn.mean(0) - law.mean), 5 * np.sqrt(law.variance / 3000))


def test_an_operator_that_is_no_pytree_predicts_and_is_tuned():
    class Own:
        def __init__(self, M):
            self.M, self.shape, self.dtype = M, M.shape, M.dtype

        def _sum(self, damping):
            return self.M + jnp.diag(jnp.broadcast_to(jax.flatten_util.ravel_pytree(damping)[0], (len(self.M),)))

        def __matmul__(self, v):
            return self.M @ v

        def solve(self, v, damping=0.0):
            return jnp.linalg.solve(self._sum(damping), v)

        def logdet(self, damping=0.0):
            return jnp.linalg.slogdet(self._sum(damping))[1]

    y = jnp.asarray(RNG.integers(0, 2, 30))
    model = lambda t, x: dist.Bernoulli(logits=x @ t)
    curvature = lambda model, theta, x, law: Own(fb.dense_fisher(model, theta, x).as_matrix())
    ours, theirs = (fb.laplace(model, THETA[:2], y, X, curvature=c) for c in (fb.dense_fisher, curvature))
    np.testing.assert_allclose(theirs.predictive(X).probs, ours.predictive(X).probs, rtol=1e-10)
    a, b = (q.output_distribution(X[:3], joint=True).covariance_matrix for q in (ours, theirs))
    np.testing.assert_allclose(a, b, atol=1e-12)
    np.testing.assert_allclose(fb.tune_prior(theirs).prior_precision, fb.tune_prior(ours).prior_precision, rtol=1e-6)
