"""The network as a JAX user writes it, and what one computes from it in plain JAX."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import work
from work import Entry, Network


def logits(theta, x):
    for W, b in zip(theta[:-2:2], theta[1:-2:2], strict=True):
        x = jnp.tanh(x @ W + b)
    return x @ theta[-2] + theta[-1]


def arrays(network: Network):
    return [jnp.asarray(w) for w in network.weights], jnp.asarray(network.x)


def vector(network: Network):
    return [jnp.asarray(v) for v in work.direction(network)]


def loss(theta, x, y):
    """The mean negative log-likelihood."""
    return -jnp.take_along_axis(jax.nn.log_softmax(logits(theta, x)), y[:, None], 1).mean()


def gradient(network: Network):
    theta, x = arrays(network)
    y, compiled = jnp.asarray(network.y), jax.jit(jax.grad(loss))
    return lambda: jax.block_until_ready(compiled(theta, x, y))


def timed(network: Network, function, canonical, *args, beside=True) -> Entry:
    """`function(*args)` under jit; everything in args is an argument, nothing a constant."""
    compiled = jax.jit(function)
    call = lambda: jax.block_until_ready(compiled(*args))
    return Entry(call, canonical, gradient(network) if beside else None)


def looped(product, v):
    """What conjugate gradients do: one product after another; each is made smaller, so that nothing overflows."""
    return jax.lax.fori_loop(0, work.LOOP, lambda _, v: jax.tree.map(lambda a: a / 10, product(v)), v)


def metric(p, u):
    return p * u - p * (p * u).sum(-1, keepdims=True)


def product(theta, x, v):
    z, u = jax.jvp(lambda t: logits(t, x), (theta,), (v,))
    _, back = jax.vjp(lambda t: logits(t, x), theta)
    return back(metric(jax.nn.softmax(z), u) / len(x))[0]


def loop(theta, x, v):
    z, forward = jax.linearize(lambda t: logits(t, x), theta)
    back, p = jax.linear_transpose(forward, theta), jax.nn.softmax(z)
    return looped(lambda v: back(metric(p, forward(v)) / len(x))[0], v)


def rows(theta, x):
    """Rows sqrt(p_c) grad log p_c of one input, one list entry per parameter array, [C, ...] each."""
    log_p = lambda t: jax.nn.log_softmax(logits(t, x))
    root_p = jnp.exp(log_p(theta) / 2)
    return jax.tree.map(lambda J: J * root_p.reshape(-1, *[1] * (J.ndim - 1)), jax.jacrev(log_p)(theta))


def matrix(theta, x):
    J = jax.vmap(rows, (None, 0))(theta, x)
    R = jnp.concatenate([j.reshape(-1, w.size) for j, w in zip(J, theta, strict=True)], 1)
    return R.T @ R / len(x)


ENTRIES = {
    ("matrix", "JAX"): lambda n: timed(n, matrix, np.ravel, *arrays(n), beside=False),
    ("product", "JAX"): lambda n: timed(n, product, work.flat, *arrays(n), vector(n)),
    ("loop", "JAX"): lambda n: timed(n, loop, work.flat, *arrays(n), vector(n)),
}

if __name__ == "__main__":
    work.main(ENTRIES)
