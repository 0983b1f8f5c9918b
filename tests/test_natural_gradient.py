"""The natural gradient: invariance, closed-form steps, damping, trust radius, state, and what bad input gets."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest

import fisherbook as fb
from fisherbook.natural_gradient import LevenbergMarquardt, natural_gradient
from fisherbook.operators import dense_fisher, diagonal_fisher, implicit_fisher, low_rank_fisher

X = jax.random.normal(jax.random.key(0), (40, 3))
Y = jax.random.poisson(jax.random.key(1), jnp.exp(X @ jnp.array([0.5, -0.3, 0.2])))


def poisson(theta, x):
    return dist.Poisson(jnp.exp(x @ theta))


def loss(theta):
    return -poisson(theta, X).log_prob(Y).mean()


def run(optimiser, theta, steps, loss=loss, **extra):
    def step(carry, key):
        theta, state = carry
        updates, state = optimiser.update(jax.grad(loss)(theta), state, theta, key=key, **extra)
        theta = optax.apply_updates(theta, updates)
        return (theta, state), (theta, loss(theta))

    keys = jax.random.split(jax.random.key(9), steps)
    (_, state), (path, losses) = jax.jit(lambda: jax.lax.scan(step, (theta, optimiser.init(theta)), keys))()
    return path, losses, state


def test_one_step_is_iteratively_reweighted_least_squares():
    """For a canonical link the full undamped step is a weighted least-squares fit (Green, 1984)."""
    theta = jnp.zeros(3)
    w = jnp.exp(X @ theta)
    z = X @ theta + (Y - w) / w
    expected = np.linalg.lstsq(np.sqrt(w)[:, None] * X, np.sqrt(w) * z, rcond=None)[0]
    path, _, _ = run(natural_gradient(poisson, damping=0.0), theta, 1, x=X)
    np.testing.assert_allclose(path[0], expected, rtol=1e-10)


@pytest.mark.parametrize("curvature", [dense_fisher, implicit_fisher, partial(low_rank_fisher, rank=3)])
def test_structures_give_the_same_path(curvature):
    reference = run(natural_gradient(poisson, 0.5, damping=0.01), jnp.zeros(3), 4, x=X)[0]
    path = run(natural_gradient(poisson, 0.5, damping=0.01, curvature=curvature), jnp.zeros(3), 4, x=X)[0]
    np.testing.assert_allclose(path, reference, rtol=1e-6)


A, SHIFT = jnp.array([[2.0, 0.3, 0.0], [0.0, 0.5, -1.0], [0.4, 0.0, 3.0]]), jnp.array([0.1, -0.2, 0.3])


def test_invariant_under_an_affine_change_of_coordinates():
    """theta = A phi + c: undamped steps agree exactly, those of gradient descent do not (Amari, 1998)."""
    start = jnp.zeros(3)
    moved = lambda phi, x: poisson(A @ phi + SHIFT, x)
    moved_loss = lambda phi: loss(A @ phi + SHIFT)
    phi = jnp.linalg.solve(A, start - SHIFT)
    for make, same in ((lambda m: natural_gradient(m, 0.7, damping=0.0), True), (lambda m: optax.sgd(0.1), False)):
        extra = {"x": X} if same else {}
        path = run(optax.with_extra_args_support(make(poisson)), start, 5, **extra)[0]
        other = run(optax.with_extra_args_support(make(moved)), phi, 5, moved_loss, **extra)[0] @ A.T + SHIFT
        gap = np.abs(path - other).max()
        assert (gap < 1e-10) == same, gap


def test_invariant_to_first_order_under_any_change_of_coordinates():
    """theta = sinh(phi): the paths differ by O(step), so half the step is half the gap; not so for descent."""
    start, gaps = jnp.array([0.3, 0.2, -0.1]), []
    curved, curved_loss = (lambda phi, x: poisson(jnp.sinh(3 * phi), x)), (lambda phi: loss(jnp.sinh(3 * phi)))
    for steps in (20, 40, 80):
        path = run(natural_gradient(poisson, 1 / steps, damping=0.0), start, steps, x=X)[0]
        optimiser = natural_gradient(curved, 1 / steps, damping=0.0)
        other = run(optimiser, jnp.arcsinh(start) / 3, steps, curved_loss, x=X)[0]
        gaps.append(float(jnp.abs(path[-1] - jnp.sinh(3 * other[-1])).max()))
    np.testing.assert_allclose(np.divide(gaps[:-1], gaps[1:]), 2, atol=0.15)
    path = run(optax.with_extra_args_support(optax.sgd(0.001)), start, 500)[0]
    other = run(optax.with_extra_args_support(optax.sgd(0.001)), jnp.arcsinh(start) / 3, 500, curved_loss)[0]
    assert jnp.abs(path[-1] - jnp.sinh(3 * other[-1])).max() > 0.05


def test_mean_parameter_moves_straight():
    """For an exponential family's likelihood the flow is d eta / dt = ybar - eta (CHAPTERS, statement 11)."""
    model, y, h = (lambda t: dist.Poisson(jnp.exp(t))), jnp.array([2.0, 5.0, 3.0]), 1e-4
    path, _, _ = run(natural_gradient(model, h, damping=0.0), jnp.array(0.0), 1, lambda t: -model(t).log_prob(y).mean())
    np.testing.assert_allclose((jnp.exp(path[0]) - 1) / h, y.mean() - 1, rtol=1e-3)  # O(h)


def test_trust_radius_bounds_the_divergence():
    radius = 1e-3
    path, _, state = run(natural_gradient(poisson, damping=0.0, trust_radius=radius), jnp.zeros(3), 1, x=X)
    np.testing.assert_allclose(state.kl, radius, rtol=1e-12)
    kl = fb.kl_divergence(poisson, jnp.zeros(3), path[0], X)
    np.testing.assert_allclose(kl, radius, rtol=0.1)  # the cubic term: of the order sqrt(radius)
    path, _, state = run(natural_gradient(poisson, damping=0.0, trust_radius=radius), jnp.zeros(3), 100, x=X)
    assert state.kl < radius * 1e-6  # not the normalised step: it settles


def test_saved_state_resumes_bit_for_bit():
    optimiser = natural_gradient(poisson, 0.3, damping=0.1, momentum=0.5, every=3, averaging=0.9, example=X)
    step = jax.jit(lambda theta, state: optimiser.update(jax.grad(loss)(theta), state, theta, x=X))
    theta, state = jnp.zeros(3), optimiser.init(jnp.zeros(3))
    for i in range(8):
        if i == 4:
            leaves, tree = jax.tree.flatten((theta, state))
            saved = [np.array(leaf) for leaf in leaves]
        updates, state = step(theta, state)
        theta = optax.apply_updates(theta, updates)
    again, resumed = jax.tree.unflatten(tree, [jnp.asarray(leaf) for leaf in saved])
    for _ in range(4):
        updates, resumed = step(again, resumed)
        again = optax.apply_updates(again, updates)
    np.testing.assert_array_equal(again, theta)


def test_curvature_is_refreshed_and_averaged():
    """Against a loop that does it by hand."""
    every, beta, eta = 2, 0.6, 0.2
    path, _, _ = run(
        natural_gradient(poisson, eta, damping=0.1, every=every, averaging=beta, example=X), jnp.zeros(3), 5, x=X
    )
    theta, F = jnp.zeros(3), None
    for i in range(5):
        if i % every == 0:
            new = fb.score_covariance(poisson, theta, X)
            F = new if F is None else beta * F + (1 - beta) * new
        theta = theta - eta * jnp.linalg.solve(F + 0.1 * jnp.eye(3), jax.grad(loss)(theta))
        np.testing.assert_allclose(path[i], theta, rtol=1e-10)


def test_row_space_is_the_same_step():
    few = X[:2]
    small = lambda t: -poisson(t, few).log_prob(Y[:2]).mean()
    F = fb.score_covariance(poisson, jnp.zeros(3), few)
    expected = -jnp.linalg.solve(F + 0.01 * jnp.eye(3), jax.grad(small)(jnp.zeros(3)))
    path, _, _ = run(natural_gradient(poisson, damping=0.01), jnp.zeros(3), 1, small, x=few)
    np.testing.assert_allclose(path[0], expected, rtol=1e-9)


def test_levenberg_marquardt():
    """Never uphill, damping falls where the quadratic model is good, and the estimate is reached."""
    inputs = jnp.column_stack([jnp.ones(len(X)), X])
    start = jnp.array([-4.0, 0.0, 0.0, 0.0])  # rates far too low: F is small there, and the full step far too long
    cost = lambda t: -poisson(t, inputs).log_prob(Y).mean()
    plain = run(natural_gradient(poisson, damping=1e-6), start, 1, cost, x=inputs)[1]
    assert plain[0] > cost(start)
    optimiser = natural_gradient(poisson, damping=LevenbergMarquardt(initial=1e-3))
    path, losses, state = run(optimiser, start, 60, cost, x=inputs, value_fn=cost)
    assert np.all(np.diff(losses) <= 0)
    assert losses[0] <= cost(start)
    assert state.rejected > 0
    assert state.damping < 1e-3
    np.testing.assert_allclose(jax.grad(cost)(path[-1]), 0, atol=1e-8)


def test_sampled_and_empirical_laws():
    drawn = natural_gradient(poisson, 0.5, damping=0.1, law=lambda key: fb.MonteCarlo(key, 200))
    exact = natural_gradient(poisson, 0.5, damping=0.1)
    np.testing.assert_allclose(run(drawn, jnp.zeros(3), 3, x=X)[0], run(exact, jnp.zeros(3), 3, x=X)[0], atol=0.05)
    path = run(natural_gradient(poisson, 0.5, damping=0.1, law=fb.Data), jnp.zeros(3), 1, x=X, y=Y)[0]
    F = fb.score_covariance(poisson, jnp.zeros(3), X, law=fb.Data(Y))
    np.testing.assert_allclose(
        path[0], -0.5 * jnp.linalg.solve(F + 0.1 * jnp.eye(3), jax.grad(loss)(jnp.zeros(3))), rtol=1e-9
    )


def test_chains_with_schedules_clips_and_decay():
    schedule = optax.linear_schedule(1.0, 0.1, 10)
    chain = optax.chain(
        optax.clip_by_global_norm(10.0),
        natural_gradient(poisson, schedule, damping=schedule),
        optax.add_decayed_weights(0.0),
    )
    theta, state = jnp.zeros(3), chain.init(jnp.zeros(3))
    for _ in range(12):
        updates, state = chain.update(jax.grad(loss)(theta), state, theta, x=X)
        theta = optax.apply_updates(theta, updates)
    assert jnp.abs(jax.grad(loss)(theta)).max() < 0.05


@pytest.mark.parametrize(
    ("options", "extra", "message"),
    [
        ({"law": lambda key: fb.MonteCarlo(key, 1)}, {}, "key"),
        ({"law": fb.Data}, {}, "needs the observations"),
        ({"damping": LevenbergMarquardt()}, {}, "value_fn"),
        (
            {"curvature": lambda *a, **k: dense_fisher(lambda t: dist.Normal(t, 1.0), 0.0)},
            {},
            "but the parameters are 3",
        ),
        ({"damping": 0.0}, {"x": X.at[:, 2].set(X[:, 1])}, "singular"),
        ({"damping": -1.0}, {}, "damping must be finite and not negative"),
    ],
)
def test_bad_input(options, extra, message):
    optimiser = natural_gradient(poisson, **options)
    state = optimiser.init(jnp.zeros(3))
    with pytest.raises(ValueError, match=message):
        optimiser.update(jnp.ones(3), state, jnp.zeros(3), **{"x": X, **extra})


@pytest.mark.parametrize(
    "options", [{"every": 0}, {"momentum": 1.0}, {"averaging": 1.0}, {"trust_radius": 0.0}, {"learning_rate": -1}]
)
def test_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        natural_gradient(poisson, **options)


def test_gradients_that_are_not_finite():
    optimiser = natural_gradient(poisson)
    state = optimiser.init(jnp.zeros(3))
    with pytest.raises(ValueError, match="gradient is not finite"):
        optimiser.update(jnp.array([1.0, jnp.nan, 0.0]), state, jnp.zeros(3), x=X)
    with pytest.raises(Exception, match="gradient is not finite"):
        jax.jit(partial(optimiser.update, x=X))(jnp.array([1.0, jnp.nan, 0.0]), state, jnp.zeros(3))
    with pytest.raises(ValueError, match="needs the parameters"):
        optimiser.update(jnp.ones(3), state, x=X)


def test_gradients_of_a_sum_make_the_step_n_times_too_long():
    """The documented symptom."""
    total = lambda t: len(Y) * loss(t)
    once = run(natural_gradient(poisson), jnp.zeros(3), 1, x=X)[0][0]
    long = run(natural_gradient(poisson), jnp.zeros(3), 1, total, x=X)[0][0]
    np.testing.assert_allclose(long, len(Y) * once, rtol=1e-10)
    assert loss(long) > loss(jnp.zeros(3)) > loss(once)


def test_structures_that_cannot_be_averaged():
    optimiser = natural_gradient(poisson, curvature=low_rank_fisher, averaging=0.5, example=X)
    with pytest.raises(ValueError, match="cannot be averaged"):
        optimiser.update(jnp.ones(3), optimiser.init(jnp.zeros(3)), jnp.zeros(3), x=X)


def test_diagonal():
    path = run(natural_gradient(poisson, 0.5, curvature=diagonal_fisher, damping=0.0), jnp.zeros(3), 1, x=X)[0]
    F = fb.score_covariance(poisson, jnp.zeros(3), X)
    np.testing.assert_allclose(path[0], -0.5 * jax.grad(loss)(jnp.zeros(3)) / jnp.diag(F), rtol=1e-10)
