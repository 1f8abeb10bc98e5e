"""The loss and accuracy of each epoch are kept with any logger, and a resumed training continues them."""

import pytest
from command import command
from interrupted import BATCHES, fit
from pandas.testing import assert_frame_equal

from nodelens.report.training_figures import loss
from nodelens.results.training_history import HISTORY, history_of, read_history
from nodelens.training.history import History

STEPS = {"every_n_train_steps": 1, "save_top_k": -1}


def test_a_training_without_a_logger_shows_its_loss_and_accuracy(quiet_home):
    ended = command("train", "trainer.max_epochs=2", "logger=[none]", "hydra.run.dir=run")
    assert ended.code == 0, ended.err
    found = history_of(quiet_home / "run")
    assert list(found.index) == [0, 1]
    assert {"train/loss", "train/acc", "val/loss", "val/acc"} <= set(found)
    assert found.notna().all(axis=None)
    page = (quiet_home / "run/report.html").read_text()
    assert "How the training went" in page
    assert "Training was resumed" not in page


@pytest.mark.filterwarnings("ignore")  # of Lightning, on workers, intervals and existing folders
def test_a_resumed_training_has_the_rows_of_the_undisturbed_one(tmp_path):
    def history(name, *steps, **options):
        for step in (*steps, None):
            fit(tmp_path / name, step, resume=True, keep=STEPS, more=[History(tmp_path / name / HISTORY)], **options)
        return read_history(tmp_path / name / HISTORY)

    whole = history("whole")
    assert list(whole.index) == [0, 1, 2]
    assert (whole["batches"] == BATCHES).all()
    assert whole["train/loss"].is_monotonic_decreasing
    within = history("within", 11)
    assert_frame_equal(within.loc[[0, 2]], whole.loc[[0, 2]])
    assert within["val/loss"][1] == whole["val/loss"][1]
    assert 0 < within["batches"][1] < BATCHES
    assert "resumed within epoch 1:" in loss(within).caption


@pytest.mark.filterwarnings("ignore")
def test_epochs_without_validation_have_no_value_of_an_earlier_one(tmp_path):
    fit(tmp_path, more=[History(tmp_path / HISTORY)], check_val_every_n_epoch=2)
    assert read_history(tmp_path / HISTORY)["val/loss"].notna().tolist() == [False, True, False]


def test_a_damaged_history_is_named(tmp_path):
    (tmp_path / HISTORY).write_text("epoch\n0\n")
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  {HISTORY}\n")
    with pytest.raises(ValueError, match=r"history\.csv is damaged"):
        read_history(tmp_path / HISTORY)
