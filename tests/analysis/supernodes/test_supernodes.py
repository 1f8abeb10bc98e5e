import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from real import folder
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralConfig

from nodelens.analysis.supernodes.agreement import MEAN, POOLED, agreement, hits, pearson, spearman
from nodelens.analysis.supernodes.controls import ControlSets, control_rows, matched
from nodelens.analysis.supernodes.hidden import HiddenPass, UnitSums
from nodelens.analysis.supernodes.robustness import bootstrap_intervals, chance_jaccard, resample_scores
from nodelens.analysis.supernodes.supernode_result import TABLES, load_supernodes
from nodelens.analysis.supernodes.supernodes import Supernodes
from nodelens.metrics import get_metric
from nodelens.metrics.supernode import largest, overlap
from nodelens.network.batch import Batch
from nodelens.network.objective import Objective
from nodelens.pruning.criteria.scoring import score_table
from nodelens.pruning.groups.find import find_groups

SIZE = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZE |= {"num_key_value_heads": 2, "max_position_embeddings": 64}
NAMES = {"scar_activation_power": "power", "scar_taylor": "taylor", "scar_curvature": "curvature"}
NAMES |= {"scar_loss_proxy": "loss_proxy", "scar_loss_proxy_factored": "loss_proxy_factored"}


def document(name):
    return json.loads((folder("NODELENS_GOLDEN") / f"{name}.json").read_text())


def tensor(value):
    return torch.as_tensor(np.array(value, float))


def numbers(column):
    return torch.tensor(column.to_numpy(float))


def column(result, layer, name):
    return numbers(result.units.loc[layer, name])


def llama(seed=0, **more):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**SIZE | more, initializer_range=0.3)).double().eval()


def texts(lengths, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(32, (length,), generator=generator) for length in lengths]


def batches(every, size, side="right"):
    """Texts padded in batches; positions count real tokens."""
    found = []
    for k in range(0, len(every), size):
        part = every[k : k + size]
        ids = nn.utils.rnn.pad_sequence(part, batch_first=True, padding_side=side)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(t) for t in part], batch_first=True, padding_side=side)
        at = (mask.cumsum(1) - 1).clamp_min(0)
        found.append({"input_ids": ids, "labels": ids, "attention_mask": mask, "position_ids": at})
    return found


@pytest.fixture(scope="module")
def golden_net():
    doc = document("scar_llama")
    options = {k: v for k, v in doc["config"].items() if k not in ("class", "rope_theta")}
    net = LlamaForCausalLM(LlamaConfig(**options, attn_implementation="eager")).double().eval()
    net.load_state_dict({k: tensor(v) for k, v in doc["inputs"]["state_dict"].items()}, strict=False)
    return net, [torch.tensor(text) for text in doc["inputs"]["input_ids"]]


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_golden_scores_of_a_language_model(golden_net, size, reduction):
    net, every = golden_net
    result = Supernodes(loss_reduction=reduction, supernode_fraction=0.125)(net, batches(every, size))
    for k in (0, 1):
        for name, wanted in document("scar_llama")["expected"][f"{reduction}_layer{k}"].items():
            found = column(result, f"model.layers.{k}.mlp", NAMES[name])
            assert_close(found, tensor(wanted), rtol=1e-5, atol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_golden_supernodes_halo_and_protection(golden_net):
    net, every = golden_net
    doc = document("scar_supernodes")
    for k, (own, wanted) in enumerate(zip(doc["options"].values(), doc["expected"].values(), strict=True)):
        names = (
            "halo_fraction",
            "connectivity_topk",
            "redundancy_topk",
            "redundancy_reduce",
            "positive_redundancy",
        )
        options = {name: own[name] for name in names} | {"supernode_fraction": own["core_fraction"]}
        result = Supernodes(**options)(net, batches(every, 2))
        units = result.units.loc[f"model.layers.{k}.mlp"]
        assert units.index[units["supernode"]].tolist() == wanted["supernodes"]
        assert units.index[units["halo"]].tolist() == wanted["halo"]
        outside = ~units["supernode"].to_numpy()
        for ours, theirs in {
            "connectivity": "connectivity",
            "redundancy_to_core": "redundancy_to_core",
            "protection": "protection",
            "scar_prot": "supernode_protection_score",
            "scar_conn": "supernode_connectivity_score",
        }.items():
            found, value = torch.tensor(units[ours].to_numpy(float)), tensor(wanted[theirs])
            keep = outside if ours.startswith("scar") else slice(None)
            assert_close(found[keep], value[keep], rtol=2e-5, atol=1e-8, equal_nan=True, msg=lambda m, n=ours: f"{n}: {m}")


@pytest.mark.parametrize("size", [1, 5])
def test_golden_scores_of_a_convolutional_network(size):
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
    result = Supernodes(scope="channels", unit="sequence", connectivity_topk=2, supernode_fraction=0.3)(net, data)
    for group in find_groups(net, Batch.of(x)):
        made = group.by_role("producer")[0].module
        for case, name in ((f"layer{made}", "loss_proxy"), (f"layer{made}_taylor", "taylor")):
            assert_close(column(result, group.name, name), tensor(doc["expected"][case]), rtol=1e-8, atol=1e-12)
    with pytest.raises(ValueError, match="has no value per token"):
        Supernodes(scope="channels")(net, data)


def products(net, layer, every, reduction):
    """q of each token of each text, (tokens, units), by hand: the gradient of each text's loss at what is read."""
    found = []
    for text in every:
        held = []
        handle = net.get_submodule(f"{layer}.down_proj").register_forward_pre_hook(lambda m, args, held=held: held.append(args[0]))
        logits = net(text[None]).logits[0]
        handle.remove()
        loss = nn.functional.cross_entropy(logits[:-1], text[1:], reduction=reduction)
        (g,) = torch.autograd.grad(loss, held[0])
        found.append((held[0] * g)[0].detach())
    return torch.cat(found)


@pytest.mark.parametrize(("reduction", "eps"), [("sum", 0.0), ("mean", 1e-8), ("sum", 1e-8)])
def test_redundancy_by_hand_with_the_published_epsilon_and_reduction(reduction, eps):
    net, every = llama(), texts([9, 14, 11, 12])
    options = {"supernode_fraction": 0.1, "halo_fraction": 0.3, "connectivity_topk": 4, "redundancy_topk": 2}
    result = Supernodes(**options, corr_eps=eps, loss_reduction=reduction)(net, batches(every, 2))
    groups = [group for group in find_groups(net) if group.kind == "ffn"]
    for group in groups:
        q = products(net, group.name, every, reduction)
        units = result.units.loc[group.name]
        assert_close(
            torch.tensor(units["loss_proxy"].to_numpy()), 0.5 * q.square().mean(0), rtol=1e-6, atol=0
        )  # its norms are float32
        assert_close(numbers(units["first_order"]), -q.mean(0), rtol=1e-5, atol=1e-9)
        core = (0.5 * q.square().mean(0)).topk(2).indices.sort().values
        assert units.index[units["supernode"]].tolist() == core.tolist()
        centred = q - q.mean(0)
        variance = centred.square().mean(0)
        rho = (centred.T @ centred[:, core]) / len(q) / (variance[:, None] * variance[core] + eps).sqrt()
        information = -0.5 * torch.log(1 - rho.clamp_min(0).square())
        members = units.index[units["halo"]]
        assert_close(
            torch.tensor(units["redundancy_to_core"][members].to_numpy()), information.mean(1)[members], rtol=1e-5, atol=1e-12
        )
    chosen = {"prot": get_metric("scar_prot", **options, corr_eps=eps, loss_reduction=reduction)}
    chosen["conn"] = get_metric("scar_conn", **options, corr_eps=eps, loss_reduction=reduction)
    table = score_table(net, groups, chosen, batches(every, 3))
    assert_close(numbers(table["prot"]), numbers(result.units["scar_prot"]), rtol=1e-6, atol=0)
    assert_close(numbers(table["conn"]), numbers(result.units["scar_conn"]), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("size", "side"), [pytest.param(1, "right", marks=pytest.mark.slow), (5, "left"), (2, "right")])
def test_batches_and_padding_change_nothing(size, side):
    net, every = llama(), texts([9, 14, 11, 12, 7])
    analysis = Supernodes(scope=["ffn", "heads"], supernode_fraction=0.1, connectivity_topk=4, groups=4)
    one, other = analysis(net, batches(every, 3)), analysis(net, batches(every, size, side))
    assert set(one.layers["kind"]) == {"ffn", "kv_group"}
    pd.testing.assert_frame_equal(one.units, other.units, rtol=1e-9, atol=1e-15)
    pd.testing.assert_frame_equal(one.robustness, other.robustness, rtol=1e-9)
    pd.testing.assert_frame_equal(one.controls, other.controls, rtol=1e-6, atol=1e-12)


def mixtral():
    more = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = MixtralConfig(**SIZE | more, initializer_range=0.3)
        return AutoModelForCausalLM.from_config(config, experts_implementation="eager").double().eval()


def gpt2():
    config = {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "initializer_range": 0.2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(**config)).double().eval()


@pytest.mark.parametrize(
    ("make", "scope", "unit"),
    [
        (llama, "ffn", "token"),
        (llama, "heads", "sequence"),
        (gpt2, "ffn", "token"),
        (mixtral, "experts", "token"),
        (mixtral, "experts", "sequence"),
    ],
    ids=lambda x: getattr(x, "__name__", x),
)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_the_loss_proxy_is_that_of_gates(make, scope, unit, reduction):
    net, data = make(), batches(texts([9, 12, 10]), 2)
    found = Supernodes(scope=scope, unit=unit, supernode_fraction=0.1, connectivity_topk=4, loss_reduction=reduction)(net, data)
    groups = [group for group in find_groups(net) if group.name in found.layers.index]
    chosen = {"proxy": get_metric("loss_proxy", unit=unit), "power": get_metric("activation_power")}
    chosen["prot"] = get_metric("scar_prot", unit=unit, supernode_fraction=0.1, connectivity_topk=4, loss_reduction=reduction)
    table = score_table(net, groups, chosen, data)
    if reduction == "sum":
        assert_close(numbers(found.units["loss_proxy"]), numbers(table["proxy"]), rtol=1e-9, atol=1e-18)
    assert_close(numbers(found.units["scar_prot"]), numbers(table["prot"]), rtol=1e-6, atol=1e-18)
    assert_close(numbers(found.units["power"]), numbers(table["power"]), rtol=1e-9, atol=1e-18)


class Twice(nn.Module):
    """One block of hidden units that runs twice, the second time on what the first put out."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x):
        for _ in range(2):
            x = x + self.fc2(torch.tanh(self.fc1(x)))
        return self.head(x)


def test_a_unit_that_is_read_twice_goes_twice():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net, x = Twice().double(), torch.randn(20, 6, dtype=torch.float64)
    data = [(x[:12], torch.arange(12) % 3), (x[12:], torch.arange(8) % 3)]
    group = {"name": "hidden", "producer": ["fc1.weight", "fc1.bias"], "consumer": ["fc2.weight"]}
    groups = find_groups(net, None, [group])
    sums = UnitSums(groups, 4, torch.device("cpu"))
    assert HiddenPass(net, list(groups), "sequence", "sum", 4, 0).run(data, sums, Objective.of(net)) == 20
    wanted = numbers(score_table(net, groups, {"proxy": get_metric("loss_proxy")}, data)["proxy"])
    assert_close(0.5 * sums.found["hidden", "square"].sum(0) / 20, wanted, rtol=1e-9, atol=0)
    assert int(sums.found["hidden", "positions"]) == 40


def test_the_error_of_the_loss_proxy_is_the_jackknife_over_groups():
    net, every = llama(), texts([10] * 6)
    result = Supernodes(groups=64)(net, batches(every, 3))
    layer = "model.layers.0.mlp"
    parts = torch.stack([0.5 * products(net, layer, [text], "sum").square().mean(0) for text in every])  # a group a text
    left = (parts.sum(0) - parts) / 5
    wanted = (5 * left.var(0, correction=0)).sqrt()
    assert_close(column(result, layer, "loss_proxy_se"), wanted, rtol=1e-6, atol=0)


def test_correlations_by_hand():
    a, b = [1.0, 2, 3, 4, math.nan], [1.0, 3, 2, 40, 5]
    assert spearman(a, b) == pytest.approx(0.8)
    assert spearman([1, 1, 2], [3, 4, 5]) == pytest.approx(math.sqrt(3) / 2), "ranks of ties are averaged"
    assert pearson([1, 2, 4], [1e-200, 2e-200, 4e-200]) == pytest.approx(1)
    assert math.isnan(spearman([1, 1], [1, 2]))
    assert math.isnan(pearson([1.0], [2.0]))


def planted(n=400, noise=0.5):
    """Two layers of units whose score tells their change but for noise."""
    generator = torch.Generator().manual_seed(0)
    change, error, other = torch.randn(3, 2 * n, generator=generator, dtype=torch.float64)
    index = pd.MultiIndex.from_product([["a", "b"], range(n)], names=["layer", "unit"])
    return pd.DataFrame({"change": change, "good": change + noise * error, "none": other}, index=index)


def test_agreement_has_errors_that_are_the_spread_of_other_draws():
    table = agreement(planted(), ["good", "none"]).set_index(["layer", "score"])
    rho = 1 / math.sqrt(1.25)
    for place, n in ((POOLED, 800), (MEAN, 800), ("a", 400)):
        row = table.loc[place, "good"]
        assert row["n"] == n
        assert row["pearson"] == pytest.approx(rho, abs=5 * (1 - rho**2) / math.sqrt(n))
        assert row["pearson_se"] == pytest.approx((1 - rho**2) / math.sqrt(n), rel=0.6)
        assert abs(table.loc[place, "none"]["spearman"]) < 5 / math.sqrt(n)
        assert table.loc[place, "none"]["spearman_se"] == pytest.approx(1 / math.sqrt(n), rel=0.6)
    few = agreement(planted().groupby("layer").head(10), ["good"])
    assert few["spearman_se"].isna().sum() >= 3, "of twenty units no error is told"


def test_hits_by_hand():
    index = pd.MultiIndex.from_product([["a"], range(4)], names=["layer", "unit"])
    table = pd.DataFrame({"change": [4.0, 3, 2, 1], "score": [9.0, 1, 8, 7], "gone": [math.nan] * 4}, index=index)
    found = hits(table, ["score", "gone"], budgets=(0.25, 0.5, 1.0)).set_index(["score", "k"])
    assert found.loc["score", "hits"].tolist() == [1.0, 0.5, 1.0]
    assert found.loc["score", "chance"].tolist() == [0.25, 0.5, 1.0]


def test_units_are_matched_by_the_logarithm_once_each():
    proxy = torch.tensor([100.0, 10, 1, 90, 12, 1.1, 0], dtype=torch.float64)
    pairs = matched(proxy, torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5, 6]))
    assert pairs.tolist() == [[0, 3], [1, 4], [2, 5]]
    assert matched(proxy, torch.tensor([0, 1, 2]), torch.tensor([4])).tolist() == [[0, 4]]
    assert matched(proxy, torch.tensor([0]), torch.tensor([], dtype=torch.long)).shape == (0, 2)


def test_controls_see_a_halo_that_repeats_its_core_and_none_that_does_not():
    n, core, members = 60, torch.tensor([0, 1]), torch.arange(2, 14)
    proxy = torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    chosen = ControlSets.of("layer", proxy, core, members, 39, 0)
    assert chosen.random.shape == (39, 2)
    assert not set(chosen.random.flatten().tolist()) & {*core.tolist(), *members.tolist()}
    noise = torch.rand(n, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def redundancy(strength):
        return lambda units, to: noise[units][:, to].mean(1) + strength * ((units[:, None] < 14) & (to < 2)).any(1)

    connectivity = torch.linspace(0, 1, n, dtype=torch.float64)
    repeated, plain = (pd.DataFrame(control_rows("layer", chosen, redundancy(s), connectivity, 0)) for s in (1.0, 0.0))
    assert repeated["p"][:2].tolist() == [1 / 40, pytest.approx(0.001, abs=0.002)]
    assert (plain["p"][:2] > 0.05).all()
    row = repeated.iloc[1]
    a, b = chosen.pairs.T
    d = (redundancy(1.0)(a, core) - redundancy(1.0)(b, core)).numpy()
    assert row["difference"] == pytest.approx(d.mean())
    assert row["se"] == pytest.approx(d.std(ddof=1) / math.sqrt(len(d)))
    without = ControlSets.of("layer", proxy[:4], core, torch.tensor([2]), 5, 0)
    assert len(without.random) == 0
    assert math.isnan(pd.DataFrame(control_rows("layer", without, redundancy(0), connectivity, 0))["p"][0])


def test_resamples_agree_where_texts_do():
    generator = torch.Generator().manual_seed(0)
    one, rows = torch.rand(40, generator=generator, dtype=torch.float64), torch.full((8,), 5.0, dtype=torch.float64)
    same = pd.DataFrame(resample_scores("a", one.expand(8, 40) * rows[:, None], rows, 0.1, 6))
    assert (same["jaccard"] == 1).all()
    assert same["spearman"].to_numpy() == pytest.approx(1)
    noise = torch.rand(8, 2000, generator=generator, dtype=torch.float64)
    for how in ("halves", "bootstrap"):
        drawn = pd.DataFrame(resample_scores("a", noise, rows, 0.1, 6, how))
        assert len(drawn) == 6
        assert drawn["spearman"].nunique() == 6
        assert (drawn["spearman"].abs().mean() < 0.2) == (how == "halves")
    chance = pd.DataFrame(resample_scores("a", noise, rows, 0.1, 30))["jaccard"].mean()
    assert chance == pytest.approx(chance_jaccard(2000, 200), abs=0.02)
    assert resample_scores("a", noise[:1], rows[:1], 0.1, 5) == []
    assert chance_jaccard(10, 10) == 1


def test_bootstrap_intervals_hold_the_agreement_with_the_truth():
    """Where samples agree, both ends lie at the agreement of the scores; with noise the interval holds it."""
    g = torch.Generator().manual_seed(0)
    truth = torch.rand(40, generator=g, dtype=torch.float64) + 0.5
    rows = torch.tensor([3, 5, 0, 4, 4, 5, 3, 6, 5])
    other = truth + 0.3 * torch.rand(40, generator=g, dtype=torch.float64)
    core = largest(truth, 4)
    same = bootstrap_intervals({"other": other}, truth * rows[:, None], rows, core)
    assert same["spearman_other_low"] == same["spearman_other_high"] == pytest.approx(spearman(truth, other))
    assert same["jaccard_other_low"] == same["jaccard_other_high"] == pytest.approx(overlap(core, largest(other, 4)))
    noisy = truth * rows[:, None] * (1 + 0.5 * torch.rand(9, 40, generator=g, dtype=torch.float64))
    core = largest(noisy.sum(0), 4)
    found = bootstrap_intervals({"other": other}, noisy, rows, core)
    assert found["spearman_other_low"] < spearman(noisy.sum(0), other) < found["spearman_other_high"]
    assert 0 <= found["jaccard_other_low"] <= found["jaccard_other_high"] <= 1
    assert found == bootstrap_intervals({"other": other}, noisy, rows, core), "the seed decides the draws"
    by_another = bootstrap_intervals({"other": other}, noisy, rows, torch.arange(4))
    assert math.isnan(by_another["jaccard_other_low"])
    assert by_another["spearman_other_low"] == found["spearman_other_low"]
    few = bootstrap_intervals({"other": other}, noisy[:4], rows[:4], core)
    assert all(map(math.isnan, few.values()))


def test_what_the_next_layer_reads_of_where_the_core_writes():
    net, every = llama(), texts([9, 14])
    result = Supernodes(supernode_fraction=0.1, connectivity_topk=4)(net, batches(every, 2))
    first, second = (f"model.layers.{k}.mlp" for k in (0, 1))
    assert column(result, first, "read_connectivity").isnan().all()
    units = result.units.loc[first]
    core = units.index[units["supernode"]]
    down = net.model.layers[0].mlp.down_proj.weight.detach().abs()
    support = down[:, core].sum(1).topk(4).indices
    gate, up = (getattr(net.model.layers[1].mlp, name).weight.detach().abs() for name in ("gate_proj", "up_proj"))
    wanted = (gate[:, support] + up[:, support]).sum(1) / (gate + up).sum(1)
    assert_close(column(result, second, "read_connectivity"), wanted, rtol=1e-9, atol=0)
    halo = result.units["read_halo"]
    assert not halo.loc[first].any()
    assert set(halo.loc[second].index[halo.loc[second]]) == set(wanted.topk(2).indices.tolist()), "a tenth of 24"


def test_a_whole_analysis_is_saved_read_said_and_drawn(tmp_path, monkeypatch):
    from nodelens.report import write_figures

    net, every = llama(), texts([9, 14, 11, 12, 10, 13])
    shown = []
    analysis = Supernodes(supernode_fraction=0.1, connectivity_topk=4, ablate=6, resamples=4)
    result = analysis(net, batches(every, 2), evaluation=batches(texts([12, 12], 7), 2), progress=lambda x: shown.append(1) or x)
    assert len(shown) == 3, "two passes, and one of ablation"
    assert len(result.ablation) == 12
    assert set(result.agreement["layer"]) == {"model.layers.0.mlp", "model.layers.1.mlp", POOLED, MEAN}
    again = analysis(net, batches(every, 2), evaluation=batches(texts([12, 12], 7), 2))
    for name in TABLES:
        pd.testing.assert_frame_equal(getattr(result, name), getattr(again, name), rtol=1e-12)
    result.save(tmp_path / "supernodes")
    loaded = load_supernodes(tmp_path / "supernodes")
    for name in TABLES:
        pd.testing.assert_frame_equal(getattr(loaded, name), getattr(result, name))
    assert loaded.summary() == result.summary()
    assert loaded.metadata["ablation"]["predictions"] == 22
    text = result.summary()
    for words in ("48 units in 2 layers", "supernodes: 4 units", "random sets", "12 units ablated", "two halves of the texts"):
        assert words in text, text
    assert "connectivity is 1 for every unit in 2 layers" in Supernodes()(net, batches(every, 2)).summary()
    names = ("concentration", "controls", "ablation", "scores", "hits", "robustness-jaccard", "robustness-spearman")
    paths = write_figures(tmp_path / "supernodes")
    assert [path.name for path in paths] == [f"{name}.png" for name in names]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    (tmp_path / "supernodes/metadata.json").unlink()
    with pytest.raises(FileNotFoundError, match="no finished analysis"):
        load_supernodes(tmp_path / "supernodes")
    result.metadata["supernodes_schema_version"] = 99
    monkeypatch.setattr("nodelens.analysis.supernodes.supernode_result.SCHEMA", 99)
    result.save(tmp_path / "later")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="has schema version 99"):
        load_supernodes(tmp_path / "later")
    with pytest.raises(ValueError, match="is a file"):
        result.save(tmp_path / "later/units.parquet")


def test_what_does_not_fit_is_said():
    net, data = llama(), batches(texts([9]), 1)
    for options, words in (
        ({"resample": "thirds"}, "resample is 'thirds'; it must be one of halves, bootstrap"),
        ({"supernode_fraction": 1.5}, "supernode_fraction is 1.5"),
        ({"ablate": "some"}, "ablate is 'some'"),
        ({"ablate": -1}, "ablate is -1"),
    ):
        with pytest.raises(ValueError, match=words):
            Supernodes(**options)
    with pytest.raises(ValueError, match="reads its data twice"):
        Supernodes()(net, iter(data))
    with pytest.raises(ValueError, match="data are empty"):
        Supernodes()(net, [])
    with pytest.raises(ValueError, match="needs labels"):
        Supernodes()(net, [{"inputs_embeds": net.get_input_embeddings()(data[0]["input_ids"])}])
    with pytest.raises(ValueError, match="matches no group"):
        Supernodes(scope="experts")(net, data)
    with pytest.raises(ValueError, match="evaluation data are empty"):
        Supernodes(ablate=1)(net, data, evaluation=[])


def test_the_config_holds_the_defaults():
    from omegaconf import OmegaConf

    from nodelens.app.config import CONF

    options = dict(OmegaConf.load(CONF / "analysis/supernodes.yaml").supernodes)
    assert options.pop("_target_") == f"{Supernodes.__module__}.Supernodes"
    assert options == vars(Supernodes())


def test_nothing_is_left_behind():
    net, data = llama(), batches(texts([9, 10]), 1)
    net.train()
    net.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    taking = [p.requires_grad for p in net.parameters()]
    Supernodes(ablate=1)(net, data)
    assert net.training
    assert [p.requires_grad for p in net.parameters()] == taking
    assert all(p.grad is None for p in net.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__ for module in net.modules())


def _share(rank, world, home, shares):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{home}/meet", rank=rank, world_size=world)
    every, start = texts([9, 14, 11, 12, 7]), sum(shares[:rank])
    data = batches(every[start : start + shares[rank]], 2)
    result = Supernodes(supernode_fraction=0.1, connectivity_topk=4, ablate=2, resamples=3)(llama(), data)
    if rank == world - 1:
        result.save(f"{home}/result")
    dist.destroy_process_group()


def test_processes_add_up_also_where_one_is_empty(tmp_path):
    shares = [3, 0, 2]
    mp.start_processes(_share, (3, str(tmp_path), shares), 3, start_method="spawn" if torch.cuda.is_initialized() else "fork")
    found = load_supernodes(tmp_path / "result")
    alone = Supernodes(supernode_fraction=0.1, connectivity_topk=4, ablate=2, resamples=3)(
        llama(), batches(texts([9, 14, 11, 12, 7]), 5)
    )
    for name in TABLES:
        pd.testing.assert_frame_equal(getattr(found, name), getattr(alone, name), rtol=1e-6, atol=1e-9)
    assert found.metadata["ablation"]["predictions"] == alone.metadata["ablation"]["predictions"] == 48


def test_the_loss_can_be_chosen():
    """Twice the loss has twice the q, and four times the loss proxy."""
    net, data = llama(), batches(texts([9, 12, 10]), 2)

    def doubled(z, y):
        return 2 * torch.nn.functional.cross_entropy(z[:, :-1].flatten(0, 1), y[:, 1:].flatten(), reduction="sum")

    options = Supernodes(supernode_fraction=0.1, connectivity_topk=4)
    own, default = options(net, data, loss=doubled).units["loss_proxy"], options(net, data).units["loss_proxy"]
    assert_close(numbers(own), 4 * numbers(default), rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match="task is none"):
        options(net, data, task="none")
