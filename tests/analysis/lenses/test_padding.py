"""Lenses and patches do not depend on padding, in every family."""

import numpy as np
import pandas as pd
import pytest
from lens_models import CAUSAL, family, ids, padded

import nodelens as nl
from nodelens.analysis.lenses.logit_lens import lens_table

FEW = ["gpt2", "llama 8/4", "bloom"]
FAMILIES = [pytest.param(name, marks=() if name in FEW else pytest.mark.slow) for name in CAUSAL]
CLEAN, CORRUPT = ([ids(1, n, seed=seed + n)[0] for n in (7, 5)] for seed in (0, 10))
SCORES = ["surprisal", "kl", "entropy", "agreement_at_1", "precision_at_1", "surprisal_se"]

pytestmark = pytest.mark.filterwarnings("ignore:batches are padded on the left")


@pytest.mark.parametrize("name", [case for case in FAMILIES if case.values != ("trocr",)])  # which counts padding as positions
def test_a_lens_over_data_reads_no_padding(name):
    model = family(name)
    alone = lens_table(model, [{"input_ids": row[None]} for row in CLEAN])
    for side in ("left", "right"):
        found = lens_table(model, [padded(CLEAN, side)])
        assert found["tokens"].tolist() == [10] * len(found)
        np.testing.assert_allclose(found[SCORES], alone[SCORES], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_patches_of_a_padded_batch_are_those_of_its_prompts(name):
    model, options = (
        family(name),
        {"layers": [0, -1], "positions": [0, -1], "components": ["residual", "mlp"], "answer": 5, "wrong": 6},
    )
    batch = nl.patch(model, padded(CLEAN, "left"), padded(CORRUPT, "left"), **options)["cells"]
    each = [nl.patch(model, a, b, **options)["cells"] for a, b in zip(CLEAN, CORRUPT, strict=True)]
    assert batch["recovered"].nunique() > 2
    pd.testing.assert_frame_equal(
        batch.drop(columns=["sample", "pair"], errors="ignore"),
        pd.concat(each, ignore_index=True)[[c for c in batch if c not in ("sample", "pair")]],
    )
