"""A layer that cannot be read has NaN with the reason, and the analysis goes on; a layer that is named has to be read."""

import pytest
import torch
from pandas.testing import assert_frame_equal, assert_series_equal
from torch import nn

import nodelens as nl

METRICS = ["activation_mean", "rq", "redundancy", "synergy", "taylor", "linear_cka", "magnitude"]


class Table(nn.Module):
    """A bias made of a table of positions, which has no axis of samples."""

    def __init__(self):
        super().__init__()
        self.first, self.table, self.last = nn.Linear(3, 4), nn.Linear(2, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(torch.relu(self.first(x)) + self.table(torch.ones(5, 2)).mean(0))


class Routed(nn.Module):
    """An expert that reads some of the samples, and a gate on a part whose gradient is cut."""

    def __init__(self):
        super().__init__()
        self.first, self.expert, self.cut, self.last = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.spare = nn.Linear(4, 4)

    def forward(self, x):
        h, some = torch.relu(self.first(x)), x[:, 0] > 0
        self.spare(h)
        h = h.index_add(0, some.nonzero()[:, 0], self.expert(h[some]))
        return self.last(h + self.cut(h).detach())


def built(kind):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind()


def data(signs):
    """Batches of four samples, whose first entry has the signs given."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for k, own in enumerate(signs):
        x = torch.randn(4, 3, generator=generator)
        x[:, 0] = x[:, 0].abs() * torch.tensor(own)
        found.append({"x": x, "labels": torch.tensor([0, 1, 2, 0]), "ids": torch.arange(4) + 4 * k})
    return found


def reasons(found, layer):
    return {note["column"]: note["reason"] for note in found.metadata["missing"] if note["layer"] == layer}


def test_a_layer_without_samples_is_nan_with_the_reason_and_keeps_what_needs_no_rows():
    model, batches = built(Table), data([[1] * 4] * 6)
    found = nl.analyze(model, batches, METRICS)
    values = found.units.loc["table"]
    assert values["magnitude"].notna().all()
    assert values[["activation_mean", "rq", "redundancy", "synergy", "taylor"]].isna().all(axis=None)
    assert "its first axis is not the samples" in reasons(found, "table")["activation_mean"]
    others = nl.analyze(model, batches, METRICS, ["first", "last"])
    for layer in ("first", "last"):
        assert_series_equal(found.units.loc[layer, "rq"], others.units.loc[layer, "rq"])
        assert found.units.loc[layer].notna().all(axis=None)
    with pytest.raises(ValueError, match=r"layer 'table' puts out .* its first axis is not the samples"):
        nl.analyze(model, batches, METRICS, ["first", "table"])


@pytest.mark.parametrize("small", [True, False])
def test_a_layer_that_some_batch_shows_no_rows_of_samples_is_nan_throughout(small, monkeypatch):
    monkeypatch.setattr("nodelens.engine.collector.MAX_BYTES", 1 << 20 if small else 0)  # rows are buffered, or added directly
    model, batches = built(Routed), data([[1, 1, 1, 1], [1, 1, 1, -1], [1, 1, 1, 1], [1, 1, 1, 1]])
    found = nl.analyze(model, batches, METRICS)
    assert found.units.loc["expert"].drop(columns=[c for c in found.units if c.startswith("magnitude")]).isna().all(axis=None)
    assert "shows 3 rows of shape (4,) for a batch of 4 samples" in reasons(found, "expert")["activation_mean"]
    assert found.units.loc["first"].notna().all(axis=None)
    assert found.edges["linear_cka"].isna().tolist() == [True, True, False, False]  # the pairs of first, expert, cut, last, spare
    with pytest.raises(ValueError, match="layer 'expert' shows 3 rows"):
        nl.analyze(model, batches, METRICS, ["first", "expert"])


def test_a_layer_that_no_gradient_reaches_keeps_its_activations():
    model, batches = built(Routed), data([[1, 1, 1, 1]] * 4)
    found = nl.analyze(model, batches, ["activation_mean", "taylor"])
    assert found.units["activation_mean"].notna().all()
    assert set(found.units.index[found.units["taylor"].isna()].get_level_values("layer")) == {"cut", "spare"}
    assert reasons(found, "cut")["taylor"] == (
        "no gradient reached it: the loss depends on it, but .detach() or .data cuts its gradient"
    )
    assert reasons(found, "spare")["taylor"] == "no gradient reached it: the loss does not depend on it"


def test_a_model_of_which_nothing_can_be_read_is_refused():
    class Alone(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Linear(2, 4)

        def forward(self, x):
            return x + self.table(torch.ones(5, 2)).mean()

    with pytest.raises(ValueError, match=r"layer 'table' puts out .* its first axis is not the samples"):
        nl.analyze(Alone(), [torch.ones(4, 3)], ["activation_mean"])


class Windows(nn.Module):
    """A block that runs with time first, which is what its hidden layer shows."""

    def __init__(self):
        super().__init__()
        self.enter, self.up, self.down, self.out = nn.Linear(3, 4), nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x):
        turned = self.enter(x).transpose(0, 1)
        return self.out(self.down(self.up(turned).relu()).mean(0))


def test_a_pruning_names_the_groups_that_cannot_be_read_and_freeze():
    model, x = built(Windows), torch.randn(4, 5, 3)
    batches = [(x, torch.tensor([0, 1, 2, 0]))]
    words = (
        r"group 'up' is read by 'down.input', which puts out \(5, 2, 6\) for two samples and \(5, 3, 6\) for three: its first axis "
        r"is not the samples; score by weights \(magnitude\), or leave out what is read so: freeze=\['up'\] in a pruning"
    )
    with pytest.warns(UserWarning, match=r"group 'enter' is left out \(and 1 more\): its units cannot be scored: 'up.input'"):
        assert set(nl.prune(model, "taylor", data=batches).plan.removed) == {"down"}
    with pytest.raises(ValueError, match=words):
        nl.prune(model, "taylor", data=batches, scope="up")
    assert nl.prune(model, "magnitude", 0.5, data=batches).plan.removed


class TwoRows(nn.Module):
    """A table of two rows, which two samples could have made."""

    def __init__(self, rows=2):
        super().__init__()
        self.table = nn.Parameter(torch.linspace(-1, 1, 3 * rows).reshape(rows, 3))
        self.up, self.down, self.hidden, self.out = nn.Linear(3, 6), nn.Linear(6, 2), nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(torch.relu(self.hidden(x)) * self.down(torch.relu(self.up(self.rows(x)))).mean())

    def rows(self, x):
        return self.table


class UpToFour(TwoRows):
    """Shows as many rows of its table as there are samples, as far as they go."""

    def rows(self, x):
        return self.table[: len(x)]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_a_table_of_as_many_rows_as_a_batch_has_samples_is_not_taken_for_samples(rows, size):
    model, x = built(lambda: TwoRows(rows)), torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    batches = [(part, torch.arange(size) % 3) for part in x.split(size)]
    found = nl.analyze(model, batches, ["activation_mean", "magnitude"])
    assert found.units.loc["hidden"].notna().all(axis=None)
    for layer in ("up", "down"):
        assert found.units.loc[layer, "activation_mean"].isna().all()
        assert found.units.loc[layer, "magnitude"].notna().all()
        few, more = ("one sample", "two") if size == 1 else ("two samples", "three")
        width = len(model.get_submodule(layer).weight)
        says = f"({rows}, {width}) for {few} and ({rows}, {width}) for {more}: its first axis is not the samples"
        assert f"puts out {says}" in reasons(found, layer)["activation_mean"]


class ReadsTable(nn.Module):
    """A module whose first argument has no samples, but whose output has."""

    def __init__(self):
        super().__init__()
        self.table, self.mix, self.out = nn.Parameter(torch.ones(2, 3)), Mix(), nn.Linear(3, 3)

    def forward(self, x):
        return self.out(self.mix(self.table, x))


class Mix(nn.Module):
    def forward(self, table, x):
        return x * table.mean(0)


def test_what_a_layer_reads_has_to_have_samples_too():
    batches = [(torch.randn(2, 3), torch.arange(2))]
    with pytest.raises(ValueError, match=r"layer 'mix' reads \(2, 3\) for two samples and \(2, 3\) for three"):
        nl.analyze(built(ReadsTable), batches, ["activation_mean"], ["mix", "out"])


class OneSize(TwoRows):
    """Takes batches of two only."""

    def forward(self, x):
        return super().forward(x.reshape(2, 3))


def test_a_network_that_takes_one_size_of_batch_only_is_measured():
    with pytest.warns(
        UserWarning, match=r"OneSize takes batches of 2 but not of 3 samples .*: that the first axis of each layer is the"
    ):
        found = nl.analyze(built(OneSize), [(torch.randn(2, 3), torch.arange(2))], ["activation_mean"], ["hidden"])
    assert found.units["activation_mean"].notna().all()


def test_a_pruning_leaves_out_what_the_dry_run_takes_for_samples_and_the_pass_does_not():
    model, batches = built(lambda: UpToFour(4)), [(torch.randn(8, 3), torch.arange(8) % 3)]
    says = (
        r"group 'up' is left out: its units cannot be scored: 'down.input', where they are captured, shows 4 rows of shape \(6,\) "
        r"for a batch of 8 samples: rows must belong to samples"
    )
    with pytest.warns(UserWarning, match=says):
        found = nl.prune(model, "taylor", data=batches)
    assert set(found.plan.removed) == {"hidden"}
    assert [f.what for f in found.groups.frozen if "8 samples" in f.reason] == ["up"]
    with pytest.raises(ValueError, match=r"^layer 'down.input' shows 4 rows of shape \(6,\) for a batch of 8 samples"):
        nl.prune(model, "taylor", data=batches, scope="up")
    with pytest.raises(ValueError, match=r"^layer 'up' shows 4 rows of shape \(6,\) for a batch of 8 samples"):
        nl.analyze(model, batches, ["activation_mean"], ["hidden", "up"])


class InPlace(nn.Module):
    """Writes into what exp has saved for its gradient."""

    def forward(self, x):
        y = x.exp()
        y.add_(1)
        return y


def test_a_network_that_overwrites_what_its_gradient_needs_is_named():
    model = built(lambda: nn.Sequential(nn.Linear(3, 4), InPlace(), nn.Linear(4, 3)))
    batches = [(batch["x"], batch["labels"]) for batch in data([[1] * 4] * 2)]
    words = (
        r"^batch 0 of the data \(counted from 0\): Sequential overwrites in place what 1 \(InPlace\) needs for the gradient of the"
    )
    with pytest.raises(ValueError, match=words) as raised:
        nl.analyze(model, batches, ["taylor"])
    assert "loss, which gets no further: leave out 1 and the layers before it (layers=), choose metrics" in str(raised.value)
    assert str(raised.value).endswith("without gradients, or write that operation as x = x * 2 instead of x.mul_(2)")
    assert nl.analyze(model, batches, ["taylor"], "2").units["taylor"].notna().all()  # which runs after it
    assert all(parameter.grad is None for parameter in model.parameters())
    assert nl.analyze(model, batches, ["rq"]).units["rq"].notna().all()
    loose = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))
    loose.forward = lambda x: loose[1](InPlace().forward(loose[0](x)))
    with pytest.raises(ValueError, match=r"overwrites in place what its own code needs .*leave out the layers before that"):
        nl.analyze(loose, batches, ["taylor"])


class WritesInput(nn.Module):
    """Doubles its input in place, and lets the activation write into the output of a layer."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x):
        x *= 2
        return self.b(self.a(x).relu_())


class Doubles(WritesInput):
    def forward(self, x):
        return self.b(self.a(x * 2).relu())


def test_a_network_that_writes_into_its_inputs_changes_no_data():
    model, other = built(WritesInput), built(Doubles)
    other.load_state_dict(model.state_dict())
    batches = [(batch["x"], batch["labels"]) for batch in data([[1] * 4] * 2)]
    before = [x.clone() for x, _ in batches]
    for metrics in (["rq", "activation_mean"], ["taylor"], ["gradient_alignment"]):
        found, twin = nl.analyze(model, batches, metrics).units, nl.analyze(other, batches, metrics).units
        assert_frame_equal(found, twin)
    assert nl.evaluate(model, batches) == nl.evaluate(other, batches)
    pruned = nl.prune(model, "taylor", 0.5, data=batches)
    assert pruned.plan.removed == nl.prune(other, "taylor", 0.5, data=batches).plan.removed
    assert all(torch.equal(x, kept) for (x, _), kept in zip(batches, before, strict=True))


class Shared(nn.Module):
    """Reads a table that all samples share."""

    def __init__(self, use):
        super().__init__()
        self.a, self.b, self.use = nn.Linear(3, 5), nn.Linear(5, 3), use

    def forward(self, x, table):
        return self.b(self.use(self.a(x), table))


def shared(samples, rows=5):
    generator = torch.Generator().manual_seed(0)
    x, table = torch.randn(samples, 3, generator=generator), torch.randn(rows, 5, generator=generator)
    return [{"x": x, "table": table, "labels": torch.arange(samples) % 3}]


def test_a_table_with_as_many_rows_as_samples_is_not_taken_for_one_row_per_sample(recwarn):
    model = built(lambda: Shared(lambda y, table: y @ table.T))
    with pytest.raises(
        ValueError, match="it takes all 5 samples: table has 5 rows, too, and was cut as if each were of one sample"
    ):
        nl.analyze(model, shared(5), ["rq"])
    assert nl.analyze(model, shared(7), ["rq"]).units["rq"].notna().all()  # the way out
    summed = built(lambda: Shared(lambda y, table: y + table.sum(0)))
    nl.analyze(summed, shared(6), ["rq"])
    assert not recwarn.list
    with pytest.warns(
        UserWarning, match="if table, which has 5 rows for 5 samples, is shared by all of them, give batches of another"
    ):
        nl.analyze(summed, shared(5), ["rq"])
    own = built(lambda: Shared(lambda y, table: y + table))
    nl.analyze(own, shared(5), ["rq"])
    assert not recwarn.list
