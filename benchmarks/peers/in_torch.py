"""torch.func, curvlinops, nngeometry, BackPACK and laplace-torch, which run in one environment."""

from __future__ import annotations

import warnings

import numpy as np
import torch
import work
from backpack import backpack, extend
from backpack.extensions import DiagGGNExact, SqrtGGNExact
from backpack.hessianfree.ggnvp import ggn_vector_product
from curvlinops import GGNLinearOperator
from laplace import Laplace
from laplace.curvature.backpack import BackPackGGN
from laplace.curvature.curvlinops import CurvlinopsGGN
from nngeometry.metrics import FIM
from nngeometry.object import PMatDense, PMatDiag, PMatImplicit, PVector
from torch import nn
from torch.func import functional_call, jacrev, jvp, vjp, vmap
from torch.utils.data import DataLoader, TensorDataset
from work import LOOP, Entry, Network, Posterior

warnings.filterwarnings("ignore")


class Model(nn.Sequential):
    """The network, with its weights [out, in] as torch has them."""

    def __init__(self, network: Network):
        layers: list[nn.Module] = []
        for W, b in zip(network.weights[::2], network.weights[1::2], strict=True):
            linear = nn.Linear(*W.shape)
            linear.weight.data, linear.bias.data = torch.tensor(W.T.copy()), torch.tensor(b)
            layers += [linear, nn.Tanh()]
        super().__init__(*layers[:-1])


def data(network: Network):
    return torch.tensor(network.x), torch.tensor(network.y)


def transposed(arrays) -> list[np.ndarray]:
    """Between torch's order of a layer's weights and ours."""
    return [np.asarray(a).T for a in arrays]


def vector(network: Network) -> list[torch.Tensor]:
    return [torch.tensor(a.copy()) for a in transposed(work.direction(network))]


def order(network: Network) -> np.ndarray:
    """Where each of our parameters stands among torch's."""
    at, out = 0, []
    for w in network.weights:
        out.append(np.arange(at, at + w.size).reshape(w.T.shape).T.ravel())
        at += w.size
    return np.concatenate(out)


def as_vector(network: Network):
    """Results that are lists of arrays, or flat, in our order."""

    def canonical(out) -> np.ndarray:
        if isinstance(out, (list, tuple)):
            return work.flat(transposed([o.detach() for o in out]))
        return out.detach().numpy()[order(network)]

    return canonical


def as_matrix(network: Network):
    at = order(network)
    return lambda F: F.detach().numpy()[np.ix_(at, at)].ravel()


def gradient(network: Network):
    model, (x, y) = Model(network), data(network)
    return lambda: torch.autograd.grad(nn.functional.cross_entropy(model(x), y), list(model.parameters()))


def times(product, v):
    """A product, and then another with a tenth of the result, and so on."""
    for _ in range(LOOP):
        v = product([a / 10 for a in v])
    return v


# -------------------------------------------------------------------------------------------------- torch.func


def functional(network: Network):
    model, (x, _) = Model(network), data(network)
    theta = {name: p.detach() for name, p in model.named_parameters()}
    return theta, x, lambda theta, x: functional_call(model, theta, (x,))


def func_matrix(network: Network) -> Entry:
    theta, x, f = functional(network)

    def rows(theta, one):
        log_p = lambda t: torch.log_softmax(f(t, one[None])[0], 0)
        J, root_p = jacrev(log_p)(theta), torch.exp(log_p(theta) / 2)
        return torch.cat([j.flatten(1) for j in J.values()], 1) * root_p[:, None]

    def call():
        R = vmap(rows, (None, 0))(theta, x).flatten(0, 1)
        return R.T @ R / len(x)

    return Entry(call, as_matrix(network))


def func_product(network: Network):
    theta, x, f = functional(network)

    def product(v):
        z, u = jvp(lambda t: f(t, x), (theta,), (dict(zip(theta, v, strict=True)),))
        p = torch.softmax(z, 1)
        u = (p * u - p * (p * u).sum(1, keepdim=True)) / len(x)
        return list(vjp(lambda t: f(t, x), theta)[1](u)[0].values())

    return product


# ------------------------------------------------------------------------------------------------------ others


def curvlinops_operator(network: Network):
    model, batch = Model(network), data(network)
    parameters = list(model.parameters())
    return GGNLinearOperator(model, nn.CrossEntropyLoss(), parameters, [batch], check_deterministic=False)


def curvlinops_matrix(network: Network) -> Entry:
    d = sum(w.size for w in network.weights)
    return Entry(lambda: curvlinops_operator(network) @ torch.eye(d), as_matrix(network))


def nngeometry_fim(network: Network, kind, at_once=256):
    model, (x, y) = Model(network), data(network)
    loader = DataLoader(TensorDataset(x, y), batch_size=at_once)
    return model, lambda: FIM(model, loader, kind, variant="classif_logits")


def nngeometry_product(network: Network):
    _, fim = nngeometry_fim(network, PMatImplicit)
    F = fim()
    names = F.generator.layer_collection
    flat = lambda v: PVector(names, vector_repr=torch.cat([a.flatten() for a in v]))

    def product(v):
        out = F.mv(flat(v)).to_torch()
        return [o.view_as(a) for o, a in zip(out.split([a.numel() for a in v]), v, strict=True)]

    return product


def extended(network: Network):
    model, loss = extend(Model(network)), extend(nn.CrossEntropyLoss())
    x, y = data(network)
    return model, lambda: loss(model(x), y)


def backpack_matrix(network: Network) -> Entry:
    model, loss = extended(network)

    def call():
        with backpack(SqrtGGNExact()):
            loss().backward()
        V = torch.cat([p.sqrt_ggn_exact.flatten(0, 1).flatten(1) for p in model.parameters()], 1)  # [C n, d]
        return V.T @ V

    return Entry(call, as_matrix(network))


def backpack_product(network: Network):
    model, loss = Model(network), nn.CrossEntropyLoss()
    x, y = data(network)

    def product(v):
        z = model(x)
        return list(ggn_vector_product(loss(z, y), z, model, v))

    return product


def backpack_diagonal(network: Network, at_once=512):
    model, loss = extend(Model(network)), extend(nn.CrossEntropyLoss())
    x, y = data(network)

    def call():
        total = [torch.zeros_like(p) for p in model.parameters()]
        for xb, yb in zip(x.split(at_once), y.split(at_once), strict=True):
            with backpack(DiagGGNExact()):
                loss(model(xb), yb).backward()
            for t, p in zip(total, model.parameters(), strict=True):
                t += p.diag_ggn_exact * len(xb) / len(x)
        return total

    return call


def laplace_fit(network: Network, structure: str, backend, at_once: int):
    model, (x, y) = Model(network), data(network)
    loader = DataLoader(TensorDataset(x, y), batch_size=at_once)

    def call():
        posterior = Laplace(model, "classification", "all", structure, backend=backend)
        posterior.fit(loader)
        return posterior.H / len(x)

    return call


def posterior(structure: str, backend, subset: str = "all", at_once: int = 1000):
    """laplace-torch's, fitted in one batch; it predicts `at_once` digits at a time."""

    def make(network: Network) -> Posterior:
        model, (x, y) = Model(network), data(network)
        loader, new = DataLoader(TensorDataset(x, y), batch_size=len(x)), torch.tensor(work.predicted())

        def fit():
            found = Laplace(model, "classification", subset, structure, prior_precision=work.PRIOR, backend=backend)
            found.fit(loader)
            return found

        def predict(found):
            return torch.cat(
                [found(part, pred_type="glm", link_approx="probit").detach() for part in new.split(at_once)]
            )

        return Posterior(fit, lambda found: found.log_marginal_likelihood().detach(), predict)

    return make


def products(make):
    return {
        "product": lambda n: Entry(lambda p=make(n), v=vector(n): p(v), as_vector(n), gradient(n)),
        "loop": lambda n: Entry(lambda p=make(n), v=vector(n): times(p, v), as_vector(n), gradient(n)),
    }


def diagonal(make):
    return lambda n: Entry(make(n), as_vector(n), gradient(n))


ENTRIES = {
    ("matrix", "torch.func"): func_matrix,
    ("matrix", "curvlinops"): curvlinops_matrix,
    ("matrix", "nngeometry"): lambda n: Entry(
        lambda make=nngeometry_fim(n, PMatDense)[1]: make().to_torch(), as_matrix(n)
    ),
    ("matrix", "BackPACK"): backpack_matrix,
    ("matrix", "laplace-torch"): lambda n: Entry(laplace_fit(n, "full", CurvlinopsGGN, 256), as_matrix(n)),
    ("matrix", "laplace-torch with BackPACK"): lambda n: Entry(laplace_fit(n, "full", BackPackGGN, 256), as_matrix(n)),
    ("diagonal", "nngeometry"): lambda n: Entry(
        lambda make=nngeometry_fim(n, PMatDiag)[1]: make().get_diag(), as_vector(n), gradient(n)
    ),
    ("diagonal", "BackPACK"): diagonal(backpack_diagonal),
    ("diagonal", "laplace-torch with BackPACK"): diagonal(lambda n: laplace_fit(n, "diag", BackPackGGN, 512)),
    ("diagonal", "laplace-torch"): diagonal(lambda n: laplace_fit(n, "diag", CurvlinopsGGN, 16)),
    ("laplace_full", "laplace-torch"): posterior("full", CurvlinopsGGN),
    ("laplace_full", "laplace-torch with BackPACK"): posterior("full", BackPackGGN),
    ("laplace_kronecker", "laplace-torch"): posterior("kron", CurvlinopsGGN),
    ("laplace_kronecker", "laplace-torch with BackPACK"): posterior("kron", BackPackGGN),
    ("laplace_diagonal", "laplace-torch"): posterior("diag", CurvlinopsGGN),
    ("laplace_diagonal", "laplace-torch with BackPACK"): posterior("diag", BackPackGGN),
    ("laplace_last", "laplace-torch"): posterior("full", CurvlinopsGGN, "last_layer"),
    ("laplace_last", "laplace-torch with BackPACK"): posterior("full", BackPackGGN, "last_layer"),
    ("trace", "nngeometry"): lambda n: Entry(
        lambda make=nngeometry_fim(n, PMatImplicit)[1]: make().trace(), lambda t: np.array([float(t)]), gradient(n)
    ),
    ("trace", "BackPACK"): lambda n: Entry(
        lambda call=backpack_diagonal(n): sum(t.sum() for t in call()), lambda t: np.array([float(t)]), gradient(n)
    ),
} | {
    (task, name): entry
    for name, make in {
        "torch.func": func_product,
        "curvlinops": lambda n: lambda v, G=curvlinops_operator(n): G @ v,
        "nngeometry": nngeometry_product,
        "BackPACK": backpack_product,
    }.items()
    for task, entry in products(make).items()
}

if __name__ == "__main__":
    work.main(ENTRIES)
