"""The Laplace posterior: a normal law at the mode, with precision n F + prior."""

from __future__ import annotations

from functools import partial
from html import escape
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from ..model import Model, parameter_names, require
from ..part import Part, PartOfModel
from .diagnosis import diagnose, null_directions, to_arviz
from .distributions import NormalLaw
from .precision import factorise
from .predictive import output_distribution, predictive
from .saving import save


class LaplacePosterior(eqx.Module):
    """N(mean, (n F + prior)^-1) over the parameters, or a part of them.

    Attributes:
        precision: n F + prior, an operator: `precision @ v`, `.solve(v)`, `.logdet()`, `.as_matrix()`.
        prior_mean: a number, or [d].
        log_likelihood: of all observations at the mean.
        away: distance from the mean to the mode of the quadratic, in posterior standard deviations.
        diagnosis: what `diagnose` found, or None.
    """

    whole: Model = eqx.field(static=True)  # the model as it was passed
    part: Part | None  # of its theta, where `subset` selected one
    precision: Any  # a Precision
    prior_mean: Any
    log_likelihood: Any
    gradient: Any  # of the mean log-likelihood, [d]
    away: Any
    diagnosis: Any = None

    @property
    def model(self) -> Model:
        """The model as a function of the mean."""
        return self.whole if self.part is None else PartOfModel(self.whole, self.part)

    @property
    def mean(self) -> Any:
        """The parameter at which the posterior stands, a pytree like theta or like what `subset` selects."""
        return self.precision.theta

    @property
    def curvature(self) -> Any:
        """The operator F, per observation."""
        return self.precision.F

    @property
    def n(self) -> Any:
        """Number of observations."""
        return self.precision.n

    @property
    def d(self) -> int:
        return int(ravel_pytree(self.mean)[0].size)

    @property
    def flat(self) -> jax.Array:
        return ravel_pytree(self.mean)[0]

    def _tree(self, V: jax.Array) -> Any:
        """Arrays [..., d] as a pytree with leaves [..., *shape]."""
        leaves, form = jax.tree.flatten(self.mean)
        parts = _cut(tuple(jnp.shape(leaf) for leaf in leaves), V)
        return jax.tree.unflatten(form, [part.astype(leaf.dtype) for part, leaf in zip(parts, leaves, strict=True)])

    def covariance(self) -> jax.Array:
        """The covariance [d, d] in u^2, in `ravel_pytree` order."""
        return self.precision.covariance()

    def standard_deviations(self) -> Any:
        """Standard deviations in u, a pytree like the mean."""
        return self._tree(jnp.sqrt(self.precision.variances()))

    def sample(self, key: jax.Array, shape: tuple[int, ...] = ()) -> Any:
        """Draws, a pytree like the mean whose leaves have `shape` in front."""
        draws = self.precision.draws(key, int(np.prod(shape)))
        return self._tree((self.flat + draws).reshape(*shape, self.d))

    def log_prob(self, theta: Any) -> jax.Array:
        """The log-density of one parameter, a pytree like the mean."""
        return self.as_distribution().log_prob(ravel_pytree(theta)[0])

    def as_distribution(self) -> NormalLaw:
        """A numpyro distribution over the flat parameter [d], in `ravel_pytree` order."""
        return NormalLaw(self.flat, self.precision)

    def to_arviz(self, key: jax.Array, draws: int = 1000, chains: int = 4) -> Any:
        """Draws as ArviZ's InferenceData (a DataTree from ArviZ 1.0 on), one variable for each leaf of the mean.

        Args:
            key: for the draws, which are independent.
            draws: how many in each chain.
            chains: how many.
        """
        return to_arviz(self, key, draws, chains)

    def diagnose(self, key: jax.Array, y: Any, x: Any = None, draws: int = 1000) -> LaplacePosterior:
        """Compare with the true log joint; the posterior with its `diagnosis`, which the display then shows.

        Args:
            key: for the draws.
            y: the observations that it was fitted to; x: their inputs.
            draws: importance-weighted draws, whose weights give Pareto's k.
        """
        return eqx.tree_at(lambda p: p.diagnosis, self, diagnose(self, key, y, x, draws), is_leaf=lambda p: p is None)

    def null_directions(self) -> list[str]:
        """Directions about which the data say nothing, so that they are the prior's, in words; at most ten.

        For a matrix and for Kronecker products their null directions, up to 1000 parameters; else the parameters whose
        information is 0.
        """
        return null_directions(self.curvature, parameter_names(self.mean))

    def save(self, path: Any) -> None:
        """Write the posterior to a file, for `load_posterior`; the model is not in it.

        Args:
            path: a file's name; `.npz` is not added.

        Raises:
            ValueError: the curvature is not one of this package's, or theta is made of other containers than dicts,
                lists and tuples.
        """
        save(self, path)

    def log_prior(self) -> jax.Array:
        """The log-density of the prior at the mean, up to the d/2 log 2 pi that the evidence cancels."""
        precision = jnp.broadcast_to(self.precision.prior, (self.d,))
        hint = "a prior precision of 0 has no density, so the marginal likelihood is not defined: pass a positive one"
        precision = require(jnp.all(precision > 0), precision, hint)
        return _log_density(precision, self.flat, jnp.asarray(self.prior_mean))

    def log_marginal_likelihood(self) -> jax.Array:
        r"""The evidence in Laplace's approximation, a scalar; differentiable in the prior precision.

        :math:`\log p(y \mid \hat\theta) + \log p(\hat\theta) + \frac d2 \log 2\pi - \frac12 \log\det(nF + P)`. The mean
        is taken for the mode.
        """
        return self.log_likelihood + self.log_prior() - self.precision.logdet() / 2

    def gain(self) -> jax.Array:
        r"""How much the log joint rises from the mean to the mode of the quadratic: half the square of `away`.

        It is :math:`\frac12 s^\top\Lambda^{-1}s` for the gradient s of the log joint at the mean.
        """
        s = _slope(self.n, self.gradient, self.precision.prior, self.flat, jnp.asarray(self.prior_mean))
        return s @ self.precision.solve(s) / 2

    def with_prior(self, prior_precision: Any, prior_mean: Any = None) -> LaplacePosterior:
        """The same posterior under another prior: nothing is read from the data again, and the mean stays."""
        mean = self.prior_mean if prior_mean is None else spread(prior_mean, self.mean, "prior_mean")
        return assemble(
            self.whole,
            self.part,
            self.mean,
            self.curvature,
            self.n,
            positive(prior_precision, self.mean),
            mean,
            self.log_likelihood,
            self.gradient,
        )

    def output_distribution(self, x: Any = None, *, joint: bool = False) -> Any:
        """The normal law of the outputs, linearised at the mean: what the parameters leave uncertain, noise left out.

        Outputs are the distribution's parameters in unconstrained coordinates (logits, log rates) that theta moves, q
        for each input.

        Args:
            x: inputs with leading axis n.
            joint: one law of all n q outputs, with the covariance between inputs, in place of n laws.

        Returns:
            A numpyro `MultivariateNormal` with batch [n] and event [q], or with event [n q].
        """
        return output_distribution(self, x, joint)

    def predictive(
        self, x: Any = None, *, method: str | None = None, key: Any = None, draws: int = 1000, joint: bool = False
    ) -> Any:
        """The law of new observations, the posterior averaged out.

        Args:
            x: inputs with leading axis n.
            method: "linear", in closed form, for normal outputs of known covariance; "probit" (MacKay, 1992) and
                "bridge" (Hobbhahn et al., 2022), two approximations for classes (a model of probabilities has the
                logits of sum zero); "linear_samples", draws of the linearised outputs, for any distribution that
                declares its parameters, and "samples", draws of the parameters, for any model, both with error
                O(1/sqrt(draws)). By default "linear" or "probit" where they apply, else "linear_samples".
            key: for the sampled methods.
            draws: how many of them.
            joint: with "linear", one law for all n inputs.

        Returns:
            A numpyro distribution: normal, `Categorical` or `Bernoulli` with `.probs`, or an equal-weight mixture.

        Raises:
            ValueError: the method does not fit the model, or a key is missing.
        """
        return predictive(self, x, method, key, draws, joint)

    def _repr_html_(self) -> str:
        names, mean = parameter_names(self.mean), np.asarray(self.flat)
        try:
            sd, lost = np.asarray(jnp.sqrt(self.precision.variances())), ""
        except ValueError as error:  # a structure that has no diagonal of the inverse, say
            sd, lost = np.full(self.d, np.nan), f"<p>No standard deviations: {escape(str(error))}</p>"
        rows = [("parameter", "mean", "standard deviation", "95 % interval")]
        for k in range(min(self.d, 30)):
            low, high = mean[k] - 1.96 * sd[k], mean[k] + 1.96 * sd[k]
            width = ("", "") if lost else (f"{sd[k]:.3g}", f"{low:.4g} to {high:.4g}")
            rows.append((names[k], f"{mean[k]:.4g}", *width))
        body = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows)
        more = f"<p>and {self.d - 30} more</p>" if self.d > 30 else ""
        return f"<table>{body}</table>{more}{lost}<p>{escape(self._words())}</p>"

    def _words(self) -> str:
        kind = type(self.curvature).__name__
        words = [f"{kind}, {float(self.n):.0f} observations, {float(self.away):.2g} standard deviations from its mode"]
        null = self.null_directions()
        if null:
            more = f" and {len(null) - 3} more" if len(null) > 3 else ""
            words.append(f"The data say nothing along {'; '.join(null[:3])}{more}: there it is the prior")
        return ". ".join([*words, *([] if self.diagnosis is None else [str(self.diagnosis)])]) + "."

    def __repr__(self) -> str:
        return f"LaplacePosterior(d={self.d}, curvature={type(self.curvature).__name__})"


def assemble(
    model: Model, part: Part | None, mean: Any, F: Any, n: Any, prior: Any, prior_mean: Any, value: Any, gradient: Any
) -> LaplacePosterior:
    """The posterior with everything that is computed once: the factor of its precision, and the way to its mode."""
    factor = factorise(F, mean, n, prior)
    posterior = LaplacePosterior(model, part, factor, prior_mean, value, gradient, jnp.zeros(()))
    return eqx.tree_at(lambda p: p.away, posterior, _length(posterior.gain()))


# compiled once for all posteriors of these shapes, as no model is called in them


@jax.jit
def _slope(n: Any, gradient: jax.Array, prior: jax.Array, flat: jax.Array, around: jax.Array) -> jax.Array:
    """The gradient of the log joint."""
    return n * gradient - prior * (flat - around)


@jax.jit
def _log_density(precision: jax.Array, flat: jax.Array, around: jax.Array) -> jax.Array:
    return jnp.sum(jnp.log(precision) - precision * (flat - around) ** 2) / 2


@jax.jit
def _length(gain: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.maximum(2 * gain, 0))


@partial(jax.jit, static_argnums=0)
def _cut(sizes: tuple[tuple[int, ...], ...], V: jax.Array) -> list[jax.Array]:
    """Arrays of these shapes from V [..., d], with its leading axes."""
    parts = jnp.split(V, np.cumsum([int(np.prod(size)) for size in sizes])[:-1], -1)
    return [part.reshape(*V.shape[:-1], *size) for part, size in zip(parts, sizes, strict=True)]


def spread(value: Any, theta: Any, name: str) -> jax.Array:
    """A number, one number or array per leaf, or [d], as a scalar or [d]."""
    flat = ravel_pytree(theta)[0]
    if jax.tree.structure(value) == jax.tree.structure(0.0) and jnp.shape(value) in ((), (flat.size,)):
        found = jnp.asarray(value, flat.dtype)
    elif jax.tree.structure(value) == jax.tree.structure(theta):
        leaves = jax.tree.map(lambda a, t: jnp.broadcast_to(jnp.asarray(a, flat.dtype), jnp.shape(t)), value, theta)
        found = ravel_pytree(leaves)[0]
    else:
        raise ValueError(
            f"{name} must be a number, a pytree with one number per leaf of theta, or an array [{flat.size}]"
        )
    return require(jnp.all(jnp.isfinite(found)), found, f"{name} is not finite")


def positive(prior_precision: Any, theta: Any) -> jax.Array:
    prior = spread(prior_precision, theta, "prior_precision")
    return require(jnp.all(prior >= 0), prior, "prior_precision must not be negative")
