"""laplax."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import work
from in_jax import arrays, logits, looped, timed, vector
from laplax.curv.full import create_full_curvature
from laplax.curv.ggn import create_ggn_mv
from work import Entry, Network


def ggn(theta, x, y):
    """Its products; a sum over the inputs, so each is divided by n here."""
    return create_ggn_mv(
        lambda input, params: logits(params, input), theta, {"input": x, "target": y}, loss_fn="cross_entropy"
    )


def laplax_matrix(theta, x, y):
    return create_full_curvature(ggn(theta, x, y), theta) / len(x)


def laplax_product(theta, x, y, v):
    return jax.tree.map(lambda a: a / len(x), ggn(theta, x, y)(v))


def laplax_loop(theta, x, y, v):
    product = ggn(theta, x, y)
    return looped(lambda v: jax.tree.map(lambda a: a / len(x), product(v)), v)


def laplax(function, *more):
    def entry(network: Network) -> Entry:
        theta, x = arrays(network)
        return timed(
            network,
            function,
            work.flat,
            theta,
            x,
            jnp.asarray(network.y),
            *(m(network) for m in more),
            beside=bool(more),
        )

    return entry


ENTRIES = {
    ("matrix", "laplax"): laplax(laplax_matrix),
    ("product", "laplax"): laplax(laplax_product, vector),
    ("loop", "laplax"): laplax(laplax_loop, vector),
}

if __name__ == "__main__":
    work.main(ENTRIES)
