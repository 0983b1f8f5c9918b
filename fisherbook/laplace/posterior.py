"""The Laplace posterior: a normal law at the mode, with precision n F + prior."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from html import escape
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from ..compilation import run
from ..law import Exact, Law
from ..model import Conditional, Model, check_observations, flatten, is_traced, parameter_names, require
from ..operators import dense_fisher
from .precision import Precision, factorise
from .predictive import output_distribution, predictive

AWAY = 0.1  # posterior standard deviations from the mode from which on a warning is due


class LaplacePosterior(eqx.Module):
    """N(mean, (n F + prior)^-1) over the parameters, or a part of them.

    Attributes:
        mean: the parameter at which the posterior stands, a pytree like theta or like what `subset` selects.
        precision: n F + prior.
        prior_mean: a number, or [d].
        log_likelihood: of all observations at the mean.
        away: distance from the mean to the mode of the quadratic, in posterior standard deviations.
    """

    model: Model = eqx.field(static=True)
    mean: Any
    precision: Precision  # n F + prior, with `multiply`, `solve`, `logdet`
    prior_mean: Any
    log_likelihood: Any
    gradient: Any  # of the mean log-likelihood, [d]
    away: Any

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
        unravel = ravel_pytree(self.mean)[1]
        out = jax.vmap(unravel)(V.reshape(-1, self.d))
        return jax.tree.map(lambda leaf: leaf.reshape(*V.shape[:-1], *leaf.shape[1:]), out)

    def covariance(self) -> jax.Array:
        """The covariance [d, d] in u^2, in `ravel_pytree` order."""
        S = self.precision.solve(jnp.eye(self.d, dtype=self.flat.dtype))
        return (S + S.T) / 2

    def standard_deviations(self) -> Any:
        """Standard deviations in u, a pytree like the mean."""
        return self._tree(jnp.sqrt(self.precision.variances()))

    def sample(self, key: jax.Array, shape: tuple[int, ...] = ()) -> Any:
        """Draws, a pytree like the mean whose leaves have `shape` in front."""
        draws = self.precision.draws(key, int(np.prod(shape)))
        return self._tree((self.flat + draws).reshape(*shape, self.d))

    def log_prob(self, theta: Any) -> jax.Array:
        """The log-density of one parameter, a pytree like the mean."""
        delta = ravel_pytree(theta)[0] - self.flat
        length = delta @ self.precision.multiply(delta[:, None])[:, 0]
        return (self.precision.logdet() - self.d * jnp.log(2 * jnp.pi) - length) / 2

    def log_prior(self) -> jax.Array:
        """The log-density of the prior at the mean, up to the d/2 log 2 pi that the evidence cancels."""
        precision = jnp.broadcast_to(self.precision.prior, (self.d,))
        hint = "a prior precision of 0 has no density, so the marginal likelihood is not defined: pass a positive one"
        precision = require(jnp.all(precision > 0), precision, hint)
        return jnp.sum(jnp.log(precision) - precision * (self.flat - self.prior_mean) ** 2) / 2

    def log_marginal_likelihood(self) -> jax.Array:
        r"""The evidence in Laplace's approximation, a scalar; differentiable in the prior precision.

        :math:`\log p(y \mid \hat\theta) + \log p(\hat\theta) + \frac d2 \log 2\pi - \frac12 \log\det(nF + P)`. The mean
        is taken for the mode.
        """
        return self.log_likelihood + self.log_prior() - self.precision.logdet() / 2

    def with_prior(self, prior_precision: Any, prior_mean: Any = None) -> LaplacePosterior:
        """The same posterior under another prior: nothing is read from the data again, and the mean stays."""
        mean = self.prior_mean if prior_mean is None else _spread(prior_mean, self.mean, "prior_mean")
        return _posterior(
            self.model,
            self.mean,
            self.curvature,
            self.n,
            _positive(prior_precision, self.mean),
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
            method: "linear", in closed form, for normal outputs of known scale; "probit" (MacKay, 1992) and "bridge"
                (Hobbhahn et al., 2022), two approximations for classes; "linear_samples", draws of the linearised
                outputs, and "samples", draws of the parameters, for any model, with error O(1/sqrt(draws)). By default
                "linear" or "probit" where they apply.
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
        sd = np.asarray(jnp.sqrt(self.precision.variances()))
        rows = [("parameter", "mean", "standard deviation", "95 % interval")]
        for k in range(min(self.d, 30)):
            low, high = mean[k] - 1.96 * sd[k], mean[k] + 1.96 * sd[k]
            rows.append((names[k], f"{mean[k]:.4g}", f"{sd[k]:.3g}", f"{low:.4g} to {high:.4g}"))
        body = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows)
        more = f"<p>and {self.d - 30} more</p>" if self.d > 30 else ""
        return f"<table>{body}</table>{more}<p>{escape(self._words())}</p>"

    def _words(self) -> str:
        kind = type(self.curvature).__name__
        return f"{kind}, {float(self.n):.0f} observations, {float(self.away):.2g} standard deviations from its mode"


def laplace(
    model: Model,
    theta: Any,
    y: Any,
    x: Any = None,
    *,
    prior_precision: Any = 1.0,
    prior_mean: Any = 0.0,
    curvature: Callable[..., Any] = dense_fisher,
    law: Law = Exact(),  # noqa: B008
    subset: Callable[[Any], Any] | None = None,
    must_be_mode: bool = False,
) -> LaplacePosterior:
    r"""Approximate a posterior by a normal law at its mode, with precision :math:`n F + P`.

    F is the Fisher information per observation at theta and P the precision of a normal prior with independent
    parameters. For a linear model with normal noise this is the posterior itself.

    Args:
        model: `model(theta)` or `model(theta, x)`, a distribution.
        theta: the mode, a pytree with d scalars; units u. Fit it first: this function does not move it.
        y: observations with leading axis n.
        x: inputs with leading axis n, for a conditional model.
        prior_precision: a number, a pytree with one number (or array) per leaf, or an array [d]; in 1/u^2. Zero is the
            flat prior, which needs a regular F.
        prior_mean: the same forms, in u.
        curvature: `dense_fisher`, `diagonal_fisher`, `kronecker_fisher`, `low_rank_fisher`, `implicit_fisher`, or any
            function of their signature.
        law: the law of the curvature's expectation.
        subset: a function from theta to the part that is uncertain, `lambda t: t["out"]`; the rest is held fixed, and
            everything the posterior gives is about that part.
        must_be_mode: raise, instead of warning, where theta is more than a tenth of a posterior standard deviation from
            the mode of the quadratic.

    Returns:
        A `LaplacePosterior`.

    Raises:
        ValueError: y outside the support; a negative prior precision; n F + prior is singular; a prior that the
            structure cannot carry; `subset` selects nothing; theta is not finite.

    Example:
        >>> import numpyro.distributions as dist
        >>> y = jnp.array([1.0, 2.0, 3.0])  # normal with variance 1, prior precision 1: the mode is 6 / 4
        >>> posterior = laplace(lambda t: dist.Normal(t, 1.0), jnp.array(1.5), y)
        >>> print(posterior.mean, posterior.standard_deviations())  # 1 / sqrt(3 + 1)
        1.5 0.5

    Derived in the chapter "Laplace posteriors". Source: MacKay (1992), sections 2 and 3.
    """
    model, theta = _select(model, theta, subset)
    flat, unravel = flatten(theta)
    mean = unravel(flat)
    y = check_observations(model, mean, y, x)
    n = jnp.asarray(len(y), flat.dtype)

    def likelihood(flat: jax.Array, y: jax.Array, x: Any) -> jax.Array:
        block = Conditional.of(model, unravel(flat), x, split=False)
        return jnp.sum(block.log_prob(y[None] if x is not None else y[:, None]))

    value, gradient = run(jax.value_and_grad(likelihood), flat, y, x)
    F = curvature(model, mean, x, law=law)
    if tuple(getattr(F, "shape", ())) != (flat.size, flat.size):
        raise ValueError(f"curvature has shape {getattr(F, 'shape', None)} but the parameters are {flat.size} scalars")
    prior = _positive(prior_precision, mean)
    posterior = _posterior(model, mean, F, n, prior, _spread(prior_mean, mean, "prior_mean"), value, gradient / n)
    return _checked(posterior, must_be_mode)


def _select(model: Model, theta: Any, subset: Callable[[Any], Any] | None) -> tuple[Model, Any]:
    """The model of the part of theta that is uncertain, and that part."""
    if subset is None:
        return model, theta
    part = subset(theta)
    if not jax.tree.leaves(part):
        raise ValueError("subset selects nothing: it must return a part of theta, as in lambda t: t['out']")

    def of_part(part: Any, *x: Any) -> Any:
        return model(eqx.tree_at(subset, theta, part), *x)

    return of_part, part


def _posterior(
    model: Model, mean: Any, F: Any, n: Any, prior: Any, prior_mean: Any, value: Any, gradient: Any
) -> LaplacePosterior:
    factor = factorise(F, n, prior, lambda: parameter_names(mean))
    slope = n * gradient - prior * (ravel_pytree(mean)[0] - prior_mean)
    away = jnp.sqrt(jnp.maximum(slope @ factor.solve(slope[:, None])[:, 0], 0))
    return LaplacePosterior(model, mean, factor, prior_mean, value, gradient, away)


def _checked(posterior: LaplacePosterior, must_be_mode: bool) -> LaplacePosterior:
    if is_traced(posterior):
        return posterior
    if float(posterior.away) > AWAY:
        message = (
            f"theta is not the mode: the step to it is {float(posterior.away):.2g} posterior standard deviations long; "
            "fit theta to the log-likelihood plus the log-prior first"
        )
        if must_be_mode:
            raise ValueError(message)
        warnings.warn(message, stacklevel=3)
    return posterior


def _spread(value: Any, theta: Any, name: str) -> jax.Array:
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


def _positive(prior_precision: Any, theta: Any) -> jax.Array:
    prior = _spread(prior_precision, theta, "prior_precision")
    return require(jnp.all(prior >= 0), prior, "prior_precision must not be negative")
