"""The future lens: linear maps to later states."""

import numpy as np
import pytest
import torch
from lens_models import ids, llama, padded, stories

from nodelens.analysis.lenses.future_lens import FutureLens
from nodelens.interventions.lenses.future import fit_maps, shifted
from nodelens.interventions.lenses.lens_pass import blocks_to_read, run_lens

ROWS = [*ids(6, 12), *ids(2, 7, seed=1)]


def test_pairs_of_tokens_are_found_within_their_sample():
    seen = []
    run_lens(llama(), [padded(ROWS, "right")], blocks_to_read(llama(), 0), seen.append)
    now, later = shifted(seen[0], 2)
    assert (seen[0].sample[now] == seen[0].sample[later]).all()
    assert (seen[0].column[later] - seen[0].column[now] == 2).all()
    assert len(now) == 6 * (11 - 2) + 2 * (6 - 2)


def test_the_map_is_that_of_least_squares():
    weight, bias = fit_maps(llama(), [padded(ROWS, "right")], blocks_to_read(llama(), 1), 2, [1])[1, 1]
    x, y = [], []
    for row in ROWS:
        kept = []
        handles = [llama().model.layers[k].register_forward_hook(lambda m, a, o, kept=kept: kept.append(o[0])) for k in (1, 2)]
        with torch.no_grad():
            llama()(row[None])
        for handle in handles:
            handle.remove()
        x.append(kept[0][: len(row) - 2].double())
        y.append(kept[1][1 : len(row) - 1].double())
    x, y = torch.cat(x), torch.cat(y)
    centred = x - x.mean(0)
    covariance = torch.cov(x.T) + 1e-4 * torch.cov(x.T).diagonal().mean() * torch.eye(48)
    wanted = torch.linalg.solve(covariance, centred.T @ (y - y.mean(0)) / (len(x) - 1))
    np.testing.assert_allclose(weight, wanted, rtol=1e-2, atol=1e-4 * float(wanted.abs().max()))
    np.testing.assert_allclose(bias, y.mean(0) - x.mean(0) @ wanted, rtol=1e-2, atol=1e-3)


def test_the_last_block_with_nothing_ahead_is_the_model():
    model, tokenizer = stories()
    story = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    rows = torch.tensor(tokenizer(story * 8)["input_ids"][:240]).reshape(10, 24)
    table = FutureLens(ahead=[0, 1])(model, [{"input_ids": rows}])["layers"].set_index(["ahead", "layer"])
    assert table.loc[(0, 4), "agreement_at_1"] > 0.99
    assert table.loc[(0, 4), "kl"] < 0.01
    assert table.loc[0, "kl"].is_monotonic_decreasing
    assert table.loc[(1, 3), "precision_at_10"] > 0.5  # the story repeats


def test_bad_options_and_short_data_are_refused():
    with pytest.raises(ValueError, match=r"future_lens: ahead is \[-1\] and ks is \[1, 5, 10\]; positions from 0, tokens from 1"):
        FutureLens(ahead=[-1])
    with pytest.raises(ValueError, match="no sample has tokens 3 positions apart that predict another: give longer samples"):
        FutureLens(ahead=[3])(llama(), [{"input_ids": ids(4, 4)}])


def test_a_distance_that_no_token_has_is_said():
    with pytest.raises(ValueError, match="no token is followed by 8 others that are predicted: give longer samples, or smaller"):
        FutureLens(layers=[0], ahead=[0, 7])(llama(), [padded(ROWS[:6], "right")], evaluation=[padded(ROWS[6:], "right")])
