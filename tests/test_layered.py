"""F through layers: equal to R^T R whatever the layers are, and Kronecker products exact where theory says so."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import fisherbook as fb
from fisherbook.operators import dense_fisher, diagonal_fisher, implicit_fisher, kronecker_fisher, layered
from fisherbook.root import dense_rows, make_root

KEY = jax.random.key(0)


def normal(i, *shape):
    return jax.random.normal(jax.random.fold_in(KEY, i), shape)


def mlp(t, x):
    return jnp.tanh(x @ t["W1"] + t["b1"]) @ t["W2"] + t["b2"]


MLP = {"W1": normal(1, 3, 5), "W2": normal(2, 5, 4), "b1": normal(3, 5), "b2": normal(4, 4)}
X = normal(5, 7, 3)


def convolution(t, x):  # x [n, 6, 6, 2]
    z = jax.lax.conv_general_dilated(x, t["K"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")) + t["b"]
    return jax.nn.silu(z).reshape(len(x), -1) @ t["W"]


CONVOLUTION = {"K": normal(6, 3, 3, 2, 2), "b": normal(7, 2), "W": normal(8, 18, 3)}


def shared(t, x):  # one weight at four positions, LayerNorm with scale and shift
    h = jnp.tanh(x @ t["W"] + t["b"])
    h = (h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 0.1) * t["scale"] + t["shift"]
    return jnp.sum(h @ t["V"], 1)


SHARED = {k: normal(10 + i, *s) for i, (k, s) in enumerate(
    {"W": (3, 4), "b": (4,), "V": (4, 2), "scale": (4,), "shift": (4,)}.items())}  # fmt: skip


def words(t, x):  # x [n, 3] integers
    return jnp.tanh(t["E"][x].mean(1)) @ t["W"]


WORDS = {"E": normal(20, 6, 3), "W": normal(21, 3, 2)}
TIED = {"W": normal(22, 3, 4), "b": normal(23, 3)}
module = eqx.nn.MLP(3, 4, 5, 2, key=KEY)
ARRAYS, STATIC = eqx.partition(module, eqx.is_inexact_array)

CUTS = jnp.array([-1.0, 0.5, 1.0])
logits = lambda net: lambda t, x: dist.Categorical(logits=net(t, x))
CASES = {
    "MLP": (logits(mlp), MLP, X),
    "outcomes by quadrature": (lambda t, x: dist.VonMises(mlp(t, x)[:, 0], 1.0), MLP, X),
    "outcomes by enumeration": (lambda t, x: dist.OrderedLogistic(mlp(t, x)[:, 0], CUTS), MLP, X),
    "convolution": (logits(convolution), CONVOLUTION, normal(30, 4, 6, 6, 2)),
    "shared weight, LayerNorm": (logits(shared), SHARED, normal(31, 5, 4, 3)),
    "embedding": (logits(words), WORDS, jax.random.randint(KEY, (9, 3), 0, 6)),
    "tied": (lambda t, x: dist.Normal(jnp.tanh(x @ t["W"]) @ t["W"].T + t["b"], 1.0).to_event(1), TIED, X),
    "a parameter in no layer": (
        lambda t, x: dist.Normal(mlp(t["net"], x), jnp.exp(t["log_sd"])).to_event(1),
        {"log_sd": jnp.array(0.3), "net": MLP, "unused": jnp.ones(2)},
        X,
    ),
    "equinox": (logits(lambda t, x: jax.vmap(eqx.combine(t, STATIC))(x)), ARRAYS, X),
}
LAWS = ["exact", "draws", "data"]


def law_of(name, model, theta, x):
    return {"exact": fb.Exact(), "draws": fb.MonteCarlo(KEY, 2), "data": fb.Data(model(theta, x).sample(KEY))}[name]


@pytest.mark.parametrize(("name", "law"), [(name, "exact") for name in CASES] + [("MLP", law) for law in LAWS[1:]])
def test_same_as_rows(name, law):
    model, theta, x = CASES[name]
    law = law_of(law, model, theta, x)
    root = make_root(model, theta, x, law=law)
    R = np.asarray(jax.jit(dense_rows)(root)).reshape(-1, root.d)
    F, size = R.T @ R, np.abs(R.T @ R).max()
    assert (root.varying is None) == (name.startswith("outcomes") or law != fb.Exact())
    if root.varying is None:
        np.testing.assert_allclose(F, fb.score_covariance(model, theta, x, law=law), atol=1e-12 * size)
    layers = layered.layers_of(root)
    assert layers is not None
    assert layered.shared(layers) == (name == "tied")
    np.testing.assert_allclose(jax.jit(lambda r: layered.matrix(r, layers))(root), F, atol=1e-13 * size)
    np.testing.assert_allclose(diagonal_fisher(model, theta, x, law=law).diagonal(), np.diag(F), atol=1e-13 * size)
    np.testing.assert_allclose(implicit_fisher(model, theta, x, law=law).trace(), np.trace(F), rtol=1e-12)
    M = dense_fisher(model, theta, x, law=law).as_matrix()
    np.testing.assert_allclose(M, F, atol=1e-12 * size)
    np.testing.assert_array_equal(M, M.T)


@pytest.mark.parametrize("name", ["MLP", "shared weight, LayerNorm", "tied", "a parameter in no layer"])
@pytest.mark.parametrize("damping", [1.0, 1e-7])
def test_solve_in_the_space_of_rows(name, damping):
    model, theta, x = CASES[name]
    F = implicit_fisher(model, theta, x[:2])
    assert F.rows < F.d
    M, v = np.asarray(dense_fisher(model, theta, x[:2]).as_matrix()), np.linspace(-1, 1, F.d)
    w = F.solve(jnp.asarray(v), damping)
    residual = M @ w + damping * w - v
    assert np.linalg.norm(residual) < 1e-8 * np.linalg.norm(v)
    if name != "tied":
        root = make_root(model, theta, x[:2])
        R = np.asarray(dense_rows(root)).reshape(-1, F.d)
        np.testing.assert_allclose(layered.gram(root, layered.layers_of(root)), R @ R.T, atol=1e-12)


def test_outer_products_where_they_are_less_work():
    """A logistic regression goes by rows, a network with ten outcomes by layers."""
    x = normal(40, 20, 8)
    theta = {"W1": normal(41, 8, 16), "W2": normal(42, 16, 10)}
    network = lambda t, x: dist.Categorical(logits=jnp.tanh(x @ t["W1"]) @ t["W2"])
    for model, at, expected in (
        (network, theta, True),
        (lambda t, x: dist.Bernoulli(logits=x @ t), theta["W1"][:, 0], False),
    ):
        root = make_root(model, at, x)
        assert layered.pays(root, layered.layers_of(root)) == expected


# --- Kronecker products -----------------------------------------------------------------------------------------


def by_hand(t, x):
    """A and G of both layers of the MLP under a categorical law, outcome by outcome."""
    n, ones = len(x), np.ones((len(x), 1))
    h = np.tanh(x @ t["W1"] + t["b1"])
    p = np.asarray(jax.nn.softmax(h @ t["W2"] + t["b2"]))
    A = [np.hstack([x, ones]), np.hstack([h, ones])]
    G = [0.0, 0.0]
    for c in range(4):
        s = np.eye(4)[c] - p  # the score of outcome c in the logits
        first = (s @ np.asarray(t["W2"]).T) * (1 - h**2)
        G = [G[0] + (first * p[:, [c]]).T @ first / n, G[1] + (s * p[:, [c]]).T @ s / n]
    return [a.T @ a / n for a in A], G


def block(F, k):
    at = F.blocks[k].index.at
    return np.asarray(F.as_matrix())[np.ix_(at, at)]


def test_factors_are_those_of_the_definition():
    model, theta, x = CASES["MLP"]
    F = kronecker_fisher(model, theta, x)
    A, G = by_hand(theta, np.asarray(x))
    assert [b.name for b in F.blocks] == ["W1, b1", "W2, b2"]
    for k in range(2):
        np.testing.assert_allclose(block(F, k), np.kron(A[k], G[k]), atol=1e-14)
    at = [b.index.at for b in F.blocks]
    assert np.abs(np.asarray(F.as_matrix())[np.ix_(at[0], at[1])]).max() == 0


def test_exact_for_one_input():
    for name in ("MLP", "equinox", "a parameter in no layer"):
        model, theta, x = CASES[name]
        F, M = kronecker_fisher(model, theta, x[:1]), np.asarray(dense_fisher(model, theta, x[:1]).as_matrix())
        for k, b in enumerate(F.blocks):
            np.testing.assert_allclose(block(F, k), M[np.ix_(b.index.at, b.index.at)], atol=1e-13)


def test_exact_for_a_deep_linear_network_with_fixed_noise_and_not_for_a_logistic_regression():
    deep = lambda t, x: dist.Normal(x @ t["W1"] @ t["W2"] + t["b2"], 0.7).to_event(1)
    theta = {k: MLP[k] for k in ("W1", "W2", "b2")}
    F, M = kronecker_fisher(deep, theta, X), np.asarray(dense_fisher(deep, theta, X).as_matrix())
    for k, b in enumerate(F.blocks):
        np.testing.assert_allclose(block(F, k), M[np.ix_(b.index.at, b.index.at)], atol=1e-12)
    x = jnp.array([[0.1], [0.2], [5.0]])  # F = mean of p (1 - p) x^2; K-FAC = mean of p (1 - p) times mean of x^2
    logistic = lambda t, x: dist.Bernoulli(logits=x @ t)
    p = 1 / (1 + np.exp(-np.asarray(x[:, 0])))
    at = jnp.ones(1)
    F = kronecker_fisher(logistic, at, x).as_matrix()[0, 0]
    np.testing.assert_allclose(F, np.mean(p * (1 - p)) * np.mean(x**2))
    assert dense_fisher(logistic, at, x).as_matrix()[0, 0] < F / 5


@pytest.mark.parametrize(
    ("name", "law"),
    [("MLP", "draws"), ("convolution", "exact"), ("shared weight, LayerNorm", "data"), ("embedding", "exact")],
)
def test_corrected_eigenvalues_are_the_second_moments_of_the_root(name, law):
    model, theta, x = CASES[name]
    law = law_of(law, model, theta, x)
    M = np.asarray(dense_fisher(model, theta, x, law=law).as_matrix())
    F = kronecker_fisher(model, theta, x, law=law, corrected=True)
    np.testing.assert_allclose(F.trace(), np.trace(M), rtol=1e-10)
    for b in F.blocks:
        if b.corrected and b.a.vectors is not None:
            U = np.kron(b.a.vectors, b.g.vectors)
            inside = M[np.ix_(b.index.at, b.index.at)]
            np.testing.assert_allclose(b.values.ravel(), np.diag(U.T @ inside @ U), atol=1e-11 * np.abs(M).max())
    plain = kronecker_fisher(model, theta, x, law=law).as_matrix()
    frobenius = [np.linalg.norm(np.asarray(K) - M) for K in (F.as_matrix(), plain)]
    assert frobenius[0] <= frobenius[1] + 1e-12  # George et al. (2018): the best diagonal in that basis


def test_positions_are_independent_uses():
    """The expand form of a layer at T positions: A is a mean over positions too, and G a sum."""
    model = lambda t, x: dist.Normal(jnp.sum(jnp.tanh(x @ t["W"]), 1), 1.0).to_event(1)
    theta, x = {"W": MLP["W1"]}, normal(50, 6, 4, 3)
    F = kronecker_fisher(model, theta, x)
    slope = np.asarray(1 - jnp.tanh(x @ theta["W"]) ** 2)  # [n, T, out]; output o sees position t by its own slope
    A = np.einsum("nti,ntj->ij", x, x) / (6 * 4)
    G = np.diag(np.sum(slope**2, (0, 1)) / 6)
    np.testing.assert_allclose(F.as_matrix(), np.kron(A, G), atol=1e-13)


def test_whole_blocks_are_exact():
    model, theta, x = CASES["shared weight, LayerNorm"]
    F, M = kronecker_fisher(model, theta, x), np.asarray(dense_fisher(model, theta, x).as_matrix())
    whole = {b.name: k for k, b in enumerate(F.blocks) if b.shape[0] == 1}
    assert set(whole) == {"scale", "shift"}
    for k in whole.values():
        at = F.blocks[k].index.at
        np.testing.assert_allclose(block(F, k), M[np.ix_(at, at)], atol=1e-13)
    model, theta, x = CASES["tied"]
    F = kronecker_fisher(model, theta, x)  # both uses of W, and b, in one block each
    np.testing.assert_allclose(block(F, 0)[:12, :12], dense_fisher(model, theta, x).as_matrix()[:12, :12], atol=1e-13)
    unconditional = lambda t: dist.Normal(t[0], t[1])
    F = kronecker_fisher(unconditional, jnp.array([0.0, 2.0]))
    np.testing.assert_allclose(F.as_matrix(), np.diag([1 / 4, 1 / 2]))


def test_too_many_parameters_in_no_layer_are_named(monkeypatch):
    monkeypatch.setattr("fisherbook.operators.plan.LARGEST", 10)
    model = lambda t, x: dist.Normal(jnp.tanh(x @ jnp.exp(t["log_W"])) @ t["v"], 1.0)
    with pytest.raises(ValueError, match=r"12 parameters \(log_W\) are in no linear layer.*enters exp"):
        kronecker_fisher(model, {"log_W": normal(60, 3, 4), "v": normal(61, 4)}, X)


def test_damping_must_separate():
    model, theta, x = CASES["MLP"]
    F = kronecker_fisher(model, theta, x)
    with pytest.raises(ValueError, match="same for all the leaves of W1, b1"):
        F.solve(theta, {"W1": 0.1, "b1": 0.2, "W2": 0.3, "b2": 0.3})
    with pytest.raises(ValueError, match="singular to working precision in W2, b2"):  # four logits are one too many
        F.solve(theta)


def test_blocks_of_rows_change_nothing(monkeypatch):
    for name in ("MLP", "convolution", "shared weight, LayerNorm"):
        model, theta, x = CASES[name]
        dense, kron = dense_fisher(model, theta, x), kronecker_fisher(model, theta, x, corrected=True)
        with monkeypatch.context() as patch:
            patch.setattr("fisherbook.operators.row_blocks.BLOCK", 500)
            patch.setattr("fisherbook.root.CAP", 500)
            np.testing.assert_allclose(dense_fisher(model, theta, x).as_matrix(), dense.as_matrix(), atol=1e-13)
            blocks = kronecker_fisher(model, theta, x, corrected=True)
            np.testing.assert_allclose(blocks.as_matrix(), kron.as_matrix(), atol=1e-12)


@pytest.mark.parametrize("case", ["MLP", "convolution"])
def test_row_space_beyond_the_cap(case, monkeypatch):
    """Where activations and written rows are too many to hold, the Gram matrix comes by products; the answer stays."""
    model, theta, x = CASES[case]
    x = x[:3]
    exact = dense_fisher(model, theta, x)
    v = jnp.linspace(-1, 1, exact.d)
    for cap in (2**26, 10):
        with monkeypatch.context() as patch:
            patch.setattr("fisherbook.operators.implicit.CAP", cap)
            if cap == 10:
                patch.delattr("fisherbook.operators.layered.gram")
            F = implicit_fisher(model, theta, x)
            assert F.rows < F.d
            np.testing.assert_allclose(F.solve(v, 0.1), exact.solve(v, 0.1), rtol=1e-9)


def test_average_is_that_of_the_factors():
    model, theta, x = CASES["MLP"]
    one, two = kronecker_fisher(model, theta, x), 2.0 * kronecker_fisher(model, theta, x + 1)
    mean = one.average(two, 0.25)
    for k in range(2):
        A = 0.75 * one.blocks[k].a.matrix + 0.25 * two.blocks[k].a.matrix
        G = 0.75 * one.blocks[k].g.matrix + 0.25 * 2.0 * two.blocks[k].g.matrix
        np.testing.assert_allclose(block(mean, k), np.kron(A, G), atol=1e-13)


def test_curvature_of_the_natural_gradient():
    """Full-batch steps with averaged K-FAC inside jit lower the loss to that of separated classes."""
    import optax

    x = normal(70, 60, 3)
    y = (x @ normal(71, 3, 4)).argmax(1)
    model = logits(mlp)
    loss = lambda t: -model(t, x).log_prob(y).mean()
    optimiser = fb.natural_gradient(
        model, 0.5, curvature=kronecker_fisher, damping=1e-2, averaging=0.5, every=2, example=x[:1]
    )

    @jax.jit
    def step(t, state):
        updates, state = optimiser.update(jax.grad(loss)(t), state, t, x=x)
        return optax.apply_updates(t, updates), state

    t, state = MLP, optimiser.init(MLP)
    for _ in range(40):
        t, state = step(t, state)
    assert loss(t) < 0.1 * loss(MLP)
