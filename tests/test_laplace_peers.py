"""Laplace posteriors beside other software: laplace-torch's numbers, NUTS, and coverage over simulated data."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.special
import statsmodels.api as sm
from sklearn.datasets import load_digits

import fisherbook as fb

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "benchmarks" / "peers"))
import work  # noqa: E402

PEER = json.loads((HERE / "laplace_torch.json").read_text())
OPTIONS = {
    "dense": {"curvature": fb.dense_fisher},
    "diagonal": {"curvature": fb.diagonal_fisher},
    "last layer": {"subset": lambda t: (t[2], t[3])},
}


def network(theta, x):
    W1, b1, W2, b2 = theta
    return dist.Categorical(logits=jnp.tanh(x @ W1 + b1) @ W2 + b2)


@pytest.mark.filterwarnings("ignore:theta is not the mode")
@pytest.mark.parametrize("case", PEER["found"])
def test_laplace_torch(case):
    """laplace-torch 0.3 on the same weights and data, in float64 (benchmarks/peers/laplace_torch_reference.py)."""
    name, prior = case.split(", ")
    images, (n, m) = load_digits(), (PEER["setting"]["fitted"], PEER["setting"]["predicted"])
    x, y = images.data / 16, images.target
    theta = [jnp.asarray(w, float) for w in work.weights(tuple(PEER["setting"]["sizes"]))]
    posterior = fb.laplace(network, theta, y[:n], x[:n], prior_precision=float(prior), **OPTIONS[name])
    theirs, new = PEER["found"][case], x[n : n + m]
    np.testing.assert_allclose(posterior.log_marginal_likelihood(), theirs["log_marginal_likelihood"], rtol=1e-6)
    np.testing.assert_allclose(posterior.predictive(new, method="probit").probs, theirs["probit"], rtol=1e-6)
    np.testing.assert_allclose(posterior.predictive(new, method="bridge").probs, theirs["bridge"], rtol=1e-6)


def spector():
    data = sm.datasets.spector.load_pandas()
    x = data.exog.to_numpy()
    return np.column_stack([np.ones(len(x)), (x - x.mean(0)) / x.std(0)]), data.endog.to_numpy()


def logistic(theta, x):
    return dist.Bernoulli(logits=x @ theta)


def mode_of(x, y, precision):
    theta = np.zeros(x.shape[1])
    for _ in range(50):
        p = scipy.special.expit(x @ theta)
        H = x.T @ (x * (p * (1 - p))[:, None]) + precision * np.eye(len(theta))
        theta += np.linalg.solve(H, x.T @ (y - p) - precision * theta)
    return jnp.asarray(theta)


def on_a_grid(posterior, x, y, precision, step):
    """Points [m, d] in posterior standard deviations, and on them the true posterior and Laplace's, both of sum one.

    A sum over an even grid is exact to many digits for densities that are smooth and vanish at its ends.
    """
    d = len(posterior.mean)
    axis = np.arange(-9, 13, step)
    z = np.stack(np.meshgrid(*[axis] * d, indexing="ij"), -1).reshape(-1, d)
    root = np.linalg.cholesky(posterior.covariance())
    logs = []
    for part in np.array_split(z, 20):
        theta = np.asarray(posterior.mean) + part @ root.T
        outputs = theta @ x.T
        logs.append((y * outputs - np.logaddexp(0, outputs)).sum(1) - precision * (theta**2).sum(1) / 2)
    return z @ root.T, scipy.special.softmax(np.concatenate(logs)), scipy.special.softmax(-(z**2).sum(1) / 2)


def test_nuts_on_a_logistic_regression():
    """Means and variances of the true posterior, by NUTS, are what the importance-weighted draws say."""
    rng = np.random.default_rng(0)
    x = np.column_stack([np.ones(400), rng.normal(size=(400, 2))])
    y = (rng.random(400) < scipy.special.expit(x @ [0.5, 1.0, -0.5])).astype(int)

    def program():
        theta = numpyro.sample("theta", dist.Normal(jnp.zeros(3), 1.0).to_event(1))
        numpyro.sample("y", dist.Bernoulli(logits=x @ theta), obs=y)

    sampler = numpyro.infer.MCMC(numpyro.infer.NUTS(program), num_warmup=500, num_samples=4000, progress_bar=False)
    sampler.run(jax.random.key(0))
    draws = np.asarray(sampler.get_samples()["theta"])
    effective = numpyro.diagnostics.effective_sample_size(draws[None])
    posterior = fb.laplace(logistic, mode_of(x, y, 1.0), y, x)
    sd = np.asarray(posterior.standard_deviations())
    # the mean lies beside the mode by half of S b, with the third derivatives in b; what is left is of order n^(-3/2)
    S, p = np.linalg.inv(posterior.precision.as_matrix()), scipy.special.expit(x @ posterior.mean)
    shift = S @ (-x.T @ (p * (1 - p) * (1 - 2 * p) * np.einsum("ij,jk,ik->i", x, S, x))) / 2
    assert np.max(abs(shift) / sd) > 0.05
    np.testing.assert_array_less(abs(draws.mean(0) - posterior.mean - shift), 4 * sd / np.sqrt(effective))
    z, true, ours = on_a_grid(posterior, x, y, 1.0, 0.5)
    spread = np.sqrt(true @ (z - true @ z) ** 2)
    np.testing.assert_allclose(draws.std(0), spread, rtol=4 / np.sqrt(2 * effective.min()))
    np.testing.assert_allclose(sd, spread, rtol=0.01)  # what the normal law misses, of order 1 / n
    found = posterior.diagnose(jax.random.key(1), y, x, draws=4000).diagnosis
    assert found.pareto_k < 0.5
    np.testing.assert_allclose(found.effective, 4000 / np.sum(true**2 / ours), rtol=0.03)


def test_skew_of_the_true_posterior():
    """Spector's 32 students: the third derivatives are the skewness of the true posterior, to first order."""
    x, y = spector()
    posterior = fb.laplace(logistic, mode_of(x, y, 0.1), y, x, prior_precision=0.1)
    found = posterior.diagnose(jax.random.key(0), y, x, draws=4000).diagnosis
    z, true, _ = on_a_grid(posterior, x, y, 0.1, 0.9)
    along = (z - true @ z) @ np.linalg.eigh(posterior.covariance())[1][:, :0:-1]
    skewness = true @ along**3 / (true @ along**2) ** 1.5
    assert max(abs(skewness)) > 0.5
    np.testing.assert_allclose(found.skew, skewness, atol=0.03)
    assert found.pareto_k > 0.4  # and weights of which few count
    assert found.effective < 3000


@pytest.mark.parametrize("fixed", [False, True])
def test_coverage(fixed):
    """90 % intervals over 500 data sets: exact on average over the prior but for Laplace's own error.

    With theta from the prior the coverage is 90 % but for the difference between the normal law and the posterior; with
    theta fixed it is not 90 % by any theorem, but n = 100 is near the limit in which it is.
    """
    rng, runs, n = np.random.default_rng(5), 500, 100
    x = np.column_stack([np.ones(n), rng.normal(size=n)])
    theta = np.tile([0.3, -0.6], (runs, 1)) if fixed else rng.normal(size=(runs, 2))
    y = (rng.random((runs, n)) < scipy.special.expit(theta @ x.T)).astype(int)
    modes = jnp.stack([mode_of(x, row, 1.0) for row in y])

    @jax.jit
    @jax.vmap
    def intervals(mode, y):
        posterior = fb.laplace(logistic, mode, y, x)
        return posterior.standard_deviations()

    inside = abs(theta - modes) < 1.6449 * intervals(modes, jnp.asarray(y))
    error = np.sqrt(0.9 * 0.1 / runs)  # 1.3 %
    np.testing.assert_array_less(abs(np.mean(inside, 0) - 0.9), 3 * error)
