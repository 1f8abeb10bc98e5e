import math

import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ids import label
from real import cifar_images, folder, resnet20
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3nTextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
)

import nodelens as nl
from nodelens.analysis.ablation import damage, donor_pool
from nodelens.engine.driver import Driver
from nodelens.evaluation.evaluate import evaluate
from nodelens.interventions.replay import RecordedCall
from nodelens.network.batch import Batch
from nodelens.network.hooks import edit
from nodelens.network.objective import Objective
from nodelens.pruning.surgery.mask import channel_dim, masked
from nodelens.statistics.sample_hash import content_hashes, mix

SIZE = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZE |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3}
MIXTRAL = MixtralConfig(**SIZE | {"num_hidden_layers": 1, "intermediate_size": 6}, num_local_experts=4, num_experts_per_tok=2)


def seeded(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().double().eval()


def llama():
    return seeded(lambda: LlamaForCausalLM(LlamaConfig(**SIZE)))


def gpt2():
    config = GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=4, n_positions=64, n_inner=24, initializer_range=0.3)
    return seeded(lambda: GPT2LMHeadModel(config))


def mixtral():
    return seeded(lambda: AutoModelForCausalLM.from_config(MIXTRAL, experts_implementation="eager"))


def texts(lengths, size):
    generator = torch.Generator().manual_seed(1)
    every = [torch.randint(1, 32, (length,), generator=generator) for length in lengths]
    found = []
    for k in range(0, len(every), size):
        ids = nn.utils.rnn.pad_sequence(every[k : k + size], batch_first=True)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(t) for t in every[k : k + size]], batch_first=True)
        found.append({"input_ids": ids, "labels": ids, "attention_mask": mask})
    return found


class Branches(nn.Module):
    """One ReLU for all, which writes in place; a block inside, functional operations, and a skip from the stem to the end."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 5, 3, padding=1), nn.BatchNorm2d(5))
        self.relu = nn.ReLU(inplace=True)
        self.a, self.norm = nn.Conv2d(5, 6, 3), nn.BatchNorm2d(6)
        self.b, self.behind = nn.Conv2d(6, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.head = nn.Linear(9, 3)

    def forward(self, x):
        stem = self.relu(self.stem(x))
        y = self.relu(self.norm(self.a(stem)))
        y = nn.functional.gelu(self.behind(self.b(y)))
        return self.head(torch.cat([y.mean((2, 3)), stem.amax((2, 3))], 1))


def branches():
    net = seeded(Branches)
    generator = torch.Generator().manual_seed(2)
    for norm in (net.stem[1], net.norm, net.behind):
        norm.running_mean.normal_(generator=generator)
        norm.running_var.uniform_(0.5, 2, generator=generator)
        nn.init.uniform_(norm.weight, 0.5, 2, generator=generator)
    return net


def images(n=13, size=5):
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(n, 2, 7, 7, generator=generator, dtype=torch.float64), torch.randint(3, (n,), generator=generator)
    return list(zip(x.split(size), y.split(size), strict=True))


def by_masks(net, data, groups, index, **options):
    """The slow and obvious way: the whole model under a pruning mask, once per unit."""
    dense = evaluate(net, data, **options)["loss"]
    found = []
    for layer, unit in index:
        with masked(net, groups, {layer: [unit]}):
            found.append(evaluate(net, data, **options)["loss"] - dense)
    return np.array(found)


@pytest.mark.parametrize("make", [llama, pytest.param(gpt2, marks=pytest.mark.slow), mixtral, branches], ids=lambda f: f.__name__)
def test_the_damage_is_that_of_a_pruning_mask(make):
    net, data = make(), images() if make is branches else texts([9, 12, 10, 5, 7], 2)
    groups = nl.find_groups(net, data[0])
    found = nl.ablate(net, data)
    assert {name for name, _ in found.units.index} == {group.name for group in groups}
    assert len(found.units) == sum(group.n for group in groups)
    np.testing.assert_allclose(found.units["damage"], by_masks(net, data, groups, found.units.index), rtol=0, atol=1e-9)
    assert found.metadata["loss"] == pytest.approx(evaluate(net, data)["loss"], abs=1e-12)
    assert found.metadata["whole_model"] == [], "every site could be replayed"
    plain = nl.ablate(net, data, replay=False)
    pd.testing.assert_frame_equal(found.units, plain.units, rtol=0, atol=1e-9)
    assert set(plain.metadata["whole_model"]) == {group.name for group in groups}
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in net.modules())


def test_whole_experts_are_ablated_as_their_router_never_chooses_them():
    net, data = mixtral(), texts([9, 12], 2)
    groups = list(nl.find_groups(net).chosen("expert"))
    found = nl.ablate(net, data, layers=groups)
    np.testing.assert_allclose(found.units["damage"], by_masks(net, data, groups, found.units.index), rtol=0, atol=1e-9)


def test_units_in_a_table_a_mapping_or_a_sample():
    net, data = branches(), images()
    every = nl.ablate(net, data).units
    some = nl.ablate(net, data, {"a": [4, 1]}).units
    assert list(some.index) == [("a", 4), ("a", 1)]
    pd.testing.assert_frame_equal(some, every.loc[some.index], rtol=1e-9)
    pd.testing.assert_frame_equal(nl.ablate(net, data, some).units, some)
    drawn = nl.ablate(net, data, sample=2, seed=1)
    assert drawn.layers["units"].tolist() == [2] * len(every.index.unique("layer"))
    pd.testing.assert_frame_equal(drawn.units, every.loc[drawn.units.index], rtol=1e-9)
    assert list(drawn.units.index) == list(nl.ablate(net, data, sample=2, seed=1).units.index)
    assert list(drawn.units.index) != list(nl.ablate(net, data, sample=2, seed=2).units.index)


def test_the_table_joins_that_of_the_metrics():
    net, data = branches(), images()
    measured = nl.analyze(net, data, ["rq"], list(nl.find_groups(net, data[0])))
    joined = measured.units.join(nl.ablate(net, data).units)
    assert joined["damage"].notna().all()


def test_units_of_a_layer_are_removed_from_its_output():
    net, data = branches(), images()
    found = nl.ablate(net, data, layers=["b", "stem.1", "head"])
    dense = evaluate(net, data)["loss"]
    for (layer, unit), change in found.units["damage"].items():
        keep = torch.ones(found.units.loc[layer].shape[0], dtype=torch.float64)
        keep[unit] = 0
        gate = keep if layer == "head" else keep[:, None, None]
        with edit({net.get_submodule(layer): lambda out, gate=gate: out * gate}):
            assert change == pytest.approx(evaluate(net, data)["loss"] - dense, abs=1e-9)
    assert found.metadata["whole_model"] == []


def test_heads_and_hidden_units_by_role():
    net, data = llama(), texts([9, 12], 2)
    roles = nl.ablate(net, data, layers="blocks[0].mlp.hidden").units
    groups = nl.ablate(net, data, {"model.layers.0.mlp": range(24)}).units
    np.testing.assert_allclose(roles["damage"], groups["damage"], atol=1e-12)


def replaced(net, group, unit, values):
    """The loss when a unit is replaced by values at what reads it: a function of a consumer's input and the unit's places."""

    def change(module, piece):
        def put(x):
            x = x.clone().movedim(channel_dim(module), 0)
            places = piece.places[unit]
            x[places] = values(x, places)
            return x.movedim(0, channel_dim(module))

        return put

    pieces = [(net.get_submodule(piece.module), piece) for piece in group.by_role("consumer")]
    return edit({}, {module: change(module, piece) for module, piece in pieces})


def test_mean_and_resample():
    net, data = branches(), images(12, 12)
    group = nl.find_groups(net, data[0]).named("a")
    dense = evaluate(net, data)["loss"]
    mean = nl.ablate(net, data, how="mean", layers=[group]).units["damage"]
    other = nl.ablate(net, data, how="resample", layers=[group], seed=4).units["damage"]
    donors = donors_of(data[0][0], 4)
    assert (donors != torch.arange(12)).all()
    assert len(donors.unique()) > 4
    for unit in range(group.n):
        with replaced(net, group, unit, lambda x, places: x[places].mean((1, 2, 3), keepdim=True)):
            assert mean["a", unit] == pytest.approx(evaluate(net, data)["loss"] - dense, abs=1e-9)
        with replaced(net, group, unit, lambda x, places: x[places][:, donors]):
            assert other["a", unit] == pytest.approx(evaluate(net, data)["loss"] - dense, abs=1e-9)
    parts = nl.ablate(net, images(12, 5), how="mean", layers=[group]).units["damage"]
    np.testing.assert_allclose(parts, mean, atol=1e-9)


def donors_of(x, seed):
    """The slow and obvious way: every sample's donor, by hashes of contents."""
    hashes = content_hashes(x).tolist()
    pool = sorted(hashes, key=lambda own: int(mix(torch.tensor([own]), seed)))[:64]
    found = []
    for own in hashes:
        k = int(mix(torch.tensor([own]), seed, 1)) % len(pool)
        found.append(hashes.index(pool[k] if pool[k] != own else pool[(k + 1) % len(pool)]))
    return torch.tensor(found)


def test_donors_do_not_depend_on_batches_and_their_order():
    net, net_of_texts = branches(), llama()
    wanted = nl.ablate(net, images(13, 13), how="resample", seed=2).units
    for data in (images(13, 1), images(13, 5), images(13, 4)[::-1]):
        found = nl.ablate(net, data, how="resample", seed=2)
        pd.testing.assert_frame_equal(found.units, wanted, rtol=0, atol=1e-9)
        assert found.metadata["whole_model"] == []
    assert not np.allclose(nl.ablate(net, images(13, 13), how="resample", seed=3).units["damage"], wanted["damage"])
    wanted = nl.ablate(net_of_texts, texts([9, 12, 10, 5, 7], 5), sample=4, how="resample").units
    for size in (1, 2):
        found = nl.ablate(net_of_texts, texts([9, 12, 10, 5, 7], size), sample=4, how="resample").units
        pd.testing.assert_frame_equal(found, wanted, rtol=0, atol=1e-9)


def test_texts_without_a_mask_give_values_to_texts_of_another_length():
    net, lengths = llama(), [9, 12, 10, 5, 7]
    masked = nl.ablate(net, texts(lengths, 2), sample=3, how="resample").units
    bare = [{k: v for k, v in batch.items() if k != "attention_mask"} for batch in texts(lengths, 1)]
    pd.testing.assert_frame_equal(nl.ablate(net, bare, sample=3, how="resample").units, masked, rtol=0, atol=1e-9)


def test_there_are_at_most_as_many_donors_as_are_kept(monkeypatch):
    net, data = branches(), images(13, 4)
    batches = [objective_batch(x, y) for x, y in data]
    monkeypatch.setattr(donor_pool, "_MOST", 3)
    driver = Driver(net, Objective.of(net, None, "classification", None))
    donors = donor_pool.Donors.of(driver, data, {}, 7)
    every = torch.cat([batch.hashes for batch in batches])
    wanted = every[mix(every, 7).argsort()[:3]].tolist()
    assert [int(sample.hashes) for sample in donors.samples] == wanted
    donors.begin(batches[0])
    own = [int(donors.samples[k].hashes) for k in donors.chosen]
    assert not set(zip(own, batches[0].hashes.tolist(), strict=True)) & {(h, h) for h in wanted}


def objective_batch(x, y):
    return Batch.of((x, y), task="classification")


class Twice(nn.Module):
    """One linear layer that is called twice, and chooses rows that belong to no sample where it is asked to."""

    def __init__(self, rows=None):
        super().__init__()
        self.rows, self.fc, self.head = rows, nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        if self.rows is not None:
            self.fc(x[: self.rows])
        return self.head(self.fc(self.fc(x).relu()).relu())


def test_each_call_of_a_layer_gets_the_donor_s_values_of_that_call():
    net = seeded(Twice)
    x = torch.randn(10, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    y = torch.arange(10) % 3
    donors = donors_of(x, 0)
    dense = evaluate(net, [(x, y)])["loss"]
    found = nl.ablate(net, [(x[:6], y[:6]), (x[6:], y[6:])], layers="fc", how="resample").units["damage"]
    calls = [net.fc(x), net.fc(net.fc(x).relu())]  # of the clean pass, whose values donors give
    for unit in range(6):
        with torch.no_grad():
            first = net.fc(x)
            first[:, unit] = calls[0][donors, unit]
            second = net.fc(first.relu())
            second[:, unit] = calls[1][donors, unit]
            loss = nn.functional.cross_entropy(net.head(second.relu()), y).item()
        assert found["fc", unit] == pytest.approx(loss - dense, abs=1e-9)


def test_rows_that_belong_to_no_sample_are_refused():
    x, y = torch.randn(4, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64), torch.arange(4) % 3
    with pytest.raises(
        ValueError, match=r"fc.output shows 3 rows for a batch of 4 samples: rows must belong to samples; use how=mean"
    ):
        nl.ablate(seeded(lambda: Twice(3)), [(x, y)], layers="fc", how="resample")


def test_maps_of_other_sizes_are_refused():
    net, data = branches(), images(4, 4)
    small = (data[0][0][:, :, 1:, 1:], data[0][1])
    with pytest.raises(
        ValueError, match=r"shows \(\d, \d, \d\) for a sample and \(\d, \d, \d\) for the one .* give samples of one size"
    ):
        nl.ablate(net, [data[0], small], how="resample")


def test_padding_has_no_part_in_means_and_donors():
    """Two texts of one length, padded or not, have the same damage under each replacement."""
    net = llama()
    ids = torch.randint(1, 32, (4, 8), generator=torch.Generator().manual_seed(5))
    bare = [{"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}]
    pad = nn.functional.pad
    padded = [{name: pad(t, (0, 3)) for name, t in bare[0].items()}]
    for how in ("mean", "resample"):
        found = [nl.ablate(net, data, sample=3, how=how).units for data in (bare, padded)]
        pd.testing.assert_frame_equal(*found, rtol=0, atol=1e-9)


def test_the_error_is_over_samples_and_a_limit_counts_predictions():
    net = llama()
    ids = torch.randint(1, 20, (12, 16), generator=torch.Generator().manual_seed(3))
    units, found = {"model.layers.1.mlp": [0, 3]}, []
    for size in (1, 5, 12):
        data = [{"input_ids": part, "labels": part} for part in ids.split(size)]
        result = nl.ablate(net, data, units, predictions=100)
        assert result.metadata["predictions"] == 105  # whole samples of 15: the seventh meets the number
        assert result.metadata["samples"] == 7
        found.append(result.units)
    for table in found[1:]:
        pd.testing.assert_frame_equal(table, found[0], rtol=1e-6, atol=1e-9)
    groups = list(nl.find_groups(net))
    singles = [[{"input_ids": row[None], "labels": row[None]}] for row in ids[:7]]
    d = np.array([by_masks(net, single, groups, [("model.layers.1.mlp", 0)])[0] for single in singles])
    assert found[0]["damage_se"].iloc[0] == pytest.approx(d.std(ddof=1) / math.sqrt(7), rel=1e-6)


def test_the_error_of_texts_of_unequal_length_is_that_of_a_ratio():
    """Cochran 1977, Sampling Techniques, eq. 6.13: sums of changes over sums of predictions."""
    net, lengths = llama(), [9, 12, 10, 8, 4]
    groups = list(nl.find_groups(net))
    singles = [[batch] for batch in texts(lengths, 1)]
    t = np.array(lengths) - 1.0
    d = t * np.array([by_masks(net, single, groups, [("model.layers.1.mlp", 0)])[0] for single in singles])
    change = d.sum() / t.sum()
    error = math.sqrt(((d - change * t) ** 2).sum() * len(t) / (len(t) - 1)) / t.sum()
    for size in (1, 2, 5):
        found = nl.ablate(net, texts(lengths, size), {"model.layers.1.mlp": [0]}).units.iloc[0]
        assert found["damage"] == pytest.approx(change, rel=1e-6)
        assert found["damage_se"] == pytest.approx(error, rel=1e-6)


def test_a_unit_that_is_named_twice_counts_once():
    found = nl.ablate_sets(branches(), images(), {"twice": {"a": [1, 1]}, "once": {"a": torch.tensor([1])}})
    assert found["units"].tolist() == [1, 1]
    assert found["damage"].iloc[0] == pytest.approx(found["damage"].iloc[1], rel=1e-9)


class Saturated(nn.Module):
    """An infinite activation gives finite outputs."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.sigmoid(self.b(torch.relu(self.a(x)))))


def test_an_infinite_activation_in_a_later_batch():
    net = seeded(Saturated)
    with torch.no_grad():
        net.a.weight.abs_(), net.b.weight.abs_()
    x, y = images()[0][0].flatten(1)[:4, :3].abs(), torch.tensor([0, 1, 2, 0])
    data = [(x, y), (x.index_fill(0, torch.tensor([0]), torch.inf), y)]
    fast, whole = (nl.ablate(net, data, {"a": [0, 1, 2]}, replay=replay) for replay in (True, False))
    assert np.isfinite(whole.units["damage"]).all()
    np.testing.assert_allclose(fast.units["damage"], whole.units["damage"], rtol=0, atol=1e-12)


def test_sets_interact():
    net, data = branches(), images()
    found = nl.ablate_sets(net, data, {"both": {"a": [0, 1]}, "across": {"a": [0], "b": [1, 2]}, "none": {}})
    assert found["units"].tolist() == [2, 3, 0]
    groups = nl.find_groups(net, data[0])
    dense = evaluate(net, data)["loss"]
    for name, units in {"both": {"a": [0, 1]}, "across": {"a": [0], "b": [1, 2]}}.items():
        with masked(net, groups, units):
            assert found.loc[name, "damage"] == pytest.approx(evaluate(net, data)["loss"] - dense, abs=1e-9)
    assert found.loc["none", "damage"] == 0


class Around(LlamaForCausalLM):
    """What the first block's FFN puts out goes to the head on a way of its own."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits + self.lm_head(self.model.layers[0].mlp.kept)
        return out


def keeps(mlp, args, output):
    mlp.kept = output


def test_a_model_that_goes_around_its_modules():
    net = seeded(lambda: Around(LlamaConfig(**SIZE)))
    net.model.layers[0].mlp.register_forward_hook(keeps)
    data = texts([9, 9, 9], 1)
    groups = list(nl.find_groups(net))
    found = nl.ablate(net, data, sample=2)
    np.testing.assert_allclose(found.units["damage"], by_masks(net, data, groups, found.units.index), rtol=0, atol=1e-9)


class Counts(nn.Module):
    """A block that behaves otherwise at every second call, as no replay can know."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.calls = nn.Linear(3, 4), nn.Linear(4, 3), 0

    def forward(self, x):
        self.calls += 1
        return self.last(torch.relu(self.first(x)) * (1 + self.calls % 2))


def test_a_model_that_does_not_repeat_itself_runs_whole():
    net = seeded(Counts)
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = nl.ablate(net, [(x, torch.tensor([0, 1, 2, 0, 1, 2]))], layers=["first"])
    assert found.metadata["whole_model"] == ["first"]


class Mixture(nn.Module):
    """Experts that are modules of their own: each is called with the tokens it is chosen for, in the order of choices."""

    def __init__(self):
        super().__init__()
        self.embed, self.router = nn.Embedding(9, 6), nn.Linear(6, 3, bias=False)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 6)) for _ in range(3))
        self.head = nn.Linear(6, 2)

    def forward(self, ids):
        x = self.embed(ids)
        flat = x.flatten(0, 1)
        weights, chosen = self.router(flat).softmax(-1).topk(2)
        mixed = torch.zeros_like(flat)
        for k, expert in enumerate(self.experts):
            choice, token = torch.where(k == chosen.T)
            mixed = mixed.index_add(0, token, expert(flat[token]) * weights[token, choice, None])
        return self.head((x + mixed.view_as(x)).mean(1))


def test_experts_that_see_other_numbers_of_tokens_in_each_batch():
    net = seeded(Mixture)
    ids = torch.randint(9, (20, 5), generator=torch.Generator().manual_seed(0))
    data = [(part, part.sum(1) % 2) for part in ids.split(2)]
    layers = [f"experts.{k}.{place}" for k in range(3) for place in (0, 2)] + ["router", "embed"]
    found, plain = (nl.ablate(net, data, layers=layers, replay=replay) for replay in (True, False))
    pd.testing.assert_frame_equal(found.units, plain.units, rtol=0, atol=1e-9)


@pytest.mark.parametrize("task", ["regression", "multilabel", "none"])
def test_other_losses(task):
    net = seeded(lambda: nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)))
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(9, 3, generator=generator, dtype=torch.float64), torch.rand(9, 2, generator=generator, dtype=torch.float64)
    y = y.round() if task == "multilabel" else y
    given = {"loss": lambda z, target: (z - target).abs().sum()} if task == "none" else {}
    data = [(x[:4], y[:4]), (x[4:], y[4:])]
    found = nl.ablate(net, data, task=task, **given)
    groups = nl.find_groups(net, data[0])
    wanted = by_masks(net, data, groups, found.units.index, task=task, **given)
    np.testing.assert_allclose(found.units["damage"], wanted, atol=1e-9)


def test_what_does_not_fit_is_said():
    net, data = branches(), images()
    (x, y), tokens = data[0], texts([6], 1)
    cases = [
        (lambda: nl.ablate(net, data, {"c": [0]}), "units names 'c'; the layers are"),
        (lambda: nl.ablate(net, data, {"a": [6]}), "'a' has 6 units, 0 to 5; units names unit 6"),
        (lambda: nl.ablate(net, data, {"a": [0]}, sample=2), "both units= and sample= are given"),
        (lambda: nl.ablate(net, data, sample=-1), "the sample of units is -1"),
        (lambda: nl.ablate(net, data, sample=0), "there are no units to ablate"),
        (lambda: nl.ablate(net, data, ["a"]), "units is list; it is {layer: "),
        (lambda: nl.ablate(net, data, how="median"), "how is 'median'; it is zero, mean, resample"),
        (lambda: nl.ablate(net, iter(data), how="mean"), "how=mean reads the data twice"),
        (lambda: nl.ablate(net, iter(data), how="resample"), "how=resample reads the data twice"),
        (lambda: nl.ablate(net, [(x[:1], y[:1])] * 2, how="resample"), "all samples of the data are equal: give others"),
        (lambda: nl.ablate(net, []), "the data are empty"),
        (lambda: nl.ablate(net, [x]), "the loss needs labels"),
        (lambda: nl.ablate(net, data, predictions=0), "predictions is 0; it is a number of predictions"),
        (lambda: nl.ablate(mixtral(), tokens, how="mean"), "experts that share a tensor, which can only be zeroed"),
        (lambda: nl.ablate(mixtral(), tokens, layers="blocks[0].mlp.hidden"), "ablate their pruning groups"),
        (lambda: nl.ablate_sets(net, data, {"s": {"a": [9]}}), "units names unit 9"),
        (
            lambda: nl.ablate(net, data, {"a": np.arange(6) == 5}),
            "the units of 'a' are booleans; they are ids, as np.flatnonzero(mask)",
        ),
        (lambda: nl.ablate_sets(net, data, {"s": {"a": [False, True]}}), "the units of 'a' are booleans"),
        (lambda: nl.ablate(net, data, {"a": [0.7]}), "the units of 'a' are [0.7]; they are integers from 0 on"),
        (lambda: nl.ablate(net, data, {"a": ["a"]}), "the units of 'a' are ['a']; they are integers from 0 on"),
    ]
    for call, words in cases:
        with pytest.raises(ValueError) as error:
            call()
        assert words in str(error.value)
        assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in net.modules())


class ByName(nn.Module):
    """Takes its input by name only; a layer inside reads zeros, integers, before what it weighs."""

    def __init__(self):
        super().__init__()
        self.a, self.picked, self.head = nn.Linear(6, 5), Picked(), nn.Linear(5, 3)

    def forward(self, *, x):
        return self.head(self.picked(torch.zeros(len(x), 5, dtype=torch.long), x=torch.tanh(self.a(x))))


class Picked(nn.Module):
    def forward(self, shift, x):
        return 2 * x + shift


def test_a_layer_that_reads_integers_first_is_not_taken_for_idle():
    net, generator = seeded(ByName), torch.Generator().manual_seed(2)
    x, y = torch.randn(7, 6, generator=generator, dtype=torch.float64), torch.randint(0, 3, (7,), generator=generator)
    found = nl.ablate(net, [{"x": x, "labels": y}], {"picked.input": [1, 4]}, layers=["picked.input"])
    with torch.no_grad():
        read = torch.tanh(net.a(x))
        losses = [nn.functional.cross_entropy(net.head(2 * read), y)]
        for unit in (1, 4):
            losses.append(nn.functional.cross_entropy(net.head(2 * read.index_fill(1, torch.tensor([unit]), 0)), y))
    np.testing.assert_allclose(found.units["damage"], torch.stack(losses[1:]) - losses[0], rtol=0, atol=1e-12)


def test_a_block_that_reads_keys_of_another_one_runs_whole():
    """Gemma 3n: a block takes keys from a dictionary that an earlier block fills, and a replay leaves empty."""
    sizes = SIZE | {"head_dim": 4, "num_hidden_layers": 3, "vocab_size_per_layer_input": 32, "hidden_size_per_layer_input": 8}
    sizes |= {"laurel_rank": 4, "num_kv_shared_layers": 1, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 3}
    config = Gemma3nTextConfig(**sizes, layer_types=["sliding_attention", "full_attention", "full_attention"])
    net, data = seeded(lambda: AutoModelForCausalLM.from_config(config)), texts([9, 7], 2)
    units = {"model.layers.1.mlp": [0, 3]}
    found = nl.ablate(net, data, units, layers=list(nl.find_groups(net, data[0])), task="causal_lm")
    whole = nl.ablate(net, data, units, layers=list(nl.find_groups(net, data[0])), task="causal_lm", replay=False)
    pd.testing.assert_frame_equal(found.units, whole.units, rtol=0, atol=1e-9)


class LastState(nn.Module):
    """Reads what an LSTM returns besides its output."""

    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[1][0][-1])


def test_a_unit_of_a_recurrent_layer_is_removed_from_its_last_state():
    net, generator = seeded(LastState), torch.Generator().manual_seed(2)
    x, y = torch.randn(6, 7, 4, generator=generator, dtype=torch.float64), torch.randint(0, 3, (6,), generator=generator)
    found = nl.ablate(net, [(x, y)], {"rnn": [0, 3]}, layers=["rnn"])
    with torch.no_grad():
        h = net.rnn(x)[1][0][-1]
        states = [h, *(h.index_fill(1, torch.tensor([unit]), 0) for unit in (0, 3))]
        losses = torch.stack([nn.functional.cross_entropy(net.head(state), y) for state in states])
    np.testing.assert_allclose(found.units["damage"], losses[1:] - losses[0], rtol=0, atol=1e-12)


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x):
        return self.b(self.norm(self.a(x)))


def test_groups_under_a_norm_are_named_where_there_are_no_others():
    net, x = seeded(Normed), torch.randn(5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    data = [(x, torch.arange(5) % 3)]
    words = r"a norm reduces over the units of each pruning group, such as a: layers=nl.find_groups\(model, batch\) zeroes them all"
    with pytest.raises(ValueError, match=words):
        nl.ablate(net, data)
    assert len(nl.ablate(net, data, layers=list(nl.find_groups(net, x))).units) == 6
    with pytest.raises(ValueError, match=r"the model has no pruning groups \(.*\): name layers, as layers='<name of a module>'"):
        nl.ablate(seeded(LastState), [(torch.randn(2, 3, 4, dtype=torch.float64), torch.tensor([0, 1]))])


class Idle(nn.Module):
    """A module that is never called, and one that returns a number."""

    def __init__(self):
        super().__init__()
        self.used, self.never, self.total = nn.Linear(3, 2), nn.Linear(3, 2), Total()

    def forward(self, x):
        return self.used(x) + self.total(x)


class Total(nn.Module):
    def forward(self, x):
        return x.sum()


def test_layers_without_units_are_named():
    data = [(torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64), torch.tensor([0, 1, 0, 1]))]
    net = seeded(Idle)
    with pytest.raises(ValueError, match="layer 'never' was not called"):
        nl.ablate(net, data, layers=["never"])
    with pytest.raises(ValueError, match=r"layer 'total' shows a tensor of shape \(\)"):
        nl.ablate(net, data, layers=["total"])


def test_training_mode_and_gradients_stay():
    net, data = branches(), images()
    net.train()
    net.a.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    nl.ablate(net, data, sample=1)
    assert net.training
    assert not net.a.weight.requires_grad
    assert net.b.weight.requires_grad
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize("cache", [1, 1 << 14, 1 << 22])
def test_the_size_of_a_pass_does_not_matter(cache, monkeypatch):
    net, data = branches(), images()
    wanted = nl.ablate(net, data).units
    monkeypatch.setattr(damage, "_CACHE", cache)
    pd.testing.assert_frame_equal(nl.ablate(net, data).units, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("make", [llama, gpt2, branches], ids=lambda f: f.__name__)
def test_single_precision_gives_the_numbers_of_the_loop_to_1e_6(make):
    """Heads, FFN units, convolution channels and the inputs of a linear layer."""
    net = make().float()
    data = [(x.float(), y) for x, y in images()] if make is branches else texts([9, 12, 10, 5, 7], 2)
    found = nl.ablate(net, data)
    wanted = by_masks(net, data, nl.find_groups(net, data[0]), found.units.index)
    assert np.abs(wanted).max() > 1e-3
    np.testing.assert_allclose(found.units["damage"], wanted, rtol=0, atol=1e-6)


class Flat(nn.Module):
    """Maps are joined to one dimension by a view, which maps with channels last do not allow."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(2, 5, 3), nn.Conv2d(5, 4, 3), nn.Linear(36, 3)

    def forward(self, x):
        return self.head(nn.functional.relu(self.b(nn.functional.relu(self.a(x)))).view(len(x), -1))


def _laid_last(net, data, layer):
    """The damage, and whether the convolution b read maps with channels last in the last replayed pass."""
    seen = []
    hook = net.b.register_forward_pre_hook(lambda module, args: seen.append(not args[0].is_contiguous()))
    found = nl.ablate(net, data, layers=[layer])
    hook.remove()
    assert found.metadata["whole_model"] == []
    return found.units["damage"], seen[-1]


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")
@pytest.mark.parametrize("form", ["single", "double", "view"])
def test_replayed_maps_lie_channels_last_where_that_is_faster(form):
    """In single precision, and not where the model takes another layout for granted."""
    net = seeded(Flat) if form == "view" else branches()
    net, data = (net, images()) if form == "double" else (net.float(), [(x.float(), y) for x, y in images()])
    (group, *_) = nl.find_groups(net, data[0])
    damage, last = _laid_last(net, data, group)
    assert last == (form == "single")
    np.testing.assert_allclose(damage, by_masks(net, data, [group], damage.index), rtol=0, atol=1e-6)


class Sizes(Flat):
    """The same for images of any size, of which the smallest give maps of one position."""

    def forward(self, x):
        y = nn.functional.relu(self.b(nn.functional.relu(self.a(x))))
        return self.head(y.view(len(x), -1).norm(dim=1, keepdim=True).expand(-1, 36))


def test_a_view_that_only_the_first_batch_allows():
    net, generator = seeded(Sizes).float(), torch.Generator().manual_seed(1)
    data = [(torch.randn(4, 2, size, size, generator=generator), torch.arange(4) % 3) for size in (5, 7, 5)]
    found, plain = nl.ablate(net, data), nl.ablate(net, data, replay=False)
    assert found.metadata["whole_model"] == []
    np.testing.assert_allclose(found.units["damage"], plain.units["damage"], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("threads", "samples"), [(1, 4), (2, 8), (3, 12), (10_000, 1024)])
def test_each_thread_has_a_cache_of_its_own(threads, samples, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    passes = damage._Passes(nn.Linear(1, 1), None, [], None, True)
    call = RecordedCall(nn.Linear(1, 1), None, 0, output=torch.zeros(1, 1 << 16))  # 256 KB
    assert passes._fitting([call]) == samples


def test_a_trained_network_gives_the_numbers_of_the_loop():
    net, x = resnet20(), cifar_images(12)
    with np.load(folder("NODELENS_DATA") / "images/cifar10_test_first500.npz") as file:
        y = torch.from_numpy(file["y"][:12]).long()
    groups = nl.find_groups(net, x[:2])
    found = nl.ablate(net, [(x, y)], sample=3)
    assert len(found.units) == 27
    wanted = by_masks(net, [(x, y)], groups, found.units.index)
    np.testing.assert_allclose(found.units["damage"], wanted, rtol=0, atol=1e-6)
    assert found.metadata["whole_model"] == []


def _share(rank, home, how, shares):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{home}/meet", rank=rank, world_size=len(shares))
    start = sum(shares[:rank])
    own = texts([9, 14, 11, 12, 7], 1)[start : start + shares[rank]]
    found = nl.ablate(llama(), own, how=how, sample=5)
    sets = nl.ablate_sets(llama(), iter(own) if how == "zero" else own, {"two": {"model.layers.0.mlp": [1, 3]}}, how=how)
    if rank == 0:
        found.save(f"{home}/found")
        sets.to_csv(f"{home}/sets.csv")
    dist.destroy_process_group()


FAST = [("zero", [2, 3]), ("mean", [0, 4, 1]), ("resample", [0, 4, 1])]
SHARES = [(how, shares) for how in ("zero", "mean", "resample") for shares in ([2, 3], [0, 4, 1])]


@pytest.mark.parametrize(
    ("how", "shares"), [pytest.param(*case, marks=() if case in FAST else pytest.mark.slow) for case in SHARES], ids=label
)
def test_processes_equal_one_also_where_one_has_no_data(tmp_path, how, shares):
    method = "spawn" if torch.cuda.is_initialized() else "fork"
    mp.start_processes(_share, (str(tmp_path), how, shares), len(shares), start_method=method)
    every = texts([9, 14, 11, 12, 7], 5)
    alone, found = nl.ablate(llama(), every, how=how, sample=5), nl.load(tmp_path / "found")
    pd.testing.assert_frame_equal(found.units, alone.units, rtol=1e-9, atol=1e-12)
    for name in ("loss", "predictions", "samples"):
        assert found.metadata[name] == pytest.approx(alone.metadata[name], rel=1e-12)
    sets = nl.ablate_sets(llama(), every, {"two": {"model.layers.0.mlp": [1, 3]}}, how=how)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "sets.csv", index_col="set"), sets, rtol=1e-9, atol=1e-12)


def _odd_share(rank, home):
    """The second process, which has no data, gets the same list of layers for which the whole model runs."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{home}/meet", rank=rank, world_size=2)
    found = nl.ablate(llama(), [] if rank else texts([9, 7], 1), sample=1, replay=False)
    assert len(found.metadata["whole_model"]) == 4
    with pytest.raises(ValueError, match="the data are empty"):
        nl.ablate(llama(), [])
    dist.destroy_process_group()


def test_a_process_without_data_knows_what_the_others_found(tmp_path):
    mp.start_processes(_odd_share, (str(tmp_path),), 2, start_method="spawn" if torch.cuda.is_initialized() else "fork")


def test_numbers_of_predictions_and_sets_are_checked():
    with pytest.raises(ValueError, match=r"predictions is 0; it is a number of predictions, 1 or more, or None for all data"):
        nl.ablate(llama(), texts([9, 7], 2), sample=1, predictions=0)
    with pytest.raises(ValueError, match=r"sets is list; it is \{name: units\}, such as"):
        nl.ablate_sets(llama(), texts([9, 7], 2), [1])
