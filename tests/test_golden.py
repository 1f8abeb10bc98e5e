"""Numbers of the systems these metrics come from."""

import json

import numpy as np
import pytest
import torch
from real import folder
from torch.testing import assert_close

from nodelens.metrics import get_metric, list_metrics
from nodelens.targets import logit_pc1, target_of

FILES = (
    "activations",
    "activations_conv",
    "rayleigh_quotient_linear",
    "rayleigh_quotient_conv_1",
    "rayleigh_quotient_conv_2",
    "pairwise_redundancy_gaussian",
    "pairwise_redundancy_gaussian_conv",
    "gaussian_pid_synergy_mmi",
    "targets",
    "mi_about_class",
    "taylor_saliency",
    "taylor_saliency_conv",
)
LATER = {
    "outlier_index",
    "outlier_index_q",
    "class_norm_mean",
    "class_norm_max",
    "class_norm_variance",
    "class_norm_ratio",
    "layer",
    "binning",
}


def cases(doc):
    for case, options in doc["options"].items():
        options = dict(options)
        arguments = doc["arguments"].get("*") or doc["arguments"][case]
        arrays = {k: torch.as_tensor(np.array(doc["inputs"][v])) for k, v in arguments.items()}
        expected = torch.as_tensor(np.array(doc["expected"][case], float))
        yield case, options.pop("metric", doc["metric"]), options, arrays, expected, doc["tolerance"].get(case, doc["tolerance"])


@pytest.mark.parametrize("name", FILES)
def test_golden_numbers_agree(name):
    doc = json.loads((folder("NODELENS_GOLDEN") / f"{name}.json").read_text())
    seen = 0
    for case, metric, options, arrays, expected, tolerance in cases(doc):
        if case in LATER or metric == "targets":
            continue
        assert metric in list_metrics(), metric
        value = get_metric(metric, **options).compute(**arrays, **doc.get("layer", {}))
        assert_close(value, expected, **tolerance, msg=lambda m, case=case: f"{case}: {m}")
        seen += 1
    assert seen


def test_golden_targets_agree():
    doc = json.loads((folder("NODELENS_GOLDEN") / "targets.json").read_text())
    logits, y = (torch.as_tensor(np.array(doc["inputs"][k])) for k in ("logits", "labels"))
    for name in ("logit_margin", "correct_logit"):
        assert_close(target_of(name, logits, y), torch.tensor(doc["expected"][name], dtype=torch.float64), rtol=1e-8, atol=1e-12)
    pc1 = torch.tensor(doc["expected"]["logit_pc1"], dtype=torch.float64)
    found = logit_pc1(logits)
    assert_close(found * (found @ pc1).sign(), pc1, rtol=1e-8, atol=1e-12)


def test_golden_spectra_agree():
    doc = json.loads((folder("NODELENS_GOLDEN") / "spectrum.json").read_text())
    for k in range(3):
        rows = torch.as_tensor(np.array(doc["inputs"][f"layer{k}"]))
        value = get_metric("participation_ratio").compute(outputs=rows)
        assert_close(float(value), doc["expected"][f"layer{k}"]["d_pr"], rtol=1e-6, atol=1e-12)
