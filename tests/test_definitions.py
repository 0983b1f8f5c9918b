"""What each function gives beyond the closed forms of test_accuracy: laws, shapes, distances, known traps."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import fisherbook as fb
from fisherbook.expectation import BLOCK

RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 3))
T = jnp.array([0.5, -1.0, 0.3])


def logit(t, x):
    return dist.Bernoulli(logits=x @ t)


def network(t, x):
    return dist.Categorical(logits=jnp.tanh(x @ t["in"] + t["bias"]) @ t["out"])


NET = {"in": RNG.normal(size=(3, 4)), "bias": RNG.normal(size=4), "out": RNG.normal(size=(4, 5))}


def by_hand(model, theta, x, classes):
    """Slow loop: sum over rows and classes of p s s^T, with the gradient of every log-probability on its own."""
    flat, unravel = jax.flatten_util.ravel_pytree(theta)
    F = 0
    for i in range(len(x)):
        for k in range(classes):

            def log_p(f, i=i, k=k):
                return model(unravel(f), x[i : i + 1]).log_prob(jnp.array([k]))[0]

            s = np.asarray(jax.grad(log_p)(flat))
            F = F + np.exp(log_p(flat)) * np.outer(s, s) / len(x)
    return F


def test_network_with_a_pytree_against_a_slow_loop():
    x = X[:3]
    closed = by_hand(network, NET, x, 5)
    np.testing.assert_allclose(fb.score_covariance(network, NET, x), closed, atol=1e-12)
    J = fb.hellinger_jacobian(network, NET, x)
    assert J.shape == (3 * 5, 36)
    np.testing.assert_allclose(4 * J.T @ J, closed, atol=1e-12)
    np.testing.assert_allclose(fb.kl_curvature(network, NET, x), closed, atol=1e-12)
    np.testing.assert_allclose(-fb.expected_hessian(network, NET, x), closed, atol=1e-12)
    assert fb.parameter_names(NET)[:5] == ["bias[0]", "bias[1]", "bias[2]", "bias[3]", "in[0,0]"]


def test_score_is_the_gradient_of_the_log_likelihood():
    y = (X[:, 0] > 0).astype(int)
    S = fb.score(logit, T, y, X)
    p = 1 / (1 + np.exp(-X @ np.asarray(T)))
    np.testing.assert_allclose(S, (y - p)[:, None] * X, atol=1e-14)


@pytest.mark.parametrize("family", ["bernoulli", "binomial", "pixels"])
def test_logits_at_zero(family):
    """numpyro 0.22 differentiates |logits|: its own score at 0 is 0 and 1 where -1/2 and 1/2 are right."""
    models = {
        "bernoulli": (lambda t: dist.Bernoulli(logits=t), jnp.array([0, 1]), [-0.5, 0.5]),
        "binomial": (lambda t: dist.Binomial(3, logits=t), jnp.array([0, 3]), [-1.5, 1.5]),
        "pixels": (lambda t: dist.Bernoulli(logits=t * jnp.ones(2)).to_event(1), jnp.array([[0, 0], [1, 1]]), [-1, 1]),
    }
    model, y, expected = models[family]
    np.testing.assert_allclose(fb.score(model, 0.0, y).ravel(), expected)
    np.testing.assert_allclose(
        fb.score_covariance(model, 0.0).item(), {"bernoulli": 0.25, "binomial": 0.75}.get(family, 0.5)
    )
    shown = model(0.4).log_prob(y)
    np.testing.assert_allclose(fb.distributions.adapt(model(0.4)).log_prob(y), shown, rtol=1e-12)


def test_data_gives_the_empirical_fisher_and_the_observed_hessian():
    y = RNG.integers(0, 2, 40)
    S = fb.score(logit, T, y, X)
    np.testing.assert_allclose(fb.score_covariance(logit, T, X, law=fb.Data(y)), S.T @ S / 40, atol=1e-14)
    p = 1 / (1 + np.exp(-X @ np.asarray(T)))
    closed = -(X * (p * (1 - p))[:, None]).T @ X / 40
    np.testing.assert_allclose(fb.expected_hessian(logit, T, X, law=fb.Data(y)), closed, atol=1e-14)
    unconditional = fb.score_covariance(lambda t: dist.Poisson(t), 2.0, law=fb.Data(jnp.array([0, 1, 5])))
    np.testing.assert_allclose(unconditional, np.mean([(k / 2 - 1) ** 2 for k in (0, 1, 5)]))


@pytest.mark.parametrize("definition", [fb.score_covariance, fb.kl_curvature, fb.hellinger_jacobian])
def test_monte_carlo_is_within_five_standard_errors(definition):
    draws = 20_000
    F = definition(lambda t: dist.Gamma(t, 2.0), 1.5, law=fb.MonteCarlo(jax.random.key(0), draws))
    F = 4 * F.T @ F if definition is fb.hellinger_jacobian else F
    exact = fb.score_covariance(lambda t: dist.Gamma(t, 2.0), 1.5)
    assert abs(F / exact - 1).item() < 5 * 3 / np.sqrt(draws)  # the square of a log-gamma score has kurtosis below 9


def test_draws_are_keyed_by_row_so_blocks_do_not_change_them(monkeypatch):
    law = fb.MonteCarlo(jax.random.key(3), 4)
    whole = fb.score_covariance(network, NET, X, law=law)
    monkeypatch.setattr("fisherbook.expectation.BLOCK", 2000)  # several blocks, the last one overlapping
    blocks = fb.score_covariance(network, NET, X, law=law)
    np.testing.assert_allclose(blocks, whole, atol=1e-14)
    np.testing.assert_allclose(jax.jit(lambda t: fb.score_covariance(network, t, X, law=law))(NET), whole, atol=1e-14)


@pytest.mark.parametrize("definition", [fb.score_covariance, fb.kl_curvature, fb.expected_hessian])
def test_blocks_add_up(definition, monkeypatch):
    assert BLOCK > 2000
    whole = definition(network, NET, X)
    monkeypatch.setattr("fisherbook.expectation.BLOCK", 7000)
    np.testing.assert_allclose(definition(network, NET, X), whole, atol=1e-13)
    np.testing.assert_allclose(jax.jit(lambda t: definition(network, t, X))(NET), whole, atol=1e-13)


def test_many_outcomes_are_taken_in_pieces():
    """4000 classes and 4000 parameters: 16 million scores, taken a few classes at a time; F = diag p - p p^T."""
    logits = jnp.asarray(RNG.normal(size=1500))
    p = np.asarray(jax.nn.softmax(jnp.tile(logits, 3)))
    F = fb.score_covariance(lambda t: dist.Categorical(logits=jnp.tile(t, 3)), logits)
    total = p.reshape(3, -1).sum(0)
    np.testing.assert_allclose(F, np.diag(total) - np.outer(total, total), atol=1e-13)


def test_a_thousand_pixels_cost_a_thousand():
    eta = jnp.linspace(-2, 2, 1000)
    p = jax.nn.sigmoid(eta)
    J = fb.hellinger_jacobian(lambda t: dist.Bernoulli(logits=t[0] + eta).to_event(1), jnp.zeros(1))
    assert J.shape == (2000, 1)
    np.testing.assert_allclose(4 * J.T @ J, jnp.sum(p * (1 - p)), rtol=1e-12)


def test_embedding_is_a_unit_vector_with_the_jacobian_as_derivative():
    root = fb.hellinger_embedding(logit, T, X)
    assert root.shape == (80,)
    np.testing.assert_allclose(jnp.linalg.norm(root), 1.0)
    h, direction = 1e-5, jnp.array([1.0, 2.0, -1.0])
    difference = fb.hellinger_embedding(logit, T + h * direction, X) - fb.hellinger_embedding(
        logit, T - h * direction, X
    )
    np.testing.assert_allclose(fb.hellinger_jacobian(logit, T, X) @ direction, difference / (2 * h), atol=1e-9)


# H^2 = 2 - 2 * affinity, and KL, in closed form (affinities: Pardo 2006, table 2.1; elementary integrals).
PAIRS = {
    "normal": (
        lambda t: dist.Normal(t[0], t[1]),
        (0.0, 1.0),
        (30.0, 0.01),
        lambda a, b: (
            np.sqrt(2 * a[1] * b[1] / (a[1] ** 2 + b[1] ** 2))
            * np.exp(-((a[0] - b[0]) ** 2) / (4 * (a[1] ** 2 + b[1] ** 2)))
        ),
        lambda a, b: np.log(b[1] / a[1]) + (a[1] ** 2 + (a[0] - b[0]) ** 2) / (2 * b[1] ** 2) - 0.5,
    ),
    "poisson": (
        lambda t: dist.Poisson(t[0]),
        (3.0,),
        (40.0,),
        lambda a, b: np.exp(-((np.sqrt(a[0]) - np.sqrt(b[0])) ** 2) / 2),
        lambda a, b: a[0] * np.log(a[0] / b[0]) + b[0] - a[0],
    ),
    "exponential": (
        lambda t: dist.Exponential(t[0]),
        (1.0,),
        (50.0,),
        lambda a, b: 2 * np.sqrt(a[0] * b[0]) / (a[0] + b[0]),
        lambda a, b: np.log(a[0] / b[0]) + b[0] / a[0] - 1,
    ),
    "laplace": (
        lambda t: dist.Laplace(t[0], 1.0),
        (0.0,),
        (1.7,),
        lambda a, b: (1 + abs(a[0] - b[0]) / 2) * np.exp(-abs(a[0] - b[0]) / 2),
        lambda a, b: abs(a[0] - b[0]) + np.exp(-abs(a[0] - b[0])) - 1,
    ),
    "uniform": (
        lambda t: dist.Uniform(0.0, t[0]),
        (2.0,),
        (2.1,),
        lambda a, b: np.sqrt(min(a[0], b[0]) / max(a[0], b[0])),
        lambda a, b: np.log(b[0] / a[0]) if b[0] >= a[0] else np.inf,
    ),
    "independent": (
        lambda t: dist.Normal(t, 1.0).to_event(1),
        (0.0, 1.0, 2.0),
        (1.0, 1.5, 0.0),
        lambda a, b: np.exp(-np.sum((np.array(a) - b) ** 2) / 8),
        lambda a, b: np.sum((np.array(a) - b) ** 2) / 2,
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_distances_in_closed_form(name):
    model, a, b, affinity, divergence = PAIRS[name]
    for first, second in ((a, b), (b, a)):
        s, t = jnp.array(first), jnp.array(second)
        np.testing.assert_allclose(fb.hellinger_distance(model, s, t) ** 2, 2 - 2 * affinity(first, second), rtol=1e-8)
        np.testing.assert_allclose(fb.kl_divergence(model, s, t), divergence(first, second), rtol=1e-8)


@pytest.mark.parametrize("shift", [1e-3, 1e-6])
def test_small_distances_keep_their_digits(shift):
    h2 = fb.hellinger_distance(lambda t: dist.Normal(t, 1.0), 0.0, shift) ** 2
    np.testing.assert_allclose(h2, -2 * np.expm1(-(shift**2) / 8), rtol=1e-7)


def test_distances_need_no_interior():
    """KL(0 || t) = -log(1 - t) at the edge of the set of probabilities, where no score exists."""
    np.testing.assert_allclose(fb.kl_divergence(lambda t: dist.Bernoulli(probs=t), 0.0, 0.1), -np.log(0.9), rtol=1e-12)
    uniform = lambda t: dist.Uniform(0.0, t)
    h2 = fb.hellinger_distance(uniform, 1.0, 1.3, law=fb.Exact(breakpoints=(2.0,))) ** 2
    np.testing.assert_allclose(h2, 2 - 2 / np.sqrt(1.3), rtol=1e-9)


def test_distance_of_a_law_to_itself_is_zero():
    assert fb.hellinger_distance(logit, T, T, X) == 0
    assert fb.kl_divergence(logit, T, T, X) == 0


def test_kl_of_a_cauchy_from_a_normal_does_not_converge():
    def model(t):
        heavy = dist.Cauchy(0.0, 1.0)
        light = dist.Normal(0.0, 1.0)
        return fb.from_log_prob(
            lambda t, y: jnp.where(t > 0.5, heavy.log_prob(y), light.log_prob(y)), location=0.0, scale=1.0
        )(t)

    with pytest.raises(ValueError, match="the integral does not converge"):
        fb.kl_divergence(model, 1.0, 0.0)


def test_distances_by_monte_carlo():
    law = fb.MonteCarlo(jax.random.key(0), 40_000)
    model = PAIRS["normal"][0]
    s, t = jnp.array([0.0, 1.0]), jnp.array([0.4, 1.2])
    for distance in (fb.kl_divergence, fb.hellinger_distance):
        np.testing.assert_allclose(distance(model, s, t, law=law), distance(model, s, t), rtol=10 / np.sqrt(40_000))


def test_own_finite_support_of_vectors():
    """Two dependent coins, log p = a (y1 + y2) + b y1 y2 - log Z: F is the covariance of (y1 + y2, y1 y2)."""
    outcomes = jnp.array([[0, 0], [0, 1], [1, 0], [1, 1]])

    def energy(t, y):
        return t[0] * (y[0] + y[1]) + t[1] * y[0] * y[1]

    def log_prob(t, y):
        return energy(t, y) - jax.scipy.special.logsumexp(jnp.stack([energy(t, o) for o in outcomes]))

    model = fb.from_log_prob(log_prob, support=outcomes)
    t = jnp.array([0.3, -0.7])
    p = np.exp([log_prob(t, o) for o in outcomes])
    statistic = np.array([[0, 0], [1, 0], [1, 0], [2, 1]])
    closed = np.cov(statistic.T, aweights=p, ddof=0)
    for F in (fb.score_covariance(model, t), fb.kl_curvature(model, t), -fb.expected_hessian(model, t)):
        np.testing.assert_allclose(F, closed, atol=1e-12)
    sampled = fb.score_covariance(model, t, law=fb.MonteCarlo(jax.random.key(0), 20_000))
    np.testing.assert_allclose(sampled, closed, atol=5 / np.sqrt(20_000))
    with pytest.raises(ValueError, match="is impossible under the model"):
        fb.score(model, t, jnp.array([[0, 2]]))


def test_own_conditional_density():
    model = fb.from_log_prob(
        lambda t, y, x: -0.5 * (y - x @ t) ** 2 - 0.5 * jnp.log(2 * jnp.pi), location=lambda t, x: x @ t
    )
    np.testing.assert_allclose(fb.score_covariance(model, T, X), X.T @ X / 40, rtol=1e-9)
    y = X[:, 0]
    np.testing.assert_allclose(fb.score(model, T, y, X), (y - X @ np.asarray(T))[:, None] * X, atol=1e-12)


def test_density_that_is_not_normalised_raises():
    with pytest.raises(ValueError, match="total probability other than 1"):
        fb.score_covariance(fb.from_log_prob(lambda t, y: -0.5 * (y - t) ** 2), 0.0)
    normalised_here_only = fb.from_log_prob(lambda t, y: -0.5 * (y * t) ** 2 - 0.5 * jnp.log(2 * jnp.pi))
    with pytest.raises(ValueError, match="mean score is not 0"):
        fb.score_covariance(normalised_here_only, 1.0)


@pytest.mark.parametrize("law", [fb.Exact(), fb.MonteCarlo(jax.random.key(0), 50)], ids=["exact", "sampled"])
@pytest.mark.parametrize(
    "model", [lambda t: dist.Uniform(t, t + 1), lambda t: dist.Uniform(0.0, t)], ids=["both", "one"]
)
def test_probability_that_crosses_a_moving_end(model, law):
    """Uniform(t, t + 1): the score is 0 everywhere and so is its mean, yet neighbours are told apart at once."""
    for definition in (fb.score_covariance, fb.hellinger_jacobian, fb.kl_curvature, fb.expected_hessian):
        with pytest.raises(ValueError, match="differentiation does not pass through the integral"):
            definition(model, 0.3, law=law)


def test_ends_that_move_with_other_inputs_only_are_no_obstacle():
    """A truncation point that is data, not parameter; the information of a truncated exponential in closed form."""
    cut = jnp.array([0.5, 1.0, 3.0])

    def log_prob(t, y, c):
        return jnp.log(t) - t * y - jnp.log1p(-jnp.exp(-t * c))

    F = [
        fb.score_covariance(
            fb.from_log_prob(lambda t, y, c=c: log_prob(t, y, c), support=dist.constraints.interval(0.0, c)), 1.3
        ).item()
        for c in cut
    ]
    a = 1.3 * np.asarray(cut)
    np.testing.assert_allclose(F, (1 - a**2 * np.exp(a) / np.expm1(a) ** 2) / 1.3**2, rtol=1e-8)


def test_counts_without_a_mean_start_at_the_lower_end():
    model = fb.from_log_prob(
        lambda t, y: (y - 1) * jnp.log1p(-t) + jnp.log(t), support=dist.constraints.positive_integer
    )
    np.testing.assert_allclose(fb.score_covariance(model, 0.3), 1 / (0.3**2 * 0.7), rtol=1e-10)


def test_a_missed_narrow_mode_is_an_error_and_a_breakpoint_mends_it():
    def two(t, y):
        parts = jnp.stack([dist.Normal(t, 1.0).log_prob(y), dist.Normal(t + 3000.0, 1e-3).log_prob(y)])
        return jax.scipy.special.logsumexp(parts + jnp.log(0.5))

    model = fb.from_log_prob(two, location=lambda t: t, scale=1.0)
    with pytest.raises(ValueError, match="breakpoints"):
        fb.score_covariance(model, 0.0)
    F = fb.score_covariance(model, 0.0, law=fb.Exact(breakpoints=(3000.0,)))
    np.testing.assert_allclose(F, 0.5 * 1 + 0.5 * 1e6, rtol=1e-6)  # far apart: each component's own information


def test_traced_number_of_outcomes_must_be_given():
    def model(t, m):
        return dist.Binomial(m, probs=t)

    def call(t, m, law):
        return fb.score_covariance(lambda t: model(t, m), t, law=law)

    with pytest.raises(ValueError, match=r"Exact\(outcomes=largest number \+ 1\)"):
        jax.jit(lambda t, m: call(t, m, fb.Exact()))(0.3, 5)
    F = jax.jit(lambda t, m: call(t, m, fb.Exact(outcomes=9)))(0.3, 5)
    np.testing.assert_allclose(F, 5 / (0.3 * 0.7), rtol=1e-12)


def test_numbers_of_trials_that_differ_by_row():
    m = jnp.array([1, 4, 20])
    F = fb.score_covariance(lambda t, m: dist.Binomial(m, probs=jnp.broadcast_to(t, m.shape)), 0.3, m)
    np.testing.assert_allclose(F, 25 / 3 / (0.3 * 0.7), rtol=1e-12)


def test_a_window_too_small_under_jit_is_an_error():
    with pytest.raises(Exception, match=r"wider window law=Exact\(outcomes"):
        jax.jit(lambda t: fb.score_covariance(lambda t: dist.Poisson(t), t, law=fb.Exact(outcomes=8)))(50.0)
