"""Targets of tokens: what a language model's pass finds is what the rows of all tokens give, one below another."""

import math
import re
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

import nodelens as nl
from nodelens.engine.collect import Pass
from nodelens.engine.dry_run import DryRun
from nodelens.engine.plan import Plan
from nodelens.metrics import get_metric
from nodelens.network.batch import IGNORE, Batch
from nodelens.network.find_layers import find_layers
from nodelens.network.objective import Objective
from nodelens.network.targets import token_target
from nodelens.statistics.linalg import MI_CEILING

V, WIDTH, LENGTHS = 7, 4, (9, 5, 12, 7, 3, 10, 8, 6, 11, 4)


class Toy(nn.Module):
    """A language model whose logits are linear in its hidden units, or in the first alone; what it reads is pushed in place."""

    def __init__(self, vocabulary=V, alone=False):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.embed, self.hidden = nn.Embedding(vocabulary, 3), nn.Linear(3, WIDTH)
        self.pool, self.head = nn.Linear(WIDTH, 2), nn.Linear(WIDTH, vocabulary)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=g)
        if alone:
            self.head.weight.data[:, 1:] = 0
        self.double().eval()

    def forward(self, input_ids, attention_mask=None):
        h = self.hidden(self.embed(input_ids))
        self.pool(h.mean(1))
        logits = self.head(h)
        h.relu_()
        return logits


def texts(vocabulary=V):
    g = torch.Generator().manual_seed(1)
    return [torch.randint(vocabulary, (n,), generator=g) for n in LENGTHS]


def padded(words, size=4, extra=2, side="right"):
    """Batches with padding, the labels of every seventh token ignored, and one paired value per token."""
    found = []
    for a in range(0, len(words), size):
        some = words[a : a + size]
        length = max(map(len, some)) + extra
        ids, mask = torch.zeros(len(some), length, dtype=torch.long), torch.zeros(len(some), length, dtype=torch.long)
        labels, given = torch.full_like(ids, IGNORE), torch.full(ids.shape, torch.nan, dtype=torch.float64)
        for row, word in enumerate(some):
            place = slice(length - len(word), None) if side == "left" else slice(len(word))
            ids[row, place], mask[row, place], labels[row, place] = word, 1, _labels(word)
            given[row, place] = _given(word)
        found.append({"input_ids": ids, "attention_mask": mask, "labels": labels, "targets": given})
    return found


def _labels(word):
    return word.where(torch.arange(len(word)) % 7 != 6, IGNORE)


def _given(word):
    return (word.double() + 1).log() + torch.arange(len(word)) / 5


def entropy(logits, labels):
    return torch.special.entr(logits.softmax(-1)).sum(-1)


def by_hand(net, target):
    """Rows of the hidden units, and the target, of all tokens that have one."""
    rows, values = [], []
    with torch.no_grad():
        for word in texts():
            h = net.hidden(net.embed(word))
            z, following = net.head(h), _labels(word)[1:]
            known = following != IGNORE
            each = {
                "nll": lambda z=z, f=following: nn.functional.cross_entropy(z[:-1], f.clamp_min(0), reduction="none"),
                "correct_logit": lambda z=z, f=following: z[:-1].gather(1, f.clamp_min(0)[:, None])[:, 0],
                "logit_margin": lambda z=z, f=following: torch.tensor(
                    [
                        row[c] - torch.cat([row[:c], row[c + 1 :]]).max()
                        for row, c in zip(z[:-1], f.clamp_min(0).tolist(), strict=True)
                    ]
                ),
                "label": lambda f=following: f,
                "logits": lambda z=z: z,
                "given": lambda word=word: _given(word),
                "entropy": lambda z=z: entropy(z, None),
            }
            names = target.split("+")
            own = all(name in ("logits", "given", "entropy") for name in names)
            columns = [each[name]().double() for name in names]
            columns = [c if own or len(c) == len(word) - 1 else c[:-1] for c in columns]
            z = torch.cat([c.reshape(len(c), -1) for c in columns], 1)
            rows.append(h if own else h[:-1][known])
            values.append(z if own else z[known])
    return torch.cat(rows), torch.cat(values)


CASES = [
    ("mi", {}, "nll"),
    ("mi", {"target": "loss", "bias": "gaussian"}, "nll"),
    ("mi", {"target": "correct_logit"}, "correct_logit"),
    ("mi", {"target": "logit_margin"}, "logit_margin"),
    ("mi", {"target": "given"}, "given"),
    ("mi", {"target": "nll+given"}, "nll+given"),
    ("mi", {"target": "nll+given", "target_reduce": "mean"}, "nll+given"),
    ("mi", {"target": "logits"}, "logits"),
    ("mi", {"target": entropy}, "entropy"),
    ("synergy", {}, "nll"),
    ("synergy", {"reduce": "none"}, "nll"),
    ("synergy", {"target": "logits"}, "logits"),
    ("pid_redundancy", {}, "nll"),
    ("pid_unique", {"target": "logit_margin"}, "logit_margin"),
    ("conditional_mutual_information", {}, "nll+correct_logit"),
    ("mi_binning", {}, "nll"),
]


@pytest.fixture(scope="module")
def passed():
    metrics = {f"{k}": get_metric(name, **options) for k, (name, options, _) in enumerate(CASES)}
    classes = {name: get_metric(name) for name in ("class_mi", "synergy_gaussian_mmi", "class_selectivity", "cond_mi", "cond_rq")}
    return nl.analyze(Toy(), padded(texts()), metrics | classes, "hidden")


@pytest.mark.parametrize(
    "k", range(len(CASES)), ids=[re.sub(" at 0x[0-9a-f]+", "", f"{name} {options}") for name, options, _ in CASES]
)
def test_a_pass_over_tokens_is_the_metric_of_their_rows(k, passed):
    name, options, target = CASES[k]
    rows, values = by_hand(Toy(), target)
    options = options | {"target": "given"} | ({"condition": "given"} if "conditional" in name else {})
    value = get_metric(name, **options).compute(outputs=rows, targets=values)
    found = passed.matrices["hidden", str(k)] if options.get("reduce") == "none" else passed.units[str(k)].to_numpy()
    assert_close(torch.tensor(found), value, rtol=1e-9, atol=1e-12)
    assert float(value.abs().max()) > 1e-3


@pytest.mark.parametrize("name", ["class_mi", "synergy_gaussian_mmi", "class_selectivity"])
def test_the_class_of_a_token_is_the_next_one_while_there_are_few(name, passed):
    rows, values = by_hand(Toy(), "label")
    value = get_metric(name).compute(outputs=rows, labels=values[:, 0].long())
    assert_close(torch.tensor(passed.units[name].to_numpy()), value, rtol=1e-9, atol=1e-12)


def test_a_class_and_a_target_of_the_same_tokens(passed):
    rows, values = by_hand(Toy(), "label+nll")
    value = get_metric("cond_mi", target="given").compute(outputs=rows, labels=values[:, 0].long(), targets=values[:, 1])
    assert_close(torch.tensor(passed.units["cond_mi"].to_numpy()), value, rtol=1e-9, atol=1e-12)
    rows, values = by_hand(Toy(), "label")
    inputs = torch.cat([Toy().embed(w[:-1])[_labels(w)[1:] != IGNORE] for w in texts()]).detach()
    value = get_metric("cond_rq").compute(inputs=inputs, outputs=rows, weights=Toy().hidden.weight, labels=values[:, 0].long())
    assert_close(torch.tensor(passed.units["cond_rq"].to_numpy()), value, rtol=1e-9, atol=1e-12)


def test_the_first_axis_of_the_logits():
    metrics = {"mi": get_metric("mi", target="logit_pc1"), "binned": get_metric("mi_binning", target="logit_pc1")}
    found = nl.analyze(Toy(), padded(texts()), metrics, "hidden").units
    rows, logits = by_hand(Toy(), "logits")
    axis = torch.linalg.svd(logits - logits.mean(0), full_matrices=False).Vh[0]
    for column, name in (("mi", "mi"), ("binned", "mi_binning")):
        value = get_metric(name, target="given").compute(outputs=rows, targets=logits @ axis)
        assert_close(torch.tensor(found[column].to_numpy()), value, rtol=1e-8, atol=1e-12)


def test_logits_that_follow_from_one_unit_are_told_by_it_and_synergy_has_nothing_to_add():
    words = [torch.tensor([k, k + 1, 2, 2, 2, 2 + k % 3]) for k in range(5)]  # the labels vary; the margin of the right one is not
    metrics = {"one": get_metric("mi", target="logits", target_reduce="mean"), "synergy": get_metric("synergy", target=first_logit)}
    metrics["own"] = get_metric("mi", target=first_logit)
    found = nl.analyze(Toy(alone=True), padded(words), metrics, "hidden").units
    ceiling = -0.5 * math.log1p(-MI_CEILING)
    assert found["own"].iloc[0] == pytest.approx(ceiling)
    assert found["one"].iloc[0] == pytest.approx(ceiling)
    assert (found["own"].iloc[1:] < 0.9 * ceiling).all()
    assert found["synergy"].iloc[0] == pytest.approx(0, abs=1e-9), "what the first unit tells is all there is"


def first_logit(logits, labels):
    return logits[:, :, 0]


@cache
def measured(positions, *how):
    metrics = {
        "mi": get_metric("mi", permutations=9),
        "synergy": get_metric("synergy"),
        "binned": get_metric("mi_binning", target="given"),
        "class": get_metric("class_mi", permutations=9),
        "redundancy": get_metric("redundancy"),
        "cka": get_metric("linear_cka"),
    }
    return nl.analyze(Toy(), padded(texts(), *how), metrics, ["hidden", "head"], positions=positions)


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.slow), 3, 10])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("positions", [None, 3])
def test_neither_batches_nor_padding_change_a_value_an_error_or_a_control(size, side, positions):
    truth, found = measured(positions, 10, 0, "right"), measured(positions, size, 3, side)
    for a, b in ((truth.units, found.units), (truth.edges, found.edges)):
        for column in a.select_dtypes("number"):
            np.testing.assert_allclose(b[column], a[column], rtol=1e-8, atol=1e-9, err_msg=column)
    assert truth.units["mi_p"].between(0.1, 1).all()


def test_drawn_positions_are_real_tokens_and_the_same_ones_for_all_sums_of_a_metric():
    found = nl.analyze(Toy(), padded(texts(), extra=30), ["redundancy", "synergy"], "hidden", positions=3)
    rows = {row["statistic"]: row["rows"] for row in found.metadata["rows"]}
    assert rows["Gram(output, positions)"] == 3 * len(LENGTHS)
    assert rows["Gram(output, tokens with nll)"] == rows["Cross(output, tokens with nll)"] <= 3 * len(LENGTHS)


def test_the_table_says_which_target_was_used_and_the_plan_what_waits():
    metrics = ["mi", "synergy", "redundancy"]
    found = nl.analyze(Toy(), padded(texts()), metrics, ["hidden", "head"])
    assert found.metadata["metrics"]["mi"]["targets"] == found.metadata["metrics"]["synergy"]["targets"] == ["nll"]
    assert "targets" not in found.metadata["metrics"]["redundancy"]
    waits = {(row["layer"], row["statistic"]): row["waits_for"] for row in found.metadata["plan"]["statistics"]}
    assert waits["hidden", "Cross(output, tokens with nll)"] == "nll"
    assert waits["hidden", "Gram(output, positions)"] is None
    batch = Batch.of(padded(texts())[0])
    net = Toy()
    layers = find_layers(net, ["hidden", "head"])
    dry_run = DryRun.of(net, layers, batch)
    plans = [Plan.of(net, layers, {m: get_metric(m) for m in chosen}, dry_run) for chosen in (metrics, ["redundancy"])]
    samples, length = batch.kwargs["input_ids"].shape
    assert plans[0].held_bytes == samples * length * 8 * (WIDTH + V)
    assert plans[1].held_bytes == 0


def test_of_images_the_default_target_is_the_margin():
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(2))
    batches = [{"x": x, "labels": torch.arange(40) % 3}]
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))
    metrics = {"auto": get_metric("mi"), "margin": get_metric("mi", target="logit_margin"), "nll": get_metric("mi", target="nll")}
    found = nl.analyze(net, batches, metrics | {"loss": get_metric("mi", target="loss")})
    assert (found.units["auto"] == found.units["margin"]).all()
    assert (found.units["nll"] == found.units["loss"]).all()
    assert found.metadata["metrics"]["auto"]["targets"] == ["logit_margin"]


def test_labels_and_targets_of_whole_texts_go_with_means_over_their_tokens():
    words = texts()
    batches = padded(words)
    for a, batch in zip(range(0, 10, 4), batches, strict=True):
        batch["labels"] = torch.arange(a, a + len(batch["labels"])) % 2
        batch["targets"] = torch.tensor(LENGTHS[a : a + 4], dtype=torch.float64)
    metrics = [get_metric("mi", target="given"), "class_mi"]
    found = nl.analyze(Toy(), batches, metrics, "hidden").units
    means = torch.stack([Toy().hidden(Toy().embed(w)).mean(0) for w in words]).detach()
    value = get_metric("mi", target="given").compute(outputs=means, targets=torch.tensor(LENGTHS, dtype=torch.float64))
    assert_close(torch.tensor(found["mi"].to_numpy()), value, rtol=1e-9, atol=1e-12)
    value = get_metric("class_mi").compute(outputs=means, labels=torch.arange(10) % 2)
    assert_close(torch.tensor(found["class_mi"].to_numpy()), value, rtol=1e-9, atol=1e-12)


def test_rows_that_wait_are_gone_when_a_batch_ends():
    given = padded(texts())[0]
    net = Toy()
    batch = Objective.of(net).batch(given, 8)
    layers = find_layers(net, "hidden")
    taken = Pass(Plan.of(net, layers, {"mi": get_metric("mi")}, DryRun.of(net, layers, batch)), Objective.of(net))
    taken.begin(batch)
    (site,) = taken.collectors
    with torch.no_grad():
        taken.see(site, net.hidden(net.embed(given["input_ids"])))
        assert taken.token_rows[site].held
        taken.end(batch.run(net))
    assert not taken.token_rows[site].held


def test_a_gradient_reaches_units_that_are_overwritten_behind_an_embedding():
    net, words = Toy(), texts()
    found = nl.analyze(net, padded(words), ["taylor_saliency", "mi"], "hidden").units
    q = []
    for word in words:
        h = net.hidden(net.embed(word)).detach().requires_grad_()
        loss = nn.functional.cross_entropy(net.head(h)[:-1], _labels(word)[1:], ignore_index=IGNORE, reduction="sum")
        q.append(h.detach() * torch.autograd.grad(loss, h)[0])
    assert_close(torch.tensor(found["taylor_saliency"].to_numpy()), torch.cat(q).abs().mean(0), rtol=1e-9, atol=1e-12)
    assert all(p.grad is None for p in net.parameters())


def wrong_shape(logits, labels):
    return logits[:, 0, 0]


def large(name, **options):
    return lambda: nl.analyze(Toy(1500), padded(texts(1500)), [get_metric(name, **options)], "hidden")


def with_batches(change, metric="mi", layers="hidden", **options):
    return lambda: nl.analyze(Toy(), [change(b) for b in padded(texts())], [get_metric(metric, **options)], layers)


def without(*keys):
    return lambda batch: {k: v for k, v in batch.items() if k not in keys}


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (large("class_mi"), r"metric 'class_mi' needs a class for each row; here the rows are tokens with a vocabulary of 1,500, "),
        (large("composite"), r"metric 'composite' needs a class for each row"),
        (large("synergy", target="logit_pc1"), r"metric 'synergy' needs all logits for each row; .* use target nll"),
        (with_batches(without("labels")), "target 'nll' needs labels, but the data have none"),
        (with_batches(without("targets"), target="given"), "target 'given' needs a target in the batch"),
        (
            with_batches(lambda b: b | {"targets": b["targets"][:, :3]}, target="nll+given"),
            "metric 'mi' pairs each row with nll and given",
        ),
        (
            lambda: token_target("nll+given", torch.ones(2, 3, 4), torch.ones(2, 3, dtype=torch.long), torch.ones(2, 4)),
            r"target 'given' is \(2, 4\), but 3 tokens of 2 samples have logits",
        ),
        (with_batches(lambda b: b, target=wrong_shape), r"returns \(4,\) for 4 x 14 tokens; return \(B, T\) or \(B, T, t\)"),
        (
            with_batches(lambda b: b | {"targets": b["targets"][:, 0]}, "cond_mi", target="given"),
            r"metric 'mi_given_class' pairs each row with label and given; here one is per sample, the other per token",
        ),
        (lambda: token_target("nll", torch.ones(2, 3), None), r"needs logits \(B, T, V\), but the model gives \(2, 3\)"),
        (lambda: token_target("margin", torch.ones(2, 3, 4), None), "no target is called 'margin'"),
    ],
)
def test_what_tokens_cannot_have_is_an_error_with_the_way_out(run, said):
    with pytest.raises(ValueError, match=said):
        run()


def test_a_layer_without_a_row_per_prediction_has_a_reason_and_the_others_their_values():
    found = with_batches(dict, layers=["hidden", "pool"])()
    alone = with_batches(dict, layers="hidden")()
    assert found.units.loc["pool", "mi"].isna().all()
    assert found.units.loc[["hidden"], "mi"].equals(alone.units["mi"])
    (missing,) = [each for each in found.metadata["missing"] if each["column"] == "mi"]
    assert missing["reason"] == "the target has one value for each of 14 predictions of a sample, and pool has 1 rows per sample"
