"""Batches give what the whole array gives, draws included, with one batch in memory."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import fisherbook as fb
from fisherbook.families import find_family

KEYS = jax.random.split(jax.random.key(0), 5)
THETA = {"W": jax.random.normal(KEYS[0], (3, 4)), "b": jnp.ones(4), "V": jax.random.normal(KEYS[1], (4, 3))}
X = jax.random.normal(KEYS[2], (23, 3))
Y = jax.random.randint(KEYS[3], (23,), 0, 3)
SPLIT = [X[:10], X[10:20], X[20:]]


def model(t, x):
    return dist.Categorical(logits=jnp.tanh(x @ t["W"] + t["b"]) @ t["V"])


def direction(t, x):  # its law is integrated, not looked up
    return dist.VonMises(x @ t, 1.0)


def grade(t, x):  # and this one's outcomes are summed
    return dist.OrderedLogistic(x @ t, jnp.array([-1.0, 0.5, 1.0]))


LAWS = {
    "exact": (fb.Exact(), fb.Exact()),
    "draws": (fb.MonteCarlo(KEYS[4], 2), fb.MonteCarlo(KEYS[4], 2)),
    "data": (fb.Data(Y), fb.Data(fb.Batches([Y[:10], Y[10:20], Y[20:]]))),
    "data, one array": (fb.Data(Y), fb.Data(Y)),
}
BUILDS = {f.__name__: f for f in (fb.dense_fisher, fb.diagonal_fisher, fb.kronecker_fisher, fb.implicit_fisher)}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("build", BUILDS)
def test_same_as_the_whole_array(build, law):
    whole = BUILDS[build](model, THETA, X, law=LAWS[law][0])
    parts = BUILDS[build](model, THETA, fb.Batches(SPLIT), law=LAWS[law][1])
    v = jnp.linspace(-1, 1, whole.d)
    np.testing.assert_allclose(parts @ v, whole @ v, atol=1e-13)
    np.testing.assert_allclose(parts.diagonal(), whole.diagonal(), atol=1e-13)
    np.testing.assert_allclose(parts.trace(), whole.trace(), rtol=1e-12)
    np.testing.assert_allclose(parts.solve(v, 0.1), whole.solve(v, 0.1), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(parts.logdet(0.1), whole.logdet(0.1), rtol=1e-10)


def test_corrected_eigenvalues_low_rank_and_quadrature():
    batches = fb.Batches(SPLIT)
    plain = fb.kronecker_fisher(model, THETA, X, corrected=True)
    np.testing.assert_allclose(
        fb.kronecker_fisher(model, THETA, batches, corrected=True).as_matrix(), plain.as_matrix(), atol=1e-12
    )
    whole, parts = (fb.low_rank_fisher(model, THETA, x, rank=5) for x in (X, batches))
    np.testing.assert_allclose(parts.eigenvalues(), whole.eigenvalues(), rtol=1e-6)
    np.testing.assert_allclose(parts.discarded, whole.discarded, rtol=1e-4)
    t = jnp.array([0.5, -0.2, 0.1])
    for law in (direction, grade):
        assert find_family(law(t, X)) is None
        M = fb.score_covariance(law, t, X)
        np.testing.assert_allclose(fb.dense_fisher(law, t, batches).as_matrix(), M, rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(fb.diagonal_fisher(grade, t, batches).diagonal(), jnp.diag(M), rtol=1e-10)
    np.testing.assert_allclose(fb.implicit_fisher(grade, t, batches) @ t, M @ t, rtol=1e-10)


def test_a_loader_of_pairs_and_a_function():
    expected = fb.dense_fisher(model, THETA, X).as_matrix()
    pairs = [(x, None) for x in SPLIT]
    for batches in (fb.Batches(pairs, lambda pair: pair[0]), fb.Batches(lambda: iter(SPLIT))):
        np.testing.assert_allclose(fb.dense_fisher(model, THETA, batches).as_matrix(), expected, atol=1e-13)


@pytest.mark.parametrize("law", ["exact", "draws"])
@pytest.mark.parametrize("build", [*BUILDS.values(), fb.low_rank_fisher], ids=[*BUILDS, "low_rank_fisher"])
def test_one_batch_in_memory(build, law):
    """Each batch is made when it is asked for, and no earlier one is alive then."""
    import gc
    import time
    import weakref

    alive, most = [], 0
    living = lambda: sum(ref() is not None for ref in alive)

    def source():
        nonlocal most
        for k in range(6):
            x = np.asarray(X) + k
            alive.append(weakref.ref(x))
            until = time.monotonic() + 20.0
            while living() > 2 and time.monotonic() < until:  # XLA lets go a moment after the program,
                gc.collect()  # and cycles are Python's collector's
                time.sleep(0.01)
            most = max(most, living())
            yield x
            del x

    F = build(model, THETA, fb.Batches(source), law=LAWS[law][1])
    for _ in range(2):
        F @ jnp.ones(F.d)
    assert len(alive) >= 6
    assert most <= 2  # the one in use, and the one before it until it is replaced


@pytest.mark.parametrize(
    "law", [fb.Exact(), fb.MonteCarlo(KEYS[4], 2), fb.Data(jnp.tile(Y[:6], 5))], ids=["exact", "draws", "data"]
)
def test_more_batches_and_more_passes_trace_nothing(law):
    def traces(build, many, products=0):
        seen = []

        def counted(t, x):
            seen.append(isinstance(x, jax.core.Tracer))
            return model(t, x)

        used = fb.Data(law.y[: 6 * many]) if isinstance(law, fb.Data) else law
        F = build(counted, THETA, fb.Batches([X[k : k + 6] for k in range(many)]), law=used)
        found = [F @ (k + jnp.ones(F.d)) for k in range(products)]
        assert len(found) < 2 or abs(found[1] - found[0]).max() > 1e-3
        return sum(seen)

    for build in (fb.dense_fisher, fb.diagonal_fisher, fb.kronecker_fisher):
        assert traces(build, 2) == traces(build, 5) > 0
    assert traces(fb.implicit_fisher, 2, 1) == traces(fb.implicit_fisher, 5, 4) > 0


def test_a_batch_is_waited_for_before_the_next_is_read(monkeypatch):
    events, wait = [], jax.block_until_ready
    monkeypatch.setattr(jax, "block_until_ready", lambda tree: (wait(tree), events.append("ended"))[0])

    def source():
        for part in SPLIT:
            events.append("read")
            yield part

    F = fb.implicit_fisher(model, THETA, fb.Batches(source))
    for _ in range(2):
        events.clear()
        F @ jnp.ones(F.d)
        assert events == ["read", "ended"] * 3


class Tilted(eqx.Module):
    """A model that holds an array, so that JAX can neither hash it nor ask whether it equals another."""

    tilt: jax.Array

    def __call__(self, t, x):
        return model(t, self.tilt * x)


@pytest.mark.parametrize("build", [*BUILDS.values(), fb.low_rank_fisher], ids=[*BUILDS, "low_rank_fisher"])
def test_models_that_hold_arrays(build):
    """Two of one class are not taken for each other, by any operator or posterior, in jit or out of it."""
    for tilt in (jnp.array([1.0, 2.0, -1.0]), jnp.array([0.5, 0.0, 3.0])):
        tilted, expected = Tilted(tilt), build(lambda t, x: model(t, tilt * x), THETA, X)  # noqa: B023
        v = jnp.linspace(-1, 1, expected.d)
        for x in (X, fb.Batches(SPLIT)):
            F = build(tilted, THETA, x)
            np.testing.assert_allclose(F @ v, expected @ v, rtol=1e-5, atol=1e-12)
            if x is X:
                np.testing.assert_allclose(jax.jit(lambda F, v: F @ v)(F, v), expected @ v, rtol=1e-5, atol=1e-12)
            with pytest.warns(UserWarning, match="not the mode"):
                posterior = fb.laplace(tilted, THETA, Y, x, curvature=build)
            if x is X:
                jax.jit(lambda p: p.sample(KEYS[0], (2,)))(posterior)
            np.testing.assert_allclose(posterior.precision @ v, len(X) * (expected @ v) + v, rtol=1e-5, atol=1e-12)


def test_what_is_read_again_is_used():
    """Programs are kept between products, the data are not."""
    parts, v = [X[:10], X[10:20]], jnp.linspace(-1, 1, 28)
    F = fb.implicit_fisher(model, THETA, fb.Batches(parts))
    product = lambda theta: fb.dense_fisher(model, theta, jnp.concatenate(parts)) @ v
    np.testing.assert_allclose(F @ v, product(THETA), atol=1e-13)
    parts[1] = 2 * X[10:20]
    np.testing.assert_allclose(F @ v, product(THETA), atol=1e-13)
    parts[1] = X[10:17]  # of another length: checked as a new batch
    np.testing.assert_allclose(F @ v, product(THETA), atol=1e-13)
    other = jax.tree.map(lambda leaf: 1.5 * leaf, F)  # theta and the scale
    np.testing.assert_allclose(other @ v, 1.5 * product(jax.tree.map(lambda leaf: 1.5 * leaf, THETA)), atol=1e-13)
    parts[0] = X[:10].at[3, 1].set(jnp.nan)
    with pytest.raises(ValueError, match="batch that is read again holds other values"):
        F @ v


def test_bad_input():
    with pytest.raises(ValueError, match="a generator can be iterated once only"):
        fb.Batches(x for x in SPLIT)
    with pytest.raises(ValueError, match="hold no inputs"):
        fb.dense_fisher(model, THETA, fb.Batches([]))
    with pytest.raises(ValueError, match="y has fewer batches than x"):
        fb.dense_fisher(model, THETA, fb.Batches(SPLIT), law=fb.Data(fb.Batches([Y[:10]])))
    with pytest.raises(ValueError, match="but y has more"):
        fb.dense_fisher(model, THETA, fb.Batches(SPLIT[:2]), law=fb.Data(Y))
    with pytest.raises(ValueError, match="rows"):
        fb.dense_fisher(model, THETA, fb.Batches(SPLIT), law=fb.Data(Y[:15]))
    F = fb.implicit_fisher(model, THETA, fb.Batches(SPLIT))
    with pytest.raises(ValueError, match=r"inside jax\.jit"):
        jax.jit(lambda v: F @ v)(jnp.ones(F.d))
    with pytest.raises(ValueError, match="singular"):
        F.solve(jnp.ones(F.d))
    with pytest.warns(UserWarning, match="not the mode"):
        posterior = fb.laplace(model, THETA, Y, fb.Batches(SPLIT))
    for call in (
        lambda x: fb.score_covariance(model, THETA, x),
        lambda x: fb.fisher_scoring(model, THETA, Y, x),
        lambda x: posterior.predictive(x),
    ):
        with pytest.raises(TypeError, match="x is Batches, which only"):
            call(fb.Batches(SPLIT))
