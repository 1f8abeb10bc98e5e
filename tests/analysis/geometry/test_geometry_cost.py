"""What a geometry analysis computes once, and how few tokens its dry run takes."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from torch import nn
from torch.testing import assert_close

import nodelens as nl
from nodelens.analysis.geometry import reading
from nodelens.analysis.geometry.columns import FAMILIES, SAMPLED
from nodelens.analysis.geometry.sampled import SampledRows
from nodelens.analysis.geometry.tokens import TokenBatch
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


class Positioned(nn.Module):
    """A table of positions that takes texts of one length only, and a head that may be called twice."""

    def __init__(self, twice=False):
        super().__init__()
        self.embed, self.place = nn.Embedding(VOCABULARY, 8), nn.Parameter(torch.randn(LENGTH, 8))
        self.last, self.twice, self.lengths = nn.Linear(8, 5), twice, []

    def forward(self, x):
        self.lengths.append(x.shape[1])
        x = self.embed(x) + self.place
        return self.last(x) + (self.last(x) if self.twice else 0)


def same(one, other):
    for name in ("metrics", "novelty", "router"):
        pd.testing.assert_frame_equal(getattr(one, name), getattr(other, name))
    assert one.metadata["passes"] == other.metadata["passes"]  # layers and bytes


@pytest.mark.parametrize("family", ["Llama", "Mixtral"])
def test_a_dry_run_takes_the_first_tokens_only(family, monkeypatch):
    net, data = build(family), [{"input_ids": tokens()}]
    shapes = []
    net.get_input_embeddings().register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape)))
    found = nl.analyze_model(net, data, sample_limit=None)  # pairs of layers hold the rows of a batch
    assert shapes == [(2, reading.FEW), (3, reading.FEW), (4, LENGTH)]
    assert len(found.router) == (3 if family == "Mixtral" else 0)
    monkeypatch.setattr(reading, "FEW", LENGTH)
    same(found, nl.analyze_model(net, data, sample_limit=None))
    assert shapes[3:] == [(2, LENGTH), (3, LENGTH), (4, LENGTH)]


def test_a_model_of_one_length_is_run_on_all_tokens():
    net = Positioned()
    found = nl.analyze_model(net, [tokens()], hook_point="module_input:last")
    assert set(net.lengths[:-3]) == {reading.FEW}
    assert net.lengths[-3:] == [LENGTH] * 3
    assert found.metrics["tokens_observed"].tolist() == [4 * LENGTH]


def test_an_error_of_a_dry_run_names_all_tokens():
    with pytest.raises(ValueError, match=r"last.input shows 40 rows for 40 tokens in each of 2 calls"):
        nl.analyze_model(Positioned(twice=True), [tokens()], hook_point="module_input:last")


def test_inputs_with_one_value_for_each_token_are_cut():
    ids, mask = tokens(), torch.ones(4, LENGTH, dtype=torch.int64)
    cut = TokenBatch.of({"input_ids": ids, "attention_mask": mask}, {"use_cache": False}).beginning(17)
    assert cut.inputs["use_cache"] is False
    for name, whole in (("input_ids", ids), ("attention_mask", mask)):
        assert torch.equal(cut.inputs[name], whole[:, :17])
    assert cut.mask.shape == cut.keys.shape == (4, 17)
    assert TokenBatch.of({"input_ids": ids}, {}).beginning(LENGTH) is None
    assert TokenBatch.of({"input_ids": ids, "images": torch.zeros(4, 3, 8, 8)}, {}).beginning(17) is None
    assert TokenBatch.of({"input_ids": ids, "position_ids": torch.arange(LENGTH)[None]}, {}).beginning(17) is None


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
    for name in ("eigh", "eigvalsh", "svdvals", "qr"):
        original = getattr(torch.linalg, name)
        monkeypatch.setattr(torch.linalg, name, lambda x, *a, f=original, n=name, **k: taken.append(n) or f(x, *a, **k))
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
