"""Every wrong input raises, names the argument, and never becomes a NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import fisherbook as fb

X = np.random.default_rng(0).normal(size=(6, 2))


def coin(t):
    return dist.Bernoulli(probs=t)


def logit(t, x):
    return dist.Bernoulli(logits=x @ t)


DEFINITIONS = [fb.score_covariance, fb.hellinger_jacobian, fb.kl_curvature, fb.expected_hessian]
every = pytest.mark.parametrize("definition", DEFINITIONS, ids=lambda f: f.__name__)


@every
def test_integer_theta(definition):
    with pytest.raises(ValueError, match=r"theta must be floating point, but theta is int"):
        definition(coin, 1)
    with pytest.raises(ValueError, match=r"but p is int64"):
        definition(lambda t: coin(t["p"]), {"p": np.array(1)})


@every
def test_empty_theta(definition):
    for theta in ({}, jnp.zeros(0)):
        with pytest.raises(ValueError, match="theta is empty"):
            definition(coin, theta)


@every
def test_nan_in_theta_is_named(definition):
    with pytest.raises(ValueError, match=r"theta is not finite: beta\[1\] = nan"):
        definition(lambda t: dist.Normal(t["beta"].sum(), 1.0), {"beta": jnp.array([0.0, jnp.nan])})


@every
def test_theta_outside_its_domain(definition):
    with pytest.raises(ValueError, match=r"theta is outside its domain.*scale"):
        definition(lambda t: dist.Normal(0.0, t), -1.0)
    with pytest.raises(ValueError, match=r"theta is outside its domain.*probs"):
        definition(coin, 1.5)


def test_nan_in_theta_under_jit():
    with pytest.raises(Exception, match="theta is not finite"):
        jax.jit(lambda t: fb.score_covariance(lambda t: dist.Normal(t, 1.0), t))(jnp.nan)


def test_lengths_of_x_and_y():
    y = jnp.zeros(5, int)
    for call in (
        lambda: fb.score(logit, jnp.zeros(2), y, X),
        lambda: fb.score_covariance(logit, jnp.zeros(2), X, law=fb.Data(y)),
        lambda: fb.expected_hessian(logit, jnp.zeros(2), X, law=fb.Data(y)),
        lambda: fb.information(logit, jnp.zeros(2), y, X),
        lambda: jax.jit(lambda t: fb.score(logit, t, y, X))(jnp.zeros(2)),
    ):
        with pytest.raises(ValueError, match="x has 6 rows but y has 5"):
            call()


def test_arrays_of_x_of_different_lengths():
    with pytest.raises(ValueError, match=r"the arrays of x have different lengths: .*'a': 6.*'b': 5"):
        fb.score_covariance(lambda t, x: logit(t, x["a"]), jnp.zeros(2), {"a": X, "b": X[:5]})


def test_x_without_rows():
    with pytest.raises(ValueError, match="x has no rows"):
        fb.score_covariance(logit, jnp.zeros(2), X[:0])
    with pytest.raises(ValueError, match="x must hold arrays with a leading axis"):
        fb.score_covariance(logit, jnp.zeros(2), 1.0)


def test_y_outside_the_support():
    with pytest.raises(ValueError, match=r"y\[1\] = -2 is impossible under the model"):
        fb.score(lambda t: dist.Poisson(t), 2.0, jnp.array([1, -2]))
    with pytest.raises(ValueError, match=r"y\[0\] = 1.5 is impossible"):
        fb.score_covariance(lambda t: dist.Poisson(t), 2.0, law=fb.Data(jnp.array([1.5])))
    with pytest.raises(ValueError, match=r"y\[2\] = nan is impossible"):
        fb.information(lambda t: dist.Gamma(t, 1.0), 2.0, jnp.array([1.0, 2.0, jnp.nan]))
    with pytest.raises(Exception, match="y has values outside the support"):
        jax.jit(lambda y: fb.score(lambda t: dist.Poisson(t), 2.0, y))(jnp.array([-1]))


def test_y_of_another_shape():
    with pytest.raises(ValueError, match=r"y has rows of shape \(2,\) but the model's events have shape \(\)"):
        fb.score(coin, 0.5, jnp.zeros((3, 2), int))
    with pytest.raises(ValueError, match="y must have a leading axis"):
        fb.score(coin, 0.5, 1)


@every
def test_model_that_returns_no_distribution(definition):
    with pytest.raises(TypeError, match="model returned float, which is not a distribution"):
        definition(lambda t: 1.0, 0.5)


@every
def test_batch_of_distributions(definition):
    with pytest.raises(ValueError, match=r"model\(theta\) has batch_shape \(3,\), but must have \(\).*to_event"):
        definition(coin, jnp.full(3, 0.5))
    with pytest.raises(ValueError, match=r"has batch_shape \(\), but must have \(6,\)"):
        definition(lambda t, x: dist.Normal(t.sum(), 1.0), jnp.zeros(2), X)


class Vectorial(dist.Normal):
    """A distribution whose log_prob forgets to sum over an event of two numbers."""

    def log_prob(self, value, intermediates=None):
        return jnp.stack([super().log_prob(value)] * 2, -1)


def test_log_prob_that_is_not_one_number_per_observation():
    with pytest.raises(ValueError, match="must give one number per observation"):
        fb.score_covariance(lambda t: Vectorial(t, 1.0), 0.0)
    with pytest.raises(ValueError, match="must give one number per observation"):
        fb.score(lambda t: fb.from_log_prob(lambda t, y: jnp.array([t, y]))(t), 0.0, jnp.zeros(3))


@every
@pytest.mark.parametrize("jit", [False, True])
def test_rows_that_depend_on_each_other(definition, jit):
    def normalised(t, x):
        return dist.Normal((x - x.mean(0)) @ t, 1.0)

    def call(t):
        return definition(normalised, t, X)

    with pytest.raises(Exception, match="the rows of the model depend on each other"):
        (jax.jit(call) if jit else call)(jnp.array([0.4, 1.0]))


@every
def test_a_law_that_cannot_be_exact(definition):
    ten = dist.MultivariateNormal(jnp.zeros(10), jnp.eye(10))
    with pytest.raises(ValueError, match=r"cannot be exact for MultivariateNormal.*MonteCarlo\(key, draws\)"):
        definition(lambda t: dist.MultivariateNormal(t * ten.mean, ten.covariance_matrix), 1.0)
    with pytest.raises(ValueError, match=r"cannot be exact for Dirichlet.*MonteCarlo"):
        definition(lambda t: dist.Dirichlet(t), jnp.ones(3))


@every
def test_more_outcomes_than_the_maximum(definition):
    with pytest.raises(ValueError, match=r"tail is not negligible after 64 outcomes: .*max_outcomes"):
        definition(lambda t: dist.Poisson(t), 100.0, law=fb.Exact(max_outcomes=64))
    with pytest.raises(ValueError, match=r"the support has 101 outcomes, more than Exact\(max_outcomes=64\)"):
        definition(lambda t: dist.Binomial(100, probs=t), 0.5, law=fb.Exact(max_outcomes=64))


def test_zero_draws_and_a_missing_key():
    with pytest.raises(ValueError, match="draws >= 1, got 0"):
        fb.MonteCarlo(jax.random.key(0), 0)
    with pytest.raises(TypeError, match="MonteCarlo needs a key"):
        fb.MonteCarlo(None, 10)
    with pytest.raises(TypeError, match="MonteCarlo needs a key"):
        fb.MonteCarlo(3, 10)


@every
def test_a_law_that_is_no_law(definition):
    with pytest.raises(TypeError, match="law must be Exact"):
        definition(coin, 0.5, law="exact")


@pytest.mark.parametrize("compare", [fb.hellinger_distance, fb.kl_divergence])
def test_data_is_refused_by_distances(compare):
    with pytest.raises(ValueError, match=rf"{compare.__name__} compares distributions, so law=Data"):
        compare(coin, 0.5, 0.6, law=fb.Data(jnp.zeros(3, int)))
    with pytest.raises(ValueError, match="must have one structure"):
        compare(lambda t: coin(t[0]), jnp.array([0.5, 0.1]), jnp.array([0.5]))
    with pytest.raises(ValueError, match="other is not finite"):
        compare(coin, 0.5, jnp.nan)


@pytest.mark.parametrize("definition", [fb.hellinger_embedding, fb.hellinger_jacobian, fb.kl_curvature])
def test_data_is_refused_by_definitions_that_compare(definition):
    with pytest.raises(ValueError, match=rf"{definition.__name__} compares.*empirical Fisher.*score_covariance"):
        definition(coin, 0.5, law=fb.Data(jnp.zeros(3, int)))


def test_float64_input_while_x64_is_off_warns():
    with jax.enable_x64(False), pytest.warns(UserWarning, match="theta is float64 but JAX computes in float32"):
        fb.score_covariance(coin, np.array(0.25))


def test_a_sampler_is_missing():
    model = fb.from_log_prob(lambda t, y: -0.5 * (y - t) ** 2 - 0.5 * jnp.log(2 * jnp.pi))
    with pytest.raises(ValueError, match="MonteCarlo needs a sampler"):
        fb.score_covariance(model, 0.0, law=fb.MonteCarlo(jax.random.key(0), 10))
    with pytest.raises(TypeError, match="log_prob must be a function"):
        fb.from_log_prob(3.0)


def test_exact_refuses_nonsense():
    for options in ({"max_outcomes": 1}, {"outcomes": 0}):
        with pytest.raises(ValueError, match="Exact needs max_outcomes >= 2"):
            fb.Exact(**options)


def test_weights_and_clusters():
    y = jnp.array([0, 1, 0, 1, 1, 0])
    theta = jnp.zeros(2)
    with pytest.raises(ValueError, match=r"weights has shape \(5,\) but y has 6 rows"):
        fb.information(logit, theta, y, X, weights=np.ones(5))
    with pytest.raises(ValueError, match="weights must be finite and non-negative"):
        fb.information(logit, theta, y, X, weights=-np.ones(6))
    with pytest.raises(ValueError, match=r"clusters has shape \(5,\)"):
        fb.information(logit, theta, y, X, clusters=np.ones(5))
    with pytest.raises(ValueError, match="single label"):
        fb.information(logit, theta, y, X, clusters=np.ones(6))
    with pytest.raises(ValueError, match=r"law=Data\(y\) is the outer product"):
        fb.information(logit, theta, y, X, law=fb.Data(y))
    with pytest.raises(ValueError, match="kind must be one of expected, observed, opg, sandwich"):
        fb.information(logit, theta, y, X).covariance("hessian")


def test_matrices_that_are_no_information():
    F = jnp.eye(2)
    for call, match in [
        (lambda: fb.cramer_rao(jnp.ones((2, 3))), r"F must be a square matrix"),
        (lambda: fb.cramer_rao(jnp.array([[1.0, 0.5], [0.0, 1.0]])), "F is not symmetric"),
        (lambda: fb.cramer_rao(-F), "F is not positive semi-definite"),
        (lambda: fb.cramer_rao(F * jnp.nan), "F has entries that are not finite"),
        (lambda: fb.cramer_rao(F, n=0), "n must be positive"),
        (lambda: fb.cramer_rao(F, jacobian=jnp.ones(3)), r"jacobian has shape \(3,\) but F is \[2, 2\]"),
        (lambda: fb.marginal_information(F, [2]), "does not pick from 2 parameters"),
        (lambda: fb.conditional_information(F, []), "must pick at least one parameter"),
        (lambda: fb.marginal_information(F, [0, 0]), "each once"),
        (lambda: fb.reparametrize(F, jnp.ones((3, 2))), r"jacobian has shape \(3, 2\)"),
        (lambda: fb.reparametrize(F, jnp.full((2, 2), jnp.nan)), "jacobian has entries that are not finite"),
    ]:
        with pytest.raises(ValueError, match=match):
            call()


OPERATORS = [fb.dense_fisher, fb.diagonal_fisher, fb.kronecker_fisher, fb.low_rank_fisher, fb.implicit_fisher]


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda f: f.__name__)
def test_operators_name_the_same_culprits(operator):
    y = jnp.zeros(5, int)
    for call, match in [
        (lambda: operator(logit, jnp.arange(2), X), "theta must be floating point"),
        (lambda: operator(lambda t, x: logit(t["w"], x), {"k": 1, "w": jnp.ones(2)}, X), "but k is int64"),
        (lambda: operator(logit, jnp.array([0.0, jnp.nan]), X), r"theta is not finite: theta\[1\] = nan"),
        (lambda: operator(logit, {}, X), "theta is empty"),
        (lambda: operator(lambda t: dist.Normal(0.0, t), -1.0), "theta is outside its domain"),
        (lambda: operator(logit, jnp.zeros(2), X[:0]), "x has no rows"),
        (lambda: operator(logit, jnp.zeros(2), 1.0), "x must hold arrays with a leading axis"),
        (lambda: operator(logit, jnp.zeros(2), {"a": X, "b": X[:5]}), "have different lengths"),
        (lambda: operator(logit, jnp.zeros(2), X, law=fb.Data(y)), "x has 6 rows but y has 5"),
        (lambda: operator(logit, jnp.zeros(2), X, law=fb.Data(2 + jnp.zeros(6, int))), r"y\[0\] = 2 is impossible"),
        (lambda: operator(lambda t, x: dist.Normal(t * x, 1.0), jnp.zeros(2), X), "to_event"),
        (lambda: operator(lambda t, x: x @ t, jnp.zeros(2), X), "not a distribution"),
        (lambda: operator(logit, jnp.zeros(2), X, law="exact"), "law must be Exact"),
        (lambda: operator(lambda t: dist.Uniform(0.0, t), 2.0), "the support moves"),
        (lambda: operator(logit, jnp.zeros(2), fb.Batches([X, X[:0]])).trace(), "x has no rows"),
    ]:
        with pytest.raises((ValueError, TypeError), match=match):
            call()


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("law", [fb.Exact(), fb.MonteCarlo(jax.random.key(0), 2)], ids=["exact", "draws"])
def test_inputs_that_are_not_finite_are_named_however_late(operator, law):
    x = np.ones((2500, 2))
    x[2300, 1] = np.nan
    for data, where in ((x, "x"), ({"a": x[:, :1], "b": x}, r"x\['b'\]")):
        with pytest.raises(ValueError, match=f"{where} is not finite at row 2300"):
            operator(lambda t, d: logit(t, d["b"] if isinstance(d, dict) else d), jnp.zeros(2), data, law=law)
    masked = lambda t, x: logit(t, jnp.where(jnp.isnan(x), 0.0, x))  # a model may use NaN for what is missing
    kept = operator(masked, jnp.zeros(2), x, law=law).trace()
    np.testing.assert_allclose(kept, operator(logit, jnp.zeros(2), np.nan_to_num(x), law=law).trace(), rtol=1e-12)
    late = lambda t, x: dist.Normal(jnp.log(x[:, 0] - 1.5) * t, 1.0, validate_args=False)  # NaN of the model's own
    if operator is fb.implicit_fisher and law != fb.Exact():
        return  # it looks at no row before the first product
    with pytest.raises(ValueError, match=r"NaN for the parameters|F is not finite|is not finite at a possible outcome"):
        operator(late, 1.0, np.where(np.arange(2500)[:, None] < 2300, 2.0, 1.0), law=law).trace()


@pytest.mark.parametrize("operator", OPERATORS[:-1], ids=lambda f: f.__name__)
def test_inputs_that_are_not_finite_under_jit(operator):
    inside = jax.jit(lambda t, x: operator(logit, t, x).as_matrix())
    assert np.isfinite(inside(jnp.zeros(2), X)).all()
    with pytest.raises(RuntimeError, match="F is not finite"):
        inside(jnp.zeros(2), jnp.asarray(X).at[3, 1].set(jnp.nan)).block_until_ready()


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda f: f.__name__)
def test_inputs_of_more_digits_do_not_change_the_type(operator):
    F = operator(logit, jnp.zeros(2, jnp.float32), np.asarray(X, np.float64))
    found = (F.trace(), F.diagonal(), F @ jnp.ones(2), F.as_matrix(), F.logdet(0.1), F.solve(jnp.ones(2), 0.1))
    assert {a.dtype for a in found} == {jnp.dtype("float32")}


def test_inputs_without_columns():
    F = fb.dense_fisher(lambda t, x: dist.Normal(t + x.sum(1), 2.0), 0.0, np.zeros((5, 0)))
    np.testing.assert_allclose(F.as_matrix(), [[0.25]])
