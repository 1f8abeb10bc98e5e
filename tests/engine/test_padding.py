"""Every metric of a language model, with every padding and batch: the numbers of each text alone, and their errors."""

from functools import cache

import numpy as np
import pytest
import torch
from published import OF_LAYERS
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import nodelens as nl
from nodelens.metrics import get_metric

V, EOS, LENGTHS = 13, 12, 2 * (9, 5, 14, 7, 3, 9, 8, 5, 11, 4, 9, 14)
NAMES = OF_LAYERS
FEW = {"novelty_k": 3}  # of all directions of a space two bases never differ: a value of roundings alone
TAKEN = {
    name: get_metric(name, **FEW) if "novelty_k" in metric.options else metric
    for name in NAMES
    if (metric := get_metric(name)).parameter != "norm"  # no batch norm is here
}
BARE = {name: metric for name, metric in TAKEN.items() if not metric.weighted and "weight*grad" not in str(metric.needs())}
NO_TOKENS = dict.fromkeys(("bos_token_id", "eos_token_id"))


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 18, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=V, initializer_range=0.3, **sizes, **NO_TOKENS))


def gpt2():
    torch.manual_seed(0)
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 32, "n_inner": 18}
    return GPT2LMHeadModel(GPT2Config(vocab_size=V, initializer_range=0.3, **sizes, **NO_TOKENS))


def texts():
    g = torch.Generator().manual_seed(1)
    found = [torch.randint(V, (n,), generator=g) for n in LENGTHS]
    for k, text in enumerate(found):
        text[-1] = EOS if k % 2 else text[-1]  # a real one, which a padding of the same id must not take along
    return found


def padded(size, side="right", pad=0, extra=0):
    """Batches with a mask, and labels also where there is padding."""
    some, found = texts(), []
    for a in range(0, len(some), size):
        part = some[a : a + size]
        length = max(map(len, part)) + extra
        ids, mask = torch.full((len(part), length), pad), torch.zeros(len(part), length, dtype=torch.long)
        for row, text in enumerate(part):
            place = slice(length - len(text), None) if side == "left" else slice(len(text))
            ids[row, place], mask[row, place] = text, 1
        places = (mask.cumsum(1) - 1).clamp_min(0)
        found.append({"input_ids": ids, "attention_mask": mask, "position_ids": places, "labels": ids})
    return found


def grouped():
    """Batches of texts of one length, without padding or a mask."""
    by_length = [torch.stack([t for t in texts() if len(t) == n]) for n in sorted(set(LENGTHS))]
    return [{"input_ids": ids, "labels": ids} for ids in by_length]


VARIANTS = {
    "a text a batch": lambda: padded(1),
    "right": lambda: padded(12),
    "right, pad equal to eos": lambda: padded(3, pad=EOS),
    "left": lambda: padded(8, "left"),
    "left, pad equal to eos": lambda: padded(3, "left", EOS),
    "left, more columns": lambda: padded(8, "left", 5, extra=6),
}


def measured(net, batches):
    """Metrics of weights at the layers that have some, all others also between them."""
    g = torch.Generator().manual_seed(2)
    start = {k: v + 0.1 * torch.randn(v.shape, generator=g, dtype=torch.float64).to(v) for k, v in net.state_dict().items()}
    linear = ["*.o_proj", "*.up_proj", "*.down_proj"] if isinstance(net, LlamaForCausalLM) else ["*.mlp.c_*", "*.attn.c_proj"]
    roles = ["blocks[:]", "blocks[:].mlp.hidden", "blocks[:].heads"]
    return [
        nl.analyze(net, batches, TAKEN, linear, initial=start, groups=4, pairs="all"),
        nl.analyze(net, batches, BARE, roles, groups=4, pairs="all"),
    ]


def differing(found, truth, tolerance):
    """Columns that differ by more than a share of their largest value, an error by a share of its value's."""
    bad = {}
    for one, other in zip(found, truth, strict=True):
        for table in ("units", "layers", "edges"):
            a, b = getattr(one, table), getattr(other, table)
            assert list(a.columns) == list(b.columns)
            for column in a.select_dtypes("number"):
                bad[table, column] = _away(a[column], b[column], b[column.removesuffix("_se")])
        assert one.matrices.keys() == other.matrices.keys()
        bad |= {key: _away(matrix, other.matrices[key], other.matrices[key]) for key, matrix in one.matrices.items()}
    return {key: away for key, away in bad.items() if away > tolerance}


def _away(x, y, of):
    x, y, of = (np.asarray(values, dtype=float) for values in (x, y, of))
    if (np.isnan(x) != np.isnan(y)).any():
        return np.inf
    scale = np.abs(of[np.isfinite(of)]).max(initial=0)
    return float(np.abs(x - y)[np.isfinite(y)].max(initial=0) / (scale or 1))


@cache
def exact(kind):
    """A model in float64, and what is found of it where texts of one length stand together, without padding."""
    net = kind().double().eval()
    return net, measured(net, grouped())


CASES = [(llama, how) for how in VARIANTS] + [(gpt2, how) for how in ("right", "left", "left, pad equal to eos")]
FAST = [(llama, "left, pad equal to eos"), (gpt2, "right")]


@pytest.mark.parametrize(
    ("kind", "how"),
    [pytest.param(*case, id=f"{case[0].__name__}, {case[1]}", marks=() if case in FAST else pytest.mark.slow) for case in CASES],
)
def test_padding_and_batches_change_no_metric_and_no_error(kind, how):
    net, truth = exact(kind)
    assert not differing(measured(net, VARIANTS[how]()), truth, 1e-9)


@pytest.mark.parametrize("kind", [llama, gpt2])
def test_nothing_is_compared_that_is_not_there(kind):
    """What is NaN on either side would agree."""
    there, seen = set(), set()
    for found in exact(kind)[1]:
        for table in (found.units, found.layers, found.edges):
            numbers = table.select_dtypes("number")
            seen |= set(numbers)
            there |= {column for column in numbers if numbers[column].notna().any()}
    assert {column for column in seen - there if not column.endswith("_se")} == set(), "no value is missing"
    assert seen - there == {"activation_max_ratio_se", "activation_outlier_index_se", "component_count_se"}, "maxima have no error"


@pytest.mark.slow
@pytest.mark.parametrize("kind", [llama, gpt2])
def test_in_float32_they_agree_to_1e_5(kind):
    net = kind().eval()
    assert not differing(measured(net, padded(5, "left", EOS, extra=1)), measured(net, grouped()), 1e-5)


DRAWN = (
    "redundancy",
    "effective_rank",
    "activation_outlier_index",
    "linear_cka",
    "downstream_importance",
    "total_correlation",
    "mi",
)


@pytest.mark.parametrize("how", ["right", "left, more columns"])
def test_positions_are_drawn_among_tokens_that_count(how):
    net = llama().double().eval()
    layers = ["*.o_proj", "*.up_proj"]
    found, truth = (nl.analyze(net, data, DRAWN, layers, positions=6) for data in (VARIANTS[how](), grouped()))
    assert not differing([found], [truth], 1e-9)
    rows = {row["statistic"]: row["rows"] for row in found.metadata["rows"]}
    assert rows["Quantiles(output, positions)"] == sum(min(n, 6) for n in LENGTHS)


@pytest.mark.parametrize("kind", [llama, gpt2])
def test_no_parameter_takes_a_gradient_and_the_graph_begins_behind_the_embedding(kind):
    net = kind().eval()
    embedding, seen = net.get_input_embeddings(), []
    taking = [p.requires_grad for p in net.parameters()]
    next(net.parameters()).requires_grad_(False)
    taking[0] = False

    def look(module, args, output):
        seen.append((output.requires_grad, any(p.requires_grad for p in net.parameters())))

    handles = [module.register_forward_hook(look) for module in (embedding, net.lm_head)]
    nl.analyze(net, padded(4), ["taylor", "scar_loss_proxy", "gradient_alignment"], ["*.o_proj", "*.attn.c_proj"][kind is gpt2])
    for handle in handles:
        handle.remove()
    assert all(p.grad is None for p in net.parameters())
    assert [p.requires_grad for p in net.parameters()] == taking
    assert (False, False) in seen, "nothing before the measured layer is differentiated"
    assert (True, False) in seen, "the logits are, by activations alone"
