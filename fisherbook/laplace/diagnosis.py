"""How far a Laplace posterior is from the true one: importance weights, skew, and directions without data."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse.linalg
from jax.flatten_util import ravel_pytree

from ..batches import Batches
from ..bounds import name_direction
from ..compilation import run
from ..families import innermost
from ..likelihood import inside
from ..model import Conditional, check_observations, is_traced, parameter_names, path_name
from ..operators.base import Fisher
from ..operators.dense import DenseFisher
from ..operators.kronecker import KroneckerFisher

DIRECTIONS, LARGEST = 3, 1000
EQUAL = 1e-3  # spread of log weights below which they are equal: a tail of such differences has no meaning


class Diagnosis(eqx.Module):
    """What importance weights and third derivatives say about a Laplace posterior.

    Attributes:
        pareto_k: shape of the tail of the importance weights; below 0.5 they have a variance, above `limit` averages
            over the posterior cannot be mended by weighing its draws. Minus infinity where the weights are equal.
        effective: number of independent draws of the true posterior that the weighed draws are worth.
        draws: how many there were.
        outside: how many of them the model gives no density.
        skew: third derivative of the log joint, in posterior standard deviations, along the widest directions; the
            skewness of the true posterior there, to first order. A normal posterior has 0.
        directions: what these directions are.
    """

    pareto_k: float
    effective: float
    draws: int
    outside: int
    skew: Any
    directions: tuple[str, ...] = eqx.field(static=True)

    @property
    def limit(self) -> float:
        """The largest k with which this many draws can do (Vehtari et al., 2024)."""
        return min(1 - 1 / np.log10(self.draws), 0.7)

    def __str__(self) -> str:
        good = "weighing its draws mends what it misses" if self.pareto_k <= self.limit else "NOT the true posterior"
        skew = ", ".join(f"{s:.2g} along {d}" for s, d in zip(self.skew.tolist(), self.directions, strict=True))
        lost = f", {self.outside} draws outside of the model's domain" if self.outside else ""
        worth = f"{self.draws} draws are worth {self.effective:.0f}"
        return f"Pareto k {self.pareto_k:.2f}: {good} ({worth}{lost}); skew {skew}"


def diagnose(posterior: Any, key: jax.Array, y: Any, x: Any, draws: int) -> Diagnosis:
    if is_traced(posterior, y, x):
        raise ValueError("diagnose cannot stand inside jax.jit: Pareto's k is fitted by ArviZ")
    if draws < 100:
        raise ValueError(f"draws must be at least 100 for a tail to be fitted, got {draws}")
    if isinstance(y, Batches) or isinstance(x, Batches):
        raise ValueError("diagnose evaluates the log joint at many draws: pass y and x as arrays, not as Batches")
    y = check_observations(posterior.model, posterior.mean, y, x)
    if len(y) != int(posterior.n):
        raise ValueError(f"the posterior was fitted to {int(posterior.n)} observations, but y has {len(y)}")
    unravel = ravel_pytree(posterior.mean)[1]

    def log_joint(flat: jax.Array, prior: jax.Array, prior_mean: jax.Array, y: jax.Array, x: Any) -> jax.Array:
        block = Conditional.of(posterior.model, unravel(flat), x, split=False)
        fit = jnp.sum(block.of_observations(y))
        # outside of its parameters' sets numpyro may answer with the density at the edge
        fit = jnp.where(inside(innermost(block.distribution)), fit, -jnp.inf)
        return fit - jnp.sum(prior * (flat - prior_mean) ** 2) / 2

    data = (posterior.precision.prior, jnp.asarray(posterior.prior_mean), y, x)
    white = posterior.precision.draws(key, draws)
    size = max(1, 2**22 // (len(y) * max(1, posterior.d)))
    each = run(
        lambda F, *more: jax.lax.map(lambda f: log_joint(f, *more), F, batch_size=size), posterior.flat + white, *data
    )
    lengths = jnp.sum(white * posterior.precision.multiply(white.T).T, 1)
    weights = np.asarray(each + lengths / 2, float)
    outside = int(np.sum(~np.isfinite(weights)))
    pareto_k, effective = _tail(weights, draws)
    sd, directions = _widest(posterior)

    def third(flat: jax.Array, v: jax.Array, *more: Any) -> jax.Array:
        slice_ = lambda t: log_joint(flat + t * v, *more)
        return jax.jacfwd(jax.jacfwd(jax.jacfwd(slice_)))(0.0)

    skew = jnp.stack([run(third, posterior.flat, s * v, *data) for s, v in zip(sd, directions, strict=True)])
    names = parameter_names(posterior.mean)
    words = tuple(name_direction(np.asarray(v), names) for v in directions)
    return Diagnosis(pareto_k, effective, draws, outside, skew, words)


def _widest(posterior: Any) -> tuple[np.ndarray, np.ndarray]:
    """Standard deviations and directions of the largest eigenvalues of the covariance, from the largest down."""
    d, count = posterior.d, min(DIRECTIONS, posterior.d)
    if d <= 100:
        values, vectors = np.linalg.eigh(np.asarray(posterior.covariance(), float))
        values, vectors = values[::-1][:count], vectors[:, ::-1][:, :count]
    else:
        dtype = np.asarray(posterior.flat).dtype
        solve = lambda v: np.asarray(posterior.precision.solve(jnp.asarray(v.reshape(d), dtype)))
        start = np.cos(np.arange(d, dtype=dtype) ** 2)
        operator = scipy.sparse.linalg.LinearOperator((d, d), matvec=solve, dtype=dtype)
        values, vectors = scipy.sparse.linalg.eigsh(operator, k=count, v0=start, tol=1e-3)
        values, vectors = values[::-1], vectors[:, ::-1]
    return np.sqrt(np.maximum(values, 0)), vectors.T


def _arviz(what: str) -> Any:
    """The module, which is an optional dependency, without its announcement of version 1."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return importlib.import_module("arviz")
    except ImportError as error:
        raise ImportError(f"{what} needs ArviZ: pip install 'fisherbook[arviz]'") from error


def _is_old(arviz: Any) -> bool:
    """Whether it is a version before 1, which has InferenceData."""
    return int(arviz.__version__.split(".")[0]) < 1


def _tail(log_weights: np.ndarray, draws: int) -> tuple[float, float]:
    """Pareto's k of the largest weights, and the effective number of draws after their smoothing, by ArviZ."""
    arviz = _arviz("diagnose")
    kept = log_weights[np.isfinite(log_weights)]
    if len(kept) <= draws / 2:
        return float("inf"), 0.0
    if np.std(kept) < EQUAL and len(kept) == draws:
        return -float("inf"), float(draws)
    ratios = kept - np.max(kept)
    with np.errstate(all="ignore"):
        if _is_old(arviz):
            smoothed, k = arviz.psislw(ratios)
        else:  # which takes the log-likelihoods of a leave-one-out estimate, and changes their sign
            smoothed, k = importlib.import_module("arviz_stats.base").array_stats.psislw(-ratios)
    weights = np.exp(np.asarray(smoothed) - np.max(smoothed))
    k = float(k) if np.isfinite(k) else float("inf")  # no Pareto law fits
    return k, float(weights.sum() ** 2 / (weights**2).sum())


def null_directions(F: Any, names: list[str]) -> list[str]:
    if is_traced(F):
        return []
    d = len(names)
    if isinstance(F, (DenseFisher, KroneckerFisher)) and d <= LARGEST:
        M = np.asarray(F.as_matrix(), float)
        scale = np.sqrt(np.where(np.diag(M) > 0, np.diag(M), 1))
        values, vectors = np.linalg.eigh(M / scale[:, None] / scale)
        empty = values < 8 * d * jnp.finfo(F.dtype).eps
        return [name_direction(v / scale, names) for v in vectors.T[empty][:10]]
    diagonal = np.asarray(F.diagonal()) if isinstance(F, Fisher) else np.ones(d)
    return [names[k] for k in np.flatnonzero(diagonal <= 0)[:10]]


def to_arviz(posterior: Any, key: jax.Array, draws: int, chains: int) -> Any:
    arviz = _arviz("to_arviz")
    tree = posterior.sample(key, (chains, draws))
    found = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        found[path_name(path)] = np.asarray(leaf)
    return arviz.from_dict(posterior=found) if _is_old(arviz) else arviz.from_dict({"posterior": found})
