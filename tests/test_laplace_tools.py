"""What goes on from a Laplace posterior: files, other priors, diagnosis, ArviZ, batches, the observed Hessian."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.optimize
import scipy.stats

import fisherbook as fb
from fisherbook.laplace import diagnosis, laplace, load_posterior, tune_prior
from fisherbook.operators import observed_information

RNG = np.random.default_rng(1)
X = np.column_stack([np.ones(60), RNG.normal(size=(60, 2))])
Y = X @ np.array([0.5, 1.0, -1.0]) + 0.3 * RNG.normal(size=60)
CLASSES = RNG.integers(0, 3, 60)
KEY = jax.random.key(0)
STRUCTURES = {
    "dense": fb.dense_fisher,
    "diagonal": fb.diagonal_fisher,
    "Kronecker": fb.kronecker_fisher,
    "corrected": partial(fb.kronecker_fisher, corrected=True),
    "low rank": partial(fb.low_rank_fisher, rank=3),
    "implicit": partial(fb.implicit_fisher, rtol=1e-13),
}
each = pytest.mark.parametrize("structure", STRUCTURES)
anywhere = pytest.mark.filterwarnings("ignore:theta is not the mode")


def regression(theta, x, sd=0.3):
    return dist.Normal(x @ theta, sd)


def network(theta, x):
    return dist.Categorical(logits=jnp.tanh(x @ theta["W1"] + theta["b1"]) @ theta["W2"])


def weights():
    one, two = jax.random.split(KEY)
    return {"W1": jax.random.normal(one, (3, 4)), "b1": jnp.zeros(4), "W2": jax.random.normal(two, (4, 3))}


def ridge(precision):
    return np.linalg.solve(precision * np.eye(3) + X.T @ X / 0.3**2, X.T @ Y / 0.3**2)


# --- files ----------------------------------------------------------------------------------------------------


@anywhere
@each
def test_saved_and_read_again(tmp_path, structure):
    posterior = laplace(network, weights(), CLASSES, X, prior_precision=2.0, curvature=STRUCTURES[structure])
    posterior.save(tmp_path / "p")
    again = load_posterior(tmp_path / "p", network)
    assert jax.tree.structure(again.mean) == jax.tree.structure(posterior.mean)
    same = np.testing.assert_array_equal
    if structure == "implicit":  # whose linearised model is made anew
        same = partial(np.testing.assert_allclose, rtol=1e-9)
    same(again.log_marginal_likelihood(), posterior.log_marginal_likelihood())
    same(again.sample(KEY)["W1"], posterior.sample(KEY)["W1"])
    same(again.predictive(X[:5]).probs, posterior.predictive(X[:5]).probs)
    same(again.with_prior(3.0).log_marginal_likelihood(), posterior.with_prior(3.0).log_marginal_likelihood())
    assert again.curvature.law == posterior.curvature.law


@anywhere
def test_saved_part_of_a_network_and_its_diagnosis(tmp_path):
    part = lambda t: {"last": t["W2"][1:], "bias": t["b1"]}
    posterior = laplace(network, weights(), CLASSES, X, subset=part).diagnose(KEY, CLASSES, X, draws=100)
    posterior.save(tmp_path / "p")
    again = load_posterior(tmp_path / "p", network)
    np.testing.assert_array_equal(again.predictive(X[:5]).probs, posterior.predictive(X[:5]).probs)
    assert str(again.diagnosis) == str(posterior.diagnosis)
    assert again.mean.keys() == {"last", "bias"}


@anywhere
def test_saved_equinox_module_needs_its_structure(tmp_path):
    net = eqx.nn.Linear(3, 3, key=KEY)
    model = lambda net, x: dist.Categorical(logits=jax.vmap(net)(x))
    posterior = laplace(model, net, CLASSES, X)
    posterior.save(tmp_path / "p")
    with pytest.raises(ValueError, match="pass theta="):
        load_posterior(tmp_path / "p", model)
    with pytest.raises(ValueError, match="theta has"):
        load_posterior(tmp_path / "p", model, theta={"W": 1.0})
    again = load_posterior(tmp_path / "p", model, theta=net)
    np.testing.assert_array_equal(again.mean.weight, net.weight)
    np.testing.assert_array_equal(again.covariance(), posterior.covariance())


def test_files_that_hold_no_posterior(tmp_path):
    (tmp_path / "text").write_text("no posterior")
    np.savez(tmp_path / "other.npz", header=np.array('{"format": "x"}'))
    for name in ("text", "other.npz"):
        with pytest.raises(ValueError, match="holds no posterior"):
            load_posterior(tmp_path / name, regression)
    header = '{"format": "fisherbook posterior", "version": 99, "content": {}}'
    np.savez(tmp_path / "newer.npz", header=np.array(header))
    with pytest.raises(ValueError, match="newer version"):
        load_posterior(tmp_path / "newer.npz", regression)
    code = '{"format": "fisherbook posterior", "version": 1, "content": {"object": "os:system", "fields": {}}}'
    np.savez(tmp_path / "code.npz", header=np.array(code))
    with pytest.raises(ValueError, match="may not name os"):
        load_posterior(tmp_path / "code.npz", regression)


@anywhere
def test_a_curvature_of_ones_own_cannot_be_saved(tmp_path):
    class Own:
        shape = (3, 3)
        solve = lambda self, v, damping: v / (1 + damping)
        logdet = lambda self, damping: 3 * jnp.log(1 + damping)
        __matmul__ = lambda self, v: v

    posterior = laplace(regression, jnp.ones(3), Y, X, curvature=lambda *a, **k: Own())
    np.testing.assert_allclose(posterior.covariance(), np.eye(3) / 61, rtol=1e-12)
    with pytest.raises(ValueError, match="Own cannot be saved"):
        posterior.save(tmp_path / "p")


# --- the prior ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fitted_at", [1e-9, 1.0, 30.0])
def test_prior_by_the_evidence_of_a_linear_regression(fitted_at):
    """Against the maximum of the normal density of y, wherever the mean was fitted: the quadratic is the log joint."""
    posterior = laplace(regression, jnp.asarray(ridge(fitted_at)), Y, X, prior_precision=fitted_at)

    def density(log):
        C = 0.09 * np.eye(60) + X @ X.T / np.exp(log)
        return scipy.stats.multivariate_normal.logpdf(Y, np.zeros(60), C)

    best = scipy.optimize.minimize_scalar(
        lambda log: -density(log), bounds=(-8, 8), method="bounded", options={"xatol": 1e-10}
    )
    found = tune_prior(posterior)
    assert found.converged
    np.testing.assert_allclose(np.log(found.prior_precision), best.x, atol=1e-4)
    # the density of y is ill-conditioned for a wide prior: C has eigenvalues from 0.09 to 1e8
    np.testing.assert_allclose(found.objective, density(best.x), rtol=1e-7)
    np.testing.assert_allclose(found.start, density(np.log(max(fitted_at, 1e-6))), rtol=1e-7)
    assert "by evidence" in repr(found)


@anywhere
def test_prior_of_each_leaf_is_a_stationary_point():
    posterior = laplace(network, weights(), CLASSES, X, curvature=fb.kronecker_fisher)
    with pytest.raises(ValueError, match="prior_precision must be the same for all the leaves of W1, b1"):
        tune_prior(posterior, per_leaf=True)  # a layer with a bias does not separate
    dense = laplace(network, weights(), CLASSES, X, subset=lambda t: {"W1": t["W1"], "W2": t["W2"]})
    found = tune_prior(dense, per_leaf=True)
    assert found.converged
    total = lambda p: dense.with_prior(p).log_marginal_likelihood() + dense.with_prior(p).gain()
    gradient = jax.grad(total)(found.prior_precision)
    assert all(abs(g * p) < 1e-3 for g, p in zip(gradient.values(), found.prior_precision.values(), strict=True))
    assert found.objective > tune_prior(dense).objective


def test_prior_by_data_held_out():
    theta = np.linalg.solve(np.eye(3) + X[:40].T @ X[:40] / 0.09, X[:40].T @ Y[:40] / 0.09)
    posterior = laplace(regression, jnp.asarray(theta), Y[:40], X[:40])
    found = tune_prior(posterior, y=Y[40:], x=X[40:], bounds=(1e-3, 1e3))
    values = [value for _, value in found.tried]
    assert found.objective >= max(values) - 1e-9
    direct = found.posterior.predictive(X[40:]).log_prob(Y[40:]).mean()
    np.testing.assert_allclose(found.objective, direct, rtol=1e-12)
    assert "held-out" in repr(found)


@anywhere
def test_prior_by_data_held_out_compiles_once(caplog):
    posterior = laplace(network, weights(), CLASSES, X, curvature=fb.kronecker_fisher)
    tune_prior(posterior, y=CLASSES, x=X)
    with caplog.at_level("WARNING", logger="jax"), jax.log_compiles():
        tune_prior(posterior, y=CLASSES, x=X)
    assert "Finished tracing" in caplog.text
    assert "Finished XLA compilation" not in caplog.text


@anywhere
@pytest.mark.parametrize("structure", [s for s in STRUCTURES if s != "implicit"])  # where lineax checks derivatives
def test_prior_by_the_evidence_compiles_once_for_models_of_one_shape(structure, caplog):
    """Fit, tune and fit again is what people do, with a posterior, and often a model, made anew."""
    make = lambda: laplace(lambda t, x: network(t, x), weights(), CLASSES, X, curvature=STRUCTURES[structure])
    first = tune_prior(make())
    posterior = make()
    with caplog.at_level("WARNING", logger="jax"), jax.log_compiles():
        second = tune_prior(posterior)
    assert "Finished tracing" in caplog.text
    assert "Finished XLA compilation" not in caplog.text
    assert second.prior_precision == first.prior_precision
    assert first.converged or structure == "low rank"  # what it left out has only the prior: the weaker the better


@anywhere
@pytest.mark.parametrize("curvature", [fb.dense_fisher, fb.kronecker_fisher])
def test_prior_is_tuned_in_float32(curvature):
    """Weak priors, under which a softmax is singular in float32, end the range; rounding is no lack of convergence."""
    single = lambda tree: jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), tree)
    fine = laplace(network, weights(), CLASSES, X, curvature=curvature)
    coarse = laplace(network, single(weights()), CLASSES, single(X), curvature=curvature)
    with pytest.raises(ValueError, match=r"n F \+ prior is"):
        coarse.with_prior(1e-6)
    found, expected = tune_prior(coarse), tune_prior(fine)
    assert found.converged
    np.testing.assert_allclose(np.log(found.prior_precision), np.log(expected.prior_precision), atol=1e-3)
    held = tune_prior(coarse, y=CLASSES, x=single(X))
    assert any(value == -np.inf for _, value in held.tried)
    direct = held.posterior.predictive(single(X)).log_prob(CLASSES).mean()
    assert held.objective == direct == max(value for _, value in held.tried)


def test_prior_that_cannot_be_tuned():
    posterior = laplace(regression, jnp.asarray(ridge(1.0)), Y, X)
    for bounds in ((0.0, 1.0), (2.0, 1.0), (1.0, np.inf)):
        with pytest.raises(ValueError, match="bounds must be positive"):
            tune_prior(posterior, bounds=bounds)
    with pytest.raises(ValueError, match="per_leaf=True chooses by the evidence"):
        tune_prior(posterior, y=Y, x=X, per_leaf=True)
    halves = fb.Batches([X[: len(X) // 2], X[len(X) // 2 :]])  # products that read them each time
    streamed = laplace(regression, jnp.asarray(ridge(1.0)), Y, halves, curvature=fb.implicit_fisher)
    with pytest.raises(ValueError, match="a solve over Batches cannot stand inside"):
        tune_prior(streamed)
    edge = tune_prior(posterior, bounds=(1e2, 1e3))
    assert not edge.converged
    assert "NOT converged" in repr(edge)
    assert "the mode under this prior" in repr(edge)


# --- diagnosis ------------------------------------------------------------------------------------------------


def test_a_normal_posterior_has_no_fault():
    posterior = laplace(regression, jnp.asarray(ridge(1.0)), Y, X).diagnose(KEY, Y, X)
    found = posterior.diagnosis
    assert found.pareto_k == -np.inf  # the weights are equal up to rounding
    np.testing.assert_allclose(found.effective, 1000, rtol=1e-6)
    np.testing.assert_allclose(found.skew, 0, atol=1e-9)
    assert "weighing its draws mends what it misses" in posterior._repr_html_()


def test_skew_of_an_exponential_rate():
    """n log t - t S with a flat prior is a gamma law of shape n + 1: third derivative 2 / sqrt(n) in its units."""
    y = jnp.array([1.0, 2.0, 0.5, 0.5])
    posterior = laplace(lambda t: dist.Exponential(t), jnp.array(1.0), y, prior_precision=0.0)
    found = posterior.diagnose(KEY, y, draws=2000).diagnosis
    np.testing.assert_allclose(found.skew, [2 / np.sqrt(4)], rtol=1e-9)
    assert found.directions == ("+1 theta",)
    share = scipy.stats.norm.cdf(-2.0)  # a rate below 0 is two standard deviations away
    assert abs(found.outside - 2000 * share) < 5 * np.sqrt(2000 * share)
    assert "outside of the model's domain" in str(found)


def test_a_posterior_with_two_modes_is_found_out():
    model = lambda t: dist.MixtureSameFamily(
        dist.Categorical(probs=jnp.array([0.5, 0.5])), dist.Normal(jnp.stack([t, -t]), 0.3)
    )
    y = jnp.array([-1.0, -1.1, 1.0, 0.9, 1.05, -0.95])
    loss = lambda t: t * t / 2 - model(t).log_prob(y).sum()
    mode = scipy.optimize.minimize_scalar(lambda t: float(loss(t)), bounds=(0.5, 1.5), method="bounded").x
    narrow = laplace(model, jnp.array(mode), y, curvature=fb.operators.observed_information, law=fb.Data(y))
    found = narrow.diagnose(KEY, y, draws=4000)
    assert found.diagnosis.pareto_k < found.diagnosis.limit  # one mode of two: weights alone do not see the other
    np.testing.assert_allclose(jnp.exp(-loss(-mode)), jnp.exp(-loss(mode)), rtol=1e-6)  # yet half of it is there


def test_a_heavy_tail_is_found_out():
    """One observation of a Cauchy law and a flat prior: the posterior is a Cauchy law too."""
    model, y = lambda t: dist.Cauchy(t, 1.0), jnp.array([0.0])
    posterior = laplace(model, jnp.array(0.0), y, prior_precision=0.0)
    found = posterior.diagnose(KEY, y, draws=4000).diagnosis
    assert found.pareto_k > found.limit
    assert "NOT the true posterior" in str(found)


@pytest.mark.parametrize("k", [0.2, 0.5, 0.9])
def test_shape_of_a_known_tail(k):
    """Weights from a Pareto law of shape k, at its quantiles: the estimate has the shape, in every version of ArviZ."""
    weights = (1 - (np.arange(10_000) + 0.5) / 10_000) ** -k
    found, effective = diagnosis._tail(np.log(weights), 10_000)
    np.testing.assert_allclose(found, k, atol=0.05)
    np.testing.assert_allclose(effective, weights.sum() ** 2 / (weights**2).sum(), rtol=0.2)  # the largest are smoothed


def test_directions_are_the_widest():
    prior = np.array([0.0, 0.0, 1e4])
    theta = np.linalg.solve(np.diag(prior) + X.T @ X / 0.09, X.T @ Y / 0.09)
    posterior = laplace(regression, jnp.asarray(theta), Y, X, prior_precision=prior)
    found = posterior.diagnose(KEY, Y, X).diagnosis
    vectors = np.linalg.eigh(posterior.covariance())[1]
    assert np.argmax(abs(vectors[:, 0])) == 2
    assert "theta[2]" in found.directions[-1]
    np.testing.assert_allclose(found.skew, 0, atol=1e-9)


def test_diagnosis_needs_the_data_it_was_fitted_to():
    posterior = laplace(regression, jnp.asarray(ridge(1.0)), Y, X)
    with pytest.raises(ValueError, match="fitted to 60 observations, but y has 59"):
        posterior.diagnose(KEY, Y[:59], X[:59])
    with pytest.raises(ValueError, match="draws must be at least 100"):
        posterior.diagnose(KEY, Y, X, draws=10)


def test_directions_that_are_the_priors_are_named():
    x = np.column_stack([X, X[:, 1] + X[:, 2], np.zeros(60)])
    posterior = laplace(regression, jnp.zeros(5), np.zeros(60), x)
    null = posterior.null_directions()
    assert len(null) == 2
    assert any("theta[4]" in direction for direction in null)
    assert "The data say nothing along" in posterior._repr_html_()
    diagonal = laplace(regression, jnp.zeros(5), np.zeros(60), x, curvature=fb.diagonal_fisher)
    assert diagonal.null_directions() == ["theta[4]"]


# --- other people's tools -------------------------------------------------------------------------------------


def test_draws_for_arviz():
    theta = {"a": jnp.asarray(ridge(1.0)[:1]), "b": {"c": jnp.asarray(ridge(1.0)[1:])}}
    posterior = laplace(lambda t, x: regression(jnp.concatenate([t["a"], t["b"]["c"]]), x), theta, Y, X)
    data = posterior.to_arviz(KEY, draws=500, chains=2)
    assert data.posterior["b.c"].shape == (2, 500, 2)
    found = [data.posterior["a"].mean(("chain", "draw")), data.posterior["b.c"].mean(("chain", "draw"))]
    error = 5 * np.sqrt(np.diag(posterior.covariance()) / 1000)
    np.testing.assert_array_less(abs(np.concatenate(found) - ridge(1.0)), error)
    alone = laplace(lambda t: dist.Normal(t, 1.0), jnp.array(0.0), jnp.zeros(3))
    assert alone.to_arviz(KEY).posterior["theta"].shape == (4, 1000)


@anywhere
@each
def test_a_numpyro_distribution(structure):
    posterior = laplace(network, weights(), CLASSES, X, curvature=STRUCTURES[structure])
    law = posterior.as_distribution()
    same = dist.MultivariateNormal(posterior.flat, posterior.covariance())
    draws = law.sample(KEY, (3, 2))
    assert draws.shape == (3, 2, 28)
    np.testing.assert_allclose(law.log_prob(draws), same.log_prob(draws), rtol=1e-6)
    np.testing.assert_allclose(law.variance, same.variance, rtol=1e-6)
    np.testing.assert_allclose(law.precision_matrix, same.precision_matrix, rtol=1e-4, atol=1e-4)
    traced = jax.jit(lambda law, at: law.log_prob(at))(law, draws[0, 0])
    np.testing.assert_allclose(traced, law.log_prob(draws[0, 0]), rtol=1e-6)


@anywhere
@each
def test_the_precision_is_an_operator(structure):
    posterior = laplace(network, weights(), CLASSES, X, prior_precision=2.0, curvature=STRUCTURES[structure])
    P = 60 * np.asarray(posterior.curvature.as_matrix()) + 2 * np.eye(28)
    np.testing.assert_allclose(posterior.precision.as_matrix(), P, atol=1e-9)
    np.testing.assert_allclose(posterior.precision.diagonal(), np.diag(P), atol=1e-9)
    v = np.linspace(-1, 1, 28)
    np.testing.assert_allclose(posterior.precision @ v, P @ v, atol=1e-9)
    tree = posterior.precision.solve(posterior.mean)
    assert tree.keys() == posterior.mean.keys()
    np.testing.assert_allclose(jax.flatten_util.ravel_pytree(tree)[0], np.linalg.solve(P, posterior.flat), rtol=1e-6)
    assert posterior.precision.shape == (28, 28)


# --- batches --------------------------------------------------------------------------------------------------


@anywhere
@each
def test_batches_are_the_whole_array(structure, capsys):
    whole = laplace(network, weights(), CLASSES, X, curvature=STRUCTURES[structure])
    pairs = [(X[k : k + 25], CLASSES[k : k + 25]) for k in (0, 25, 50)]
    x, y = fb.Batches(pairs, lambda p: p[0]), fb.Batches(pairs, lambda p: p[1])
    for given, show in ((y, False), (CLASSES, True)):
        streamed = laplace(network, weights(), given, x, curvature=STRUCTURES[structure], progress=show)
        assert streamed.n == 60
        np.testing.assert_allclose(streamed.log_likelihood, whole.log_likelihood, rtol=1e-12)
        np.testing.assert_allclose(streamed.away, whole.away, rtol=1e-7)
        np.testing.assert_allclose(streamed.standard_deviations()["W1"], whole.standard_deviations()["W1"], rtol=1e-7)
        assert ("log-likelihood" in capsys.readouterr().err) == show


def test_batches_that_do_not_belong_together():
    pairs = [X[:30], X[30:]]
    with pytest.raises(ValueError, match="y has fewer batches than x"):
        laplace(regression, jnp.ones(3), fb.Batches([Y[:30]]), fb.Batches(pairs))
    with pytest.raises(ValueError, match="but y has more"):
        laplace(regression, jnp.ones(3), np.r_[Y, Y], fb.Batches(pairs))
    with pytest.raises(ValueError, match="y comes in Batches, but x does not"):
        laplace(regression, jnp.ones(3), fb.Batches([Y]), X)
    with pytest.raises(ValueError, match="batch 1 of x has another structure"):
        laplace(regression, jnp.ones(3), Y, fb.Batches([X[:30], {"x": X[30:]}]))


# --- the observed Hessian -------------------------------------------------------------------------------------


def test_observed_information_is_the_hessian():
    model = lambda t, x: dist.Cauchy(x @ t, 0.5)
    loss = lambda t: -model(t, X).log_prob(Y).sum() + t @ t / 2
    theta = jnp.asarray(scipy.optimize.minimize(loss, ridge(1.0), jac=jax.grad(loss), tol=1e-12).x)
    posterior = laplace(model, theta, Y, X, curvature=observed_information, law=fb.Data(Y))
    np.testing.assert_allclose(posterior.covariance(), np.linalg.inv(jax.hessian(loss)(theta)), rtol=1e-9)
    assert posterior.curvature.law == "observed, Data(y)"
    streamed = observed_information(model, theta, fb.Batches([X[:40], X[40:]]), law=fb.Data(Y))
    np.testing.assert_allclose(streamed.as_matrix(), posterior.curvature.as_matrix(), rtol=1e-12)
    with pytest.raises(ValueError, match=r"n F \+ prior is indefinite: .*theta\[0\].*the curvature of no maximum"):
        laplace(
            lambda t: dist.Cauchy(t[0] + t[1], 1.0),
            jnp.array([0.0, 0.0]),
            jnp.array([-5.0, 5.0]),
            prior_precision=1e-3,
            curvature=observed_information,
            law=fb.Data(jnp.array([-5.0, 5.0])),
        )


# --- precision of numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("spread", "message"), [(1e-3, "singular to working precision"), (4e-3, "ill-conditioned")])
def test_float32_that_is_too_ill_conditioned(spread, message):
    x = np.column_stack([np.ones(60), 1 + spread * RNG.normal(size=60)])
    model = lambda t, x: dist.Normal(x @ t, 0.3)
    y = x @ np.ones(2)
    exact = laplace(model, jnp.ones(2), y, x, prior_precision=1e-4, prior_mean=1.0)
    single = lambda a: jnp.asarray(a, jnp.float32)
    with pytest.raises(ValueError, match=f"{message}.*float64"):
        laplace(model, single(np.ones(2)), single(y), single(x), prior_precision=1e-4, prior_mean=1.0)
    better = laplace(model, single(np.ones(2)), single(y), single(x), prior_precision=100.0, prior_mean=1.0)
    np.testing.assert_allclose(better.covariance(), exact.with_prior(100.0).covariance(), rtol=0.01)


@anywhere
def test_must_be_mode_under_jit_guards_everything():
    fit = lambda t: laplace(regression, t, Y, X, must_be_mode=True).standard_deviations()
    expected = laplace(regression, jnp.asarray(ridge(1.0)), Y, X).standard_deviations()
    np.testing.assert_allclose(jax.jit(fit)(jnp.asarray(ridge(1.0))), expected, rtol=1e-12)
    with pytest.raises(Exception, match="theta is not the mode"):
        jax.block_until_ready(jax.jit(fit)(jnp.zeros(3)))


def test_low_rank_in_float32_keeps_what_little_is_left():
    """Ten thousand times narrower than the prior along two axes: 1 - t^2 / (1 + t^2) would be 0 in float32."""
    x = np.concatenate([RNG.normal(size=(1000, 2)), np.zeros((1000, 2))], 1)
    sharp = lambda t, x: dist.Normal(x @ t, jnp.asarray(3e-3, x.dtype))
    sd, variance = [], []
    for dtype, curvature in ((jnp.float64, fb.dense_fisher), (jnp.float32, partial(fb.low_rank_fisher, rank=2))):
        a = jnp.asarray(x, dtype)
        posterior = laplace(sharp, jnp.zeros(4, dtype), 0 * a[:, 0], a, curvature=curvature)
        sd.append(posterior.standard_deviations())
        variance.append(posterior.output_distribution(a[:3]).variance)
    np.testing.assert_allclose(sd[1], sd[0], rtol=1e-5)
    np.testing.assert_allclose(variance[1], variance[0], rtol=1e-4)


@anywhere
def test_kronecker_names_float64_where_float32_is_too_coarse():
    single = lambda tree: jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), tree)
    coarse = laplace(network, single(weights()), CLASSES, single(X), curvature=fb.kronecker_fisher)
    with pytest.raises(ValueError, match="compute in float64"):
        coarse.with_prior(1e-8)


@anywhere
def test_null_directions_of_kronecker_products_are_named():
    """A shift of all logits is invisible for each of 4 hidden units, and so is what a bias adds to a column of ones."""
    dense, found = (
        laplace(network, weights(), CLASSES, X, curvature=STRUCTURES[name]).null_directions()
        for name in ("dense", "Kronecker")
    )
    assert len(dense) == len(found) == 8
    assert any("W2" in words for words in found)


@anywhere
def test_prior_by_data_held_out_draws_with_a_key():
    counts = RNG.poisson(np.exp(X @ np.array([0.5, 0.3, -0.2])))
    model = lambda t, x: dist.Poisson(jnp.exp(x @ t))
    posterior = laplace(model, jnp.array([0.5, 0.3, -0.2]), counts[:40], X[:40], prior_mean=jnp.array([0.5, 0.3, -0.2]))
    with pytest.raises(ValueError, match="pass key="):
        tune_prior(posterior, y=counts[40:], x=X[40:])
    found = tune_prior(posterior, y=counts[40:], x=X[40:], key=KEY)
    direct = found.posterior.predictive(X[40:], key=KEY).log_prob(counts[40:]).mean()
    np.testing.assert_allclose(found.objective, direct, rtol=1e-12)


def test_what_diagnosis_and_files_refuse(tmp_path):
    posterior = laplace(regression, jnp.asarray(ridge(1.0)), Y, X)
    with pytest.raises(ValueError, match="not as Batches"):
        posterior.diagnose(KEY, Y, fb.Batches([X]))
    posterior.save(tmp_path / "whole")
    (tmp_path / "cut").write_bytes((tmp_path / "whole").read_bytes()[:300])
    with pytest.raises(ValueError, match="holds no posterior"):
        load_posterior(tmp_path / "cut", regression)


def test_a_posterior_without_standard_deviations_is_shown(monkeypatch):
    posterior = laplace(regression, jnp.asarray(ridge(1.0)), Y, X, curvature=fb.implicit_fisher)

    def refuse(*_):
        raise ValueError("too large")

    monkeypatch.setattr(type(posterior.precision), "variances", refuse)
    shown = posterior._repr_html_()
    assert "No standard deviations: too large" in shown
    assert "nan" not in shown
