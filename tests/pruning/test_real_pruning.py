"""Pruning of trained networks against numbers that were found elsewhere."""

import sys

import pandas as pd
import pytest
import torch
from command import command
from real import folder
from transformers import AutoModelForCausalLM, AutoTokenizer

import nodelens as nl
from nodelens.network.batch import Batch
from nodelens.pruning.cost import Cost


@pytest.fixture(scope="module")
def stories():
    """A small Llama, 51 windows to evaluate on and 52 to calibrate on: BOS and 511 tokens each."""
    home = folder("NODELENS_DATA")
    net = AutoModelForCausalLM.from_pretrained(home / "models/stories260K").eval()
    read = AutoTokenizer.from_pretrained(home / "models/stories260K")
    text = (home / "text/grimms_fairy_tales.txt").read_text()

    def windows(start, end):
        ids = read(text[start:end], add_special_tokens=False, verbose=False).input_ids
        return torch.tensor([[1, *ids[k : k + 511]] for k in range(0, len(ids) - 510, 511)])

    return net, windows(1_000, 51_000), windows(60_000, 110_000)


def nats(net, windows):
    with torch.no_grad():
        logits = torch.cat([net(part).logits[:, :-1] for part in windows.split(16)])
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()))


@pytest.mark.slow
def test_a_language_model_loses_a_quarter_of_its_hidden_units_as_it_did_elsewhere(stories):
    net, held_out, calibration = stories
    assert nats(net, held_out) == pytest.approx(3.734, abs=5e-4)
    data = [{"input_ids": part, "labels": part} for part in calibration.split(16)]
    found = [
        nats(nl.prune(net, "wanda", 0.25, data=data, scope="ffn", compensate=how).model, held_out)
        for how in ("none", "bias", "least_squares")
    ]
    assert found == pytest.approx([4.13, 4.01, 3.86], abs=0.006)


def test_half_the_hidden_units_and_a_group_of_heads_leave_what_they_should(stories):
    net, _, calibration = stories
    groups = nl.prune(net, "magnitude", 0.0, example_inputs={"input_ids": calibration[:2]}).groups
    cost = Cost.of(net, groups, Batch.of({"input_ids": calibration[:2]}))
    assert cost.params() == 260_032
    ffn, heads = (next(a for a in groups if a.kind == kind) for kind in ("ffn", "kv_group"))
    assert cost.params() - cost.params({ffn.name: ffn.n - 1}) == 192
    assert cost.params() - cost.params({heads.name: heads.n - 1}) == 3_072
    kept = {a.name: 86 if a.kind == "ffn" else 3 for a in groups}
    assert cost.params(kept) == 162_112
    assert heads.attention_macs == 2 * 2 * 8, "two products, two query heads a group, eight numbers a head"


def test_a_quarter_and_a_half_of_the_inner_channels_cost_what_they_should(quiet_home, monkeypatch):
    home = folder("NODELENS_DATA")
    monkeypatch.delitem(sys.modules, "nets", raising=False)  # the tests' own networks go by the same name
    monkeypatch.syspath_prepend(str(home))
    ended = command(
        "prune",
        "model.net._target_=nets.CifarResNet",
        "model.net.depth=20",
        f"ckpt_path={home}/models/cifar_resnet20/model.safetensors",
        "dataset=npz",
        f"dataset.path={home}/images/cifar10_train4000.npz",
        f"dataset.test_path={home}/images/cifar10_test_first500.npz",
        "dataset.mean=[0.485,0.456,0.406]",
        "dataset.std=[0.229,0.224,0.225]",
        "dataset.calibration=32",
        "criterion=[group_l2]",
        "amounts=[0.25,0.5]",
        "latency.batches=[]",
        "logger=none",
        "hydra.run.dir=run",
    )
    assert ended.code == 0, ended.err
    table = pd.read_parquet("run/sweep.parquet").set_index("amount")
    assert table["params"].tolist() == [202_738, 135_754]
    assert table["macs"].tolist() == [30_524_032, 20_497_024]
    assert table["dense_macs"].eq(40_551_040).all()
    assert table["dense_accuracy"].eq(0.91).all()
    assert table.loc[0.25, "accuracy"] == pytest.approx(0.77, abs=0.005)
