"""analysis=[logit_lens]: scores of each layer over data."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from lens_models import ids, llama, odd, padded, stories
from torch.nn import functional

import nodelens as nl
from nodelens.analysis.lenses.logit_lens import LogitLens
from nodelens.interventions.lenses.scores import TokenMeans, place, row_scores
from nodelens.report.lens_figures import figures_of

ROWS = [*ids(3, 9), *ids(3, 6, seed=1)]


@pytest.fixture(scope="module")
def table():
    return LogitLens(ks=(1, 3))(llama(), [padded(ROWS, "right")])["layers"]


def slow(model, rows, block):
    """The scores of each token by one plain forward per row."""
    found = []
    for sample, row in enumerate(rows):
        with torch.no_grad():
            out = model(row[None], output_hidden_states=True)
            states = out.hidden_states[block + 1][0]
            lens = out.logits[0] if block == len(model.model.layers) - 1 else model.lm_head(model.model.norm(states))
        for t in range(len(row) - 1):
            order, own = lens[t].argsort(descending=True), out.logits[0, t].log_softmax(0)
            theirs = lens[t].log_softmax(0)
            rank, first = (order.tolist().index(int(token)) for token in (row[t + 1], own.argmax()))
            found.append(
                {
                    "sample": sample,
                    **{f"precision_at_{k}": float(rank < k) for k in (1, 3)},
                    **{f"agreement_at_{k}": float(first < k) for k in (1, 3)},
                    "surprisal": float(functional.cross_entropy(lens[t][None], row[t + 1][None])),
                    "kl": float((own.exp() * (own - theirs)).sum()),
                    "entropy": float(-(theirs.exp() * theirs).sum()),
                }
            )
    return pd.DataFrame(found)


@pytest.mark.parametrize("block", [0, 2])
def test_means_are_those_of_a_loop_over_tokens(table, block):
    wanted, row = slow(llama(), ROWS, block), table.set_index("layer").loc[block]
    names = list(wanted.columns[1:])
    assert (row["tokens"], row["samples"]) == (3 * 8 + 3 * 5, 6)
    np.testing.assert_allclose(row[names].astype(float), wanted[names].mean(), rtol=1e-4, atol=1e-5)
    # the error of a ratio of sums over samples, in the words of the textbook
    totals, n = wanted.groupby("sample")[names].sum(), wanted.groupby("sample").size()
    rest = totals - np.outer(n, wanted[names].mean())
    error = np.sqrt((rest**2).sum() / (6 * 5)) / n.mean()
    np.testing.assert_allclose(row[[f"{name}_se" for name in names]].astype(float), error, rtol=1e-3, atol=1e-6)


@pytest.mark.filterwarnings("ignore:batches are padded on the left")
@pytest.mark.parametrize("data", {"left": [padded(ROWS, "left")], "none": [{"input_ids": row[None]} for row in ROWS]}.items())
def test_padding_and_batches_change_nothing(table, data):
    found = LogitLens(ks=(1, 3))(llama(), data[1])["layers"]
    pd.testing.assert_frame_equal(found, table, rtol=1e-4, atol=1e-6)


def test_the_last_layer_is_the_model():
    for model in (llama(), odd("gemma2"), odd("cohere")):
        last = LogitLens()(model, [{"input_ids": ids(2, 9)}])["layers"].iloc[-1]
        assert last["agreement_at_1"] == 1
        assert last["kl"] < 1e-6
        with torch.no_grad():
            loss = model(ids(2, 9), labels=ids(2, 9)).loss
        assert math.isclose(last["surprisal"], float(loss), rel_tol=1e-4)


def test_scores_of_rows_done_by_hand():
    logits = torch.tensor([[math.log(4), math.log(3), math.log(2), math.log(1)]])
    assert place(logits, torch.tensor([2])).tolist() == [2]
    found = row_scores(logits, torch.zeros(1, 4), torch.tensor([1]), (1, 2))
    assert (found["precision_at_1"].item(), found["precision_at_2"].item()) == (0, 1)
    assert math.isclose(found["surprisal"].item(), -math.log(0.3), rel_tol=1e-6)
    assert math.isclose(found["kl"].item(), -0.25 * math.log(0.4 * 0.3 * 0.2 * 0.1) - math.log(4), rel_tol=1e-5)
    assert math.isclose(found["entropy"].item(), -sum(p * math.log(p) for p in (0.1, 0.2, 0.3, 0.4)), rel_tol=1e-5)


def test_an_impossible_token_costs_nothing_in_the_entropy():
    found = row_scores(torch.tensor([[0.0, 0.0, -math.inf]]), torch.tensor([[0.0, 0.0, -math.inf]]), torch.tensor([0]))
    assert math.isclose(found["entropy"].item(), math.log(2), rel_tol=1e-6)
    assert found["kl"].item() == 0


def test_one_sample_has_no_error():
    means = TokenMeans()
    means.add(0, {"kl": torch.tensor([1.0, 3.0], dtype=torch.float64)}, torch.tensor([0, 0]), 1)
    row = means.row(0)
    assert (row["tokens"], row["samples"], row["kl"]) == (2, 1, 2)
    assert math.isnan(row["kl_se"])


def test_analyze_runs_it_by_name_and_the_folder_is_loaded_again(tmp_path):
    data = [{"input_ids": ids(2, 9)}]
    result = nl.analyze(llama(), data, metrics=[], layers="head", analysis={"early": LogitLens(prompts=[[3, 4, 5]])})
    result.save(tmp_path)
    again = nl.load(tmp_path).analyses["early"]
    assert set(again.frames) == {"layers", "predictions", "positions"}
    pd.testing.assert_frame_equal(again["layers"], result.analyses["early"]["layers"])
    assert "KL to the model's logits" in again.summary()
    assert [plot.name for plot in figures_of(again)] == ["tokens-0", "lens"]


def test_bad_options_and_data_are_refused():
    with pytest.raises(ValueError, match=r"logit_lens: ks is \[0\] and k is 5; they are numbers of tokens, 1 or more"):
        LogitLens(ks=[0])
    with pytest.raises(ValueError, match="the data have no token that predicts another one"):
        LogitLens()(llama(), [{"input_ids": ids(2, 1)}])
    with pytest.raises(ValueError, match="the prompt 'a' is a text and there is no tokenizer"):
        LogitLens(prompts="a")(llama(), [{"input_ids": ids(2, 3)}])


def test_a_trained_network_knows_more_with_each_layer():
    model, tokenizer = stories()
    story = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    rows = torch.tensor(tokenizer(story * 8)["input_ids"][:240]).reshape(10, 24)
    table = LogitLens()(model, [{"input_ids": rows}])["layers"]
    assert table["kl"].is_monotonic_decreasing
    assert table["kl"].iloc[-1] < 1e-9
    assert table["agreement_at_1"].iloc[-1] == 1
