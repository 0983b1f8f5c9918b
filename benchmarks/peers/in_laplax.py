"""laplax."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import work
from in_jax import arrays, logits, looped, timed, vector
from laplax import laplace
from laplax.curv.full import create_full_curvature
from laplax.curv.ggn import create_ggn_mv
from laplax.eval import marginal_log_likelihood
from laplax.eval.pushforward import lin_pred_mean, lin_pred_var, lin_setup, lin_special_pred_act, set_lin_pushforward
from work import Entry, Network, Posterior


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


def posterior(structure: str):
    """Fit, with the factor of the precision; the evidence; and `mean_field_0`, which is the widened probit."""

    def make(network: Network) -> Posterior:
        theta, x = arrays(network)
        data, new = {"input": x, "target": jnp.asarray(network.y)}, jnp.asarray(work.predicted())
        model, prior = lambda input, params: logits(params, input), {"prior_prec": work.PRIOR}
        steps = [lin_setup, lin_pred_mean, lin_pred_var, lin_special_pred_act]
        options = {"special_pred_type": "mean_field_0", "use_correction": True}

        def fit():
            law, estimate = laplace(model, theta, data, loss_fn="cross_entropy", curv_type=structure, curv_mv_jit=True)
            jax.block_until_ready(law(prior, 1.0).state)
            one = set_lin_pushforward(
                model_fn=model,
                mean_params=theta,
                posterior_fn=law,
                prior_arguments=prior,
                pushforward_fns=steps,
                **options,
            )
            return estimate, jax.jit(jax.vmap(lambda x: one(x)["special_pred_act"]))

        def twice(z, y):
            """Its evidence halves any loss, which is right for squares; that of its "cross_entropy" takes no labels."""
            return -2 * jnp.take_along_axis(jax.nn.log_softmax(z), y[:, None], 1).sum()

        def evidence(fitted):
            found = marginal_log_likelihood(fitted[0], prior, data, model, theta, twice, structure)
            return jax.block_until_ready(found)

        return Posterior(fit, evidence, lambda fitted: jax.block_until_ready(fitted[1](new)))

    return make


ENTRIES = {
    ("matrix", "laplax"): laplax(laplax_matrix),
    ("product", "laplax"): laplax(laplax_product, vector),
    ("loop", "laplax"): laplax(laplax_loop, vector),
    ("laplace_full", "laplax"): posterior("full"),
    ("laplace_diagonal", "laplax"): posterior("diagonal"),
}

if __name__ == "__main__":
    work.main(ENTRIES)
