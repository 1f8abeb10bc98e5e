"""What a geometry analysis computes once."""

import math

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from torch.testing import assert_close

import nodelens as nl
from nodelens.analysis.geometry.columns import FAMILIES, SAMPLED
from nodelens.analysis.geometry.sampled import SampledRows
from nodelens.metrics import get_metric

WIDTH, LENGTH, VOCABULARY = 24, 40, 50


def build(family, **options):
    shared = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 3}
    config = getattr(transformers, f"{family}Config")(**shared, num_attention_heads=4, num_key_value_heads=2, **options)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def llama():
    return build("Llama")


def tokens(samples=4, length=LENGTH):
    return torch.randint(3, VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("rows", [12, 200], ids=["fewer rows than units", "more rows than units"])
def test_a_column_of_the_sample_is_the_metric_of_its_rows(rows):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(rows, WIDTH, generator=generator) + 3 * torch.randn(WIDTH, generator=generator) for _ in range(2))
    y[3, 1] = math.inf
    sample, kept = SampledRows({"x": x, "y": y}), [k for k in range(rows) if k != 3]
    for name in sorted(SAMPLED):
        metric = get_metric(name)
        if metric.shape == "edge":
            wanted = metric.compute(outputs=x[kept].double(), next_outputs=y[kept].double())
            assert_close(sample.value(metric, "x", "y"), float(wanted), rtol=1e-9, atol=1e-12)
        else:
            assert_close(sample.value(metric, "x"), float(metric.compute(outputs=x.double())), rtol=1e-9, atol=1e-12)
            assert_close(sample.value(metric, "y"), float(metric.compute(outputs=y[kept].double())), rtol=1e-9, atol=1e-12)


def test_a_sample_of_one_row_or_of_two_widths_has_no_value():
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    assert math.isnan(SampledRows({"x": x[:1]}).value(get_metric("cos_sim_mean"), "x"))
    assert math.isnan(SampledRows({"x": x, "y": x[:, :2]}).value(get_metric("layer_cosine_sim"), "x", "y"))


@pytest.mark.parametrize("limit", [12, 200], ids=["few rows", "many rows"])
def test_no_decomposition_is_taken_twice(llama, limit, monkeypatch):
    taken = []
    for room, name in ((torch, "eigh"), (torch, "svdvals"), (torch, "qr"), (np, "eigvalsh")):
        original = getattr(room.linalg, name)
        monkeypatch.setattr(room.linalg, name, lambda x, *a, f=original, n=name, **k: taken.append(n) or f(x, *a, **k))
    nl.analyze_model(llama, [{"input_ids": tokens()}], sample_limit=limit)
    counts = {name: taken.count(name) for name in ("eigh", "eigvalsh", "svdvals", "qr")}
    # of all rows: axes at 3 layers, those of rankme, angles at 2 pairs; of the sample: one spectrum and one basis at each layer
    assert counts == {"eigh": 3, "eigvalsh": 6, "svdvals": 2, "qr": 3 * (limit < WIDTH)}


def test_wide_layers_have_the_columns_of_numpy():
    wide = nn.Sequential(nn.Embedding(VOCABULARY, 300), nn.Linear(300, 300))
    found = nl.analyze_model(wide, [tokens(32)], hook_point="module_output:1", metrics=["spectrum", "novelty"])
    rows = wide(tokens(32)).flatten(0, 1).double().detach().numpy()
    values = np.linalg.eigvalsh(np.cov(rows.T))[::-1]
    rank = int((found.eigenvalues["layer_00"] > 0).sum())
    np.testing.assert_allclose(found.eigenvalues["layer_00"][:rank], values[:rank], rtol=1e-4)
    assert rank == VOCABULARY - 4
    assert set(FAMILIES["spectrum"]) <= set(found.metrics)
