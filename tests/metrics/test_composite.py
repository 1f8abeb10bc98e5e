import json

import numpy as np
import pytest
import torch
from ids import label
from laws import everything
from omegaconf import OmegaConf
from real import folder
from torch.testing import assert_close

import nodelens as nl
from nodelens.app.config import build
from nodelens.engine.request import describe
from nodelens.metrics import get_metric
from nodelens.metrics.composite import _SCALES, CompositeImportance
from nodelens.results.files import plain


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_golden_scores_agree():
    doc = json.loads((folder("NODELENS_GOLDEN") / "composite_importance.json").read_text())
    arrays = {k: torch.as_tensor(np.array(doc["inputs"][v])) for k, v in doc["arguments"]["*"].items()}
    for case, options in doc["options"].items():
        options = dict(options)
        value = get_metric(options.pop("metric", doc["metric"]), **options).compute(**arrays)
        assert_close(value, vector(*doc["expected"][case]), **doc["tolerance"][case], msg=lambda m, case=case: f"{case}: {m}")


NAN = float("nan")


@pytest.mark.parametrize(
    ("scale", "values", "expected"),
    [
        ("minmax", (1, 3, 3, NAN, 9, 2), (0, 0.25, 0.25, NAN, 1, 0.125)),
        ("rank", (1, 3, 3, NAN, 9, 2), (0, 0.625, 0.625, NAN, 1, 0.25)),
        ("robust_z", (1, 2, 3, 4, NAN, 10), (-2 / 1.4826, -1 / 1.4826, 0, 1 / 1.4826, NAN, 7 / 1.4826)),
        ("robust_z", (1, 1, 1, 2), (0, 0, 0, NAN)),
        ("none", (1, NAN, 3), (1, NAN, 3)),
        ("minmax", (0.1 + 0.2, 0.3), (0.5, 0.5)),  # equal up to rounding: no scale is made of it
        ("rank", (0.1 + 0.2, 0.3), (0.5, 0.5)),
        ("robust_z", (0.1 + 0.2, 0.3), (0, 0)),
        ("minmax", (4,), (0.5,)),
        ("minmax", (NAN, NAN), (NAN, NAN)),
    ],
    ids=label,
)
def test_a_part_is_brought_to_a_scale(scale, values, expected):
    assert_close(_SCALES[scale](vector(*values)), vector(*expected), equal_nan=True)


def test_it_is_the_weighted_sum_of_its_parts():
    t = everything(units=6)
    parts = {"rq": 1.0, "mi_class": 0.5, "redundancy": -0.3}
    scores = {name: get_metric(name).compute(**t) for name in parts}
    scores["rq"] = scores["rq"].log()  # whichever of its names a metric goes by
    for log in ({}, {"log": ["rayleigh_quotient"]}, {"log": ["rq"]}):
        expected = sum(w * (s - s.min()) / (s.max() - s.min()) for s, w in zip(scores.values(), parts.values(), strict=True))
        assert_close(get_metric("composite", weights=parts, **log).compute(**t), expected)
    ranks = sum(w * scores[name].argsort().argsort().double() / 5 for name, w in parts.items())
    assert_close(get_metric("composite", weights=parts, normalize="rank").compute(**t), ranks)


def test_parts_take_options():
    t = everything(units=5)
    raw = get_metric("composite", weights={"rq": 1.0}, log=[], normalize="none", metrics={"rq": {"relative": False}})
    assert_close(raw.compute(**t), get_metric("rq", relative=False).compute(**t))


def test_a_logarithm_of_nothing_is_no_number():
    t = everything(units=5)
    t["weights"][1] = 1e-200  # whose outputs have a variance of 0
    t["outputs"] = t["inputs"] @ t["weights"].T
    value = get_metric("composite").compute(**t)
    assert value.isnan().tolist() == [False, True, False, False, False]


@pytest.mark.parametrize("name", ["alignment_minus_redundancy", "rq_minus_r"])
def test_presets_are_names_with_options(name):
    t = everything(units=5)
    rq, r = (get_metric(n).compute(**t) for n in ("rq", "redundancy"))
    minmax = _SCALES["minmax"]
    assert_close(get_metric(name).compute(**t), minmax(rq) - 0.3 * minmax(r))
    assert get_metric(name, normalize="rank").options == get_metric(name).options | {"normalize": "rank"}


@pytest.mark.parametrize("name", CompositeImportance.presets)
def test_every_preset_s_parts_are_in_the_catalogue(name):
    metric = get_metric(name)
    assert set(metric.parts) == set(metric.weights)
    assert metric.weighted == any("rayleigh" in part for part in metric.parts)


def test_options_survive_the_config_and_the_metadata():
    node = OmegaConf.create(
        {
            "_target_": "nodelens.metrics.CompositeImportance",
            "weights": {"rq": 1.0},
            "log": ["rq"],
            "metrics": {"rq": {"relative": False}},
        }
    )
    metric = build(node, "metrics.composite")
    assert metric == get_metric("composite", weights={"rq": 1.0}, log=("rq",), metrics={"rq": {"relative": False}})
    assert metric == CompositeImportance(weights=node.weights, log=node.log, metrics=node.metrics)
    assert json.loads(json.dumps(plain(describe(metric))))["options"] == {
        "weights": {"rq": 1.0},
        "log": ["rq"],
        "normalize": "minmax",
        "metrics": {"rq": {"relative": False}},
    }
    assert hash(metric) == hash(get_metric("composite", weights={"rq": 1.0}, log=["rq"]))


def test_a_pass_gives_it_with_a_standard_error_and_without_weights_where_none_are_read():
    x, y = torch.randn(80, 6), torch.randint(3, (80,))
    net = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
    result = nl.analyze(net, [(x, y)], ["composite", "rq_minus_r", "rq", "redundancy"], layers=["0", "2"])
    assert result.units[["composite", "composite_se", "rq_minus_r_se"]].notna().all(axis=None)
    for _, units in result.units.groupby("layer"):
        rq, r = (_SCALES["minmax"](torch.tensor(units[c].to_numpy())) for c in ("rq", "redundancy"))
        assert_close(torch.tensor(units["rq_minus_r"].to_numpy()), rq - 0.3 * r)
    assert nl.analyze(net, [(x, y)], ["within_layer_importance"], layers=["1"]).units["within_layer_importance"].notna().all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weights": {}}, "composite_importance: weights is empty"),
        ({"weights": {"rqq": 1}}, "composite_importance: no metric is called 'rqq'; did you mean 'rq'"),
        ({"weights": {"rq": "much"}}, "composite_importance: weights.rq is 'much'; it must be a number"),
        ({"log": ["rqq"]}, "composite_importance: no metric is called 'rqq'"),
        ({"metrics": {"rq": {}}}, "metrics has options for 'rq', but the parts are rayleigh_quotient, class_mutual_information"),
        ({"weights": {"rq": 1}, "metrics": {"rq": {"relativ": 1}}}, "composite_importance: rq has no option 'relativ'"),
        ({"weights": {"effective_rank": 1}}, "adds values per unit; effective_rank gives one value per layer"),
        ({"weights": {"redundancy": 1}, "metrics": {"redundancy": {"reduce": "none"}}}, "one value per pair of units"),
        ({"weights": {"bn_scale": 1}}, "reads the layer's weight; bn_scale reads another parameter, norm"),
        ({"normalize": "zscore"}, "normalize is 'zscore'; it takes 'minmax', 'rank', 'robust_z', 'none'"),
    ],
    ids=label,
)
def test_mistakes_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        get_metric("composite", **options)


def test_a_part_that_fails_is_an_error():
    t = everything(units=5)
    del t["labels"], t["logits"]
    with pytest.raises(ValueError, match="label"):
        get_metric("composite").compute(**t)
