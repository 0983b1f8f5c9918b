"""kfac-jax, which needs JAX 0.9.1 or older."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import kfac_jax
import numpy as np
import work
from in_jax import arrays, logits, looped, timed, vector
from work import Entry, Network, Race


def loss(theta, batch):
    x, y = batch
    z = logits(theta, x)
    kfac_jax.register_softmax_cross_entropy_loss(z, y)
    return -jnp.take_along_axis(jax.nn.log_softmax(z), y[:, None], 1).mean()


def train(network: Network) -> Race:
    """Its optimiser as its documentation sets it up: damping, learning rate and momentum adapt."""
    theta, x = arrays(network)
    batch = x, jnp.asarray(network.y)
    optimizer = kfac_jax.Optimizer(
        value_and_grad_func=jax.value_and_grad(loss),
        l2_reg=0.0,
        value_func_has_aux=False,
        use_adaptive_learning_rate=True,
        use_adaptive_momentum=True,
        use_adaptive_damping=True,
        initial_damping=1.0,
        num_burnin_steps=0,
        multi_device=False,
    )

    def losses():
        params = jax.tree.map(jnp.copy, theta)  # it gives its arguments away
        state = optimizer.init(params, jax.random.key(0), batch)
        for _ in range(work.AT_MOST + 1):
            params, state, stats = optimizer.step(params, state, jax.random.key(1), batch=batch)
            yield float(stats["loss"])

    return Race(losses)


def product(theta, x, y, v):
    return kfac_jax.ImplicitExactCurvature(loss).multiply_fisher((theta, (x, y)), v)


def loop(theta, x, y, v):
    return looped(lambda v: product(theta, x, y, v), v)


def matrix(theta, x, y, at_once=32):
    """It has products only: here with the columns of the identity, some at a time."""
    flat, unravel = jax.flatten_util.ravel_pytree(theta)
    column = lambda v: jax.flatten_util.ravel_pytree(product(theta, x, y, unravel(v)))[0]
    return jax.lax.map(column, jnp.eye(flat.size, dtype=flat.dtype), batch_size=at_once)


def entry(function, *more, beside=True):
    def make(network: Network) -> Entry:
        theta, x = arrays(network)
        args = (theta, x, jnp.asarray(network.y), *(m(network) for m in more))
        return timed(network, function, work.flat if more else np.ravel, *args, beside=beside)

    return make


ENTRIES = {
    ("matrix", "kfac-jax"): entry(matrix, beside=False),
    ("product", "kfac-jax"): entry(product, vector),
    ("loop", "kfac-jax"): entry(loop, vector),
    ("training", "kfac-jax"): train,
}

if __name__ == "__main__":
    work.main(ENTRIES)
