"""The layers found by tracing: what is found, and that their derivatives are those of the function.

The reference is `jax.jacrev` of the function itself, which knows nothing of layers.
"""

import re
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from jax.flatten_util import ravel_pytree

from fisherbook.layers import find_layers, jacobian_of, leaf_sizes, linear_layers
from fisherbook.operators import dense_fisher, kronecker_fisher

jax.config.update("jax_enable_x64", True)


def random_like(tree, seed=0):
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    made = [jnp.asarray(rng.normal(size=np.shape(leaf)), jnp.result_type(leaf)) for leaf in leaves]
    return jax.tree.unflatten(structure, made)


def normal(*shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def find(function, theta, row):
    """`function(theta, row)` of a pytree theta, as the engine wants it."""
    flat, unravel = ravel_pytree(theta)
    of_flat = lambda flat, row: function(unravel(flat), row)
    return of_flat, flat, find_layers(of_flat, flat, row, leaf_sizes(theta))


def jacobian(layers, flat, row):
    """[outputs, d] from activations and backward signals, one reverse pass per output."""
    zeros = layers.zero_shifts(), jnp.zeros(layers.rest.size)
    run = lambda shifts, rest: layers.perturbed(flat, row, shifts, rest)
    outputs, back, activations = jax.vjp(run, *zeros, has_aux=True)
    units, unravel = ravel_pytree(outputs)

    def one(unit):
        signals, rest = back(unravel(unit))
        J = jnp.zeros(flat.size).at[layers.rest].add(rest)
        for layer, a, g in zip(layers.found, activations, signals, strict=True):
            J = J.at[layer.entries].add(jacobian_of(layer, a, g))
        return J

    return jax.vmap(one)(jnp.eye(units.size, dtype=units.dtype)), outputs


def check(function, theta, row, rtol=1e-12):
    """The layers of a function, after its outputs and Jacobian were compared with those of the function."""
    of_flat, flat, layers = find(function, theta, row)
    plain = lambda flat, row: ravel_pytree(of_flat(flat, row))[0]
    both = lambda flat, row: (jacobian(layers, flat, row), jax.jacrev(plain)(flat, row), plain(flat, row))
    (J, outputs), reference, expected = jax.tree.map(np.asarray, jax.jit(both)(flat, row))
    np.testing.assert_allclose(ravel_pytree(outputs)[0], expected, rtol=rtol, atol=rtol)
    np.testing.assert_allclose(J, reference, rtol=rtol, atol=rtol * max(1.0, np.abs(reference).max()))
    assert not reference[:, layers.unused].any()
    return layers


def kinds(layers):
    return [layer.kind for layer in layers.found]


X = normal(1, 3)
MLP = random_like({"W": jnp.ones((3, 4)), "b": jnp.ones(4), "V": jnp.ones((4, 2)), "c": jnp.ones(2)})


def mlp(t, x, activation=jnp.tanh):
    return activation(x @ t["W"] + t["b"]) @ t["V"] + t["c"]


def test_dense_layers_with_their_biases():
    layers = check(mlp, MLP, X)
    assert kinds(layers) == ["dense", "dense"]
    assert layers.everything
    assert not layers.unused.size
    W, V = layers.found
    # `ravel_pytree` sorts the keys: V, W, b, c
    np.testing.assert_array_equal(W.weight, 8 + np.arange(12).reshape(3, 4))
    np.testing.assert_array_equal(W.bias, 20 + np.arange(4))
    np.testing.assert_array_equal(V.weight, np.arange(8).reshape(4, 2))
    np.testing.assert_array_equal(V.bias, 24 + np.arange(2))
    assert (W.positions, W.uses, W.tied, W.parameters) == (1, 1, False, "W, b")


# --- how a layer may be written: each is found, and its derivatives are exact -----------------------------------


@jax.custom_vjp
def clipped(h):
    return h


clipped.defvjp(lambda h: (h, None), lambda _, g: (jnp.clip(g, -0.1, 0.1),))


@jax.custom_jvp
def straight_through(h):
    return jnp.round(h)


straight_through.defjvp(lambda primals, tangents: (jnp.round(primals[0]), tangents[0]))


def remat(t, x):
    h = jax.checkpoint(lambda t, x: jnp.tanh(x @ t["W"] + t["b"]))(t, x)
    return h @ t["V"] + t["c"]


def convolution(t, x, numbers, stride=1, padding="SAME", dilation=1, base=1):
    pairs = [(k,) * 2 for k in (stride, dilation, base)]
    return jnp.sin(jax.lax.conv_general_dilated(x, t["K"], pairs[0], padding, pairs[2], pairs[1], numbers) + t["b"])


def layer_norm(t, x):
    h = x @ t["W"]
    h = (h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 1e-6)
    return h * t["scale"] + t["shift"]


def attention(t, x):  # weights with three axes, one product for all heads
    q, k, v = (jnp.einsum("nti,ihk->nthk", x, t[name]) for name in "qkv")
    p = jax.nn.softmax(jnp.einsum("nthk,nshk->nhts", q, k))
    return jnp.einsum("nthk,hko->nto", jnp.einsum("nhts,nshk->nthk", p, v), t["o"])


def recurrent(t, x):  # an unrolled loop: one weight at each time
    h = jnp.zeros((1, 4))
    for i in range(3):
        h = jnp.tanh(x[:, i] @ t["W"] + h @ t["U"] + t["b"])
    return h


K = {"K": normal(3, 3, 2, 4), "b": normal(4)}
NCHW = {"K": normal(4, 2, 3, 3), "b": normal(4, 1, 1)}
IMAGE, SEQUENCE = normal(1, 5, 6, 2), normal(1, 3, 3)
HEADS = {"q": normal(3, 2, 4), "k": normal(3, 2, 4, seed=2), "v": normal(3, 2, 4, seed=3), "o": normal(2, 4, 3)}
NORM = {"W": normal(3, 4), "scale": normal(4), "shift": normal(4)}
TABLE = {"E": normal(6, 4), "P": normal(3, 4), "V": normal(4, 2)}
WORDS = jnp.array([[1, -1, 1]])
RNN = {"W": normal(3, 4), "U": normal(4, 4), "b": normal(4)}
DENSE = ["dense", "dense"]

FOUND = {
    "relu": (partial(mlp, activation=jax.nn.relu), MLP, X, DENSE),
    "gelu": (partial(mlp, activation=jax.nn.gelu), MLP, X, DENSE),
    "softmax": (partial(mlp, activation=jax.nn.softmax), MLP, X, DENSE),
    "a custom rule around no parameter": (partial(mlp, activation=clipped), MLP, X, DENSE),
    "straight-through rounding": (partial(mlp, activation=straight_through), MLP, X, DENSE),
    "jit": (jax.jit(mlp), MLP, X, DENSE),
    "jit of jit": (jax.jit(lambda t, x: jax.jit(mlp)(t, x) * 2), MLP, X, DENSE),
    "vmap": (lambda t, x: jax.vmap(lambda x: mlp({**t, "W": t["W"]}, x))(x), MLP, X, DENSE),
    "W @ x": (lambda t, x: jax.vmap(lambda x: jnp.sin(t["W"].T @ x + t["b"]))(x), MLP, X, ["dense"]),
    "checkpoint": (remat, MLP, X, DENSE),
    "positions": (mlp, MLP, SEQUENCE, DENSE),
    "positions, vmap": (lambda t, x: jax.vmap(jax.vmap(lambda x: mlp(t, x)))(x), MLP, SEQUENCE, DENSE),
    "flat theta": (lambda t, x: x @ t[:6].reshape(3, 2) + t[6:], normal(8), X, ["dense"]),
    "bias first": (lambda t, x: jnp.exp(t["b"] + x @ t["W"]), MLP, X, ["dense"]),
    "minus a bias": (lambda t, x: jnp.exp(x @ t["W"] - t["b"]), MLP, X, ["dense", "shift"]),
    "scaled weights": (lambda t, x: x @ (t["W"] / jnp.sqrt(3.0)) + 0.1 * t["b"], MLP, X, ["dense", "shift"]),
    "pretrained plus": (lambda t, x: jnp.sin(x @ (np.ones((3, 4)) + t["W"])) + t["b"], MLP, X, ["dense", "shift"]),
    "output": (lambda t, x: (jnp.sin(x) @ t["W"], t["b"], 2 * t["c"]), MLP, X, ["dense", "shift", "shift"]),
    "NHWC": (partial(convolution, numbers=("NHWC", "HWIO", "NHWC")), K, IMAGE, ["convolution"]),
    "NCHW, stride": (
        partial(convolution, numbers=("NCHW", "OIHW", "NCHW"), stride=2),
        NCHW,
        jnp.moveaxis(IMAGE, -1, 1),
        ["convolution"],
    ),
    "VALID, dilation": (
        partial(convolution, numbers=("NHWC", "HWIO", "NHWC"), padding="VALID", dilation=2),
        K,
        IMAGE,
        ["convolution"],
    ),
    "transposed, cropped": (
        partial(convolution, numbers=("NHWC", "HWIO", "NHWC"), padding=((2, 1), (-1, 3)), base=2, stride=3),
        K,
        IMAGE,
        ["convolution"],
    ),
    "layer norm": (layer_norm, NORM, X, ["dense", "scale", "shift"]),
    "attention": (attention, HEADS, normal(1, 5, 3), ["dense"] * 4),
    "embedding": (
        lambda t, i: jnp.tanh(t["E"][i] + t["P"]) @ t["V"],
        TABLE,
        WORDS,
        ["embedding", "shift", "dense"],
    ),
    "take": (lambda t, i: jnp.take(2 * t["E"], i, axis=1), TABLE, jnp.array([[1, -1]]), ["embedding"]),
    "one row": (lambda t, i: jnp.sin(t["E"][i[0, 0]]), TABLE, WORDS, ["embedding"]),
    "divided": (lambda t, x: t["W"][:, 0] / jnp.exp(x), MLP, X, ["scale"]),
    "chosen": (lambda t, x: jnp.where(x > 0, x, t["W"][:, 0]) ** 2, MLP, X, ["shift"]),
    "class token": (lambda t, x: jnp.sin(jnp.concatenate([t["W"][None, :, 0], x])), MLP, X, ["shift"]),
    "constant indices": (lambda t, x: x @ t["W"][:, np.array([2, 0])], MLP, X, ["dense"]),
    "Toeplitz": (lambda t, x: jnp.sin(x @ t[np.abs(np.arange(3)[:, None] - np.arange(3))]), normal(3), X, ["dense"]),
    "a head each": (lambda t, x: jnp.einsum("nhi,hio->nho", x, t), normal(2, 3, 4), normal(1, 2, 3), DENSE),
    "stop_gradient": (lambda t, x: mlp({**t, "W": jax.lax.stop_gradient(t["W"])}, x), MLP, X, ["shift", "dense"]),
    "no row": (lambda t, row: jnp.sin(np.ones((5, 3)) @ t["W"] + t["b"]), MLP, None, ["dense"]),
    "recurrent": (recurrent, RNN, SEQUENCE, ["dense", "dense"]),
}


@pytest.mark.parametrize("name", FOUND)
def test_found_however_it_is_written(name):
    function, theta, row, expected = FOUND[name]
    layers = check(function, theta, row)
    assert kinds(layers) == expected
    assert layers.everything, layers


def test_what_shares_a_weight():
    W, U = find(recurrent, RNN, SEQUENCE)[2].found
    # the bias follows x W in the sum, at each of three times; the first U meets the constant h = 0
    assert (W.kind, W.uses, W.positions, W.tied, W.parameters) == ("dense", 3, 3, False, "W, b")
    assert (U.uses, U.positions, U.bias) == (3, 3, None)
    heads = find(attention, HEADS, normal(1, 5, 3))[2].found
    assert [(h.positions, h.uses) for h in heads] == [(5, 1)] * 4

    tied = check(lambda t, x: jax.nn.sigmoid(x @ t["W"] + t["b"]) @ t["W"].T, MLP, X)
    assert kinds(tied) == ["dense", "dense"]
    assert all(layer.tied for layer in tied.found)
    np.testing.assert_array_equal(tied.found[0].weight, tied.found[1].weight.T)
    (toeplitz,) = find(*FOUND["Toeplitz"][:3])[2].found
    assert toeplitz.tied


# --- what enters otherwise is reported, and its derivatives come with the rest -----------------------------------


@jax.custom_vjp
def noisy_dense(W, x):  # its rule is not the derivative of its body
    return x @ W


noisy_dense.defvjp(lambda W, x: (x @ W, x), lambda x, g: (x.T @ jnp.sign(g), g @ jnp.ones((4, 3))))


@jax.custom_jvp
def odd_dense(W, x):
    return x @ W


odd_dense.defjvp(lambda p, t: (p[1] @ p[0], 3 * p[1] @ t[0] + t[1] @ p[0]))


def scanned(t, x):
    step = lambda h, b: (jnp.tanh(h @ t["S"] + b), None)
    return jax.lax.scan(step, x, t["B"])[0] @ t["W"]


SCAN = {"S": normal(3, 3), "B": normal(4, 3), "W": normal(3, 2)}
BRANCH = lambda t, x: jax.lax.cond(x.sum() > 0, lambda: x @ t["W"], lambda: x @ jnp.sin(t["W"])) + t["b"]
MISSING = {
    "custom_vjp": (lambda t, x: noisy_dense(t["W"], x) + t["b"], MLP, X, "W", "custom_vjp.*rule of its own"),
    "custom_jvp": (lambda t, x: odd_dense(t["W"], x) + t["b"], MLP, X, "W", "custom_jvp.*rule of its own"),
    "rounded weights": (lambda t, x: x @ straight_through(t["W"]) + t["b"], MLP, X, "W", "rule of its own"),
    "scan": (scanned, SCAN, X, "B, S", "scan, which is not opened"),
    "cond": (BRANCH, MLP, X, "W", "cond, which is not opened"),
    "masked weights": (lambda t, x: x @ (t["W"] * np.eye(3, 4)) + t["b"], MLP, X, "W", "multiplied by constants"),
    "product of parameters": (lambda t, x: x @ (t["W"] @ t["V"]) + t["c"], MLP, X, "V, W", "another parameter"),
    "weight norm": (lambda t, x: x @ (t["W"] / jnp.linalg.norm(t["W"])) + t["b"], MLP, X, "W", "in mul"),
    "softplus": (lambda t, x: (x @ t["W"], jax.nn.softplus(t["b"])), MLP, X, "b", "enters"),
    "part of a product": (lambda t, x: x @ t["W"] + t["W"][0, 0] ** 2 + t["b"], MLP, X, "W\\[0:1\\]", "enters"),
    "grouped convolution": (
        lambda t, x: (
            jax.lax.conv_general_dilated(
                x, t["K"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2
            )
            + t["b"]
        ),
        {"K": normal(3, 3, 1, 4), "b": normal(4)},
        IMAGE,
        "K",
        "grouped",
    ),
    "many heads": (lambda t, x: jnp.einsum("nhi,hio->nho", x, t), normal(65, 1, 2), normal(1, 65, 1), "theta", "65"),
    "two indices": (lambda t, i: t["W"][i, i] ** 2, MLP, jnp.array([1]), "W", "several axes"),
    "divisor": (lambda t, x: x / t["W"][:, 0], MLP, X, "3 of 12 in W", "divides"),
    "cumulative": (lambda t, x: x[:, :1] - jnp.cumsum(t["b"]), MLP, X, "b", "cumsum"),
}


@pytest.mark.parametrize("name", MISSING)
def test_what_is_not_found_is_reported_and_still_exact(name):
    function, theta, row, parameters, reason = MISSING[name]
    layers = check(function, theta, row)
    assert not layers.everything
    assert any(re.fullmatch(parameters, m.parameters) and re.search(reason, m.reason) for m in layers.missing), layers
    assert layers.missing[0].reason in str(layers)


def test_an_entry_lost_at_one_use_is_lost_with_the_products_it_is_in():
    layers = check(MISSING["part of a product"][0], MLP, X)
    assert kinds(layers) == ["shift"]  # the bias, whose product is no layer
    assert "enters together with entries that are lost" in [m.reason for m in layers.missing]


def test_a_loop_of_unknown_length():
    loop = lambda t: jax.lax.while_loop(lambda h: jnp.any(h < 1), lambda h: h + t["b"] ** 2, t["b"])
    layers = find(lambda t, x: x @ t["W"] + loop(t), MLP, X)[2]  # reverse mode has no derivative of it
    assert [(m.parameters, m.reason) for m in layers.missing] == [("b", "enters while, which is not opened")]


def test_unused_parameters():
    layers = check(lambda t, x: x @ t["W"], MLP, X)
    assert layers.everything
    assert "unused: V, b, c" in str(layers)
    np.testing.assert_array_equal(layers.unused, [*range(8), *range(20, 26)])


def test_an_index_outside_reads_nothing():
    take = lambda t, i: jnp.take(t["E"], i, axis=0, mode="fill", fill_value=0.0)
    clip = lambda t, i: jnp.take(t["E"], i, axis=0, mode="clip")
    for function in (take, clip):
        assert kinds(check(function, TABLE, jnp.array([[1, 9]]))) == ["embedding"]


# --- libraries ------------------------------------------------------------------------------------------------


class Net(eqx.Module):
    convolution: eqx.nn.Conv2d
    norm: eqx.nn.LayerNorm
    embedding: eqx.nn.Embedding
    mlp: eqx.nn.MLP
    rate: jax.Array

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.convolution = eqx.nn.Conv2d(2, 3, 3, stride=2, key=keys[0])
        self.norm, self.rate = eqx.nn.LayerNorm(12), jnp.array(0.3)
        self.embedding = eqx.nn.Embedding(5, 12, key=keys[1])
        self.mlp = eqx.nn.MLP(12, 2, 4, 1, activation=jax.nn.silu, key=keys[2])

    def __call__(self, image, word):
        h = self.norm(self.convolution(image).ravel()) + self.embedding(word)
        return self.mlp(h), jnp.exp(self.rate)


def test_equinox():
    arrays, static = eqx.partition(Net(jax.random.key(0)), eqx.is_inexact_array)
    function = lambda t, row: jax.vmap(eqx.combine(t, static))(*row)
    layers = check(function, arrays, (normal(1, 2, 5, 6), jnp.array([3])))
    assert kinds(layers) == ["convolution", "scale", "shift", "embedding", "dense", "dense"]
    assert layers.found[0].parameters == "convolution.weight, convolution.bias"
    assert [m.parameters for m in layers.missing] == ["rate"]


def test_flax():
    nnx = pytest.importorskip("flax.nnx")

    class FlaxNet(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(2, 3, (3, 3), rngs=rngs)
            self.norm = nnx.LayerNorm(3, rngs=rngs)
            self.words = nnx.Embed(5, 3, rngs=rngs)
            self.head = nnx.Linear(3, 2, rngs=rngs)

        def __call__(self, image, word):
            h = self.norm(self.conv(image)).mean((1, 2)) + self.words(word)
            return self.head(nnx.gelu(h))

    definition, state = nnx.split(FlaxNet(nnx.Rngs(0)), nnx.Param)
    function = lambda t, row: nnx.merge(definition, t)(*row)
    layers = check(function, state, (normal(1, 4, 5, 2), jnp.array([3])), rtol=1e-5)  # flax computes in float32
    assert sorted(kinds(layers)) == ["convolution", "dense", "embedding", "scale", "shift"]
    assert layers.everything, layers


def test_fisher_of_flax():
    """The same network, its weights in an nnx state and in a dict: matrices, and blocks of layers."""
    nnx = pytest.importorskip("flax.nnx")

    class FlaxNet(nnx.Module):
        def __init__(self, rngs):
            as_is = dict(rngs=rngs, dtype=jnp.float64, param_dtype=jnp.float64)
            self.first, self.last = nnx.Linear(3, 4, **as_is), nnx.Linear(4, 2, **as_is)

        def __call__(self, x):
            return self.last(nnx.silu(self.first(x)))

    definition, state = nnx.split(FlaxNet(nnx.Rngs(0)), nnx.Param)
    in_flax = lambda t, x: dist.Categorical(logits=nnx.merge(definition, t)(x))
    layer = lambda t, x: x @ t["kernel"] + t["bias"]
    plain = lambda t, x: dist.Categorical(logits=layer(t["last"], jax.nn.silu(layer(t["first"], x))))
    theta, x = nnx.to_pure_dict(state), normal(9, 3)
    for build in (dense_fisher, kronecker_fisher):
        found, expected = build(in_flax, state, x), build(plain, theta, x)
        np.testing.assert_allclose(found.as_matrix(), expected.as_matrix(), rtol=1e-12, atol=1e-15)
        product = nnx.to_pure_dict(found @ state)
        assert jax.tree.structure(product) == jax.tree.structure(theta)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), product, expected @ theta)
    K, M = kronecker_fisher(in_flax, state, x[:1]), dense_fisher(in_flax, state, x[:1]).as_matrix()
    assert len(K.blocks) == 2
    for block in K.blocks:  # exact for one input
        at = np.ix_(block.index.at, block.index.at)
        np.testing.assert_allclose(K.as_matrix()[at], M[at], atol=1e-14)


# --- transformations, precision, cost ----------------------------------------------------------------------------


def test_rows_by_vmap_and_derivatives_of_derivatives():
    x = normal(7, 3)
    of_flat, flat, layers = find(mlp, MLP, x[:1])
    trace_of = lambda flat, rows: jnp.sum(jax.vmap(lambda row: jacobian(layers, flat, row[None])[0])(rows) ** 2)
    reference = lambda flat, rows: jnp.sum(
        jax.vmap(lambda row: jax.jacrev(lambda f: of_flat(f, row[None])[0])(flat))(rows) ** 2
    )
    value, gradient = jax.jit(jax.value_and_grad(trace_of))(flat, x)
    expected = jax.jit(jax.value_and_grad(reference))(flat, x)
    np.testing.assert_allclose(value, expected[0], rtol=1e-12)
    np.testing.assert_allclose(gradient, expected[1], rtol=1e-10, atol=1e-12)


def test_rows_share_one_product():
    """After vmap over rows the compiled program multiplies [n, in] by [in, out], not n times [1, in]."""
    _, flat, layers = find(lambda t, x: jax.vmap(lambda x: jnp.tanh(t["W"].T @ x + t["b"]))(x), MLP, X)

    def run(flat, x):
        rows = lambda row: layers.perturbed(flat, row[None], layers.zero_shifts())
        return jax.vmap(rows)(x)

    text = jax.jit(run).lower(flat, normal(50, 3)).as_text()
    products = re.findall(r"dot_general.*?->", text)
    assert len(products) == 1
    assert "batching_dims" not in products[0]
    assert "50" in products[0]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_mixed_precision(dtype):
    def mixed(t, x):
        h = jnp.tanh(x.astype(dtype) @ t["W"].astype(dtype) + t["b"].astype(dtype))
        return h.astype(jnp.float64) @ t["V"] + t["c"]

    layers = check(mixed, MLP, X, rtol=20 * float(jnp.finfo(dtype).eps))
    assert kinds(layers) == DENSE
    assert layers.found[0].bias is not None


def test_float32():
    theta = jax.tree.map(lambda a: a.astype(jnp.float32), MLP)
    assert kinds(check(mlp, theta, X.astype(jnp.float32), rtol=1e-5)) == DENSE


def test_leaves_of_two_precisions():
    theta = {**MLP, "b": MLP["b"].astype(jnp.float32)}
    # JAX rounds the derivative with respect to a float32 leaf to float32; here it is kept as it came
    assert kinds(check(mlp, theta, X, rtol=1e-7)) == DENSE


def test_constants_of_an_outer_trace():
    """A closure over traced values is no parameter and no constant to be read."""

    @jax.jit
    def outer(scale, mean, flat, x):
        function = lambda t, x: (x - mean) @ (t.reshape(3, 2) * scale)
        _, _, layers = find(function, flat, x)
        return jacobian(layers, flat, x)[0], jax.jacrev(lambda f: function(f, x)[0])(flat)

    np.testing.assert_allclose(*outer(2.0, normal(3), normal(6), X), rtol=1e-12)


# --- the public function -----------------------------------------------------------------------------------------


def model(theta, x):
    mean = mlp(theta["net"], x)
    return dist.Normal(mean, jax.nn.softplus(theta["scale"])).to_event(1)


def test_linear_layers_of_a_model():
    theta = {"net": MLP, "scale": 0.5}
    layers = linear_layers(model, theta, normal(10, 3))
    assert [layer.parameters for layer in layers.found] == ["net.W, net.b", "net.V, net.c"]
    assert [m.parameters for m in layers.missing] == ["scale"]
    under_jit = []
    jax.jit(lambda t, x: under_jit.append(str(linear_layers(model, t, x))))(theta, normal(10, 3))
    assert under_jit == [str(layers)]
    html = layers._repr_html_()
    assert html.count("<tr>") == 3
    assert "net.W, net.b" in html
    assert "not found: scale" in html


def test_a_model_without_inputs():
    layers = linear_layers(lambda t: dist.Normal(t[0], jnp.exp(t[1])), jnp.zeros(2))
    assert kinds(layers) == ["shift"]
    assert layers.missing[0].parameters == "theta[1:2]"


def test_bad_input():
    with pytest.raises(TypeError, match="not a distribution"):
        linear_layers(lambda t, x: x @ t, jnp.ones(3), X)
    with pytest.raises(ValueError, match="different lengths"):
        linear_layers(model, {"net": MLP, "scale": 0.5}, (X, normal(2, 3)))
    with pytest.raises(ValueError, match="floating point"):
        linear_layers(model, {"net": MLP, "scale": 1}, X)
