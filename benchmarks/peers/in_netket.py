"""NetKet, whose metric is that of a quantum state; it computes in float64 where it can."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import netket as nk
import numpy as np
import work
from in_jax import arrays, gradient, logits, vector
from work import Entry, Network


def named(arrays):
    return {f"{k:02d}": a for k, a in enumerate(arrays)}


def state(network: Network):
    """The state |input, class> with psi^2 = p(class | input) / n, all of its amplitudes.

    NetKet's metric of it is J^T J with J the derivative of psi: a quarter of the Fisher information.
    """
    n, classes = len(network.x), network.sizes[-1]
    theta, x = arrays(network)

    def log_psi(variables, basis, **_):
        row, outcome = basis[..., 0].astype(int), basis[..., 1].astype(int)
        log_p = jax.nn.log_softmax(logits([variables["params"][name] for name in sorted(variables["params"])], x[row]))
        return jnp.take_along_axis(log_p, outcome[..., None], -1)[..., 0] / 2

    space = nk.hilbert.Fock(n - 1, 1) * nk.hilbert.Fock(classes - 1, 1)
    return nk.vqs.FullSumState(space, apply_fun=log_psi, variables={"params": named(theta)}, dtype=np.float32)


def netket_matrix(network: Network) -> Entry:
    psi = state(network)
    build = nk.optimizer.qgt.QGTJacobianDense(mode="real")
    return Entry(lambda: jax.block_until_ready(4 * psi.quantum_geometric_tensor(build).to_dense()), np.ravel)


def netket_product(network: Network) -> Entry:
    psi, v = state(network), named(vector(network))
    build = nk.optimizer.qgt.QGTOnTheFly(holomorphic=False)

    def call():
        return jax.block_until_ready(psi.quantum_geometric_tensor(build) @ v)

    return Entry(call, lambda out: 4 * work.flat([out[name] for name in sorted(out)]), gradient(network))


ENTRIES = {
    ("matrix", "NetKet"): netket_matrix,
    ("product", "NetKet"): netket_product,
}

if __name__ == "__main__":
    work.main(ENTRIES)
