"""One contract for every structure, against dense float64 linear algebra on the score covariance."""

import json
import logging
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import fisherbook as fb
from fisherbook.compilation import SEEN
from fisherbook.families import find_family
from fisherbook.operators import dense_fisher, diagonal_fisher, implicit_fisher, kronecker_fisher, low_rank_fisher

CURVLINOPS = json.loads((Path(__file__).parent / "curvlinops.json").read_text())
EXACT = {"dense": dense_fisher, "implicit": implicit_fisher, "low rank": partial(low_rank_fisher, rank=10_000)}
ALL = EXACT | {
    "diagonal": diagonal_fisher,
    "rank 3": partial(low_rank_fisher, rank=3),
    "Kronecker": kronecker_fisher,
    "Kronecker, corrected": partial(kronecker_fisher, corrected=True),
}
FIVE = {
    "dense": dense_fisher,
    "diagonal": diagonal_fisher,
    "Kronecker": kronecker_fisher,
    "low rank": low_rank_fisher,
    "implicit": implicit_fisher,
}


def network(theta, x):
    return jnp.tanh(x @ theta["W1"] + theta["b1"]) @ theta["W2"] + theta["b2"]


def weights(key, sizes, dtype=float):
    keys = jax.random.split(key, 2)
    a, b, c = sizes
    return {
        "W1": jax.random.normal(keys[0], (a, b), dtype),
        "W2": jax.random.normal(keys[1], (b, c), dtype),
        "b1": jnp.linspace(-0.5, 0.5, b, dtype=dtype),
        "b2": jnp.zeros(c, dtype),
    }


def inputs(n, d=2, dtype=float):
    return jax.random.normal(jax.random.key(7), (n, d), dtype)


# name: (model, theta, x); regular unless the name says singular
PROBLEMS = {
    "logistic regression": (
        lambda t, x: dist.Bernoulli(logits=x @ t["slope"] + t["constant"]),
        {"constant": 0.3, "slope": jnp.array([1.0, -0.5])},
        inputs(9),
    ),
    "normal, both parameters": (
        lambda t: dist.Normal(t["mean"], jnp.exp(t["log_sd"])),
        {"log_sd": 0.3, "mean": 1.0},
        None,
    ),
    "network, normal": (
        lambda t, x: dist.Normal(network(t, x), 0.7).to_event(1),
        weights(jax.random.key(0), (2, 3, 2)),
        inputs(20),
    ),
    "network, categorical (singular)": (
        lambda t, x: dist.Categorical(logits=network(t, x)),
        weights(jax.random.key(1), (2, 4, 3)),
        inputs(12),
    ),
    "one input (singular)": (
        lambda t, x: dist.Categorical(logits=network(t, x)),
        weights(jax.random.key(2), (2, 4, 3)),
        inputs(1),
    ),
    "by quadrature": (lambda t, x: dist.VonMises(x @ t, 1.5), jnp.array([0.5, -0.2]), inputs(6)),
    "by enumeration": (
        lambda t, x: dist.OrderedLogistic(network(t["net"], x)[:, 0], jnp.cumsum(jnp.exp(t["cuts"]))),
        {"cuts": jnp.array([-0.5, 0.2, -0.1]), "net": weights(jax.random.key(5), (2, 2, 1))},
        inputs(30),
    ),
}
WITHOUT_FAMILY = ["by quadrature", "by enumeration"]
REGULAR = [name for name in PROBLEMS if "singular" not in name]
KEY = jax.random.key(3)


def laws(model, theta, x):
    draw = fb.MonteCarlo(KEY, 4)
    whole = model(theta) if x is None else model(theta, x)
    y = whole.sample(jax.random.key(4), (5,) if x is None else ())
    return {"exact": fb.Exact(), "one draw": fb.MonteCarlo(KEY, 1), "four draws": draw, "data": fb.Data(y)}


def oracle(model, theta, x, law):
    return np.asarray(fb.score_covariance(model, theta, x, law=law))


@pytest.mark.parametrize("law", ["exact", "one draw", "four draws", "data"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_matrix(name, law):
    model, theta, x = PROBLEMS[name]
    law = laws(model, theta, x)[law]
    F = oracle(model, theta, x, law)
    size = np.abs(F).max()
    for structure, build in EXACT.items():
        found = build(model, theta, x, law=law)
        np.testing.assert_allclose(found.as_matrix(), F, atol=1e-11 * size, err_msg=structure)
        np.testing.assert_allclose(found.diagonal(), np.diag(F), atol=1e-11 * size)
        np.testing.assert_allclose(found.trace(), np.trace(F), rtol=1e-11)
    np.testing.assert_allclose(
        diagonal_fisher(model, theta, x, law=law).as_matrix(), np.diag(np.diag(F)), atol=1e-11 * size
    )
    values = np.linalg.eigvalsh(F)[::-1]
    low = low_rank_fisher(model, theta, x, law=law, rank=2)
    np.testing.assert_allclose(low.eigenvalues(), values[: len(low.values)], atol=1e-7 * size)
    np.testing.assert_allclose(low.trace() + low.discarded, np.trace(F), rtol=1e-10)


@pytest.mark.parametrize("name", PROBLEMS)
def test_which_laws_have_no_closed_form(name):
    """So that rows of outcomes, and not of a family's parameters, are among those tested here."""
    model, theta, x = PROBLEMS[name]
    whole = model(theta) if x is None else model(theta, x)
    assert (find_family(whole) is None) == (name in WITHOUT_FAMILY)


@pytest.mark.parametrize("name", WITHOUT_FAMILY)
def test_products_and_solves_without_a_closed_form(name):
    model, theta, x = PROBLEMS[name]
    M = oracle(model, theta, x, fb.Exact())
    v = np.linspace(-1.0, 1.0, len(M))
    for structure, build in EXACT.items():
        F = build(model, theta, x)
        np.testing.assert_allclose(F @ v, M @ v, atol=1e-10 * np.abs(M).max(), err_msg=structure)
        solved = np.linalg.solve(M + 0.1 * np.eye(len(M)), v)
        np.testing.assert_allclose(F.solve(v, 0.1), solved, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(F.logdet(0.1), np.linalg.slogdet(M + 0.1 * np.eye(len(M)))[1], rtol=1e-9)
    K = kronecker_fisher(model, theta, x[:1])  # exact within a layer for one input
    one = oracle(model, theta, x[:1], fb.Exact())
    for block in K.blocks:
        at = np.ix_(block.index.at, block.index.at)
        np.testing.assert_allclose(K.as_matrix()[at], one[at], atol=1e-10 * np.abs(one).max())


@pytest.fixture(scope="module")
def built():
    """Every structure on two problems, with the matrix that it stands for."""
    out = {}
    for name in ("network, normal", "network, categorical (singular)"):
        model, theta, x = PROBLEMS[name]
        for structure, build in ALL.items():
            F = build(model, theta, x)
            out[structure, name] = F, np.asarray(F.as_matrix())
    return out


each = pytest.mark.parametrize("structure", ALL)
both = pytest.mark.parametrize("name", ["network, normal", "network, categorical (singular)"])


@each
@both
@pytest.mark.parametrize("damping", [0.3, "per leaf"])
def test_solve_logdet_and_forms(built, structure, name, damping):
    F, M = built[structure, name]
    theta, d = F.theta, len(M)
    D = damping
    if damping == "per leaf":
        damping = {"W1": 0.1, "W2": 0.5, "b1": 1.0, "b2": 2.0}
        if "Kronecker" in structure:  # one number for each layer
            damping = {"W1": 0.1, "W2": 0.5, "b1": 0.1, "b2": 0.5}
        D = np.concatenate([np.full(np.size(theta[k]), damping[k]) for k in theta])
    total = M + D * np.eye(d)
    V = np.asarray(jax.random.normal(jax.random.key(5), (d, 2)))
    np.testing.assert_allclose(F @ V, M @ V, atol=1e-10)
    np.testing.assert_allclose(F.solve(V, damping), np.linalg.solve(total, V), rtol=1e-6, atol=1e-7)  # CG: rtol 1e-8
    np.testing.assert_allclose(F.solve(V[:, 0], damping), np.linalg.solve(total, V[:, 0]), rtol=1e-6, atol=1e-7)
    tree = F.solve(theta, damping)
    assert jax.tree.structure(tree) == jax.tree.structure(theta)
    flat = jax.flatten_util.ravel_pytree
    np.testing.assert_allclose(flat(tree)[0], np.linalg.solve(total, flat(theta)[0]), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(F.logdet(damping), np.linalg.slogdet(total)[1], rtol=1e-9)


@each
@both
def test_draws_have_the_inverse_as_covariance(built, structure, name):
    F, M = built[structure, name]
    draws = np.asarray(F.sample(jax.random.key(6), (20_000,), damping=0.5))
    assert draws.shape == (20_000, len(M))
    covariance = np.linalg.inv(M + 0.5 * np.eye(len(M)))
    scale = np.sqrt(np.diag(covariance))
    error = (draws.T @ draws / len(draws) - covariance) / np.outer(scale, scale)
    assert np.abs(error).max() < 5.5 * np.sqrt(2 / len(draws))


@each
def test_arithmetic(built, structure):
    F, M = built[structure, "network, normal"]
    np.testing.assert_allclose((2.5 * F).as_matrix(), 2.5 * M, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose((F * 2.0).diagonal(), 2 * np.diag(M), rtol=1e-9, atol=1e-12)
    v = np.ones(len(M))
    expected = np.linalg.solve(2.5 * M + 0.1 * np.eye(len(M)), v)
    np.testing.assert_allclose((2.5 * F).solve(v, 0.1), expected, rtol=1e-5)
    other, N = built["dense", "network, normal"]
    total = F + other
    np.testing.assert_allclose(total.as_matrix(), M + N, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(total.solve(v, 0.1), np.linalg.solve(M + N + 0.1 * np.eye(len(M)), v), rtol=1e-6)
    np.testing.assert_allclose((F + F).diagonal(), 2 * np.diag(M), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(total.logdet(0.2), np.linalg.slogdet(M + N + 0.2 * np.eye(len(M)))[1], rtol=1e-9)


@each
def test_display_and_lineax(built, structure):
    F, M = built[structure, "network, categorical (singular)"]
    html = F._repr_html_()
    assert f"{len(M)} x {len(M)}" in html
    assert "Exact" in html
    assert "trace" in html
    np.testing.assert_allclose(F.as_lineax().mv(jnp.ones(len(M))), M @ np.ones(len(M)), atol=1e-10)
    assert F.shape == (len(M), len(M))


def shown(F):
    return dict(re.findall("<tr><th>(.*?)</th><td>(.*?)</td></tr>", F._repr_html_()))


@each
@both
def test_display_shows_trace_and_condition(built, structure, name):
    """Of what is cheap: eigenvalues that a structure holds, and those of a matrix that is formed."""
    F, M = built[structure, name]
    values = np.linalg.eigvalsh(M)
    singular = values[0] < 1e-13 * values[-1]
    for c in (1.0, 2.5):
        facts = shown(c * F)
        assert float(facts["trace"]) == pytest.approx(c * np.trace(M), rel=1e-3)
        if structure == "implicit":
            assert facts["condition"] == "not computed"
        elif singular:
            assert facts["condition"] == f"singular: rank {np.sum(values > 1e-13 * values[-1])} of {len(M)}"
        else:
            assert float(facts["condition"]) == pytest.approx(values[-1] / values[0], rel=1e-2)
        if "rank" in facts:
            largest = float(facts["rank"].split("eigenvalues ")[1].split(" to ")[0])
            assert largest == pytest.approx(c * values[-1], rel=1e-2)
    assert shown(F + built["dense" if structure != "dense" else "diagonal", name][0])["condition"] == "not computed"


def test_display_costs_no_more_than_the_operator(monkeypatch):
    model, theta, x = PROBLEMS["network, normal"]
    monkeypatch.setattr("fisherbook.operators.dense.SHOWN", 16)
    assert shown(dense_fisher(model, theta, x))["condition"] == "not computed"
    reads = []
    streamed = implicit_fisher(model, theta, fb.Batches(lambda: reads.append(1) or iter([x])))
    reads.clear()
    assert (shown(streamed)["trace"], shown(streamed)["condition"]) == ("not computed", "not computed")
    assert reads == []


def test_the_trace_left_out_scales_with_the_operator():
    model, theta, x = PROBLEMS["network, normal"]
    whole = np.trace(oracle(model, theta, x, fb.Exact()))
    F = 2.5 * low_rank_fisher(model, theta, x, rank=2)
    np.testing.assert_allclose(F.trace() + F.discarded, 2.5 * whole, rtol=1e-10)
    np.testing.assert_allclose(np.sum(F.eigenvalues()) + F.discarded, 2.5 * whole, rtol=1e-10)


@each
@both
def test_works_under_jit(built, structure, name):
    model, theta, x = PROBLEMS[name]
    _, M = built[structure, name]

    @jax.jit
    def step(theta, x, v):
        F = ALL[structure](model, theta, x)
        return F @ v, F.solve(v, 0.2), F.trace()

    v = jnp.linspace(-1.0, 1.0, len(M))
    product, solved, trace = step(theta, x, v)
    np.testing.assert_allclose(product, M @ v, atol=1e-9)
    np.testing.assert_allclose(solved, np.linalg.solve(M + 0.2 * np.eye(len(M)), v), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(trace, np.trace(M), rtol=1e-9)


def test_a_loop_over_products_linearises_once():
    """The hidden units are evaluated before the loop, and not in it; their derivative is a product."""
    model, theta, x = PROBLEMS["network, categorical (singular)"]

    def loop(theta, x, v):
        F = fb.implicit_fisher(model, theta, x)
        return jax.lax.fori_loop(0, 3, lambda _, v: F @ v, v)

    F = fb.implicit_fisher(model, theta, x)
    v = jnp.linspace(-1.0, 1.0, F.d)
    whole = jax.make_jaxpr(loop)(theta, x, v)
    inside = [eqn for eqn in whole.eqns if eqn.primitive.name in ("scan", "while")][-1]
    assert " dot_general" in str(inside)
    assert " tanh " in str(whole)
    assert " tanh " not in str(inside)
    np.testing.assert_allclose(jax.jit(loop)(theta, x, v), F @ (F @ (F @ v)), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("convert", [jnp.float32, np.float64, lambda leaf: np.round(9 * leaf).astype(int)])
def test_a_product_in_a_trace_takes_theta_leaf_by_leaf(convert):
    """And gives what it gives outside, whatever the type of v's numbers."""
    model, theta, x = PROBLEMS["network, categorical (singular)"]
    v = jax.tree.map(lambda leaf: convert(np.linspace(-1.0, 1.0, leaf.size).reshape(leaf.shape)), theta)
    product = lambda v: fb.implicit_fisher(model, theta, x) @ v
    expected, found = product(v), jax.jit(product)(v)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-14), found, expected)
    assert jax.tree.map(jnp.result_type, found) == jax.tree.map(jnp.result_type, expected)


def test_a_loop_over_pytrees_copies_no_vector_of_all_parameters():
    model, theta, x = PROBLEMS["network, categorical (singular)"]

    def loop(theta, v):
        F = fb.implicit_fisher(model, theta, x)
        return jax.lax.fori_loop(0, 3, lambda _, v: F @ v, v)

    inside = [e for e in jax.make_jaxpr(loop)(theta, theta).eqns if e.primitive.name in ("scan", "while")][-1]
    assert " dot_general" in str(inside)
    assert " concatenate" not in str(inside)


def test_a_condition_chooses_between_two_operators_of_one_trace():
    model, theta, x = PROBLEMS["network, categorical (singular)"]

    @jax.jit
    def chosen(first, v):
        F, G = (fb.implicit_fisher(model, jax.tree.map(lambda a, s=s: s * a, theta), x) for s in (1.0, 2.0))
        return jax.lax.cond(first, lambda: F, lambda: G) @ v

    v = jnp.linspace(-1.0, 1.0, fb.implicit_fisher(model, theta, x).d)
    for first, scale in ((True, 1.0), (False, 2.0)):
        expected = fb.dense_fisher(model, jax.tree.map(lambda a, s=scale: s * a, theta), x) @ v
        np.testing.assert_allclose(chosen(first, v), expected, rtol=1e-9, atol=1e-14)


@each
def test_singular_and_undamped_raises(built, structure):
    F, M = built[structure, "network, categorical (singular)"]
    if structure == "diagonal":  # a diagonal of positive entries is regular
        np.testing.assert_allclose(F.solve(np.ones(len(M))), 1 / np.diag(M))
        return
    for call in (lambda: F.solve(np.ones(len(M))), lambda: F.logdet(), lambda: F.sample(KEY)):
        with pytest.raises(ValueError, match="singular"):
            call()


@pytest.mark.parametrize("structure", [name for name in ALL if name not in ("implicit", "diagonal")])
def test_singular_and_undamped_raises_under_jit(structure):
    model, theta, x = PROBLEMS["network, categorical (singular)"]
    solve = jax.jit(lambda theta: ALL[structure](model, theta, x).solve(theta))
    with pytest.raises(Exception, match="singular"):
        jax.block_until_ready(solve(theta))


@pytest.mark.parametrize("structure", list(FIVE))
def test_vmap_over_theta_is_a_loop(structure):
    model, build, x = PROBLEMS["logistic regression"][0], FIVE[structure], inputs(4)
    thetas = {"constant": jnp.array([0.3, -1.0]), "slope": jnp.array([[1.0, -0.5], [0.2, 2.0]])}
    v = jnp.array([1.0, -2.0, 0.5])

    def of(theta):
        F = build(model, theta, x)
        return F @ v, F.solve(v, 0.1), F.diagonal()

    loop = [of(jax.tree.map(lambda a, i=i: a[i], thetas)) for i in range(2)]
    for found, *expected in zip(jax.vmap(of)(thetas), *loop, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-7)


@pytest.mark.parametrize("structure", list(FIVE))
def test_gradients_in_theta(structure):
    """Against central differences, whose error is h^2."""
    build, x, theta, h = FIVE[structure], inputs(4), jnp.array([1.0, -0.5]), 1e-4
    model = lambda t, x: dist.Poisson(jnp.exp(x @ t))

    def number(theta):
        F = build(model, theta, x)
        return F.logdet(0.1) + F.trace() + F.solve(jnp.ones(2), 0.1).sum()

    value = jax.jit(number)
    central = [(value(theta + h * e) - value(theta - h * e)) / (2 * h) for e in jnp.eye(2)]
    np.testing.assert_allclose(jax.grad(number)(theta), central, rtol=1e-5)


@pytest.mark.parametrize("structure", list(FIVE))
def test_one_parameter_and_an_empty_leaf(structure):
    F = FIVE[structure](lambda t: dist.Normal(0.0, t["sd"]), {"none": jnp.zeros((0, 2)), "sd": 2.0})  # F = 2 / sd^2
    np.testing.assert_allclose([F.trace(), *F.diagonal(), *F.solve(np.ones(1))], [0.5, 0.5, 2.0], rtol=1e-12)
    assert F.solve({"none": jnp.zeros((0, 2)), "sd": 1.0})["none"].shape == (0, 2)
    alone = FIVE[structure](lambda s: dist.Normal(0.0, s), 2.0)
    np.testing.assert_allclose([alone @ 1.0, alone.solve(1.0), alone.logdet()], [0.5, 2.0, np.log(0.5)], rtol=1e-12)


@each
def test_bad_arguments(built, structure):
    F, M = built[structure, "network, normal"]
    with pytest.raises(ValueError, match=f"an array \\[{len(M)}\\]"):
        F @ np.ones(3)
    with pytest.raises(ValueError, match="damping must be finite and not negative"):
        F.solve(np.ones(len(M)), -1.0)
    with pytest.raises(ValueError, match="one number per leaf"):
        F.solve(np.ones(len(M)), {"W1": 1.0})
    with pytest.raises(ValueError, match="positive number"):
        -1.0 * F


def test_closed_form_where_no_law_is_exact():
    """A ten-dimensional normal: the definitions raise and point to the operators."""
    model, theta = (lambda t: dist.MultivariateNormal(t, 2.0 * jnp.eye(10))), jnp.zeros(10)
    with pytest.raises(ValueError, match="dense_fisher"):
        fb.score_covariance(model, theta)
    np.testing.assert_allclose(dense_fisher(model, theta).as_matrix(), jnp.eye(10) / 2, atol=1e-15)


@pytest.mark.parametrize(
    ("model", "theta"),
    [
        (lambda t: dist.Bernoulli(probs=t), 0.0),
        (lambda t: dist.Bernoulli(probs=t), 1.0),
        (lambda t: dist.Poisson(t**2), 0.0),
        (lambda t: dist.Categorical(probs=jnp.array([t, 1 - t])), 0.0),
    ],
)
def test_edge_of_the_parameter_set(model, theta):
    with pytest.raises(ValueError, match="edge of its set"):
        dense_fisher(model, theta)


def test_probabilities_that_do_not_stay_on_the_simplex():
    with pytest.raises(ValueError, match="normalised at this theta only"):
        dense_fisher(lambda t: dist.Categorical(probs=jnp.array([t, 0.7])), 0.3)


def test_structural_zero_is_no_edge():
    F = dense_fisher(lambda t: dist.Categorical(probs=jnp.array([t, 1 - t, 0.0])), 0.2)
    np.testing.assert_allclose(F.as_matrix(), [[1 / 0.2 + 1 / 0.8]])


@pytest.mark.parametrize("mix", [lambda x: x - x.mean(0), lambda x: x[::-1]], ids=["mean", "order"])
def test_rows_that_depend_on_each_other(mix):
    with pytest.raises(ValueError, match="depend on each other"):
        dense_fisher(lambda t, x: dist.Normal(mix(x) @ t, 1.0), jnp.ones(2), inputs(10))


@pytest.mark.parametrize("d", [400, 401, 1201, 2203])
def test_columns_in_pieces_give_the_whole_matrix(d):
    """More parameters than one product of columns takes; no layer, so that R is formed."""
    A, theta = jax.random.normal(jax.random.key(70), (3, d)), jax.random.normal(jax.random.key(71), (d,)) / d
    model = lambda t, x: dist.Normal(jnp.sin(A @ (t + t**2)) * (1 + x), 0.5).to_event(1)
    x = jnp.linspace(0.0, 1.0, 2)[:, None]
    slope = jnp.cos(A @ (theta + theta**2))[:, None] * A * (1 + 2 * theta)
    expected = slope.T @ slope / 0.25 * np.mean((1 + x) ** 2)
    F = dense_fisher(model, theta, x).as_matrix()
    np.testing.assert_allclose(F, expected, rtol=1e-12, atol=1e-12 * np.max(expected))
    np.testing.assert_array_equal(F, F.T)


def test_blocks_of_rows_change_nothing(monkeypatch):
    """With a cap that forces blocks of 3 of 20 rows, the last one overlapping."""
    model, theta, x = PROBLEMS["network, normal"]
    whole = oracle(model, theta, x, fb.Exact())
    law = fb.MonteCarlo(KEY, 2)
    drawn = oracle(model, theta, x, law)
    v = jnp.linspace(-1, 1, len(whole))
    monkeypatch.setattr("fisherbook.root.CAP", 300)
    monkeypatch.setattr("fisherbook.operators.row_blocks.BLOCK", 300)
    monkeypatch.setattr("fisherbook.operators.implicit.CAP", 300)
    monkeypatch.setattr("fisherbook.operators.low_rank.CAP", 300)
    for each_law, F in ((fb.Exact(), whole), (law, drawn)):
        np.testing.assert_allclose(dense_fisher(model, theta, x, law=each_law).as_matrix(), F, atol=1e-12)
        np.testing.assert_allclose(diagonal_fisher(model, theta, x, law=each_law).diagonal(), np.diag(F), atol=1e-12)
        np.testing.assert_allclose(implicit_fisher(model, theta, x, law=each_law) @ v, F @ v, atol=1e-12)
    low = low_rank_fisher(model, theta, x, rank=17)
    np.testing.assert_allclose(low.as_matrix(), whole, atol=1e-9)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_float32_and_new_weights_without_a_new_program(dtype):
    model, theta, x = PROBLEMS["network, categorical (singular)"]
    F = np.asarray(fb.score_covariance(model, theta, x))
    cast = lambda tree: jax.tree.map(lambda a: a.astype(dtype), tree)
    traces = []

    @jax.jit
    def product(theta, x, v):
        traces.append(1)
        return implicit_fisher(model, theta, x) @ v, dense_fisher(model, theta, x).as_matrix()

    v = jnp.ones(len(F), dtype)
    found, matrix = product(cast(theta), cast(x), v)
    assert found.dtype == matrix.dtype == dtype
    atol = 20 * jnp.finfo(dtype).eps * np.abs(F).max()
    np.testing.assert_allclose(found, F @ np.ones(len(F)), atol=len(F) * atol)
    np.testing.assert_allclose(matrix, F, atol=atol)
    product(cast(jax.tree.map(lambda a: a + 1, theta)), cast(x), v)
    assert len(traces) == 1


@each
def test_new_weights_compile_nothing(structure, caplog):
    """Outside jit, also with the model written anew."""
    _, theta, x = PROBLEMS["network, categorical (singular)"]

    def use(theta):
        F = ALL[structure](lambda t, x: dist.Categorical(logits=network(t, x)), theta, x)
        jax.block_until_ready([F @ jnp.ones(F.d), F @ theta, F.diagonal(), F.trace()])

    use(theta)
    other = jax.tree.map(lambda leaf: leaf + 0.1, theta)
    programs = set(SEEN)
    with jax.log_compiles(), caplog.at_level(logging.WARNING, "jax"):
        use(other)
        assert "Finished XLA compilation" not in caplog.text
        assert set(SEEN) == programs
        jax.jit(lambda a: a + 1)(1.0)  # that a new program does say so
        assert "Finished XLA compilation" in caplog.text


def safe_information(function, theta, x):
    """J^T (diag p - p p^T) J, as a sum of p_i p_j (J_i - J_j)(J_i - J_j)^T over pairs: nothing cancels."""
    flat, unravel = jax.flatten_util.ravel_pytree(theta)
    J = np.asarray(jax.jacrev(lambda f: function(unravel(f), x))(flat))
    log_p = np.asarray(jax.nn.log_softmax(function(theta, x)))
    pairs = [(i, j) for i in range(log_p.shape[1]) for j in range(i)]
    rows = [np.exp((log_p[:, i] + log_p[:, j]) / 2)[:, None] * (J[:, i] - J[:, j]) for i, j in pairs]
    return sum(R.T @ R for R in rows) / len(x)


@pytest.mark.parametrize("factor", [20.0, 1000.0])
def test_confident_logits(factor):
    """1 - p is below rounding for many inputs, and for some p underflows; the logits' own rounding is 1e-12."""
    theta, x = weights(jax.random.key(1), (2, 4, 3)), inputs(12)
    theta = theta | {"W2": factor * theta["W2"]}
    model = lambda t, x: dist.Categorical(logits=network(t, x))
    rest = -np.expm1(jax.nn.log_softmax(network(theta, x)).max(1))
    assert np.sum(rest < 1e-8) >= 3
    M = safe_information(network, theta, x)
    size, v = np.abs(M).max(), np.linspace(-1.0, 1.0, len(M))
    assert size > 0
    for structure, build in EXACT.items():
        F = build(model, theta, x)
        np.testing.assert_allclose(F.as_matrix(), M, rtol=1e-7, atol=1e-11 * size, err_msg=structure)
        np.testing.assert_allclose(F @ v, M @ v, rtol=1e-7, atol=1e-11 * size, err_msg=structure)
    np.testing.assert_allclose(diagonal_fisher(model, theta, x).diagonal(), np.diag(M), rtol=1e-9)
    np.testing.assert_allclose(implicit_fisher(model, theta, x).trace(), np.trace(M), rtol=1e-9)
    for corrected in (False, True):
        K = kronecker_fisher(model, theta, x, corrected=corrected)
        assert np.isfinite(K.as_matrix()).all()
        assert np.isfinite(K.solve(v, 1e-3 * size)).all()
    np.testing.assert_allclose(K.trace(), np.trace(M), rtol=1e-8)  # the corrected one keeps it
    for k in range(len(x)):  # the Kronecker product is exact for one input, however sure of it the model is
        one = safe_information(network, theta, x[k : k + 1])
        K = kronecker_fisher(model, theta, x[k : k + 1])
        for block in K.blocks:
            at = np.ix_(block.index.at, block.index.at)
            atol = 1e-11 * np.abs(one).max() + 1e-300  # numbers below 2e-308 are rounded to zero
            np.testing.assert_allclose(K.as_matrix()[at], one[at], rtol=1e-6, atol=atol)


@pytest.mark.parametrize("name", CURVLINOPS["products"])
def test_a_convolution_beside_curvlinops(name):
    """curvlinops 3 on the same weights and images, in float64 (benchmarks/peers/curvlinops_reference.py)."""
    theta, x, v, wanted = (CURVLINOPS[field] for field in ("theta", "x", "v", "products"))

    def model(t, x):
        K, b, W, c = t
        axes = ("NCHW", "OIHW", "NCHW")
        h = jax.lax.conv_general_dilated(x, K, (2, 2), ((1, 1), (1, 1)), dimension_numbers=axes) + b[:, None, None]
        return dist.Categorical(logits=jnp.tanh(h).reshape(len(x), -1) @ W.T + c)

    F = kronecker_fisher(model, [jnp.array(p) for p in theta], jnp.array(x), corrected=name == "EKFAC")
    assert [len(block.index.at) for block in F.blocks] == [57, 112]
    np.testing.assert_allclose(F @ jnp.array(v), wanted[name], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("law", [fb.Exact(), fb.MonteCarlo(KEY, 3)], ids=["exact", "draws"])
def test_matrix_can_be_differentiated(law):
    """The derivative of F for a logistic regression, against that of the score covariance."""
    x, model = jnp.linspace(-1.0, 1.0, 5)[:, None], lambda t, x: dist.Bernoulli(logits=x @ t)
    found = jax.grad(lambda t: dense_fisher(model, t[None], x, law=law).as_matrix()[0, 0])(0.7)
    expected = jax.grad(lambda t: fb.score_covariance(model, t[None], x, law=law)[0, 0])(0.7)
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_trace_estimate_has_an_error_bar():
    model, theta, x = PROBLEMS["network, categorical (singular)"]
    F = implicit_fisher(model, theta, x)
    value, error = F.trace_estimate(jax.random.key(8), 200)
    assert 0 < error < 0.2 * F.trace()
    assert abs(value - F.trace()) < 4.5 * error


def test_diagonal_estimate_has_error_bars():
    model, theta, x = PROBLEMS["network, categorical (singular)"]
    F = implicit_fisher(model, theta, x)
    value, error = (3.0 * F).diagonal_estimate(jax.random.key(8), 400)
    exact = (3.0 * F).diagonal()
    off = np.abs(value - exact) / np.maximum(error, 1e-12)
    assert np.all(off < 5)
    assert 0.5 < np.sqrt(np.mean(off**2)) < 1.5  # the errors are as large as they say


def entangled(theta, x):
    """No parameter enters linearly, and W is used twice."""
    h = jnp.tanh(x @ (theta["W"] + 0 * theta["W"] ** 2))
    return dist.Categorical(logits=jnp.tanh(h @ theta["W"].T) @ theta["V"] ** 3)


def test_diagonal_of_a_model_too_large_for_all_outcomes_at_once(monkeypatch):
    """Row by row of R for each input; the largest array then has no axis for the outcomes."""
    rng = np.random.default_rng(3)
    theta = {"W": jnp.asarray(rng.normal(size=(4, 6))), "V": jnp.asarray(rng.normal(size=(4, 5)))}
    x = jnp.asarray(rng.normal(size=(7, 4)))
    expected = np.diag(fb.score_covariance(entangled, theta, x))
    monkeypatch.setattr("fisherbook.operators.diagonal.BLOCK", 100)
    monkeypatch.setattr("fisherbook.operators.diagonal.leaf_rows", None)
    np.testing.assert_allclose(diagonal_fisher(entangled, theta, x).diagonal(), expected, rtol=1e-9)
    alone = lambda t: entangled(t, x[:1]).to_event(1)
    np.testing.assert_allclose(
        diagonal_fisher(alone, theta).diagonal(), np.diag(fb.score_covariance(entangled, theta, x[:1])), rtol=1e-9
    )


def test_row_space_of_a_large_model_forms_no_rows(monkeypatch):
    rng = np.random.default_rng(3)
    theta = {"W": jnp.asarray(rng.normal(size=(4, 9))), "V": jnp.asarray(rng.normal(size=(4, 5)))}
    x = jnp.asarray(rng.normal(size=(3, 4)))
    exact, v = dense_fisher(entangled, theta, x), jnp.asarray(rng.normal(size=56))
    monkeypatch.setattr("fisherbook.operators.implicit.CAP", 100)
    monkeypatch.setattr("fisherbook.operators.implicit.dense_rows", None)
    F = implicit_fisher(entangled, theta, x)
    np.testing.assert_allclose(F.solve(v, 0.1), exact.solve(v, 0.1), rtol=1e-9)
    monkeypatch.setattr("fisherbook.operators.implicit.LARGEST", 50)
    with pytest.raises(ValueError, match="need at most 50 rows or parameters, and 400 entries of R"):
        F.logdet(0.1)


def test_conjugate_gradients_that_do_not_converge():
    model, theta, x = PROBLEMS["network, normal"]
    F = implicit_fisher(model, theta, x, max_steps=2)
    with pytest.raises(ValueError, match="did not converge"):
        F.solve(jnp.ones(17), 1e-6)
    exact = dense_fisher(model, theta, x)
    helped = implicit_fisher(model, theta, x, max_steps=2, preconditioner=lambda v: exact.solve(v, 1e-3))
    np.testing.assert_allclose(helped.solve(jnp.ones(17), 1e-3), exact.solve(jnp.ones(17), 1e-3), rtol=1e-5)


def one_column_twice(t, x):
    return dist.Normal(x[:, 0] * (t[0] + t[1]) + x[:, 1] * t[2], 1.0)


@pytest.mark.parametrize("damping", [0.0, 1e-18])
def test_a_singular_matrix_is_refused_by_products_too(damping):
    """The right side lies in the range of F: the residual of conjugate gradients is zero, and says nothing."""
    F = implicit_fisher(one_column_twice, jnp.zeros(3), inputs(6))
    v = dense_fisher(one_column_twice, jnp.zeros(3), inputs(6)) @ jnp.array([1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="singular"):
        F.solve(v, damping)
    with pytest.raises(Exception, match="singular"):
        jax.jit(lambda v, damping: F.solve(v, damping))(v, damping)


def test_regular_and_undamped_under_jit():
    model, theta, x = PROBLEMS["network, normal"]
    v = jnp.linspace(-1, 1, 17)
    expected = dense_fisher(model, theta, x).solve(v)
    solved = jax.jit(lambda v: implicit_fisher(model, theta, x, rtol=1e-12).solve(v))(v)
    np.testing.assert_allclose(solved, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@each
def test_vectors_of_another_type_and_vectors_that_are_not_finite(built, structure):
    F, M = built[structure, "network, normal"]
    for v in (np.arange(len(M)), np.arange(len(M), dtype=np.float32)):
        np.testing.assert_allclose(F @ v, F @ v.astype(float), rtol=1e-12)
        np.testing.assert_allclose(F.solve(v, 0.1), F.solve(v.astype(float), 0.1), rtol=1e-7)
    with pytest.raises(ValueError, match="v holds NaN"):
        F.solve(np.full(len(M), np.nan), 0.1)


def test_damping_that_was_computed_outside_a_program():
    F, damping = dense_fisher(*PROBLEMS["logistic regression"]), jnp.zeros(()) + 0.1
    v = jnp.ones(3)
    np.testing.assert_allclose(jax.jit(lambda v: F.solve(v, damping))(v), F.solve(v, 0.1), rtol=1e-12)


@pytest.mark.parametrize("corrected", [False, True])
def test_a_model_that_uses_no_parameter(corrected):
    F = kronecker_fisher(lambda t, x: dist.Normal(x[:, 0], 1.0), jnp.ones(2), inputs(6), corrected=corrected)
    np.testing.assert_array_equal(F.as_matrix(), np.zeros((2, 2)))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda *problem: low_rank_fisher(*problem, rank=0), ValueError, "rank must be a whole number"),
        (lambda *problem: low_rank_fisher(*problem, rank=1.5), ValueError, "rank must be a whole number"),
        (lambda *problem: implicit_fisher(*problem, rtol=10), ValueError, "rtol is a relative residual"),
        (lambda *problem: implicit_fisher(*problem, max_steps=0), ValueError, "max_steps must be at least 1"),
        (lambda *problem: implicit_fisher(*problem, preconditioner=np.eye(3)), TypeError, "preconditioner must be"),
        (
            lambda *problem: implicit_fisher(*problem).trace_estimate(jax.random.key(0), 1),
            ValueError,
            "at least 2 draws",
        ),
    ],
)
def test_bad_options(call, error, message):
    with pytest.raises(error, match=message):
        call(*PROBLEMS["logistic regression"])
