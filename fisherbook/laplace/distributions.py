"""Laws that numpyro lacks: equal-weight mixtures of any distributions, and a posterior as a distribution."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

from ..compilation import run
from ..distributions import log_density
from .precision import Precision


class EqualMixture(dist.Distribution):
    """The mixture with equal weights over the axis `axis` of a distribution's batch.

    Unlike numpyro's `MixtureSameFamily` it takes distributions whose support has a parameter, such as the number of
    trials of a binomial; that parameter must not differ along the axis.
    """

    pytree_data_fields = ("components",)
    pytree_aux_fields = ("axis",)

    def __init__(self, components: Any, axis: int, *, validate_args: bool | None = None) -> None:
        self.components, self.axis = components, axis
        batch = components.batch_shape
        super().__init__(batch[:axis] + batch[axis + 1 :], components.event_shape, validate_args=validate_args)

    @property
    def support(self) -> Any:
        return self.components.support

    def log_prob(self, value: Any, intermediates: Any = None) -> jax.Array:
        value = jnp.asarray(value)
        whole = self.batch_shape + self.event_shape
        value = jnp.broadcast_to(value, jnp.broadcast_shapes(value.shape, whole))
        after = len(self.batch_shape) - self.axis  # axes of the batch behind the mixture's
        each = self.components.log_prob(jnp.expand_dims(value, value.ndim - len(self.event_shape) - after))
        return jax.nn.logsumexp(each, each.ndim - 1 - after) - jnp.log(self.components.batch_shape[self.axis])

    def sample(self, key: jax.Array | None, sample_shape: tuple[int, ...] = ()) -> jax.Array:
        assert key is not None
        count, many = int(np.prod(sample_shape)), self.components.batch_shape[self.axis]

        def one(key: jax.Array) -> jax.Array:  # one at a time: every draw needs a draw of all components
            pick, draw = jax.random.split(key)
            values = self.components.sample(draw)
            which = jnp.expand_dims(jax.random.randint(pick, self.batch_shape, 0, many), self.axis)
            which = which.reshape(*which.shape, *(1 for _ in self.event_shape))
            return jnp.squeeze(jnp.take_along_axis(values, which, self.axis), self.axis)

        drawn = jax.lax.map(one, jax.random.split(key, count))
        return drawn.reshape(*sample_shape, *drawn.shape[1:])

    @property
    def mean(self) -> jax.Array:
        return jnp.mean(self.components.mean, self.axis)

    @property
    def variance(self) -> jax.Array:
        inside = jnp.mean(self.components.variance, self.axis)
        return inside + jnp.var(self.components.mean, self.axis)


class DrawnMixture(dist.Distribution):
    """The mixture with equal weights of `draws` distributions, stacked along a new first axis of their arrays.

    It asks of them log_prob and sample only, so that any density will do.
    """

    pytree_data_fields = ("laws",)
    pytree_aux_fields = ("draws",)

    def __init__(self, laws: Any, draws: int, *, validate_args: bool | None = None) -> None:
        self.laws, self.draws = laws, draws
        super().__init__(self._first.batch_shape, self._first.event_shape, validate_args=validate_args)

    @property
    def _first(self) -> Any:
        return jax.tree.map(lambda a: a[0], self.laws)

    @property
    def support(self) -> Any:
        return self._first.support

    def log_prob(self, value: Any, intermediates: Any = None) -> jax.Array:
        def mean(laws: Any, value: jax.Array) -> jax.Array:
            each = jax.lax.map(lambda law: log_density(law, value), laws)
            return jax.nn.logsumexp(each, 0) - jnp.log(self.draws)

        return run(mean, self.laws, jnp.asarray(value))

    def sample(self, key: jax.Array | None, sample_shape: tuple[int, ...] = ()) -> jax.Array:
        assert key is not None

        def one(laws: Any, key: jax.Array) -> jax.Array:  # each row has a law of its own draw
            pick, draw = jax.random.split(key)
            values = jax.lax.map(lambda law: law.sample(draw), laws)
            which = jax.random.randint(pick, self.batch_shape, 0, self.draws)[None]
            which = which.reshape(*which.shape, *(1 for _ in self.event_shape))
            return jnp.take_along_axis(values, which, 0)[0]

        keys = jax.random.split(key, int(np.prod(sample_shape)))
        drawn = run(lambda laws, keys: jax.lax.map(lambda key: one(laws, key), keys), self.laws, keys)
        return drawn.reshape(*sample_shape, *drawn.shape[1:])

    @property
    def mean(self) -> jax.Array:
        return run(lambda laws: jnp.mean(jax.vmap(lambda law: law.mean)(laws), 0), self.laws)

    @property
    def variance(self) -> jax.Array:
        def total(laws: Any) -> jax.Array:
            means, inside = jax.vmap(lambda law: (law.mean, law.variance))(laws)
            return jnp.mean(inside, 0) + jnp.var(means, 0)

        return run(total, self.laws)


class NormalLaw(dist.Distribution):
    """A Laplace posterior over the flat parameter [d], as numpyro sees it; nothing is formed for it."""

    support = dist.constraints.real_vector
    pytree_data_fields = ("flat", "precision")

    def __init__(self, flat: jax.Array, precision: Precision, *, validate_args: bool | None = None) -> None:
        self.flat, self.precision = flat, precision
        super().__init__((), flat.shape, validate_args=validate_args)

    def sample(self, key: jax.Array | None, sample_shape: tuple[int, ...] = ()) -> jax.Array:
        assert key is not None
        draws = self.precision.draws(key, int(np.prod(sample_shape)))
        return (self.flat + draws).reshape(*sample_shape, len(self.flat))

    def log_prob(self, value: Any, intermediates: Any = None) -> jax.Array:
        delta = jnp.asarray(value) - self.flat
        rows = delta.reshape(-1, len(self.flat))
        lengths = jnp.sum(rows * self.precision.multiply(rows.T).T, 1).reshape(delta.shape[:-1])
        return (self.precision.logdet() - len(self.flat) * jnp.log(2 * jnp.pi) - lengths) / 2

    @property
    def mean(self) -> jax.Array:
        return self.flat

    @property
    def variance(self) -> jax.Array:
        return self.precision.variances()

    @property
    def covariance_matrix(self) -> jax.Array:
        return self.precision.covariance()

    @property
    def precision_matrix(self) -> jax.Array:
        return self.precision.as_matrix()
