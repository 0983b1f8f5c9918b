"""The natural gradient: invariance, closed-form steps, damping, trust radius, state, and what bad input gets."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest

import fisherbook as fb
from fisherbook.natural_gradient import LevenbergMarquardt, natural_gradient
from fisherbook.natural_gradient import _pick as choose
from fisherbook.operators import dense_fisher, diagonal_fisher, implicit_fisher, kronecker_fisher, low_rank_fisher

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


def test_row_space_is_the_same_step(monkeypatch):
    """It is picked where there are fewer rows than parameters, and only there; above `LARGEST` rows by products."""
    few = X[:2]
    picked = lambda x, curvature=dense_fisher, holds=False: type(
        choose(curvature, holds)(poisson, jnp.zeros(3), x, law=fb.Exact())
    )
    assert picked(few) is fb.operators.ImplicitFisher
    assert picked(X[:3]) is picked(X) is picked(few, holds=True) is fb.operators.DenseFisher
    assert picked(few, diagonal_fisher) is fb.operators.DiagonalFisher
    assert picked(fb.Batches([few])) is fb.operators.DenseFisher
    small = lambda t: -poisson(t, few).log_prob(Y[:2]).mean()
    F = fb.score_covariance(poisson, jnp.zeros(3), few)
    expected = -jnp.linalg.solve(F + 0.01 * jnp.eye(3), jax.grad(small)(jnp.zeros(3)))
    path, _, _ = run(natural_gradient(poisson, damping=0.01), jnp.zeros(3), 1, small, x=few)
    np.testing.assert_allclose(path[0], expected, rtol=1e-9)
    monkeypatch.setattr("fisherbook.operators.implicit.LARGEST", 1)
    assert picked(few) is fb.operators.ImplicitFisher
    path, _, _ = run(natural_gradient(poisson, damping=0.01), jnp.zeros(3), 1, small, x=few)
    np.testing.assert_allclose(path[0], expected, rtol=1e-6)  # the relative residual is 1e-8, F is 1e2 by damping


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


@pytest.mark.parametrize("decoupled", [False, True])
def test_chains_with_schedules_clips_and_decay(decoupled):
    """Decay before the transformation is that of a loss with (w / 2) |theta|^2, behind it theta shrinks by eta w."""
    longest, w = 0.05, 0.3
    rate, level = optax.linear_schedule(1.0, 0.1, 10), optax.exponential_decay(0.5, 1, 0.8)
    before = [] if decoupled else [optax.add_decayed_weights(w)]
    behind = [optax.add_decayed_weights(lambda count: -rate(count) * w)] if decoupled else []
    chain = optax.chain(
        *before, optax.clip_by_global_norm(longest), natural_gradient(poisson, rate, damping=level), *behind
    )
    theta = jnp.array([1.0, -2.0, 0.5])
    state, by_hand, clipped = chain.init(theta), np.asarray(theta), []
    for i in range(12):
        updates, state = chain.update(jax.grad(loss)(theta), state, theta, x=X)
        theta = optax.apply_updates(theta, updates)
        rates = np.exp(X @ by_hand)
        g = X.T @ (rates - Y) / len(Y) + (0 if decoupled else w) * by_hand
        clipped.append(np.linalg.norm(g) > longest)
        g = g * min(1, longest / np.linalg.norm(g))
        F = (X * rates[:, None]).T @ X / len(Y) + 0.5 * 0.8**i * np.eye(3)
        eta = 1 - 0.9 * min(i, 10) / 10
        by_hand = by_hand - eta * np.linalg.solve(F, g) - (eta * w if decoupled else 0) * by_hand
        np.testing.assert_allclose(theta, by_hand, rtol=1e-6)  # optax's schedules compute in float32
    assert any(clipped)


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
        ({"damping": lambda count: jnp.nan * count}, {}, "damping must be finite and not negative"),
        ({"damping": {"slope": 1.0}}, {}, "one number per leaf"),
        ({"law": fb.Data}, {"y": Y[:7]}, "x has 40 rows but y has 7"),
        (
            {"damping": fb.LevenbergMarquardt()},
            {"value_fn": lambda t: -poisson(t, X).log_prob(Y)},
            "value_fn must return a number",
        ),
    ],
)
def test_bad_input(options, extra, message):
    optimiser = natural_gradient(poisson, **options)
    state = optimiser.init(jnp.zeros(3))
    with pytest.raises(ValueError, match=message):
        optimiser.update(jnp.ones(3), state, jnp.zeros(3), **{"x": X, **extra})


@pytest.mark.parametrize(
    "options",
    [
        {"every": 0},
        {"momentum": 1.0},
        {"averaging": 1.0},
        {"trust_radius": 0.0},
        {"learning_rate": -1},
        {"learning_rate": np.inf},
    ],
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


def test_schedules_and_momentum_by_hand():
    rate, level = optax.linear_schedule(1.0, 0.2, 4), optax.exponential_decay(0.5, 1, 0.5)
    path, _, _ = run(natural_gradient(poisson, rate, damping=level, momentum=0.6), jnp.zeros(3), 5, x=X)
    theta, running = np.zeros(3), np.zeros(3)
    for i in range(5):
        F = fb.score_covariance(poisson, theta, X) + float(level(i)) * np.eye(3)
        running = 0.6 * running + np.linalg.solve(F, jax.grad(loss)(theta))
        theta = theta - float(rate(i)) * running
        np.testing.assert_allclose(path[i], theta, rtol=1e-9)


def net(theta, x):
    return dist.Categorical(logits=jnp.tanh(x @ theta["W"]) @ theta["V"])


NET = {"V": jax.random.normal(jax.random.key(2), (2, 3)), "W": jax.random.normal(jax.random.key(3), (3, 2))}
CLASS = jax.random.randint(jax.random.key(4), (40,), 0, 3)


def net_loss(theta):
    return -net(theta, X).log_prob(CLASS).mean()


HELD = dict(every=2, averaging=0.5, example=X[:1])


@pytest.mark.parametrize(
    "options",
    [
        dict(damping=LevenbergMarquardt(), momentum=0.5, trust_radius=0.1),
        dict(damping=LevenbergMarquardt(), law=fb.Data, **HELD),
        dict(curvature=kronecker_fisher, damping=0.1, **HELD),
        dict(curvature=diagonal_fisher, damping=0.1, law=lambda key: fb.MonteCarlo(key, 2), **HELD),
        dict(curvature=low_rank_fisher, damping=0.1, every=2, example=X),
        dict(curvature=implicit_fisher, damping=0.1, every=2, example=X),
        dict(curvature=implicit_fisher, damping=0.1, every=2, example=X, law=lambda key: fb.MonteCarlo(key, 2)),
        dict(curvature=implicit_fisher, damping=0.1, every=2, example=X, law=fb.MonteCarlo(jax.random.key(6), 2)),
    ],
    ids=[
        "adaptive",
        "adaptive, held",
        "Kronecker",
        "diagonal, drawn",
        "low rank",
        "implicit",
        "implicit, drawn",
        "implicit, one draw for all",
    ],
)
def test_state_saved_to_a_file_resumes_in_a_new_optimiser(options, tmp_path):
    keys = jax.random.split(jax.random.key(5), 6)

    def go(optimiser, theta, state, keys):
        given = dict(x=X, y=CLASS, value_fn=net_loss)
        step = jax.jit(lambda t, s, key: optimiser.update(jax.grad(net_loss)(t), s, t, key=key, **given))
        for key in keys:
            updates, state = step(theta, state, key)
            theta = optax.apply_updates(theta, updates)
        return theta, state

    optimiser, new = natural_gradient(net, 0.5, **options), natural_gradient(net, 0.5, **options)
    middle = go(optimiser, NET, optimiser.init(NET), keys[:3])
    np.savez(tmp_path / "state", *jax.tree.leaves(middle))
    saved = np.load(tmp_path / "state.npz")
    restored = jax.tree.unflatten(jax.tree.structure((NET, new.init(NET))), [jnp.asarray(saved[k]) for k in saved])
    ends = go(optimiser, *middle, keys[3:]), go(new, *restored, keys[3:])
    for one, other in zip(*map(jax.tree.leaves, ends), strict=True):
        np.testing.assert_array_equal(one, other)


def test_integers_in_the_state_are_the_key_that_was_passed():
    optimiser = natural_gradient(
        poisson, curvature=implicit_fisher, law=lambda key: fb.MonteCarlo(key, 2), every=2, example=X
    )
    theta, key = jnp.zeros(3), jax.random.key(7)
    _, state = optimiser.update(jax.grad(loss)(theta), optimiser.init(theta), theta, x=X, key=key)
    expected = fb.score_covariance(poisson, theta, X, law=fb.MonteCarlo(key, 2))
    np.testing.assert_allclose(state.curvature.as_matrix(), expected, rtol=1e-10)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("value", ["higher", "nan"])
def test_a_step_that_increases_the_loss_is_not_taken_but_counted(value, jit):
    optimiser = natural_gradient(poisson, damping=LevenbergMarquardt(initial=0.5, factor=3.0))
    theta = jnp.zeros(3)
    value_fn = loss if value == "higher" else lambda t: loss(t) + jnp.where(jnp.any(t != 0), jnp.nan, 0.0)
    uphill = jax.grad(loss)(theta) * (-1 if value == "higher" else 1)
    step = lambda g, state: optimiser.update(g, state, theta, x=X, value_fn=value_fn)
    updates, state = (jax.jit(step) if jit else step)(uphill, optimiser.init(theta))
    np.testing.assert_array_equal(updates, 0)
    assert (state.rejected, state.count, state.kl) == (1, 1, 0)
    np.testing.assert_allclose(state.damping, 1.5)
    assert state.reduction < 0


@pytest.mark.parametrize("curvature", [dense_fisher, diagonal_fisher, kronecker_fisher])
def test_a_batch_of_another_length_than_before(curvature):
    """The mean of the curvatures of 40 and of 7 inputs, with a state made from one."""
    optimiser = natural_gradient(poisson, curvature=curvature, damping=0.1, averaging=0.25, example=X[:1])
    theta = jnp.array([0.1, 0.2, -0.1])
    state, grads = optimiser.init(theta), jax.grad(loss)(theta)
    _, state = optimiser.update(grads, state, theta, x=X)
    updates, _ = optimiser.update(grads, state, theta, x=X[:7])
    F = curvature(poisson, theta, X).average(curvature(poisson, theta, X[:7]), 0.75)
    np.testing.assert_allclose(updates, -np.linalg.solve(F.as_matrix() + 0.1 * np.eye(3), grads), rtol=1e-9)


def test_trust_radius_holds_for_the_sum_with_momentum():
    radius = 1e-3
    optimiser = natural_gradient(poisson, damping=0.0, momentum=0.9, trust_radius=radius)
    theta, state = jnp.zeros(3), optimiser.init(jnp.zeros(3))
    for _ in range(4):
        F = fb.score_covariance(poisson, theta, X)
        updates, state = optimiser.update(jax.grad(loss)(theta), state, theta, x=X)
        np.testing.assert_allclose(updates @ F @ updates / 2, state.kl, rtol=1e-9)
        assert state.kl <= radius * (1 + 1e-12)
        theta = theta + updates


def test_gradients_of_another_shape():
    optimiser = natural_gradient(poisson)
    with pytest.raises(ValueError, match="gradients have the shapes"):
        optimiser.update(jnp.ones((3, 1)), optimiser.init(jnp.zeros(3)), jnp.zeros(3), x=X)


def test_held_curvature_needs_an_example_of_its_form():
    with pytest.raises(ValueError, match="pass example="):
        natural_gradient(poisson, every=2).init(jnp.zeros(3))
    optimiser = natural_gradient(poisson, every=2, example=X[:1], curvature=fb.implicit_fisher)
    with pytest.raises(ValueError, match="as many as the batches"):
        optimiser.update(jnp.ones(3), optimiser.init(jnp.zeros(3)), jnp.zeros(3), x=X)


def test_batches_give_the_same_step():
    optimiser, g = natural_gradient(poisson), jax.grad(loss)(jnp.zeros(3))
    whole, _ = optimiser.update(g, optimiser.init(jnp.zeros(3)), jnp.zeros(3), x=X)
    pieces, _ = optimiser.update(g, optimiser.init(jnp.zeros(3)), jnp.zeros(3), x=fb.Batches([X[:15], X[15:]]))
    np.testing.assert_allclose(pieces, whole, rtol=1e-10)


def test_inside_a_wrapper_of_optax_that_traces_by_itself():
    plain, g = natural_gradient(poisson), jax.grad(loss)(jnp.zeros(3))
    wrapped = optax.apply_if_finite(plain, 3)
    expected, _ = plain.update(g, plain.init(jnp.zeros(3)), jnp.zeros(3), x=X)
    found, _ = wrapped.update(g, wrapped.init(jnp.zeros(3)), jnp.zeros(3), x=X)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


MODULE, STATIC = eqx.partition(eqx.nn.MLP(3, 3, 4, 1, key=jax.random.key(8)), eqx.is_inexact_array)


def module(theta, x):
    return dist.Categorical(logits=jax.vmap(eqx.combine(theta, STATIC))(x))


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("curvature", [dense_fisher, implicit_fisher])
@pytest.mark.parametrize("name", ["dict", "equinox"])
def test_damping_per_leaf(name, curvature, jit):
    """Also where theta, and with it the damping, can be called as a schedule can."""
    model, theta = (net, NET) if name == "dict" else (module, MODULE)
    leaves, tree = jax.tree.flatten(theta)
    levels = [0.05 * (k + 1) for k in range(len(leaves))]
    optimiser = natural_gradient(model, 0.7, curvature=curvature, damping=jax.tree.unflatten(tree, levels))
    grads = jax.grad(lambda t: -model(t, X).log_prob(CLASS).mean())(theta)
    step = lambda g, t: optimiser.update(g, optimiser.init(t), t, x=X)[0]
    updates = (jax.jit(step) if jit else step)(grads, theta)
    assert jax.tree.structure(updates) == tree
    F = np.asarray(fb.score_covariance(model, theta, X))
    D = np.repeat(levels, [leaf.size for leaf in leaves])
    flat = lambda t: jax.flatten_util.ravel_pytree(t)[0]
    np.testing.assert_allclose(flat(updates), -0.7 * np.linalg.solve(F + np.diag(D), flat(grads)), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("damping", [eqx.nn.MLP(3, 3, 4, 1, key=jax.random.key(8)), lambda count: {"W": count}])
def test_damping_of_another_structure_than_theta(damping):
    with pytest.raises(ValueError, match="one number per leaf of theta"):
        natural_gradient(module, damping=damping).update(MODULE, natural_gradient(module).init(MODULE), MODULE, x=X)


def test_a_schedule_for_parameters_that_can_be_called():
    level = optax.linear_schedule(0.5, 0.1, 4)
    updates = [
        natural_gradient(module, damping=d).update(MODULE, natural_gradient(module).init(MODULE), MODULE, x=X)[0]
        for d in (level, 0.5)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), *updates)


class Scaled:
    """The least an operator of one's own must have: c I, with c the mean of x^2."""

    def __init__(self, c, d):
        self.c, self.shape = c, (d, d)

    def __matmul__(self, v):
        return jax.tree.map(lambda leaf: self.c * leaf, v)

    def solve(self, v, damping=0.0):
        return jax.tree.map(lambda leaf: leaf / (self.c + damping), v)


@jax.tree_util.register_pytree_node_class
class ScaledTree(Scaled):
    def tree_flatten(self):
        return (self.c,), self.shape[0]

    @classmethod
    def tree_unflatten(cls, d, children):
        return cls(*children, d)


class ScaledMean(ScaledTree):
    def average(self, newer, weight):
        return ScaledMean((1 - weight) * self.c + weight * newer.c, self.shape[0])


jax.tree_util.register_pytree_node_class(ScaledMean)


def scaled_by(kind):
    return lambda model, theta, x=None, *, law: kind(jnp.mean(x**2), 3)


def test_an_operator_of_ones_own():
    g = jax.grad(loss)(jnp.zeros(3))
    c, few = float(jnp.mean(X**2)), float(jnp.mean(X[:5] ** 2))
    optimiser = natural_gradient(poisson, 0.5, curvature=scaled_by(Scaled), damping=0.1, trust_radius=1e-3)
    updates, state = optimiser.update(g, optimiser.init(jnp.zeros(3)), jnp.zeros(3), x=X)
    step = -0.5 * g / (c + 0.1)
    shorten = min(1, np.sqrt(2e-3 / (c * step @ step)))
    assert shorten < 1
    np.testing.assert_allclose(updates, shorten * step, rtol=1e-12)
    np.testing.assert_allclose(state.kl, 1e-3, rtol=1e-12)
    for kind, options, expected in (
        (ScaledTree, dict(every=2), [c, c]),
        (ScaledMean, dict(averaging=0.25), [c, 0.25 * c + 0.75 * few]),
    ):
        optimiser = natural_gradient(poisson, curvature=scaled_by(kind), damping=0.1, example=X, **options)
        state = optimiser.init(jnp.zeros(3))
        for x, level in zip((X, X[:5]), expected, strict=True):
            updates, state = jax.jit(optimiser.update)(g, state, jnp.zeros(3), x=x)
            np.testing.assert_allclose(updates, -g / (level + 0.1), rtol=1e-12)


def test_an_operator_of_ones_own_that_lacks_what_the_state_needs():
    averaged = natural_gradient(poisson, curvature=scaled_by(ScaledTree), averaging=0.5, example=X)
    with pytest.raises(TypeError, match=r"ScaledTree has no average\(newer, weight\), which averaging needs"):
        averaged.init(jnp.zeros(3))
    with pytest.raises(TypeError, match="Scaled must be a pytree"):
        natural_gradient(poisson, curvature=scaled_by(Scaled), every=2, example=X).init(jnp.zeros(3))
