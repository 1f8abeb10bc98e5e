"""Numbers of the systems these metrics come from: in hand, and through a pass over batches."""

import json

import numpy as np
import pytest
import torch
from real import folder
from torch import nn
from torch.testing import assert_close

import nodelens as nl
from nodelens.metrics import get_metric, list_metrics
from nodelens.network.targets import logit_pc1, target_of

FILES = (
    "activations",
    "activations_conv",
    "average_redundancy",
    "composite_importance",
    "conditional_rayleigh_quotient",
    "delta_alignment",
    "gaussian_pid_synergy_mmi",
    "input_information",
    "mi_about_class",
    "mutual_information_gaussian",
    "pairwise_redundancy_gaussian",
    "pairwise_redundancy_gaussian_conv",
    "rayleigh_quotient_conv_1",
    "rayleigh_quotient_conv_2",
    "rayleigh_quotient_linear",
    "targets",
    "taylor_saliency",
    "taylor_saliency_conv",
)


def document(name):
    return json.loads((folder("NODELENS_GOLDEN") / f"{name}.json").read_text())


def tensor(values):
    return torch.as_tensor(np.array(values, float))


def flat(value):
    """A value of a layer stands as an array of one."""
    return value.reshape(1) if value.ndim == 0 else value


def cases(doc):
    for case, options in doc["options"].items():
        options = dict(options)
        arguments = doc["arguments"].get("*") or doc["arguments"][case]
        arrays = {k: torch.as_tensor(np.array(doc["inputs"][v])) for k, v in arguments.items()}
        metric, tolerance = options.pop("metric", doc["metric"]), doc["tolerance"].get(case, doc["tolerance"])
        if metric != "targets":
            assert metric in list_metrics(), metric
            yield case, get_metric(metric, **options), arrays, tensor(doc["expected"][case]), tolerance


@pytest.mark.parametrize("name", FILES)
def test_golden_numbers_agree(name):
    doc = document(name)
    for case, metric, arrays, expected, tolerance in cases(doc):
        value = metric.compute(**arrays, **doc.get("layer", {}))
        assert_close(flat(value), flat(expected), **tolerance, msg=lambda m, case=case: f"{case}: {m}")


class Linear(nn.Linear):
    """A layer that puts out what it is told."""

    def forward(self, x, outputs=None):
        return super().forward(x) if outputs is None else outputs


class Conv2d(nn.Conv2d):
    def forward(self, x, outputs=None):
        return super().forward(x) if outputs is None else outputs


class Bare(nn.Module):
    def forward(self, x, outputs=None):
        return x if outputs is None else outputs


class Replay(nn.Module):
    def __init__(self, weight=None, **geometry):
        super().__init__()
        self.units: nn.Module = Bare()
        if weight is not None and weight.ndim == 2:
            self.units = Linear(weight.shape[1], len(weight), bias=False, dtype=weight.dtype)
        elif weight is not None:
            width = weight.shape[1] * geometry.get("groups", 1)
            self.units = Conv2d(width, len(weight), tuple(weight.shape[2:]), bias=False, dtype=weight.dtype, **geometry)
        if weight is not None:
            self.units.weight.data.copy_(weight)

    def forward(self, x, outputs=None, logits=None):
        y = self.units(x, outputs)
        return y if logits is None else logits


def through_a_pass(metric, arrays, geometry, size):
    """The value of a metric from a pass over batches of a network that replays the arrays."""
    arrays = {k: t for k, t in arrays.items() if k != "outputs" or not {"inputs", "weights"} <= arrays.keys()}
    weight, initial, gradients = (arrays.pop(k, None) for k in ("weights", "initial_weights", "gradients"))
    arrays["x"] = arrays.pop("inputs") if "inputs" in arrays else arrays.pop("outputs")
    if gradients is not None:
        arrays["labels"] = gradients
    options = {k: geometry[k] for k in ("stride", "padding", "dilation", "groups", "padding_mode") if k in geometry}
    net = Replay(weight, **options)
    data = [{k: t[a : a + size] for k, t in arrays.items()} for a in range(0, len(arrays["x"]), size)]
    start = None if initial is None else {"units.weight": initial}
    more = {} if gradients is None else {"loss": lambda z, g: (z * g).sum()}
    found = nl.analyze(net, data, {"value": metric}, layers="units", initial=start, **more)
    if metric.shape == "unit":
        return torch.tensor(found.units["value"].to_numpy())
    if metric.shape == "layer":
        return torch.tensor(found.layers["value"].to_numpy())
    return torch.tensor(found.matrices["units", "value"])


SLOW = pytest.mark.slow  # batches of other sizes: tests/metrics/test_every_metric.py has them for every metric


@pytest.mark.parametrize("size", [pytest.param(1, marks=SLOW), 7, pytest.param(64, marks=SLOW)])
@pytest.mark.parametrize("name", FILES)
def test_golden_numbers_agree_through_a_pass(name, size):
    doc = document(name)
    for case, metric, arrays, expected, tolerance in cases(doc):
        if "targets" in arrays:
            metric = type(metric)(**{**metric.options, "target": "given"})
        if name == "composite_importance":  # its outputs are rounded to four digits, a pass has those of inputs and weights
            tolerance = {"rtol": 1e-4, "atol": 1e-4}
        value = through_a_pass(metric, arrays, doc.get("layer", {}), size)
        assert_close(flat(value), flat(expected), **tolerance, msg=lambda m, case=case: f"{case}: {m}")


def test_golden_targets_agree():
    doc = document("targets")
    logits, y = (torch.as_tensor(np.array(doc["inputs"][k])) for k in ("logits", "labels"))
    for name in ("logit_margin", "correct_logit"):
        assert_close(target_of(name, logits, y), tensor(doc["expected"][name]), rtol=1e-8, atol=1e-12)
    pc1 = tensor(doc["expected"]["logit_pc1"])
    found = logit_pc1(logits)
    assert_close(found * (found @ pc1).sign(), pc1, rtol=1e-8, atol=1e-12)


class Layers(nn.Module):
    """Three layers that put out given rows."""

    def __init__(self, count):
        super().__init__()
        self.at = nn.ModuleList(Bare() for _ in range(count))

    def forward(self, x):
        return [layer(part) for layer, part in zip(self.at, x.unbind(1), strict=True)][-1]


def stacked(doc):
    names = [k for k in doc["inputs"] if k.startswith("layer")]
    return torch.stack([tensor(doc["inputs"][k]) for k in names], 1)


@pytest.mark.parametrize("size", [pytest.param(1, marks=SLOW), 7, pytest.param(72, marks=SLOW)])
@pytest.mark.parametrize("name", ["spectrum", "sample_geometry", "layer_edges", "normalization_ablation"])
def test_golden_columns_of_layers_and_edges_agree_through_a_pass(name, size):
    doc = document(name)
    rows = stacked(doc)
    columns = {c for expected in doc["expected"].values() for c in expected}
    for case, expected in doc["expected"].items():
        options = doc["options"][case]
        if "eigenvalues" in options:
            continue
        metrics = {}
        for column in columns:
            own = {"rows": options["variant"]} if "variant" in options else {}
            own |= {"novelty_k": options["novelty_k"]} if column == "feature_subspace_novelty" else {}
            metrics[column] = get_metric(column, **own)
        found = nl.analyze(Layers(rows.shape[1]), rows.split(size), metrics, layers="at.*", pairs="all")
        if "->" in case:
            row = found.edges.loc[tuple(f"at.{k}" for k in case.split("->"))]
        else:
            row = found.layers.loc[f"at.{options.get('layer', 0)}"]
        for column, value in expected.items():
            tolerance = doc["tolerance"].get(case, doc["tolerance"])
            wanted = float("nan") if value is None else float(value)
            assert_close(float(row[column]), wanted, **tolerance, equal_nan=True, msg=lambda m, c=column: f"{c}: {m}")


def test_golden_spectra_agree():
    doc = document("spectrum")
    made = {
        "geometric_220": torch.exp(-0.05 * torch.arange(220, dtype=torch.float64)),
        "power_law_300": torch.arange(1, 301, dtype=torch.float64) ** -1.2,
        "flat_16": torch.ones(16, dtype=torch.float64),
        "short_4": torch.tensor([4.0, 2.0, 1.0, 1.0], dtype=torch.float64),
    }
    for case, eigenvalues in made.items():
        for column, value in doc["expected"][case].items():
            wanted = float("nan") if value is None else float(value)
            found = float(get_metric(column).of(eigenvalues))
            assert_close(found, wanted, **doc["tolerance"][case], equal_nan=True, msg=lambda m, c=column: f"{c}: {m}")


def test_golden_weight_norms_agree():
    doc = document("weight_norms")
    state = {k: tensor(v) for k, v in doc["inputs"]["state_dict"].items()}
    net = nn.Sequential(nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    net.load_state_dict(state)
    names = ["l1_norm", "l2_norm", "nuc_norm", "sparsity"]
    found = nl.analyze(net, torch.randn(9, 7, dtype=torch.float64).split(4), names)
    for name in names:
        assert_close(torch.tensor(found.layers[name].to_numpy()), tensor(doc["expected"][name]), **doc["tolerance"])
    assert_close(found.metadata["model_values"]["sparsity"], doc["expected"]["sparsity_model"], **doc["tolerance"])
    assert_close(found.metadata["model_values"]["l1_norm"], sum(doc["expected"]["l1_norm"]), **doc["tolerance"])


@pytest.mark.parametrize("size", [1, 5, 12])
def test_golden_loss_proxies_of_a_convolutional_network_agree(size):
    doc = document("scar_conv")
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(3, 4, 3, stride=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    ).double()
    net.load_state_dict({k: tensor(v) for k, v in doc["inputs"]["state_dict"].items()})
    x, y = tensor(doc["inputs"]["images"]), torch.tensor(doc["inputs"]["labels"])
    data = list(zip(x.split(size), y.split(size), strict=True))
    found = nl.analyze(net, data, ["scar_loss_proxy", "scar_taylor"]).units
    for case, options in doc["options"].items():
        column = options.get("metric", doc["metric"])
        value = torch.tensor(found.loc[options["layer"], column].to_numpy())
        assert_close(value, tensor(doc["expected"][case]), **doc["tolerance"])


def texts_in_batches(ids, size):
    """Texts of unequal length, padded on the right."""
    for a in range(0, len(ids), size):
        some = [torch.tensor(text) for text in ids[a : a + size]]
        padded, labels = (nn.utils.rnn.pad_sequence(some, batch_first=True, padding_value=v) for v in (0, -100))
        yield {"input_ids": padded, "labels": labels, "attention_mask": (labels != -100).long()}


@pytest.mark.parametrize("size", [1, 3])
def test_golden_loss_proxies_of_a_language_model_agree(size):
    from transformers import LlamaConfig, LlamaForCausalLM

    doc = document("scar_llama")
    options = {k: v for k, v in doc["config"].items() if k not in ("class", "rope_theta")}
    net = LlamaForCausalLM(LlamaConfig(**options, attn_implementation="eager")).eval()
    net.load_state_dict({k: tensor(v).float() for k, v in doc["inputs"]["state_dict"].items()}, strict=False)
    data = list(texts_in_batches(doc["inputs"]["input_ids"], size))
    layers = [f"model.layers.{k}.mlp.down_proj.input" for k in (0, 1)]
    names = list(doc["expected"]["sum_layer0"])
    for reduction in ("sum", "mean"):
        chosen = {n: get_metric(n, **({} if "power" in n else {"loss_reduction": reduction})) for n in names}
        found = nl.analyze(net, data, chosen, layers=layers).units
        for k, layer in enumerate(layers):
            for name, wanted in doc["expected"][f"{reduction}_layer{k}"].items():
                value = torch.tensor(found.loc[layer, name].to_numpy())
                assert_close(value, tensor(wanted), **doc["tolerance"], msg=lambda m, n=(reduction, name): f"{n}: {m}")


def test_labels_of_padded_tokens_do_not_count():
    from nodelens.network.batch import Batch

    ids = torch.tensor([[5, 6, 7, 0], [5, 6, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    batch = Batch.of({"input_ids": ids, "labels": ids, "attention_mask": mask}, task="causal_lm")
    assert batch.labels.tolist() == [[5, 6, 7, -100], [5, 6, -100, -100]]
    assert batch.predicted.tolist() == [2, 1]
