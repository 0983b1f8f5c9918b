"""The layers found by tracing: what is found, and that their derivatives are those of the function.

The reference is `jax.jacrev` of the function itself, which knows nothing of layers.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import fisherbook  # noqa: F401
from fisherbook.layers import find_layers, jacobian_of, leaf_sizes, linear_layers

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
    J, outputs = jax.jit(lambda flat, row: jacobian(layers, flat, row))(flat, row)
    plain = lambda flat: ravel_pytree(of_flat(flat, row))[0]
    reference = np.asarray(jax.jit(jax.jacrev(plain))(flat))
    np.testing.assert_allclose(ravel_pytree(outputs)[0], plain(flat), rtol=rtol, atol=rtol)
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
