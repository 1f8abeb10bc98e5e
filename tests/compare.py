"""Equality up to rounding."""

import numpy as np
import pandas as pd
from laws import values
from torch.testing import assert_close


def same(a, b, rtol=1e-11):
    for (name, x), y in zip(values(a).items(), values(b).values(), strict=True):
        scale = float(x.double().nan_to_num().abs().max()) or 1.0
        assert_close(x, y, rtol=rtol, atol=1e-11 * scale, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}")


def close(a: pd.DataFrame, b: pd.DataFrame, rtol: float) -> None:
    assert list(a.columns) == list(b.columns)
    for column in a.select_dtypes("number"):
        scale = b[column].abs().max()  # differences of sums round by a share of what they are differences of
        np.testing.assert_allclose(a[column], b[column], rtol=rtol, atol=rtol * scale + 1e-30, err_msg=column)


def near(a, b):
    """Equal up to the rounding of sums in float64 in another order, which a difference of leave-outs shows more."""
    assert list(a.columns) == list(b.columns)
    for column in a.select_dtypes("number"):
        scale = float(b[column.removesuffix("_se")].abs().max())
        np.testing.assert_allclose(a[column], b[column], rtol=1e-6, atol=1e-9 * scale + 1e-12, err_msg=column)
