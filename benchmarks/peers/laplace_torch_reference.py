"""Evidence and predictive probabilities by laplace-torch in float64, for tests/test_laplace_peers.py to compare with.

Usage: _build/peers/torch/bin/python benchmarks/peers/laplace_torch_reference.py   (compare.py makes that environment)
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import work
from in_torch import Model
from laplace import Laplace
from laplace.curvature.backpack import BackPackGGN
from laplace.curvature.curvlinops import CurvlinopsGGN
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

SIZES, FITTED, PREDICTED, PRIORS = (64, 12, 10), 200, 20, (0.5, 3.0)
CASES = {"dense": ("all", "full"), "diagonal": ("all", "diag"), "last layer": ("last_layer", "full")}
OUT = Path(__file__).parents[2] / "tests" / "laplace_torch.json"

if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    images = load_digits()
    network = work.Network(work.weights(SIZES), images.data / 16, images.target)
    model = Model(network._replace(weights=[w.astype(float) for w in network.weights]))
    x, y = torch.tensor(network.x), torch.tensor(network.y)
    loader = DataLoader(TensorDataset(x[:FITTED], y[:FITTED]), batch_size=50)
    new = x[FITTED : FITTED + PREDICTED]
    found = {}
    for name, (subset, structure) in CASES.items():
        backend = CurvlinopsGGN if subset == "last_layer" else BackPackGGN
        for prior in PRIORS:
            posterior = Laplace(model, "classification", subset, structure, prior_precision=prior, backend=backend)
            posterior.fit(loader)
            found[f"{name}, {prior}"] = {
                "log_marginal_likelihood": float(posterior.log_marginal_likelihood()),
                **{
                    link: np.asarray(posterior(new, pred_type="glm", link_approx=link).detach()).tolist()
                    for link in ("probit", "bridge")
                },
            }
    setting = {"sizes": SIZES, "fitted": FITTED, "predicted": PREDICTED}
    made_by = {name: version(name) for name in ("laplace-torch", "torch")}
    OUT.write_text(json.dumps({"made by": made_by, "setting": setting, "found": found}, indent=1) + "\n")
