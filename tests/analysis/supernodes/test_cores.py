"""Several cores of a layer, the halo of each, and redundancy within and between halos."""

import numpy as np
import pytest
import torch
from families import build
from torch.testing import assert_close

import nodelens as nl
from nodelens.analysis.supernodes.cores import core_rows, cores_of, halos_of
from nodelens.analysis.supernodes.supernode_result import load_supernodes


def planted():
    """Outgoing weights (width, units): units 0 to 2 write to the outputs 0 to 3, units 3 and 4 to 4 to 7; 5 and 6 follow them."""
    g = torch.Generator().manual_seed(0)
    columns = 0.01 * torch.rand(8, 8, generator=g, dtype=torch.float64)
    columns[:4, [0, 1, 2, 5]] += torch.rand(4, 1, generator=g, dtype=torch.float64) + 0.5
    columns[4:, [3, 4, 6]] += torch.rand(4, 1, generator=g, dtype=torch.float64) + 0.5
    return columns * torch.tensor([1, 5, 2, 9, 1, 1, 3, 1.0]).double()


def test_supernodes_that_write_to_the_same_outputs_are_one_core():
    supernodes = torch.arange(5)
    assert cores_of("fc", planted(), supernodes, 2).tolist() == [0, 0, 0, 1, 1]
    flipped = planted()[:, [3, 4, 0, 1, 2, 5, 6, 7]]
    assert cores_of("fc", flipped, supernodes, 2, seed=3).tolist() == [1, 1, 0, 0, 0], (
        "the larger one is core 0, whatever the order"
    )


def test_a_unit_of_the_halo_belongs_to_the_core_to_whose_outputs_it_writes():
    cores = torch.tensor([0, 0, 0, 1, 1])
    own = halos_of(planted(), torch.arange(5), cores, torch.tensor([5, 6]), 4, None)
    assert own.tolist() == [0, 1]


def test_more_cores_than_directions_are_refused():
    columns = planted()
    columns[:, 1] = 2 * columns[:, 0]
    with pytest.raises(
        ValueError, match="group 'fc' has 2 supernodes of 1 different directions, too few for 2 cores: set cores to 1, raise"
    ):
        cores_of("fc", columns, torch.tensor([0, 1]), 2)
    with pytest.raises(ValueError, match="supernodes: cores is 0; it is a number of cores per group, 1 or more"):
        nl.get_analysis("supernodes", cores=0)


def test_more_cores_than_supernodes_are_refused_before_the_data_are_read():
    class Counted(list):
        """Batches that count how many of them are read."""

        read = 0

        def __iter__(self):
            for batch in super().__iter__():
                self.read += 1
                yield batch

    ids = torch.randint(3, 30, (2, 8), generator=torch.Generator().manual_seed(0))
    data = Counted([{"input_ids": ids, "labels": ids}] * 3)
    words = r"group '\S+' has 1 supernode, too few for 2 cores: set cores to 1, raise supernode_fraction or top_k"
    with pytest.raises(ValueError, match=words):
        nl.get_analysis("supernodes", cores=2, top_k=1, groups=4)(build("llama 8/4")[0], data)
    assert data.read == 1, "the first batch tells the groups of the model"


def test_redundancy_within_a_halo_is_compared_with_that_between_halos():
    nats = torch.arange(64, dtype=torch.float64).reshape(8, 8)
    nats = nats + nats.T
    halo, own = torch.tensor([5, 6, 7]), torch.tensor([0, 0, 1])
    one, other = core_rows("fc", torch.tensor([0, 3]), torch.tensor([0, 1]), halo, own, lambda a, b: nats[a][:, b])
    assert one["within"] == nats[5, 6]
    assert one["between"] == (nats[5, 7] + nats[6, 7]) / 2
    assert one["halo_redundancy"] == one["within"] / one["between"]
    assert one["to_core"] == (nats[5, 0] + nats[6, 0]) / 2
    assert one["to_other_cores"] == (nats[5, 3] + nats[6, 3]) / 2
    assert np.isnan(other["within"])
    assert (one["supernodes"], one["halo"], other["halo"]) == (1, 2, 1)


def test_an_analysis_has_a_core_of_each_unit_and_a_row_per_core(tmp_path):
    g = torch.Generator().manual_seed(0)
    data = [{"input_ids": ids, "labels": ids} for ids in (torch.randint(3, 30, (2, 8), generator=g) for _ in range(4))]
    options = {"supernode_fraction": 0.15, "halo_fraction": 0.3, "connectivity_topk": 6, "draws": 3, "groups": 4, "resamples": 2}
    model = build("llama 8/4")[0]
    found = nl.get_analysis("supernodes", cores=2, **options)(model, data)
    plain = nl.get_analysis("supernodes", **options)(model, data)
    assert found.units.drop(columns="core").equals(plain.units), "no other number changes"
    assert not len(plain.cores)
    assert found.cores[["layer", "core"]].to_numpy().tolist() == [[n, k] for n in found.layers.index for k in (0, 1)]
    for name, rows in found.cores.groupby("layer", sort=False):
        units = found.units.loc[name]
        counts = units.loc[units["supernode"], "core"].value_counts()
        assert rows["supernodes"].tolist() == counts.sort_index().tolist()
        assert rows["supernodes"].is_monotonic_decreasing
        assert rows["halo"].tolist() == [int((units.loc[units["halo"], "core"] == k).sum()) for k in (0, 1)]
        assert (units.loc[~units["supernode"] & ~units["halo"], "core"] == -1).all()
    assert "4 cores in 2 layers: redundancy of two units of one halo" in found.summary()
    found.save(tmp_path)
    assert load_supernodes(tmp_path).cores.equals(found.cores)
    (tmp_path / "cores.parquet").unlink()
    assert not len(load_supernodes(tmp_path).cores), "results of an earlier version have none"
    assert_close(torch.tensor(found.cores["halo_redundancy"]), torch.tensor(found.cores["within"] / found.cores["between"]))
