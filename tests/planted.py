"""Rows whose sample covariance is exactly what a case wants."""

import json

import numpy as np
import torch
from real import folder
from torch import Tensor


def planted(covariance, n: int = 400, seed: int = 0, mean: float = 0.0, ddof: int = 1) -> Tensor:
    """Rows (n, d) float64: random ones made white, then coloured."""
    covariance = torch.as_tensor(covariance, dtype=torch.float64)
    x = torch.randn(n, len(covariance), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x - x.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(x.T @ x / (n - ddof)), x.T, upper=False).T
    return white @ torch.linalg.cholesky(covariance).T + mean


def sums(*weights) -> Tensor:
    """Covariance of variables that are weighted sums of independent ones, a row of weights each."""
    w = torch.tensor(weights, dtype=torch.float64)
    return w @ w.T


def equal(units: int, rho: float) -> Tensor:
    """All pairs correlated alike."""
    return torch.full((units, units), rho, dtype=torch.float64).fill_diagonal_(1)


def golden_cases(name: str):
    """Case, metric name, options, arrays, expected numbers and tolerance of a golden file."""
    doc = json.loads((folder("NODELENS_GOLDEN") / f"{name}.json").read_text())
    for case, options in doc["options"].items():
        options = dict(options)
        arguments = doc["arguments"].get("*") or doc["arguments"][case]
        arrays = {k: torch.as_tensor(np.array(doc["inputs"][v])) for k, v in arguments.items()}
        expected = torch.as_tensor(np.array(doc["expected"][case], float))
        yield case, options.pop("metric", doc["metric"]), options, arrays, expected, doc["tolerance"].get(case, doc["tolerance"])
