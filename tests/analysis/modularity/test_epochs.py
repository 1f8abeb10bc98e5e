"""Modules over a training: names that last, stability, and callbacks=measure with analysis=[modularity]."""

import numpy as np
import pandas as pd
import pytest
from command import command

import nodelens as nl
from nodelens.analysis.modularity.comparison import ami
from nodelens.analysis.modularity.epochs import follow_epochs
from nodelens.results.findings import Findings, load_findings

FEW = ("trainer.max_epochs=3", "dataset.calibration=64", "callbacks=measure", "logger=none", "metrics=[]", "analysis=[modularity]")


def epoch(labels):
    """What is found after an epoch, of one layer."""
    index = pd.MultiIndex.from_product([["fc"], range(len(labels))], names=["layer", "unit"])
    rows = {"layer": ["fc"], "association": ["a"], "q": [0.1], "modules": [len(set(labels))]}
    return Findings("modularity", {"modules": pd.DataFrame(rows)}, units=pd.DataFrame({"module_a": labels}, index=index))


def test_modules_keep_their_names_while_their_units_stay():
    found = follow_epochs(
        {
            0: epoch([0, 0, 0, 1, 1, 1, 2, 2, 2]),
            1: epoch([2, 2, 2, 0, 0, 0, 1, 1, 1]),  # renamed
            3: epoch([0, 0, 0, 1, 1, 2, 2, 2, 2]),  # one unit has moved
            4: epoch([0, 0, 0, 0, 0, 1, 1, 1, 1]),  # two modules have merged
            5: epoch([0, 0, 0, 1, 1, 2, 2, 2, 2]),  # and come apart
        },
        shuffles=20,
    )
    labels = found["labels"].pivot(index="unit", columns="epoch", values="module")
    assert labels[0].tolist() == labels[1].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert labels[3].tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2]
    assert labels[4].tolist() == [0, 0, 0, 0, 0, 2, 2, 2, 2]
    assert labels[5].tolist() == [0, 0, 0, 3, 3, 2, 2, 2, 2]  # a name that was given up is not used again
    stability = found["stability"]
    assert stability[["epoch_a", "epoch_b"]].to_numpy().tolist() == [[0, 1], [1, 3], [3, 4], [4, 5]]
    assert stability["alignment"].tolist() == pytest.approx([1, 8 / 9, 7 / 9, 7 / 9])
    assert stability["ami"][1] == pytest.approx(ami([0, 0, 0, 1, 1, 1, 2, 2, 2], [0, 0, 0, 1, 1, 2, 2, 2, 2]))
    assert found["modules"]["epoch"].tolist() == [0, 1, 3, 4, 5]
    assert found.lines[0].startswith("fc, a: AMI between epochs 0 and 1 1.00, between 4 and 5 0.")


def test_an_epoch_without_modules_is_passed_over():
    nothing = Findings("modularity", {"modules": epoch([0, 1])["modules"][:0]})
    found = follow_epochs({0: epoch([0, 0, 1, 1]), 1: nothing, 2: epoch([1, 1, 0, 0])}, shuffles=5)
    assert found["stability"][["epoch_a", "epoch_b", "ami"]].to_numpy().tolist() == [[0, 2, 1]]


def test_one_epoch_has_no_stability(tmp_path):
    found = follow_epochs({0: epoch([0, 0, 1, 1])})
    assert not len(found["stability"])
    assert found["labels"]["module"].tolist() == [0, 0, 1, 1]
    found.save(tmp_path)
    load_findings(tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    home = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        words = ("analysis.modularity.associations=[redundancy]", "analysis.modularity.shuffles=2", "analysis.modularity.starts=1")
        ended = command("train", *FEW, *words, "hydra.run.dir=run", "+trainer.limit_train_batches=4")
    assert ended.code == 0, ended.err
    return home / "run", ended


def test_a_training_has_modules_after_each_epoch(trained):
    folder, _ = trained
    units = [pd.read_parquet(folder / f"epochs/units_{k:03d}.parquet") for k in range(3)]
    found = load_findings(folder / "epochs/modularity")
    assert sorted(found["modules"]["epoch"].unique()) == [0, 1, 2]
    for k, table in enumerate(units):
        after = load_findings(folder / f"epochs/modularity/{k:03d}")
        columns = table["module_redundancy"].astype(int)
        pd.testing.assert_series_equal(after.units["module_redundancy"], columns, check_dtype=False)
        assert after["modules"]["q"].tolist() == found["modules"].query("epoch == @k")["q"].tolist()
    layer = found["stability"]["layer"][0]
    first, second = (table.loc[layer, "module_redundancy"].astype(int).to_numpy() for table in units[:2])
    assert found["stability"]["ami"][0] == pytest.approx(ami(first, second))


def test_stability_is_printed_and_drawn(trained):
    folder, ended = trained
    page = (folder / "report.html").read_text()
    assert "data-name='modularity-q'" in page
    assert "data-name='modularity-stability'" in page
    assert "data-name='modularity-units'" in page
    assert "modularity: " in ended.out
    assert "AMI between epochs 0 and 1" in ended.out


def test_epochs_are_compared_by_the_public_function(trained):
    folder, _ = trained
    tables = {str(k): pd.read_parquet(folder / f"epochs/units_{k:03d}.parquet") for k in range(3)}
    found = nl.compare_modules(tables, shuffles=9)
    assert {(a, b) for a, b in found[["run_a", "run_b"]].to_numpy()} == {("0", "1"), ("0", "2"), ("1", "2")}
    assert np.isfinite(found["alignment"]).all()


def test_an_analysis_without_the_callback_is_refused(quiet_home):
    ended = command("train", "analysis=[modularity]", "logger=none", "trainer.max_epochs=1")
    assert ended.code != 0
    assert "analysis=[modularity] runs after each epoch that callbacks=measure measures: add callbacks=measure" in ended.err
