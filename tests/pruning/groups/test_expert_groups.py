"""Whole experts: a masked router does not choose them, and slicing gives the same output as masking."""

import copy
import functools
import re

import pytest
import torch
import transformers
from expert_families import BATCH, FAMILIES, MASK, ROTARY, TOKENS, E, K, build
from published import PUBLISHED
from torch import nn

import nodelens as nl
from nodelens.metrics import get_metric
from nodelens.network.batch import Batch
from nodelens.network.groups import PruningGroups
from nodelens.network.hooks import observed
from nodelens.network.objective import Objective
from nodelens.pruning.cost import Cost
from nodelens.pruning.criteria.scoring import score_table
from nodelens.pruning.groups.families import family_groups
from nodelens.pruning.groups.find import find_groups
from nodelens.pruning.planning import Schedule
from nodelens.pruning.surgery.mask import masked, scale, scaled, zero
from nodelens.pruning.surgery.slice import slice_units


def logits(model):
    with torch.no_grad():
        return model(**BATCH).logits


def tokens(model):
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    return model.generate(input_ids=TOKENS[:1], **options)


def some(groups, amount, seed=2):
    """Different experts in each mixture."""
    dice = torch.Generator().manual_seed(seed)
    return {group.name: torch.randperm(group.n, generator=dice)[: int(amount * group.n)].sort().values.tolist() for group in groups}


def same(a, b):
    assert (a - b).abs().max() <= 1e-5 * b.abs().max(), f"{(a - b).abs().max()} beside {b.abs().max()}"


@pytest.mark.parametrize("amount", [0.25, 0.5])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_slice_is_the_mask(name, amount):
    model, groups = build(name)
    removed, dense = some(groups.opt_in, amount), logits(model)
    sliced = slice_units(copy.deepcopy(model), groups.opt_in, removed)
    with masked(model, groups.opt_in, removed):
        expected, written = logits(model), tokens(model)
    assert (expected - dense).abs().max() > 1e-2 * dense.abs().max()
    same(logits(sliced), expected)
    assert torch.equal(tokens(sliced), written)
    assert torch.equal(logits(model), dense)
    for group in groups.opt_in:
        experts = sliced.get_submodule(group.name)
        assert {len(tensor) for tensor in experts.parameters()} == {E - len(removed[group.name])} == {experts.num_experts}


@pytest.mark.parametrize("name", [name for name, (*_, how) in FAMILIES.items() if how == "softmax"])
def test_a_mask_is_a_logit_at_minus_infinity(name, monkeypatch):
    """The dense model, in which the product that makes the logits is given minus infinity for some experts."""
    model, groups = build(name)
    removed, linear = some(groups.opt_in, 0.5), nn.functional.linear
    rows = {}
    for group in groups.opt_in:
        (weight,) = [piece.of(model) for piece in group.slices if piece.role == "tied" and piece.tensor == "weight"]
        rows[weight.data_ptr()] = torch.tensor(removed[group.name])
    with masked(model, groups.opt_in, removed):
        found = logits(model)

    def without(x, weight, bias=None):
        y = linear(x, weight, bias)
        return y.index_fill(-1, rows[weight.data_ptr()], -torch.inf) if weight.data_ptr() in rows else y

    monkeypatch.setattr(nn.functional, "linear", without)
    monkeypatch.setattr(torch._C._nn, "linear", without)
    same(found, logits(model))


def test_a_mask_is_a_choice_that_is_never_made():
    """DeepSeek chooses by corrected scores and weighs by the scores: a correction far below 0 removes an expert exactly."""
    model, groups = build("deepseek v3")
    removed, twin = some(groups.opt_in, 0.5), copy.deepcopy(model)
    for name, units in removed.items():
        twin.get_submodule(name.replace("experts", "gate")).e_score_correction_bias[units] = -1e9
    with masked(model, groups.opt_in, removed):
        same(logits(model), logits(twin))


@pytest.mark.parametrize("how", ["batched_mm", "grouped_mm"])
def test_experts_may_be_multiplied_in_any_way(how):
    model, groups = build("gpt oss")
    model = copy.deepcopy(model)
    model.config._experts_implementation = how
    removed = {group.name: [0, 3, 4] for group in groups.opt_in}
    sliced = slice_units(copy.deepcopy(model), groups.opt_in, removed)
    assert sliced.config._experts_implementation == how
    with masked(model, groups.opt_in, removed):
        same(logits(sliced), logits(model))


def test_zeroing_an_expert_is_something_else():
    model, groups = build("mixtral")
    removed, zeroed = some(groups.opt_in, 0.5), copy.deepcopy(model)
    for name, units in removed.items():
        zeroed.get_submodule(name).down_proj.data[units] = 0
    with masked(model, groups.opt_in, removed):
        assert (logits(model) - logits(zeroed)).abs().max() > 0.1 * logits(zeroed).abs().max()


def test_an_expert_that_gets_nothing_is_not_missed():
    model, groups = build("gpt oss")
    model = copy.deepcopy(model)
    for group in groups.opt_in:
        model.get_submodule(group.router).bias.data[3] = -1e4
    removed = {group.name: [3] for group in groups.opt_in}
    dense = logits(model)
    with masked(model, groups.opt_in, removed):
        same(logits(model), dense)
    sliced = slice_units(copy.deepcopy(model), groups.opt_in, removed)
    same(logits(sliced), dense)
    assert sum(p.numel() for p in sliced.parameters()) < sum(p.numel() for p in model.parameters())


def test_hooks_see_the_choice_and_the_router_is_as_before():
    model, groups = build("mixtral")
    group, seen = groups.opt_in[0], []
    router = model.get_submodule(group.router)
    before = dict(router.__dict__)
    with observed([router], lambda *call: seen.append(call[3])), masked(model, groups.opt_in, {group.name: [0, 5]}):
        logits(model)
        with (
            pytest.raises(ValueError, match="are masked already: mask all of them"),
            masked(model, groups.opt_in, {group.name: [1]}),
        ):
            pass
        logits(model)
    first, second = seen
    scores, weights, ids = first
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert set(ids.flatten().tolist()) <= set(range(E)) - {0, 5}
    assert torch.isneginf(scores[:, [0, 5]]).all()
    kept = scores[:, [1, 2, 3, 4, 6, 7]]
    assert kept.isfinite().all()
    same(weights, torch.gather(scores, 1, ids).softmax(1))
    assert router.__dict__ == before


def test_a_mask_ends_when_the_model_fails():
    model, groups = build("mixtral")
    dense = logits(model)
    with pytest.raises(RuntimeError, match="stop"), masked(model, groups.opt_in, some(groups.opt_in, 0.5)):
        raise RuntimeError("stop")
    assert torch.equal(logits(model), dense)


def test_a_masked_router_can_be_trained():
    model, groups = build("mixtral")
    group = groups.opt_in[1]
    weight = model.get_submodule(group.router).weight
    with masked(model, groups.opt_in, {group.name: [0, 5]}):
        (slope,) = torch.autograd.grad(model(**BATCH).logits.square().sum(), [weight])
    assert (slope[[0, 5]] == 0).all()
    assert (slope[[1, 2, 3, 4, 6, 7]] != 0).any(1).sum() >= K


def test_as_many_experts_stay_as_a_token_goes_to():
    model, groups = build("mixtral")
    group = groups.opt_in[0]
    assert group.min_keep == K
    words = r"group 'model.layers.0.mlp.experts' would keep 1 of 8 experts; its router needs 2 to choose from"
    with pytest.raises(ValueError, match=words), masked(model, groups.opt_in, {group.name: range(1, E)}):
        pass
    with pytest.raises(ValueError, match=words):
        slice_units(copy.deepcopy(model), groups.opt_in, {group.name: range(1, E)})
    removed = {group.name: [*range(1, E - 1)] for group in groups.opt_in}
    sliced = slice_units(copy.deepcopy(model), groups.opt_in, removed)
    with masked(model, groups.opt_in, removed):
        same(logits(sliced), logits(model))


def test_a_group_is_scored_by_its_two_best():
    assert build("deepseek v3", num_experts_per_tok=1)[1].opt_in[0].min_keep == 2
    assert build("mixtral", num_experts_per_tok=1)[1].opt_in[0].min_keep == 1


@pytest.mark.parametrize("name", ["mixtral", "deepseek v3", "minimax m2", "gpt oss"])
@pytest.mark.parametrize("uneven", [False, True])
def test_what_is_saved_is_loaded(name, uneven, tmp_path):
    model, _ = build(name)
    given = {"scope": "expert", "example_inputs": BATCH, "freeze": "model.layers.0.*" if uneven else ()}
    pruned = nl.prune(model, "magnitude", 0.25, **given)
    pruned.save(tmp_path)
    loaded = nl.load_pruned(tmp_path)
    assert torch.equal(logits(loaded), logits(pruned.model))
    assert torch.equal(tokens(loaded), tokens(pruned.model))
    for path, numbers in pruned.numbers.items():
        for attribute, value in numbers.items():
            for net in (loaded, pruned.model):
                assert functools.reduce(getattr, attribute.split("."), net.get_submodule(path)) == value


def test_the_model_knows_how_many_experts_all_layers_keep():
    model, groups = build("mixtral")
    even = slice_units(copy.deepcopy(model), groups.opt_in, {group.name: [1, k] for k, group in enumerate(groups.opt_in, 2)})
    assert even.num_experts == even.config.num_local_experts == even.model.config.num_local_experts == E - 2
    assert even.config is even.model.config
    assert model.config.num_local_experts == E
    with torch.no_grad():
        found = even(**BATCH, labels=TOKENS, output_router_logits=True)
    assert found.aux_loss.isfinite()
    for left in ([E, E - 2], [E - 2, E], [E - 1, E - 2]):
        removed = {group.name: range(E - n) for group, n in zip(groups.opt_in, left, strict=True)}
        uneven = slice_units(copy.deepcopy(model), groups.opt_in, removed)
        assert uneven.num_experts == uneven.config.num_local_experts == E
        assert [layer.mlp.experts.num_experts for layer in uneven.model.layers] == left
        assert [layer.mlp.gate.num_experts for layer in uneven.model.layers] == left


def test_experts_cost_parameters_and_no_multiplications():
    model, groups = build("mixtral")
    cost = Cost.of(model, groups, Batch.of({"input_ids": TOKENS}))
    plain = Cost.of(model, PruningGroups(groups.groups), Batch.of({"input_ids": TOKENS}))
    assert cost.params() == plain.params() == sum(p.numel() for p in model.parameters())
    assert cost.macs() == plain.macs()
    removed = some(groups.opt_in, 0.25)
    kept = {name: E - len(units) for name, units in removed.items()}
    assert cost.params(kept) == sum(p.numel() for p in slice_units(copy.deepcopy(model), groups.opt_in, removed).parameters())
    assert cost.macs() - cost.macs(kept) == sum(map(len, removed.values())) * 16 * TOKENS.shape[1]  # of the router alone
    channels = [group for group in groups if group.equal_count == "model.layers.0.mlp.experts"]
    fewer = {group.name: 8 for group in channels}
    gone = {group.name: [0, 3, 5, 11] for group in channels}
    assert cost.params(fewer) == sum(p.numel() for p in slice_units(copy.deepcopy(model), groups, gone).parameters())
    assert cost.macs(fewer) == plain.macs(fewer) < cost.macs()
    with pytest.raises(ValueError, match="the plan removes whole experts and channels from one tensor"):
        slice_units(copy.deepcopy(model), [*channels, *groups.opt_in], gone | removed)
    both = slice_units(slice_units(copy.deepcopy(model), groups, gone), groups.opt_in, removed)
    assert cost.params(fewer | kept) == sum(p.numel() for p in both.parameters())


def test_a_budget_of_parameters_is_met():
    model, groups = build("qwen3 moe")
    pruned = nl.prune(model, "group_l2", 0.2, scope="expert", budget="params", example_inputs=BATCH)
    about, left = pruned.plan.about, sum(p.numel() for p in pruned.model.parameters())
    assert about["params"] == left
    one = sum(piece.by_unit(model)[0].numel() for piece in groups.opt_in[0].slices)
    assert abs(left - 0.8 * about["dense_params"]) <= one / 2
    assert about["macs"] < about["dense_macs"]


def test_experts_are_taken_where_they_are_asked_for():
    model, groups = build("mixtral")
    whole = ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    assert [(group.name, group.kind, group.n) for group in groups.opt_in] == [(name, "expert", E) for name in whole]
    assert (
        {group.kind for group in groups.chosen("*")}
        == {"kv_group", "moe_ffn"}
        == {group.kind for group in groups.chosen("model.*")}
    )
    assert [group.name for group in groups.chosen("expert")] == whole == [group.name for group in groups.chosen("*.experts")]
    assert [group.name for group in groups.chosen("expert", freeze="model.layers.0.*")] == whole[1:]
    assert [group.kind for group in groups.chosen(["kv_group", whole[0]])] == ["kv_group", "kv_group", "expert"]
    assert groups.named(whole[0]).describe() == "model.layers.0.mlp: gate > experts"
    assert [group.name for group in find_groups(model).opt_in] == whole
    with pytest.raises(ValueError, match=r"takes both the experts of model\.layers\.0\.mlp\.experts and their channels"):
        groups.chosen(["expert", "moe_ffn"])
    with pytest.raises(ValueError, match="of the kinds expert, kv_group, moe_ffn"):
        groups.chosen("experts")


def test_criteria_of_weights_score_experts():
    model, groups = build("gpt oss")
    names = ["magnitude", "l2", "group_l2", "lamp", "fpgm", "random"]
    table = score_table(model, groups.opt_in, {name: get_metric(name) for name in names})
    held = model.model.layers[1].mlp.experts
    rows = torch.cat([held.gate_up_proj.flatten(1), held.down_proj.flatten(1)], 1).double().detach()
    found = {name: torch.tensor(column.to_numpy()) for name, column in table.loc[groups.opt_in[1].name].items()}
    same(found["magnitude"], rows.abs().sum(1))
    same(found["l2"], rows.norm(dim=1))
    same(found["group_l2"], rows.square().sum(1))
    same(found["fpgm"], torch.cdist(rows, rows).sum(1))
    assert found["lamp"].max() == 1
    assert found["lamp"].argsort().equal(found["l2"].argsort())
    pruned = nl.prune(model, "magnitude", 0.5, scope="expert", example_inputs=BATCH)
    assert pruned.plan.removed[groups.opt_in[1].name] == sorted(rows.abs().sum(1).argsort()[: E // 2].tolist())


def test_a_budget_stops_where_a_router_could_not_choose():
    model, _ = build("mixtral")
    table = nl.prune(model, "magnitude", 0.7, scope="expert", example_inputs=BATCH, allocation="global")
    assert table.plan.about["smallest_kept"] >= K
    with pytest.raises(ValueError, match=r"multiples and protected units allow an amount of 0\.75 at most"):
        nl.prune(model, "magnitude", 0.9, scope="expert", example_inputs=BATCH)


def test_whole_experts_cannot_be_compensated():
    with pytest.raises(ValueError, match="whole experts cannot be compensated, their tokens go to others"):
        nl.prune(build("mixtral")[0], "magnitude", 0.25, scope="expert", data=[BATCH], compensate="bias")


def slopes(model, group):
    """dL/dz of gates on each expert's weighted output at each token, (samples, length, E), written into a loop of its own."""
    experts = model.get_submodule(group.name)
    z = torch.ones(*TOKENS.shape, E, requires_grad=True)

    def forward(rows, ids, weights):
        out = torch.zeros_like(rows)
        for e in range(E):
            first, second = (rows @ experts.gate_up_proj[e].T).chunk(2, -1)
            put = experts.act_fn(first) * second @ experts.down_proj[e].T
            out = out + put * (weights * (ids == e)).sum(1, keepdim=True) * z.flatten(0, 1)[:, e, None]
        return out

    experts.forward = forward
    try:
        given = {**BATCH, "labels": TOKENS}
        objective = Objective.of(model)
        batch = objective.batch(given)
        (q,) = torch.autograd.grad(objective.summed(objective.run(model, batch), batch.labels), [z])
    finally:
        del experts.forward
    return q.double()


@pytest.mark.parametrize("name", ["mixtral", "deepseek v3"])
def test_gates_on_experts_are_slopes_of_the_loss(name):
    model, groups = build(name)
    chosen = {"taylor": get_metric("taylor"), "sizes": get_metric("taylor", abs=True), "loss_proxy": get_metric("loss_proxy")}
    chosen["token"] = get_metric("loss_proxy", unit="token")
    batch = BATCH | {"labels": TOKENS}
    table = score_table(model, groups.opt_in, chosen, [batch])
    halves = [{k: v[rows] for k, v in batch.items()} for rows in (slice(0, 1), slice(1, 3))]
    again = score_table(model, groups.opt_in, chosen, halves)
    assert (table - again).abs().max().max() <= 1e-5 * table.abs().max().max()
    for group in groups.opt_in:
        q = slopes(model, group)
        whole, each = q.sum(1), q[MASK.bool()]
        found = {column: torch.tensor(values.to_numpy()) for column, values in table.loc[group.name].items()}
        for column, wanted in {
            "taylor": whole.square().mean(0),
            "sizes": whole.abs().mean(0),
            "loss_proxy": whole.square().mean(0) / 2,
            "token": each.square().mean(0) / 2,
        }.items():
            assert (found[column] - wanted).abs().max() <= 1e-4 * wanted.max()


def test_experts_and_their_channels_are_scored_in_one_pass():
    model, groups = build("mixtral")
    batch = [BATCH | {"labels": TOKENS}]
    both = score_table(model, [*groups, *groups.opt_in], {"taylor": get_metric("taylor")}, batch)
    for part in (groups, groups.opt_in):
        alone = score_table(model, list(part), {"taylor": get_metric("taylor")}, batch)
        assert torch.equal(torch.tensor(both.loc[alone.index].to_numpy()), torch.tensor(alone.to_numpy()))


def test_the_load_of_a_router():
    model, groups = build("qwen3 moe")
    group, seen = groups.opt_in[1], []
    with observed([model.get_submodule(group.router)], lambda *call: seen.append(call[3][2])):
        logits(model)
    counts = seen[0].reshape(3, 9, K)[MASK.bool()].flatten().bincount(minlength=E).double()
    found = torch.tensor(score_table(model, groups.opt_in, {"load": get_metric("router_load")}, [BATCH]).loc[group.name]["load"])
    same(found, counts / counts.sum())
    pruned = nl.prune(model, "router_load", 0.25, scope="expert", data=[BATCH])
    assert (
        counts[pruned.plan.removed[group.name]].max()
        <= counts[[e for e in range(E) if e not in pruned.plan.removed[group.name]]].min()
    )
    with pytest.raises(ValueError, match=r"router_load scores whole experts, scope=expert; group .* has other units \(moe_ffn\)"):
        nl.prune(model, "router_load", 0.25, scope="moe_ffn", data=[BATCH])


def test_loss_critical_channels_are_no_experts():
    from nodelens.analysis.supernodes.supernodes import Supernodes

    with pytest.raises(ValueError, match="scope 'expert' matches no group"):
        Supernodes(scope="expert")._groups(model := build("mixtral")[0], Objective.of(model), BATCH)


WEIGHTS = {"magnitude", "l1", "l2", "group_l2", "lamp", "fpgm", "random", "bn_scale"}


@pytest.mark.parametrize("name", ["wanda", "flap", "minitron", "hrank", "taylor_producer", "fisher", "gradient", "llm_pruner"])
def test_other_criteria_are_refused(name):
    model, _ = build("mixtral")
    assert name in set(PUBLISHED) - WEIGHTS
    with pytest.raises(
        ValueError, match=rf"{name} does not score whole experts, .* taylor, .*\(magnitude, group_l2\).* scope=moe_ffn"
    ):
        nl.prune(model, name, 0.25, scope="expert", data=[BATCH | {"labels": TOKENS}])


@pytest.mark.parametrize("metric", ["rq", "activation_rms"])
def test_metrics_of_hidden_units_are_refused(metric):
    with pytest.raises(ValueError, match=rf"{metric} does not score whole experts, the units of group '.*experts': .*moe_ffn"):
        nl.prune(build("mixtral")[0], metric, 0.25, scope="expert", data=[BATCH])


def test_weights_cannot_shut_an_expert_off():
    model, groups = build("mixtral")
    name, words = (
        groups.opt_in[0].name,
        "of a whole expert do not change the router, .*use apply=slice with",
    )
    with pytest.raises(ValueError, match=words):
        zero(model, groups.opt_in, {name: [1]})
    with pytest.raises(ValueError, match=words):
        scale(model, groups.opt_in, {name: torch.ones(E)})
    with pytest.raises(ValueError, match=words), scaled(model, groups.opt_in, {name: torch.ones(E)}):
        pass
    given = {"scope": "expert", "example_inputs": BATCH}
    for more in ({"apply": "mask"}, {"apply": "scale"}, {"schedule": Schedule("iterative", 2)}):
        with pytest.raises(ValueError, match=words):
            nl.prune(model, "magnitude", 0.25, **given, **more)


def reasons(groups):
    return {frozen.what: frozen.reason for frozen in groups.frozen}


def test_groups_of_experts_stay_whole():
    groups = build("deepseek v3", n_group=2)[1]
    words = "experts stay whole: its router gate (DeepseekV3TopkRouter) chooses among 2 groups of equally many experts"
    assert reasons(groups)["model.layers.1.mlp.experts"] == words
    assert not groups.opt_in
    with pytest.raises(ValueError, match="scope 'expert' matches no group"):
        groups.chosen("expert")


def test_experts_that_are_called_otherwise_stay_whole():
    options = ROTARY | {"num_local_experts": 4, "intermediate_size_mlp": 12}
    model = transformers.AutoModelForCausalLM.from_config(transformers.Llama4TextConfig(**options))
    groups = family_groups(model)
    assert not groups.opt_in
    assert {w: r for w, r in reasons(groups).items() if w.endswith("experts")} == {
        f"model.layers.{k}.feed_forward.experts": "experts stay whole: each is called with its own block of rows" for k in range(2)
    }


CHANGES = {
    "no router": (
        lambda block: setattr(block.gate, "top_k", None),
        "none of gate .MixtralTopKRouter., experts .MixtralExperts. stores",
    ),
    "two routers": (lambda block: setattr(block, "other", copy.deepcopy(block.gate)), "the router is not clear: 2 of gate"),
    "ids": (
        lambda block: block.gate.register_buffer("of", torch.zeros(32, 2, dtype=torch.long)),
        r"gate.of \(32, 2\) holds integers",
    ),
    "square": (
        lambda block: block.gate.register_buffer("of", torch.zeros(E, E)),
        r"gate.of \(8, 8\) has two dimensions of the number",
    ),
    "none": (
        lambda block: setattr(block.gate, "weight", nn.Parameter(torch.zeros(9, 16))),
        "no weight of its router gate has one row per expert",
    ),
    "whole": (lambda block: setattr(block.gate, "extra", nn.Parameter(torch.zeros(3).half().to(torch.float8_e4m3fn))), "quantized"),
}


@pytest.mark.parametrize(("change", "words"), CHANGES.values(), ids=list(CHANGES))
def test_routers_that_are_not_understood_are_frozen(change, words):
    model = copy.deepcopy(build("mixtral")[0])
    change(model.model.layers[1].mlp)
    groups = family_groups(model)
    assert [group.name for group in groups.opt_in] == ["model.layers.0.mlp.experts"]
    assert not any(patch.among for group in groups.opt_in for patch in group.counts)
    assert re.match(f"experts stay whole: .*{words}", reasons(groups)["model.layers.1.mlp.experts"])


def test_a_router_of_two_mixtures_is_frozen():
    model = copy.deepcopy(build("mixtral")[0])
    model.model.layers[1].mlp.gate.weight = model.model.layers[0].mlp.gate.weight
    groups = family_groups(model)
    assert not groups.opt_in
    assert reasons(groups)["model.layers.1.mlp.experts"].endswith("gate.weight is also a parameter of another module")


def test_a_router_that_answers_otherwise_is_an_error():
    model, groups = build("mixtral")
    model = copy.deepcopy(model)
    router = model.model.layers[1].mlp.gate
    router.__class__ = type("Pair", (type(router),), {"forward": lambda self, x: type(router).__mro__[1].forward(self, x)[1:]})
    with (
        pytest.raises(ValueError, match=r"router model.layers.1.mlp.gate \(Pair\) returns .*27, 2.*; masking experts needs"),
        masked(model, groups.opt_in, {groups.opt_in[1].name: [0]}),
    ):
        logits(model)


def jetmoe():
    config = transformers.JetMoeConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_key_value_heads=2,
        kv_channels=8,
        num_local_experts=4,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.JetMoeForCausalLM(config).eval()
        for weight in model.parameters():
            nn.init.normal_(weight, 0.0, 0.2)
    return model


def test_experts_whose_weights_two_modules_hold_are_pruned_and_saved(tmp_path):
    model, ids = jetmoe(), torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(1))
    pruned = nl.prune(model, "magnitude", 0.5, data=[{"input_ids": ids}])
    assert [(group.name, group.kind, group.n) for group in pruned.groups] == [
        (f"model.layers.0.mlp[{e}]", "moe_ffn", 48) for e in range(4)
    ]
    with torch.no_grad(), masked(model, pruned.groups, pruned.plan.removed):
        expected = model(input_ids=ids).logits
    with torch.no_grad():
        found = pruned.model(input_ids=ids).logits
        same(found, expected)
        assert not torch.allclose(found, model(input_ids=ids).logits, rtol=0.01)
        assert torch.equal(nl.load_pruned(pruned.save(tmp_path))(input_ids=ids).logits, found)
    experts = pruned.model.model.layers[0].mlp
    assert experts.input_linear.weight.shape == (4, experts.input_linear.output_size, 32) == (4, 2 * experts.hidden_size, 32)
    with pytest.raises(ValueError, match=r"no hook captures the units of group 'model.layers.0.mlp\[0\]': its experts share one"):
        nl.prune(model, "taylor", 0.5, data=[{"input_ids": ids}])


def test_two_modules_of_other_shapes_are_no_experts_and_quantized_ones_are_named():
    model = jetmoe()
    mixture = model.model.layers[0].mlp
    mixture.input_linear.weight = nn.Parameter(torch.ones(4, 40, 32))
    assert not family_groups(model)
    mixture.input_linear.weight = nn.Parameter(torch.ones(4, 96, 32, dtype=torch.int8), requires_grad=False)
    assert any("the experts' weights are quantized or computed" in f.reason for f in family_groups(model).frozen)
