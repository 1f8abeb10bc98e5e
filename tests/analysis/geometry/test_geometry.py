"""The geometry of a residual stream against slow twins: numpy on all hidden states at once."""

import json
import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers
from families import build as build_family
from ids import label
from real import folder
from torch import nn

import nodelens as nl
from nodelens.analysis.geometry.bundle import load_bundle
from nodelens.analysis.geometry.columns import ABLATED, FAMILIES, VARIANTS
from nodelens.analysis.geometry.router import router_load
from nodelens.analysis.geometry.tokens import TokenBatch
from nodelens.metrics import Metric, Need, get_metric
from nodelens.statistics import Gram
from nodelens.statistics.sample_hash import mix

WIDTH, VOCABULARY = 24, 50
SIZES = (9, 4, 12, 7, 12, 5, 11, 8, 12, 3, 10, 12)  # tokens of the texts: 105
SHARED = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ROTARY = SHARED | {
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
CONFIGS = {
    "Llama": ROTARY,
    "GPT2": SHARED | {"n_embd": WIDTH, "n_layer": 3, "n_head": 4, "n_positions": 32},
    "Mixtral": ROTARY | {"num_local_experts": 4, "num_experts_per_tok": 2},
}
WORDS = ["model_key", "model_label", "hook_point", "transition", "variant", "module"]


def build(family):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = getattr(transformers, f"{family}Config")(**CONFIGS[family])
        net = transformers.AutoModelForCausalLM.from_config(config).eval()
        for parameter in net.parameters():
            nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.3)
    return net


@pytest.fixture(scope="module", params=CONFIGS)
def net(request):
    return build(request.param)


@pytest.fixture(scope="module")
def llama():
    return build("Llama")


@pytest.fixture(scope="module")
def mixtral():
    return build("Mixtral")


def texts(sizes=SIZES):
    g = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCABULARY, (n,), generator=g) for n in sizes]


def batches(size=1, side="none", every=None, pad=0):
    """Texts side by side; side none: those of unlike length apart."""
    every, found = texts() if every is None else every, []
    for k in range(0, len(every), size):
        part = every[k : k + size]
        if side == "none":
            found += [{"input_ids": text[None]} for text in part]
            continue
        width = max(map(len, part)) + 1
        ids, mask = torch.full((len(part), width), pad), torch.zeros(len(part), width, dtype=torch.long)
        for row, text in enumerate(part):
            at = slice(width - len(text), width) if side == "left" else slice(len(text))
            ids[row, at], mask[row, at] = text, 1
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


def hidden(net, limit=None):
    """(layers + 1) arrays (tokens, width) of the texts' first tokens, and how many of the last are after the norm: one."""
    rows, left = [], math.inf if limit is None else limit
    for text in texts():
        with torch.no_grad():
            states = net(text[None], output_hidden_states=True).hidden_states
        rows.append(np.stack([s[0, : int(min(left, len(text)))].double().numpy() for s in states]))
        left -= rows[-1].shape[1]
        if left <= 0:
            break
    return list(np.concatenate(rows, 1))


def spectrum(x):
    """Columns of the spectrum."""
    lam = np.linalg.eigvalsh(np.cov(x.T))[::-1]
    lam, d = np.where(lam > 1e-12 * lam[0], lam, 0), x.shape[1]
    p = lam / lam.sum()
    q = p[p > 0]
    held = p.cumsum()
    place = np.arange(10, min(200, d))
    y = np.log(lam[place])
    rank = place[place < 50] + 1
    r = np.cov(np.log(rank), y[: len(rank)], aweights=1 / rank)
    return {
        "d_pr": 1 / (p**2).sum(),
        "d_pr_norm": 1 / (p**2).sum() / d,
        "d_entropy": np.exp(-(q * np.log(q)).sum()),
        "d_entropy_norm": np.exp(-(q * np.log(q)).sum()) / d,
        "stable_rank": 1 / p[0],
        **{f"top{k}_share": p[:k].sum() for k in (1, 10, 32)},
        **{f"k{k}": int((held < k / 100 - 1e-12).sum()) + 1 for k in (90, 95)},
        "log_spectrum_slope_10_200": np.polyfit(place, y, 1)[0],
        "alpha_req": -r[0, 1] / r[0, 0],
        "alpha_req_r2": r[0, 1] ** 2 / r[0, 0] / r[1, 1],
        "rankme": rankme(x),
        "d_pr_debiased": debiased(x),
    }


def rankme(x):
    s = np.linalg.svd(x, compute_uv=False)
    p = s / s.sum() + 1e-7
    return np.exp(-(p * np.log(p)).sum())


def hsic(x, y):
    """The U-statistic from n x n products (Song et al. 2012, eq. 5)."""
    n = len(x)
    k, m = ((z - z.mean(0)) @ (z - z.mean(0)).T for z in (x, y))
    for square in (k, m):
        np.fill_diagonal(square, 0)
    return ((k * m).sum() + k.sum() * m.sum() / (n - 1) / (n - 2) - 2 / (n - 2) * (k @ m).sum()) / n / (n - 3)


def debiased(x):
    n, e = len(x), ((x - x.mean(0)) ** 2).sum(1)
    return ((e.sum() / (n - 1)) ** 2 - (n / (n - 1)) ** 2 * e.var(ddof=1) / n) / hsic(x, x)


def sample(x):
    """Columns of the sample family."""
    s = np.linalg.svd(x - x.mean(0), compute_uv=False)
    s = s[s > 5e-4 * s[0]]
    p, v = s / s.sum(), s**2 / (s**2).sum()
    u = x / np.linalg.norm(x, axis=1, keepdims=True)
    cosines = (u @ u.T)[~np.eye(len(x), dtype=bool)]
    return {
        "sv_effective_rank": np.exp(-(p * np.log(p)).sum()),
        "sv_stable_rank": 1 / v[0],
        "sv_participation_ratio": 1 / (v**2).sum(),
        "cos_sim_mean": cosines.mean(),
        "cos_sim_std": cosines.std(ddof=1),
        **{f"ve_{k}": v[:k].sum() for k in (4, 8, 16, 32)},
    }


def novelty(x, y, k):
    u, v = (np.linalg.eigh(np.cov(z.T))[1][:, ::-1][:, :k] for z in (x, y))
    cosines = np.linalg.svd(u.T @ v, compute_uv=False).clip(0, 1)
    a, b = x - x.mean(0), y - y.mean(0)
    size = [np.linalg.norm(z.T @ z) for z in (a, b)]
    return {
        "feature_subspace_novelty": np.sqrt(1 - cosines**2).mean(),
        "linear_cka": np.linalg.norm(a.T @ b) ** 2 / size[0] / size[1],
        "linear_cka_debiased": hsic(x, y) / np.sqrt(hsic(x, x) * hsic(y, y)),
        "layer_cosine_sim": ((x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)).mean(),
    }


def scaled(x, variant):
    if variant == "token_l2":
        return x / np.linalg.norm(x, axis=1, keepdims=True)
    if variant == "token_rms":
        return x / np.sqrt((x**2).mean(1, keepdims=True))
    return x / x.std(0) if variant == "feature_standardized" else x


def near(row, wanted, rtol=1e-5):
    for column, value in wanted.items():
        np.testing.assert_allclose(row[column], value, rtol=rtol, atol=1e-6, err_msg=column)


def same(a, b, rtol=1e-5):
    """The same tables, but for rounding."""
    for name in ("metrics", "novelty", "router", "experts"):
        one, other = getattr(a, name), getattr(b, name)
        assert list(one.columns) == list(other.columns)
        for column in one if len(one) else ():
            if column in WORDS:
                assert one[column].tolist() == other[column].tolist()
            else:
                np.testing.assert_allclose(one[column], other[column], rtol=rtol, atol=1e-6, err_msg=column)


def test_every_column_is_that_of_the_hidden_states(net):
    found = nl.analyze_model(net, batches(4, "right"), sample_limit=200, novelty_k=6, diagnostics="normalization_ablation")
    states = hidden(net)
    assert list(found.metrics["layer"]) == [0, 1, 2]
    assert list(found.novelty["transition"]) == ["0->1", "1->2"]
    named = ["model_key", "model_label", "layer", "num_layers", "layer_norm_depth", "tokens_observed", "hidden_dim"]
    assert list(found.metrics) == [*named, *FAMILIES["spectrum"], *FAMILIES["sample"]]
    for k in range(3):
        row = found.metrics.iloc[k]
        near(row, {"layer_norm_depth": k / 2, "tokens_observed": 105, "hidden_dim": WIDTH, "num_layers": 3})
        near(row, spectrum(states[k]) | sample(states[k]))
        near({"": found.eigenvalues[f"layer_{k:02d}"]}, {"": np.linalg.eigvalsh(np.cov(states[k].T))[::-1]})
    for k in range(2):
        near(found.novelty.iloc[k], novelty(states[k], states[k + 1], 6) | {"novelty_k": 6})
    table = found.diagnostics["normalization_ablation"]
    assert list(table["variant"]) == list(VARIANTS) * 3
    for _, row in table.iterrows():
        wanted = spectrum(scaled(states[row["layer"]], row["variant"]))
        near(row, {column: wanted[column] for column in ABLATED} | {"tokens": 105, "hidden_dim": WIDTH})


def test_residual_outputs_are_the_next_inputs(net):
    both = nl.analyze_model(net, batches(), hook_point=["residual_input", "residual_output"], novelty_k=6)
    points = {name: part.reset_index(drop=True) for name, part in both.metrics.groupby("hook_point")}
    numbers = [*FAMILIES["spectrum"], *FAMILIES["sample"]]
    np.testing.assert_array_equal(points["residual_input"][numbers][1:], points["residual_output"][numbers][:-1])
    alone = nl.analyze_model(net, batches(), hook_point="residual_output", novelty_k=6)
    np.testing.assert_allclose(points["residual_output"][numbers], alone.metrics[numbers], rtol=1e-6)
    near(alone.metrics.iloc[0], spectrum(hidden(net)[1]))
    assert set(both.eigenvalues) == {f"{name}.layer_{k:02d}" for name in points for k in range(3)}


@pytest.mark.parametrize("limit", [None, *(pytest.param(limit, marks=pytest.mark.slow) for limit in (40, 64, 105, 500))], ids=label)
def test_padding_batches_and_their_order_change_nothing(net, limit):
    _check_padding_and_batches(net, limit)


def test_padding_and_batches_change_no_sample_below_the_limit(mixtral):
    _check_padding_and_batches(mixtral, 40)


def _check_padding_and_batches(net, limit):
    options = {"max_tokens": limit, "sample_limit": 30, "novelty_k": 6}
    alone = nl.analyze_model(net, batches(), **options)
    assert alone.metadata["tokens_observed"] == alone.metrics["tokens_observed"][0] == min(limit or 105, 105)
    for size, side, pad in ((3, "right", 0), (5, "left", 2), (12, "left", 0), (7, "right", 2)):
        same(nl.analyze_model(net, batches(size, side, pad=pad), **options), alone)
    near(alone.metrics.iloc[1], spectrum(hidden(net, limit)[1]))
    if limit is None:
        same(nl.analyze_model(net, batches(4, "right", texts()[::-1]), **options), alone)


@pytest.mark.parametrize("limit", [1, 9, 10, 13, 104])
def test_a_stop_is_exact_and_asks_for_no_batch_too_many(llama, limit):
    asked = []

    def loader():
        for batch in batches(2, "right"):
            asked.append(int(batch["attention_mask"].sum()))
            yield batch

    found = nl.analyze_model(llama, loader(), max_tokens=limit, metrics="spectrum")
    assert found.metadata["tokens_observed"] == limit
    assert sum(asked[:-1]) < limit <= sum(asked)
    if limit > 1:
        c = np.cov(hidden(llama, limit)[2].T)
        near(found.metrics.iloc[2], {"d_pr": c.trace() ** 2 / (c**2).sum()})
    else:
        assert math.isnan(found.metrics["d_pr"][0])


def test_the_sample_is_of_the_smallest_keys(llama):
    found = nl.analyze_model(llama, batches(4, "left"), sample_limit=17)
    keys = [TokenBatch.of(batch, {}).keys[0] for batch in batches()]
    order = torch.cat(keys).argsort()[:17].numpy()
    for k, rows in enumerate(hidden(llama)[:3]):
        near(found.metrics.iloc[k], sample(rows[order]))
        near(found.metrics.iloc[k], spectrum(rows))
    assert not np.allclose(found.metrics["cos_sim_mean"], nl.analyze_model(llama, batches()).metrics["cos_sim_mean"])


def test_without_a_limit_every_row_is_read(net):
    everything = nl.analyze_model(net, batches(4, "right"), sample_limit=None)
    same(everything, nl.analyze_model(net, batches(4, "right"), sample_limit=105))
    assert not any(column["sampled"] for column in everything.metadata["metrics"].values())


def test_equal_texts_count_once_in_a_sample_unless_they_are_numbered(llama):
    text = texts()[2][None].repeat(40, 1)
    short = nl.analyze_model(llama, [{"input_ids": text}], sample_limit=12, metrics="sample")
    once = nl.analyze_model(llama, [{"input_ids": text[:1]}], sample_limit=12, metrics="sample")
    same(short, once.__class__(once.metrics.assign(tokens_observed=480), once.novelty))
    data = [{"input_ids": part, "ids": torch.arange(20) + start} for part, start in ((text[:20], 0), (text[20:], 20))]
    numbered = nl.analyze_model(llama, data, sample_limit=400, metrics="sample")
    near(numbered.metrics.iloc[0], {"ve_32": 1.0})
    assert TokenBatch.of(data[1], {}).keys[0, 3] == mix(mix(torch.tensor(20)), torch.tensor(3))


@pytest.mark.parametrize("layers", ["1:", [2, 1], "n-2, -1", [-1, 1]], ids=label)
def test_layers_are_chosen_by_index_or_expression(llama, layers):
    found = nl.analyze_model(llama, batches(), layers=layers)
    assert list(found.metrics["layer"]) == [1, 2]
    assert list(found.metrics["layer_norm_depth"]) == [0.5, 1]
    assert list(found.novelty["transition"]) == ["1->2"]
    assert list(found.eigenvalues) == ["layer_01", "layer_02"]


def test_modules_are_named_by_path_glob_or_role(llama):
    states, seen = hidden(llama), []
    names = ["module_output:model.layers.1.mlp", "module_input:*.mlp", "module_output:blocks[1:].attention", "module_input:lm_head"]
    with torch.no_grad():
        handle = llama.model.layers[1].mlp.register_forward_hook(lambda m, a, y: seen.append((a[0][0], y[0])))
        for text in texts():
            llama(text[None])
        handle.remove()
    x, y = (torch.cat(part).double().numpy() for part in zip(*seen, strict=True))
    found = nl.analyze_model(llama, batches(3, "right"), hook_point=names)
    by_name = dict(iter(found.metrics.groupby("hook_point")))
    assert {name: list(part["layer"]) for name, part in by_name.items()} == dict(
        zip(names, ([0], [0, 1, 2], [0, 1], [0]), strict=True)
    )
    near(by_name[names[0]].iloc[0], spectrum(y))
    near(by_name[names[1]].iloc[1], spectrum(x))
    near(by_name[names[3]].iloc[0], spectrum(states[3]))
    assert list(found.novelty["transition"]) == ["0->1", "1->2", "0->1"]


@dataclass(frozen=True)
class Trace(Metric):
    """The variance of all units."""

    names: ClassVar = ("trace",)
    kind: ClassVar = "layer"

    def needs(self):
        return {"y": Need(Gram, "output")}

    def __call__(self, weight, y):
        return y.covariance.trace()


class Slope(Trace):
    names: ClassVar = ("slope",)

    def needs(self):
        return {"y": Need(Gram, "grad")}


def test_metrics_are_families_names_and_objects(llama):
    found = nl.analyze_model(
        llama, batches(), metrics=["novelty", "d_pr", "cos_sim_mean", "subspace_overlap", Trace()], novelty_k=5
    )
    assert list(found.metrics)[7:] == ["d_pr", "cos_sim_mean", "trace"]
    assert list(found.novelty)[5:] == [*FAMILIES["novelty"], "subspace_overlap"]
    states = hidden(llama)
    near(found.metrics.iloc[1], {"trace": np.cov(states[1].T).trace()})
    near(found.metrics.iloc[1], {"trace": found.eigenvalues["layer_01"].sum()})
    assert found.metadata["metrics"]["subspace_overlap"]["options"]["novelty_k"] == 5
    invariant = nl.analyze_model(llama, batches(), metrics={"flat": get_metric("d_pr", rows="token_l2")})
    near(invariant.metrics.iloc[1], {"flat": spectrum(scaled(states[1], "token_l2"))["d_pr"], "tokens_observed": 105})
    assert invariant.eigenvalues == {}
    own = nl.analyze_model(llama, batches(), metrics={"flat": get_metric("d_pr", rows="token_l2"), "all": Trace()})
    assert list(own.metrics)[7:] == ["flat", "all"]
    near(own.metrics.iloc[1], {"flat": spectrum(scaled(states[1], "token_l2"))["d_pr"]})
    assert not len(own.router)
    every = nl.analyze_model(llama, batches(), metrics=None)
    same(every, nl.analyze_model(llama, batches()))


def test_pairs_of_layers_may_have_any_metric_of_two(llama):
    found = nl.analyze_model(llama, batches(3, "left"), metrics=["procrustes", "cca_mean"], hook_point="residual_output")
    x, y = (torch.tensor(z) for z in hidden(llama)[1:3])
    for name in ("procrustes", "cca_mean"):
        near(found.novelty.iloc[0], {name: float(get_metric(name).compute(outputs=x, next_outputs=y))})
    assert not found.metrics.columns.intersection(["procrustes", "cca_mean"]).size


def test_axes_without_variance_are_not_compared(llama):
    found = nl.analyze_model(llama, [torch.arange(3, 8)[None]], novelty_k=32)
    assert list(found.novelty["novelty_k"]) == [4, 4]
    assert found.novelty["feature_subspace_novelty"].between(0, 1).all()
    assert math.isnan(found.metrics["log_spectrum_slope_10_200"][1])


def test_a_mask_may_have_holes_and_a_stop_may_fall_into_one():
    mask = torch.tensor([[0, 1, 0, 1, 1], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]])
    tokens = torch.arange(15).reshape(3, 5)
    batch = TokenBatch.of({"input_ids": tokens, "attention_mask": mask, "ids": torch.arange(3)}, {})
    assert len(batch) == 6
    assert batch.inputs["input_ids"][0].tolist() == [1, 2, 3, 4, 0]
    assert batch.mask.long().tolist() == [[1, 0, 1, 1, 0], [1, 1, 1, 0, 0], [0] * 5]
    cuts = {count: [tuple(part.mask.shape) for part in batch.first(count)] for count in range(1, 7)}
    assert cuts == {1: [(1, 1)], 2: [(1, 3)], 3: [(1, 5)], 4: [(1, 5), (1, 1)], 5: [(1, 5), (1, 2)], 6: [(3, 5)]}
    assert all(sum(map(len, batch.first(count))) == count for count in cuts)
    assert torch.equal(torch.cat([part.keys[part.mask] for part in batch.first(5)]), batch.keys[batch.mask][:5])


def test_rows_that_are_not_finite_are_left_out_and_said(llama):
    broken = build("Llama")
    with torch.no_grad():
        broken.model.embed_tokens.weight[7] = math.inf
    bad = [int((text == 7).sum()) for text in texts()]
    assert sum(bad)
    with pytest.warns(UserWarning, match="7 of 105 rows .* at model.layers.1"):  # later tokens too
        found = nl.analyze_model(broken, batches(4, "right"), sample_limit=200)
    assert {"site": "model.layers.0.input.output", "rows": sum(bad), "of": 105} in found.metadata["left_out"]
    assert "warning: 7 of 105 rows" in found.summary()
    assert found.metrics["tokens_observed"][0] == 105 - sum(bad)
    rows = hidden(llama)[0]
    near(found.metrics.iloc[0], sample(rows[torch.cat(texts()).numpy() != 7]))


def test_the_model_is_left_as_it_was(llama):
    def hooks():
        return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in llama.modules()]

    before = hooks()  # transformers has some of its own
    llama.train()
    llama.model.layers[1].eval()
    nl.analyze_model(llama, batches(4, "right"))
    assert llama.training
    assert not llama.model.layers[1].training
    assert hooks() == before
    assert all(p.requires_grad and p.grad is None for p in llama.parameters())
    llama.eval()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=label)
def test_half_precision_is_read_in_single(dtype):
    net = build("Llama").to(dtype)
    found = nl.analyze_model(net, batches(4, "right"), metrics=["spectrum", "sample"])
    near(found.metrics.iloc[0], spectrum(hidden(net)[0]))
    assert found.metrics.drop(columns=["model_key", "model_label"]).notna().all(axis=None)


def test_batches_may_be_tensors_pairs_or_embeddings(llama):
    ids = torch.stack(texts((12,) * 4))
    wanted = nl.analyze_model(llama, [{"input_ids": ids}])
    same(nl.analyze_model(llama, [ids[:3], ids[3:]]), wanted)
    same(nl.analyze_model(llama, [(ids, ids)]), wanted)
    same(nl.analyze_model(llama, [{"input_ids": ids, "labels": ids}]), wanted)
    embedded = nl.analyze_model(llama, [{"inputs_embeds": llama.model.embed_tokens(ids).detach()}], metrics="spectrum")
    near(embedded.metrics.iloc[2], wanted.metrics.iloc[2][list(FAMILIES["spectrum"])])


def test_golden_router_numbers_agree():
    doc = json.loads((folder("NODELENS_GOLDEN") / "router.json").read_text())
    for case, options in doc["options"].items():
        scores = torch.tensor(doc["inputs"][f"logits_{case}"], dtype=torch.float64)
        found = router_load(scores, options["top_k"])
        for load in (
            found,
            router_load(scores.topk(2).indices, experts=6),
            router_load(scores[:9], 2) + router_load(scores[9:], 2),
        ):
            assert load.columns.keys() == doc["expected"][case].keys()
            near(load.columns, doc["expected"][case], 1e-8)
        np.testing.assert_allclose([e["probability"] for e in found.experts()], scores.softmax(1).mean(0))


def test_known_loads():
    even = router_load(torch.arange(12).reshape(6, 2) % 4, experts=4)
    near(even.columns, {"router_entropy": math.log(4), "router_entropy_norm": 1, "load_imbalance": 1, "top_expert_load": 0.25})
    narrow = router_load(torch.tensor([[0, 3]] * 5), experts=4, mask=torch.tensor([True, True, False, True, False]))
    near(narrow.columns, {"router_entropy": math.log(2), "load_imbalance": 2, "most_used_expert": 0, "routed_assignments": 6})
    none = router_load(torch.zeros(0, 2, dtype=torch.long), experts=4).columns
    assert none.pop("routed_assignments") == 0
    assert all(math.isnan(value) for value in none.values())


def test_the_router_table_is_that_of_the_models_own_scores(mixtral):
    wanted = []
    for text in texts():
        with torch.no_grad():
            wanted.append(mixtral(text[None], output_router_logits=True).router_logits)
    for k, scores in enumerate(map(torch.cat, zip(*wanted, strict=True))):
        counts = np.bincount(scores.topk(2).indices.flatten(), minlength=4)
        load = counts / counts.sum()
        found = nl.analyze_model(mixtral, batches(5, "left"), metrics="router")
        row = {"router_entropy": -(load * np.log(load)).sum(), "load_imbalance": 4 * load.max(), "most_used_expert": load.argmax()}
        near(found.router.iloc[k], row | {"top_expert_load": load.max(), "routed_assignments": 210, "layer": k})
        experts = found.experts[found.experts["layer"] == k]
        assert list(experts["assignments"]) == counts.tolist()
        chance = scores.softmax(1)
        given = torch.zeros_like(chance).scatter(1, scores.topk(2).indices, scores.topk(2).values.softmax(1))
        np.testing.assert_allclose(experts["probability"], chance.mean(0), rtol=1e-5)
        np.testing.assert_allclose(experts["weight"], given.mean(0), rtol=1e-5)
    assert list(found.router["module"]) == [f"model.layers.{k}.mlp.gate" for k in range(3)]
    assert list(found.metrics)[-1] == "hidden_dim"


@pytest.mark.parametrize("name", ["qwen2 moe", "qwen3 moe", "olmoe", "gpt oss", "deepseek v3", "llama4", "aria", "mimo"])
def test_routers_are_found_by_what_they_put_out(name):
    with torch.random.fork_rng():
        model, _ = build_family(name)
    first = {"deepseek v3": 1, "mimo": 1}.get(name, 0)
    found = nl.analyze_model(model, batches(4, "left", pad=5), metrics="router")
    assert list(found.router["layer"]) == list(range(first, 2))
    k = model.config.num_experts_per_tok
    assert list(found.router["routed_assignments"]) == [105 * k] * (2 - first)
    alone = nl.analyze_model(model, batches(), metrics="router")
    same(found, alone, 1e-4)
    assert found.experts.groupby("layer")["load"].sum().tolist() == pytest.approx([1] * (2 - first))


class Scores(nn.Module):
    """A router that puts out scores alone."""

    def __init__(self, experts=4):
        super().__init__()
        self.experts, self.row = experts, nn.Parameter(torch.randn(8, experts))

    def forward(self, x):
        return x.reshape(-1, 8) @ self.row


class OwnRouter(Scores):
    pass


class Sparse(nn.Module):
    """Tokens, a router beside them, a head that is called twice for some."""

    def __init__(self, router):
        super().__init__()
        self.embed, self.router, self.last, self.twice = nn.Embedding(VOCABULARY, 8), router, nn.Linear(8, 5), False

    def forward(self, tokens):
        x = self.embed(tokens)
        self.router(x)
        return self.last(x) + (self.last(x) if self.twice else 0)


def test_a_router_that_does_not_say_how_many_is_an_error():
    router = OwnRouter()
    router.num_experts = 4
    net, data = Sparse(router), [torch.stack(texts((12,) * 4))]
    options = {"hook_point": "module_input:last", "metrics": ["router"]}
    with pytest.raises(
        ValueError, match=r"router returns the scores of 4 experts but no expert ids.*set config.num_experts_per_tok"
    ):
        nl.analyze_model(net, data, **options)
    router.top_k = 3
    found = nl.analyze_model(net, data, **options)
    assert list(found.router["routed_assignments"]) == [3 * 48]
    assert found.experts["weight"].isna().all()


def test_a_site_shows_each_token_once():
    net = Sparse(Scores())
    net.twice = True
    with pytest.raises(ValueError, match=r"last.input shows 12 rows for 12 tokens in each of 2 calls.*Name another module"):
        nl.analyze_model(net, [torch.stack(texts((12,) * 4))], hook_point="module_input:last")


def test_a_model_without_routers_says_so_when_they_are_named(llama):
    assert not len(nl.analyze_model(llama, batches()).router)
    with pytest.raises(ValueError, match=r"no module of LlamaForCausalLM is recognised as a router.*Remove router"):
        nl.analyze_model(llama, batches(), metrics=["spectrum", "router"])
    with pytest.raises(ValueError, match="no module of Sparse is recognised as a router"):
        nl.analyze_model(Sparse(Scores()), [torch.stack(texts((12,) * 4))], hook_point="module_input:last", metrics="router")


@pytest.mark.parametrize("mode", ["json", "csv", "bundle"])
def test_what_is_saved_is_read_again(mixtral, tmp_path, mode):
    options = {"diagnostics": ["normalization_ablation"], "run_metadata": {"seed": 3}, "tokenizer_name": "bytes"}
    found = nl.analyze_model(mixtral, batches(4, "right"), save_mode=mode, save_dir=tmp_path / "run", novelty_k=4, **options)
    kind = "json" if mode == "json" else "csv"
    names = {f"{name}.{kind}" for name in ("metrics", "novelty", "router", "experts", "diagnostics/normalization_ablation")}
    files = {str(p.relative_to(tmp_path / "run")) for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert files == names | {"eigenvalues.npz", "metadata.json", "SHA256SUMS", "diagnostics/SHA256SUMS"}
    again = load_bundle(tmp_path / "run")
    for name in ("metrics", "novelty", "router", "experts"):
        pd.testing.assert_frame_equal(getattr(again, name), getattr(found, name), check_dtype=False, rtol=0, atol=0)
    table = found.diagnostics["normalization_ablation"]
    pd.testing.assert_frame_equal(again.diagnostics["normalization_ablation"], table, check_dtype=False, rtol=0, atol=0)
    assert all((again.eigenvalues[k] == v).all() for k, v in found.eigenvalues.items())
    assert again.metadata["artifact_schema_version"] == 1
    assert again.metadata["run_metadata"] == {"seed": 3}
    assert again.metadata["tokenizer"] == "bytes"
    assert again.artifact_dir == found.artifact_dir == (tmp_path / "run").resolve()
    assert pd.DataFrame(json.loads((tmp_path / "run/metrics.json").read_text()) if kind == "json" else []).shape[0] in (0, 3)


def test_a_folder_holds_one_result_at_a_time(llama, mixtral, tmp_path):
    nl.analyze_model(mixtral, batches(), save_dir=tmp_path)
    found = nl.analyze_model(llama, batches(every=texts((5,))), layers=[0], metrics=["spectrum", "novelty"])
    assert found.save(tmp_path) == tmp_path.resolve()
    again = load_bundle(tmp_path)
    assert not len(again.router)
    assert list(again.novelty) == list(found.novelty)
    assert again.metrics["log_spectrum_slope_10_200"].isna().all()
    found.save(save_mode="json")  # where it was saved before
    assert load_bundle(tmp_path).metadata["save_mode"] == "json"
    pd.testing.assert_frame_equal(load_bundle(tmp_path).metrics, found.metrics, check_dtype=False)
    (tmp_path / "metadata.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no finished geometry: metadata.json is missing"):
        load_bundle(tmp_path)


def test_a_save_that_fails_leaves_no_half(llama, tmp_path, monkeypatch):
    found = nl.analyze_model(llama, batches(), save_dir=tmp_path)
    monkeypatch.setattr(np, "savez_compressed", lambda *a, **k: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        found.save(tmp_path)
    assert not (tmp_path / "metadata.json").exists()
    assert not list(tmp_path.glob(".*"))


def test_a_folder_of_transformers_is_opened(llama, tmp_path):
    llama.save_pretrained(tmp_path / "net")
    found = nl.analyze_model(str(tmp_path / "net"), batches(4, "right"))
    assert set(found.metrics["model_label"]) == {str(tmp_path / "net")}
    key = found.metrics["model_key"][0]
    assert key == key.lower()
    assert "/" not in key
    named = nl.analyze_model("Mine: A/b", batches(4, "right"), model=llama)
    assert named.metrics["model_key"][0] == "mine__a_b"
    numbers = [*FAMILIES["spectrum"], *FAMILIES["sample"]]
    np.testing.assert_allclose(found.metrics[numbers], named.metrics[numbers])
    with pytest.raises(OSError, match="no model to load at 'nobody/nothing'") as error:
        nl.analyze_model("nobody/nothing", batches())
    assert len(str(error.value).splitlines()) == 1


MISTAKES = {
    "residual": (
        {"hook_point": "residual"},
        "hook_point is 'residual'; it must be residual_input, residual_output, module_input:<path>",
    ),
    "no path": ({"hook_point": "module_input:"}, "hook_point is 'module_input:'; it must be residual_input"),
    "no module": ({"hook_point": "module_output:model.layerz"}, "'module_output:model.layerz': no layer matches 'model.layerz'"),
    "twice": ({"hook_point": ["residual_input"] * 2}, "give one, or several different ones"),
    "layer": ({"layers": [3]}, r"layers=\[3\] for a model with 3 blocks: .*3 is out of range; valid are -3 to 2"),
    "no layer": ({"layers": []}, "it selects no layer"),
    "expression": ({"layers": "first"}, "layers='first' for a model with 3 blocks"),
    "layers of a module": ({"layers": [0], "hook_point": "module_input:lm_head"}, "selects blocks"),
    "other rows": (
        {"hook_point": "module_output:model.rotary_emb", "dataloader": batches(3, "left")},
        "its first axis is not the samples",
    ),
    "not called": ({"hook_point": "module_output:model.layers"}, "is never called by LlamaForCausalLM.forward"),
    "diagnostic": ({"diagnostics": ["ablation"]}, "no diagnostic is called 'ablation'; available: normalization_ablation"),
    "metric": (
        {"metrics": ["spectrun"]},
        "no metric is called 'spectrun'.* the families are default, spectrum, sample, novelty, router",
    ),
    "units": ({"metrics": ["activation_mean"]}, "'activation_mean' has one value per unit; .*Use nl.analyze for values per unit"),
    "pairs": ({"metrics": {"r": get_metric("redundancy", reduce="none")}}, "'r' has one value per pair"),
    "weights": ({"metrics": ["nuc_norm"]}, "needs weights, but layer 'model.layers.0.input' .* has none"),
    "gradients": ({"metrics": [Slope()]}, r"'slope' reads Gram\(grad, positions\); this analysis has no gradients"),
    "asked twice": ({"metrics": ["d_pr", Trace(), Trace()]}, "'trace' is given twice"),
    "mode": ({"save_mode": "parquet", "save_dir": "x"}, "save_mode is 'parquet'; it must be json, csv, bundle"),
    "no folder": ({"save_mode": "csv"}, "save_mode is 'csv', but there is no folder: give save_dir="),
    "a file": ({"save_dir": __file__}, "is a file: give a folder"),
    "tokens": ({"max_tokens": 0}, "max_tokens is 0; it takes 1 or more"),
    "limit": ({"sample_limit": 0}, "sample_limit is 0; it takes 1 or more"),
    "axes": ({"novelty_k": 0}, "novelty_k is 0; it takes 1 or more"),
    "no data": ({"dataloader": None}, "dataloader is missing: give batches of tokens"),
    "empty": ({"dataloader": []}, "the data have no unmasked token"),
    "images": ({"dataloader": [torch.randn(2, 3, 4, 4)]}, "a batch has input 0 .*Use nl.analyze for other networks"),
    "no tokens": ({"dataloader": [{"pixel_values": torch.randn(2, 3)}]}, r"measured on tokens, input_ids \(B, T\)"),
    "mask": (
        {"dataloader": [{"input_ids": torch.ones(2, 5).long(), "attention_mask": torch.ones(2, 1, 5, 5)}]},
        r"the attention_mask is \(2, 1, 5, 5\), the tokens are \(2, 5\)",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_say_the_way_out(llama, name):
    options, words = MISTAKES[name]
    with pytest.raises(ValueError, match=words):
        nl.analyze_model(llama, **{"dataloader": batches()} | options)


def test_a_call_without_a_model_is_a_mistake():
    with pytest.raises(ValueError, match="there is no model: give model_name="):
        nl.analyze_model(dataloader=batches())
    with pytest.raises(ValueError, match="needs experts="):
        router_load(torch.zeros(3, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="needs k="):
        router_load(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="k is 5; it must be from 1 to 4"):
        router_load(torch.zeros(3, 4), 5)


def _work(rank, world, where, shares):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{where}/meet", rank=rank, world_size=world)
    own = texts()[sum(shares[:rank]) : sum(shares[: rank + 1])]
    options = {"sample_limit": 30, "novelty_k": 6, "save_mode": "bundle", "save_dir": f"{where}/run"}
    nl.analyze_model(build("Mixtral"), batches(3, "right", own) if own else [], max_tokens=None, **options)
    short = nl.analyze_model(build("Mixtral"), batches(3, "left", texts()), max_tokens=41, metrics="spectrum")
    if rank == 0:
        short.save(f"{where}/short")
    dist.destroy_process_group()


SHARES = [[5, 0, 7], *(pytest.param(shares, marks=pytest.mark.slow) for shares in ([5, 7], [0, 12]))]


@pytest.mark.parametrize("shares", SHARES, ids=label)
def test_processes_add_up(tmp_path, mixtral, shares):
    start = "fork" if not torch.cuda.is_initialized() else "spawn"
    mp.start_processes(_work, (len(shares), str(tmp_path), shares), len(shares), start_method=start)
    alone = nl.analyze_model(mixtral, batches(), sample_limit=30, novelty_k=6, max_tokens=None)
    found = load_bundle(tmp_path / "run")
    same(found, alone)
    assert found.metadata["processes"] == len(shares)
    assert found.metadata["tokens_observed"] == 105
    assert load_bundle(tmp_path / "short").metadata["tokens_observed"] == 41


def test_the_numbers_of_representation_geometry(net):
    """On unpadded rows that are fewer than its sample: there it reads the first rows, pads among them, in single precision."""
    peer = pytest.importorskip("representation_geometry")
    data, options = batches(), {"novelty_k": 6, "diagnostics": ["normalization_ablation"]}
    theirs = peer.analyze_model(net, data, max_tokens=None, **options)
    ours = nl.analyze_model(net, data, max_tokens=None, **options)
    for table in ("metrics", "novelty", "router"):
        wanted, found = getattr(theirs, table), getattr(ours, table)
        if table == "router" and not len(wanted):
            continue
        assert set(wanted.columns) <= set(found.columns)
        for column in wanted.columns.difference([*WORDS, "k90", "k95"]):
            np.testing.assert_allclose(found[column], wanted[column], rtol=1e-4, atol=1e-5, err_msg=column)
        assert [c for c in found if c in wanted.columns] == list(wanted.columns)
    wanted, found = theirs.diagnostics["normalization_ablation"], ours.diagnostics["normalization_ablation"]
    assert set(wanted.columns) == set(found.columns)
    for column in wanted.columns.difference([*WORDS, "k90", "k95"]):
        np.testing.assert_allclose(found[column], wanted[column], rtol=1e-4, atol=1e-5, err_msg=column)
    assert set(theirs.eigenvalues) == set(ours.eigenvalues)
    for key, wanted in theirs.eigenvalues.items():
        np.testing.assert_allclose(ours.eigenvalues[key], wanted, rtol=1e-4, atol=1e-6 * wanted[0])
    assert (
        peer.analyze_model(net, batches(5, "right"), max_tokens=40).metadata["tokens_observed"] == 65
    )  # pads count, whole batches


def test_several_passes_give_the_geometry_of_one(mixtral):
    data = batches(3, "right")
    points = ["residual_input", "residual_output"]
    one = nl.analyze_model(mixtral, data, hook_point=points, sample_limit=20, diagnostics="normalization_ablation")
    (whole,) = one.metadata["passes"]
    found = nl.analyze_model(
        mixtral,
        data,
        hook_point=points,
        sample_limit=20,
        diagnostics="normalization_ablation",
        budget=0.6 * whole["bytes"],
        max_passes=4,
    )
    passes = found.metadata["passes"]
    assert 1 < len(passes) <= 4
    assert [name for each in passes for name in each["layers"]] == whole["layers"]
    for name, table in one.tables().items():
        pd.testing.assert_frame_equal(found.tables()[name], table, rtol=1e-12)
    assert found.metadata["tokens_observed"] == one.metadata["tokens_observed"]
    with pytest.raises(MemoryError, match=r"or max_passes=\d \(it is 1\)"):
        nl.analyze_model(mixtral, data, hook_point=points, budget=0.6 * whole["bytes"])
    with pytest.raises(ValueError, match=r"the data are read .* times, .* and are an iterator"):
        nl.analyze_model(mixtral, iter(data), hook_point=points, budget=0.6 * whole["bytes"], max_passes=4)


def test_passes_that_see_other_tokens_are_refused(llama):
    class Fresh:
        def __init__(self):
            self.begun = 0

        def __iter__(self):
            self.begun += 1
            return iter(batches(3, "right")[: self.begun])

    size = nl.analyze_model(llama, Fresh(), metrics="spectrum").metadata["passes"][0]["bytes"]
    with pytest.raises(ValueError, match=r"the passes read different data.* the data must be the same every time"):
        nl.analyze_model(llama, Fresh(), metrics="spectrum", budget=0.6 * size, max_passes=4)
