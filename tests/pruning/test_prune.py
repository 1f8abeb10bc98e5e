import copy
import json

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, ResNetConfig, ResNetForImageClassification

import nodelens as nl
from nodelens.models import mlp
from nodelens.network.batch import Batch
from nodelens.pruning.allocation.allocate import Allocation
from nodelens.pruning.cost import Cost
from nodelens.pruning.planning import Schedule
from nodelens.pruning.surgery.compensate import compensate_units, reestimate_batch_norm
from nodelens.pruning.surgery.moments import input_moments


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def data():
    x = drawn(0, 96, 3, 12, 12)
    return [(x[k : k + 32], (x[k : k + 32].mean((1, 2, 3)) * 60).long().clamp(0, 3)) for k in range(0, 96, 32)]


def resnet():
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 1], layer_type="basic", num_labels=4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = ResNetForImageClassification(config)
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                for t in (m.weight, m.bias, m.running_mean, m.running_var):
                    t.data.uniform_(0.3, 1.3)
    return net.eval()


def llama(tied=True):
    config = LlamaConfig(
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
        intermediate_size=24,
        vocab_size=48,
        tie_word_embeddings=tied,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = LlamaForCausalLM(config)
        for p in net.parameters():
            p.data.normal_(0, 0.2)
    return net.eval()


def logits(net, x):
    with torch.no_grad():
        found = net(x)
    return getattr(found, "logits", found)


TEXT = torch.randint(1, 48, (2, 10), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("criterion", ["magnitude", "taylor", {"wanda": 1.0, "redundancy": -0.5}, "random", "rq"])
def test_a_slice_equals_a_mask_and_the_model_stays_as_it_was(data, criterion):
    net = resnet()
    before = copy.deepcopy(net.state_dict())
    pruned = nl.prune(net, criterion, 0.5, data=data, seed=1)
    masked = nl.prune(net, criterion, 0.5, data=data, seed=1, apply="mask")
    assert masked.plan.removed == pruned.plan.removed
    wanted = logits(masked.model, data[0][0])
    assert (logits(pruned.model, data[0][0]) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert pruned.plan.about["params"] == sum(p.numel() for p in pruned.model.parameters())
    assert pruned.plan.about["units_removed"] == sum(a.n // 2 for a in pruned.groups)
    assert pruned.table.index.names == ["group", "unit"]


def test_a_reloaded_model_is_equal_bit_for_bit(data, tmp_path):
    for k, (net, x, options) in enumerate(
        (
            (resnet(), data[0][0], {"criterion": "l2", "data": data, "compensate": "bias"}),
            (llama(), TEXT, {"criterion": "wanda", "data": [{"input_ids": TEXT}], "compensate": "least_squares"}),
            (llama(False).to(torch.bfloat16), TEXT, {"criterion": "magnitude", "scope": "ffn"}),
        )
    ):
        pruned = nl.prune(net, amount=0.5, **options)
        pruned.save(tmp_path / str(k))
        again = nl.load_pruned(tmp_path / str(k))
        assert torch.equal(logits(again, x), logits(pruned.model, x))
        assert not again.training
        assert [p.dtype for p in again.parameters()] == [p.dtype for p in pruned.model.parameters()]
    masked = nl.prune(resnet(), "l2", 0.5, data=data, apply="mask")
    masked.save(tmp_path / "masked")
    assert torch.equal(logits(nl.load_pruned(tmp_path / "masked"), data[0][0]), logits(masked.model, data[0][0]))
    tied = nl.load_pruned(tmp_path / "1")
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    plan = json.loads((tmp_path / "1/plan.json").read_text())
    assert plan["about"]["added_bias"], "Llama's projections have no bias of their own"
    words = tied.generate(TEXT, max_new_tokens=6, do_sample=False)
    assert words.shape == (2, 16)
    again = nl.prune(llama(), "wanda", 0.5, data=[{"input_ids": TEXT}], compensate="least_squares", apply="mask")
    assert torch.equal(again.model.generate(TEXT, max_new_tokens=6, do_sample=False), words)


def test_a_model_of_ones_own_is_loaded_into_a_skeleton(tmp_path):
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    pruned = nl.prune(net, "magnitude", 0.5, example_inputs=torch.rand(2, 4))
    pruned.save(tmp_path)
    with pytest.raises(ValueError, match=r"holds a torch.nn.modules.container.Sequential: give a model to load into"):
        nl.load_pruned(tmp_path)
    skeleton = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    assert torch.equal(nl.load_pruned(tmp_path, skeleton)(torch.ones(4)), pruned.model(torch.ones(4)))
    with pytest.raises(ValueError, match=r"is not the dense model of .*: 0.weight is \[9, 4\] here and \[8, 4\] in the plan"):
        nl.load_pruned(tmp_path, nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 3)))


def test_a_folder_of_earlier_versions_is_loaded(tmp_path):
    pruned = nl.prune(llama(), "magnitude", 0.5)
    pruned.save(tmp_path)
    plan = json.loads((tmp_path / "plan.json").read_text())
    about = {"nan_policy": "nan", "terms": "terms"}
    plan["about"] = {about.get(k, k): v for k, v in plan["about"].items()} | {"nan": "remove"}
    plan["about"]["allocation"]["normalise"] = plan["about"]["allocation"].pop("normalize")
    del plan["digests"], plan["config"]
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    (tmp_path / "SHA256SUMS").unlink()
    assert torch.equal(logits(nl.load_pruned(tmp_path), TEXT), logits(pruned.model, TEXT))


def test_a_plan_in_steps_is_nested_and_ends_where_it_should(data):
    net = resnet()
    steps = [nl.prune(net, "taylor", 0.6 * t / 3, data=data, schedule="one_shot").plan for t in (1, 2, 3)]
    found = nl.prune(net, "taylor", 0.6, data=data, schedule=Schedule("iterative", 3))
    assert {k: len(v) for k, v in found.plan.removed.items()} == {k: len(v) for k, v in steps[-1].removed.items()}
    assert all(set(v) <= set(found.plan.removed[k]) for k, v in steps[0].removed.items()), "the first step is the one-shot plan"
    assert found.plan.about["schedule"] == {"kind": "iterative", "steps": 3, "shape": "linear"}


@pytest.mark.parametrize(("allocation", "budget"), [("uniform", "units"), ("global", "macs"), ("erk", "params"), ("lamp", "units")])
def test_budgets_are_met(data, allocation, budget):
    pruned = nl.prune(resnet(), "l2", 0.4, data=data, allocation=allocation, budget=budget)
    about = pruned.plan.about
    dense = {"units": about["units"], "params": about["dense_params"], "macs": about["dense_macs"]}[budget]
    cost = Cost.of(resnet(), pruned.groups, Batch.of(data[0]))
    dearest = max(cost.price(budget) - cost.price(budget, {group.name: group.n - 1}) for group in pruned.groups)
    assert abs(about["budget_error"]) <= dearest / 2
    assert about["budget_error"] == pytest.approx(
        dense - {"units": dense - about["units_removed"], "params": about["params"], "macs": about["macs"]}[budget] - 0.4 * dense
    )


@pytest.mark.parametrize("amount", [0.0, 0.99])
def test_the_ends_of_the_scale(data, amount):
    pruned = nl.prune(resnet(), "fpgm", amount, data=data)
    assert pruned.plan.about["smallest_kept"] == (8 if amount == 0 else 1)
    assert logits(pruned.model, data[0][0]).isfinite().all()
    if amount == 0:
        assert torch.equal(logits(pruned.model, data[0][0]), logits(resnet(), data[0][0]))


def test_modes_protection_and_ties(data):
    table = nl.prune(resnet(), "l2", 0.25, data=data).table["l2"]
    group = table.index[0][0]
    low, high = (nl.prune(resnet(), "l2", 0.25, data=data, mode=m).plan.removed[group] for m in ("low", "high"))
    assert low == sorted(table[group].nsmallest(2).index)
    assert high == sorted(table[group].nlargest(2).index)
    kept = nl.prune(resnet(), "l2", 0.25, data=data, protect={group: low}).plan.removed[group]
    assert not set(kept) & set(low)
    signed = nl.prune(resnet(), {"l2": -1.0}, 0.25, data=data).plan.removed[group]
    assert signed == high
    chance = [nl.prune(resnet(), "random", 0.5, data=data, seed=s).plan.removed for s in (0, 0, 1)]
    assert chance[0] == chance[1] != chance[2]


def test_a_bias_makes_up_for_constant_units_and_least_squares_for_shared_ones():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4, bias=False)).double()
    net[0].weight.data[1] = 0  # constant
    net[0].weight.data[2], net[0].bias.data[2] = 2 * net[0].weight[0] - net[0].weight[3], 0.7  # a sum of two others
    x = drawn(1, 200, 6).double()
    dense = net(x)
    groups = nl.prune(net, "magnitude", 0.2, example_inputs=x[:2]).groups
    off = {}
    for how in ("none", "bias", "least_squares"):
        for unit in (1, 2, 4):
            other = copy.deepcopy(net)
            moments = input_moments(net, groups, [x[:150], x[150:]], how == "least_squares")
            grown = compensate_units(other, groups, {"0": [unit]}, moments, how, {}) if how != "none" else []
            assert grown == (["1"] if how != "none" else [])
            other[1].weight.data[:, unit] = 0
            off[how, unit] = float((other(x) - dense).detach().square().sum())
    assert off["bias", 1] < 1e-20 < off["none", 1], "exact for a unit that does not vary"
    assert off["least_squares", 2] < 1e-4 * off["bias", 2], "all but the ridge's share"
    for unit in (1, 2, 4):
        assert off["least_squares", unit] <= off["bias", unit] * (1 + 1e-9) <= off["none", unit] * (1 + 1e-8)


def test_the_shift_of_a_convolution_goes_to_the_norm_behind_it_and_is_exact_inside(data):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3, groups=1, bias=False), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten())
    net = nn.Sequential(*net, nn.Linear(5 * 64, 4)).eval()
    net[0].weight.data[2], net[0].bias.data[2] = 0, 3.0
    x = data[0][0]
    found = {c: nl.prune(net, "l2", 0.25, data=data, compensate=c) for c in ("none", "bias")}
    assert found["bias"].plan.removed["0"] == [2]
    assert found["bias"].plan.about["added_bias"] == []
    assert not torch.equal(found["bias"].model[2].running_mean, net[2].running_mean)
    kept = found["bias"].plan.removed["1"]
    wanted = net[:4](x)[:, [c for c in range(5) if c not in kept]]
    assert torch.allclose(found["bias"].model[:4](x), wanted, atol=1e-5)
    assert not torch.allclose(found["none"].model[:4](x), wanted, atol=1e-2)
    with pytest.raises(ValueError, match="'1' is no Linear layer or 1x1 convolution: least squares needs products"):
        nl.prune(net, "l2", 0.25, data=data, compensate="least_squares")


def test_batch_norms_are_estimated_anew(data):
    net = resnet()
    renewed = copy.deepcopy(net)
    reestimate_batch_norm(renewed, data)
    seen = []
    first = next(m for m in net.modules() if isinstance(m, nn.BatchNorm2d))
    first.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    for x, _ in data:
        logits(net, x)
    mine = next(m for m in renewed.modules() if isinstance(m, nn.BatchNorm2d))
    assert torch.allclose(mine.running_mean, torch.stack([s.mean((0, 2, 3)) for s in seen]).mean(0), atol=1e-5)
    assert torch.allclose(mine.running_var, torch.stack([s.transpose(0, 1).flatten(1).var(1) for s in seen]).mean(0), rtol=1e-4)
    assert mine.momentum == first.momentum
    assert not mine.training
    with pytest.raises(ValueError, match="MLP has no batch norm to re-estimate"):
        nl.prune(mlp(classes=4, channels=3, size=12), "magnitude", 0.5, data=data, compensate="batch_norm")


@pytest.mark.parametrize("apply", ["mask", "slice"])
def test_fine_tuning_keeps_the_best_epoch_and_what_is_removed_at_zero(data, apply):
    tune = nl.Finetune(data, data, epochs=4, lr=0.05)
    net = resnet()
    pruned = nl.prune(net, "l2", 0.5, data=data, apply=apply, finetune=tune)
    before = nl.prune(net, "l2", 0.5, data=data, apply=apply)
    assert pruned.finetuned["after"]["accuracy"] > pruned.finetuned["before"]["accuracy"]
    assert 1 <= pruned.finetuned["best_epoch"] <= 4
    moved = [not torch.equal(a, b) for a, b in zip(pruned.model.parameters(), before.model.parameters(), strict=True)]
    assert all(moved), "what is kept is trained"
    assert not pruned.model.training
    if apply == "mask":
        for group in pruned.groups:
            for piece in group.slices:
                assert not piece.by_unit(pruned.model)[pruned.plan.removed[group.name]].any(), piece.name


@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW"])
def test_no_optimizer_revives_what_was_removed(data, kind):
    options = {"momentum": 0.9} if kind == "SGD" else {}
    tune = nl.Finetune(
        data, data, epochs=2, optimizer=lambda p: getattr(torch.optim, kind)(p, lr=0.05, weight_decay=0.1, **options)
    )
    pruned = nl.prune(resnet(), "l2", 0.5, data=data, apply="mask", finetune=tune, schedule=Schedule("iterative", 2))
    for group in pruned.groups:
        for piece in group.slices:
            assert not piece.by_unit(pruned.model)[pruned.plan.removed[group.name]].any(), piece.name


def test_a_gate_between_zero_and_one_is_between_the_mask_and_the_dense_model(data):
    x = data[0][0]
    dense, half, none = (logits(nl.prune(resnet(), "l2", 0.5, data=data, apply="scale", gate=g).model, x) for g in (1.0, 0.5, 0.0))
    assert torch.equal(dense, logits(resnet(), x))
    assert torch.allclose(none, logits(nl.prune(resnet(), "l2", 0.5, data=data, apply="mask").model, x), atol=1e-5)
    assert (half - dense).norm() < (none - dense).norm()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"criterion": "tailor"}, "tailor"),
        ({"amount": 1.0}, "amount is 1.0"),
        ({"mode": "lo"}, "mode is 'lo'"),
        ({"apply": "cut"}, "apply is 'cut'; it is slice, mask or scale"),
        ({"compensate": "magic"}, "compensate is 'magic'"),
        ({"budget": "flops"}, "budget is 'flops'"),
        ({"scope": "ffn"}, "scope 'ffn' matches no group"),
        ({"protect": {"nope": [0]}}, "protect 'nope' matches no group"),
        ({"criterion": {"effective_rank": 1.0}}, "effective_rank gives one value per layer"),
        ({"criterion": {"taylor": "much"}}, "taylor is 'much'"),
        ({"criterion": {"terms": {"l2": 1.0}, "norm": "z"}}, "has norm; it takes terms, normalize, combine"),
        ({"allocation": "globul"}, "allocation.kind is 'globul'"),
        ({"reduce": "median", "criterion": "rq"}, "reduce is 'median'"),
    ],
)
def test_what_does_not_fit_is_named(data, options, said):
    with pytest.raises(ValueError, match=said):
        nl.prune(resnet(), data=data, **options)


def test_data_are_needed_where_something_is_measured(data):
    net = mlp(classes=4, channels=3, size=12)
    for criterion in ("taylor", "rq", "wanda"):
        with pytest.raises(ValueError, match="measured on data: give data="):
            nl.prune(net, criterion, example_inputs=data[0][0])
    with pytest.raises(ValueError, match="data can be read only once"):
        nl.prune(net, data=iter(data))
    with pytest.raises(ValueError, match="compensation needs data"):
        nl.prune(net, "l2", example_inputs=data[0][0], compensate="bias")


def test_a_composite_of_the_long_form(data):
    spec = {"terms": {"l2": {"weight": 1.0, "transform": "log"}, "wanda": 0.5}, "normalize": "minmax"}
    pruned = nl.prune(resnet(), spec, 0.25, data=data, allocation=Allocation("global", normalize="raw"))
    assert pruned.plan.about["terms"] == spec | {"combine": "sum"}
    table = pruned.table
    by = table.assign(l2=table["l2"].map(lambda v: torch.tensor(v).log().item())).groupby(level="group")
    scaled = (by.obj - by.transform("min")) / (by.transform("max") - by.transform("min"))
    total = (scaled["l2"] + 0.5 * scaled["wanda"]).sort_values()
    gone = {(a, u) for a, units in pruned.plan.removed.items() for u in units}
    assert gone == set(total.index[: len(gone)])
    product = {"terms": {"l2": 1.0, "group_l2": 0.5}, "combine": "product"}
    pruned = nl.prune(resnet(), product, 0.25, data=data, allocation=Allocation("global", normalize="raw"))
    total = (pruned.table["l2"] * pruned.table["group_l2"] ** 0.5).sort_values()
    gone = {(a, u) for a, units in pruned.plan.removed.items() for u in units}
    assert gone == set(total.index[: len(gone)])


def test_the_units_that_a_tie_break_decided_about_are_counted():
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    with torch.no_grad():
        net[0].weight[:4] = 0
    pruned = nl.prune(net, "magnitude", 0.5, example_inputs=drawn(0, 2, 4))
    assert pruned.plan.about["ties"] == {"0": 4}
    assert pruned.summary().splitlines()[2] == "4 units have the score of the cut: a permutation decided which of them stay"
    net[0].weight.data.copy_(drawn(1, 6, 4))
    assert nl.prune(net, "magnitude", 0.5, example_inputs=drawn(0, 2, 4)).plan.about["ties"] == {}


def test_the_old_name_of_the_groups_works_with_a_warning():
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    pruned = nl.prune(net, "magnitude", 0.5, example_inputs=torch.zeros(2, 4))
    with pytest.warns(DeprecationWarning, match=r"Pruned.axes is now Pruned.groups"):
        assert pruned.axes is pruned.groups


def test_options_work_under_their_old_names_with_a_warning():
    net, seen = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), []

    def tuned(model, zeros):
        seen.append(model)
        return {}

    with pytest.warns(DeprecationWarning, match=r"nl.prune: recover= is now finetune="):
        nl.prune(net, "magnitude", 0.5, example_inputs=torch.zeros(2, 4), recover=tuned)
    assert len(seen) == 1
    with pytest.warns(DeprecationWarning, match=r"nl.prune: inexact= is now allow_approximate="):
        nl.prune(net, "magnitude", 0.5, example_inputs=torch.zeros(2, 4), inexact=True)
    with pytest.warns(DeprecationWarning, match=r"nl.analyze: wide= is now covariance="):
        nl.analyze(net, [torch.randn(8, 4)], ["rq"], wide="diagonal")
