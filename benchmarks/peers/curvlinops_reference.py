"""K-FAC and EKFAC of a convolution by curvlinops in float64, for tests/test_operators.py to compare with.

Usage: _build/peers/torch/bin/python benchmarks/peers/curvlinops_reference.py   (compare.py makes that environment)
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from curvlinops import EKFACLinearOperator, KFACLinearOperator

INPUTS, IMAGE, CLASSES = 5, (2, 6, 6), 4
OUT = Path(__file__).parents[2] / "tests" / "curvlinops.json"

if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(IMAGE[0], 3, 3, stride=2, padding=1),
        torch.nn.Tanh(),
        torch.nn.Flatten(),
        torch.nn.Linear(27, CLASSES),
    )
    parameters = list(model.parameters())
    x, y = torch.randn(INPUTS, *IMAGE), torch.zeros(INPUTS, dtype=torch.long)  # the exact law looks at no label
    v = torch.randn(sum(p.numel() for p in parameters))
    loss = torch.nn.CrossEntropyLoss(reduction="mean")
    products = {}
    for name, operator in {"K-FAC": KFACLinearOperator, "EKFAC": EKFACLinearOperator}.items():
        F = operator(model, loss, parameters, [(x, y)], fisher_type="type-2", separate_weight_and_bias=False)
        products[name] = (F @ v).tolist()
    found = {
        "made by": {name: version(name) for name in ("curvlinops-for-pytorch", "torch")},
        "x": x.tolist(),
        "theta": [np.asarray(p.detach()).tolist() for p in parameters],
        "v": v.tolist(),
        "products": products,
    }
    OUT.write_text(json.dumps(found) + "\n")
