"""fisherbook; and the product R^T R in NumPy, which is given the rows for nothing."""

from __future__ import annotations

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import scipy.optimize
import work
from in_jax import arrays, logits, looped, loss, timed, vector
from jax.flatten_util import ravel_pytree
from work import Entry, Network, Posterior, Race

import fisherbook as fb


def model(theta, x):
    return dist.Categorical(logits=logits(theta, x))


def any_model(theta, x):
    """The same law, with weights that are computed from theta: no parameter enters a layer linearly."""
    return model([w + 0 * w**2 for w in theta], x)


def matrix(theta, x, model=model):
    return fb.dense_fisher(model, theta, x).as_matrix()


def product(theta, x, v):
    return fb.implicit_fisher(model, theta, x) @ v


def loop(theta, x, v):
    F = fb.implicit_fisher(model, theta, x)
    return looped(lambda v: F @ v, v)


def not_compiled(network: Network) -> Entry:
    theta, x = arrays(network)
    return Entry(lambda: jax.block_until_ready(matrix(theta, x)), np.ravel)


def raw_product(network: Network) -> Entry:
    product = work.raw_product(network)
    product()
    return Entry(product, lambda F: np.ravel(F) / len(network.x))


# ------------------------------------------------------------------------------------------------ many inputs


def at(n, function, *more):
    def make(_: Network) -> Entry:
        network = work.many_digits(n)
        return timed(network, function, work.flat, *arrays(network), *(m(network) for m in more))

    return make


INPUTS = {
    f"{name}, {n}": at(n, function, *more)
    for name, function, *more in [
        ("dense_fisher", matrix),
        ("implicit_fisher @ v", product, vector),
        ("diagonal_fisher", lambda t, x: fb.diagonal_fisher(model, t, x).diagonal()),
        ("kronecker_fisher", lambda t, x: fb.kronecker_fisher(model, t, x).trace()),
    ]
    for n in [10**3, 10**4, 10**5, 10**6]
}


def logistic(n):
    """A posterior of 64 coefficients, and a gradient of the same log-likelihood."""

    def make(_: Network) -> Entry:
        network = work.pixels(n)
        theta, x, y = map(jnp.asarray, (network.weights[0], network.x, network.y))
        model = lambda t, x: dist.Bernoulli(logits=x @ t)
        fit = jax.jit(lambda t, y, x: fb.laplace(model, t, y, x).covariance())
        slope = jax.jit(jax.grad(lambda t, y, x: model(t, x).log_prob(y).sum()))
        return Entry(
            lambda: jax.block_until_ready(fit(theta, y, x)),
            np.ravel,
            lambda: jax.block_until_ready(slope(theta, y, x)),
        )

    return make


INPUTS |= {f"laplace, logistic regression, {n}": logistic(n) for n in [10**3, 10**4, 10**5, 10**6]}

# ---------------------------------------------------------------------------------------------------- training


def train(optimiser, adaptive=False):
    """A loop as a user of optax writes it: one compiled step, and Python around it."""

    def make(network: Network) -> Race:
        theta, x = arrays(network)
        y = jnp.asarray(network.y)

        @jax.jit
        def step(theta, state, x, y, count):
            value, g = jax.value_and_grad(loss)(theta, x, y)
            more = dict(value_fn=lambda t: loss(t, x, y)) if adaptive else {}
            if isinstance(optimiser, optax.GradientTransformationExtraArgs):
                more |= dict(x=x, key=jax.random.fold_in(jax.random.key(0), count))
            updates, state = optimiser.update(g, state, theta, **more)
            return optax.apply_updates(theta, updates), state, value

        def losses():
            t, state = theta, optimiser.init(theta)
            for count in range(work.AT_MOST + 1):
                t, state, value = step(t, state, x, y, count)
                yield float(value)

        return Race(losses)

    return make


def lbfgs(network: Network) -> Race:
    """SciPy's, with a compiled loss and gradient; a step is an evaluation of both."""
    theta, x = arrays(network)
    flat, unravel = ravel_pytree(theta)
    y, value_and_grad = jnp.asarray(network.y), jax.jit(jax.value_and_grad(lambda f, x, y: loss(unravel(f), x, y)))

    def losses():
        seen = []

        def objective(f):
            value, g = value_and_grad(jnp.asarray(f, jnp.float32), x, y)
            seen.append(float(value))
            if value < work.GOAL:
                raise StopIteration
            return seen[-1], np.asarray(g, float)

        with contextlib.suppress(StopIteration):
            scipy.optimize.minimize(objective, np.asarray(flat, float), jac=True, method="L-BFGS-B")
        yield from seen

    return Race(losses)


ng = lambda *args, **options: fb.natural_gradient(model, *args, **options)
OPTIMISERS = {
    "fisherbook, dense, Levenberg-Marquardt": train(ng(damping=fb.LevenbergMarquardt(0.1)), adaptive=True),
    "fisherbook, K-FAC, damping 0.01, radius 0.1": train(
        ng(curvature=fb.kronecker_fisher, damping=0.01, trust_radius=0.1)
    ),
    "fisherbook, K-FAC, damping 0.002, radius 0.05": train(
        ng(curvature=fb.kronecker_fisher, damping=0.002, trust_radius=0.05)
    ),
    "Adam at 0.01 (optax)": train(optax.adam(0.01)),
    "Adam at 0.03 (optax)": train(optax.adam(0.03)),
    "Adam at 0.1 (optax)": train(optax.adam(0.1)),
    "L-BFGS (SciPy)": lbfgs,
}

# --------------------------------------------------------------------------------------------------- posteriors


def posterior(compiled=True, **options):
    """Fit, evidence and the probit's probabilities; compiled by the user, or called as they are."""

    def make(network: Network) -> Posterior:
        theta, x = arrays(network)
        y, new = jnp.asarray(network.y), jnp.asarray(work.predicted())
        mark = jax.jit if compiled else lambda f: f
        fit = mark(lambda theta, y, x: fb.laplace(model, theta, y, x, prior_precision=work.PRIOR, **options))
        evidence = mark(lambda p: p.log_marginal_likelihood())
        predict = mark(lambda p, x: p.predictive(x, method="probit").probs)
        return Posterior(
            lambda: jax.block_until_ready(fit(theta, y, x)),
            lambda p: jax.block_until_ready(evidence(p)),
            lambda p: jax.block_until_ready(predict(p, new)),
        )

    return make


STRUCTURES = {
    "full": {"curvature": fb.dense_fisher},
    "kronecker": {"curvature": fb.kronecker_fisher},
    "diagonal": {"curvature": fb.diagonal_fisher},
    "last": {"subset": lambda theta: (theta[-2], theta[-1])},
}

ENTRIES = {(f"laplace_{name}", "fisherbook"): posterior(**options) for name, options in STRUCTURES.items()}
ENTRIES |= {
    (f"laplace_{name}", "fisherbook, not compiled by the user"): posterior(False, **options)
    for name, options in STRUCTURES.items()
}
ENTRIES |= {("training", name): make for name, make in OPTIMISERS.items()}
ENTRIES |= {("inputs", name): make for name, make in INPUTS.items()}
ENTRIES |= {
    ("matrix", "fisherbook"): lambda n: timed(n, matrix, np.ravel, *arrays(n), beside=False),
    ("matrix", "fisherbook, not compiled by the user"): not_compiled,
    ("matrix", "fisherbook, no layers to find"): lambda n: timed(
        n, lambda t, x: matrix(t, x, any_model), np.ravel, *arrays(n), beside=False
    ),
    ("matrix", "the product R^T R alone (NumPy)"): raw_product,
    ("product", "fisherbook"): lambda n: timed(n, product, work.flat, *arrays(n), vector(n)),
    ("loop", "fisherbook"): lambda n: timed(n, loop, work.flat, *arrays(n), vector(n)),
    ("diagonal", "fisherbook"): lambda n: timed(
        n, lambda t, x: fb.diagonal_fisher(model, t, x).diagonal(), np.ravel, *arrays(n)
    ),
    ("trace", "fisherbook"): lambda n: timed(
        n, lambda t, x: fb.implicit_fisher(model, t, x).trace(), np.ravel, *arrays(n)
    ),
}

if __name__ == "__main__":
    work.main(ENTRIES)
