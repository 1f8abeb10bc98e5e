"""Checkpoints are written complete or not at all, and a training does not continue from a damaged one."""

import errno
import re
import tempfile

import pytest
import torch
from command import command
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Trainer

from nodelens.results.files import MANIFEST, checked
from nodelens.training import checkpoints
from nodelens.training.checkpoints import AtomicCheckpointIO, damage, to_resume_from, write_atomically

STATE = {"state_dict": {"w": torch.arange(100_000.0)}, "epoch": 3}
WORDS = ("trainer.max_epochs=3", "logger=none", "dataset.batch_size=200")


def full_disk(state, file):
    file.write(b"a part of the checkpoint")
    raise OSError(errno.ENOSPC, "No space left on device")


def test_the_folder_of_temporary_files_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "mkstemp", lambda *_, **__: pytest.fail("a temporary file elsewhere"))
    AtomicCheckpointIO().save_checkpoint(STATE, tmp_path / "new/last.ckpt")
    assert torch.equal(torch.load(tmp_path / "new/last.ckpt", weights_only=True)["state_dict"]["w"], STATE["state_dict"]["w"])
    assert {p.name for p in (tmp_path / "new").iterdir()} == {"last.ckpt", MANIFEST}


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    path = tmp_path / "best.ckpt"
    AtomicCheckpointIO().save_checkpoint(STATE, path)
    before = path.read_bytes()
    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left") as caught:
        AtomicCheckpointIO().save_checkpoint(STATE, path)
    assert caught.value.filename == str(path)
    assert {p.name for p in tmp_path.iterdir()} == {"best.ckpt", MANIFEST}
    assert checked(path).read_bytes() == before


def test_object_storage_is_written_by_lightning(monkeypatch):
    AtomicCheckpointIO().save_checkpoint(STATE, "memory://checkpoints/last.ckpt")
    found = AtomicCheckpointIO().load_checkpoint("memory://checkpoints/last.ckpt", weights_only=True)
    assert found["epoch"] == 3


def test_the_writer_that_a_user_chose_stays():
    class Own(TorchCheckpointIO):
        pass

    for plugins, kind in (([], AtomicCheckpointIO), ([Own()], Own)):
        trainer = Trainer(accelerator="cpu", logger=False, plugins=plugins)
        write_atomically(trainer)
        assert type(trainer.strategy.checkpoint_io) is kind


def harm(path, how):
    content = bytearray(path.read_bytes())
    if how == "flipped":
        content[len(content) // 2] ^= 1
    path.write_bytes({"empty": b"", "half": content[: len(content) // 2], "flipped": content}[how])


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("empty", "it is 0 bytes long and not a complete checkpoint"),
        ("half", r"it is \d{6} bytes long and not a complete checkpoint"),
        ("flipped", "the checksum of its record .*data/0 is wrong"),
    ],
)
def test_a_damaged_checkpoint_is_found_and_the_one_before_is_taken(how, words, tmp_path):
    for name in ("best", "previous", "last"):
        AtomicCheckpointIO().save_checkpoint(STATE, tmp_path / f"{name}.ckpt")
    last, previous, best = (tmp_path / f"{name}.ckpt" for name in ("last", "previous", "best"))
    assert to_resume_from(tmp_path) == (last, [])
    harm(last, how)
    taken, lines = to_resume_from(tmp_path)
    assert taken == previous
    assert re.fullmatch(f"{re.escape(str(last))} is damaged: {words}", "".join(lines))
    previous.unlink()
    assert to_resume_from(tmp_path)[0] == best
    harm(best, how)
    with pytest.raises(ValueError, match=r"last.ckpt is damaged: .*; .*best.ckpt is damaged: .*; no other checkpoint is there"):
        to_resume_from(tmp_path)


def test_without_a_last_checkpoint_training_starts_anew(tmp_path):
    assert to_resume_from(tmp_path / "missing") == (None, [])
    AtomicCheckpointIO().save_checkpoint(STATE, tmp_path / "best.ckpt")
    assert to_resume_from(tmp_path) == (None, [])
    AtomicCheckpointIO().save_checkpoint(STATE, tmp_path / "previous.ckpt")  # last.ckpt was about to be renamed
    assert to_resume_from(tmp_path) == (tmp_path / "previous.ckpt", [])


def test_a_sharded_checkpoint_and_one_that_is_gone(tmp_path):
    (tmp_path / "last.ckpt").mkdir()
    assert damage(tmp_path / "last.ckpt") is None
    assert "No such file" in damage(tmp_path / "none.ckpt")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert command("train", *WORDS, f"hydra.run.dir={folder}").code == 0
    return weights(folder)


def weights(run):
    return torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("call", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_training_continues_after_a_full_disk(call, whole, quiet_home, monkeypatch):
    """The second and third file are last.ckpt of the first epoch and best.ckpt of the second."""
    save, calls = torch.save, []

    def fails_once(state, file):
        calls.append(file)
        return full_disk(state, file) if len(calls) == call else save(state, file)

    monkeypatch.setattr(checkpoints.torch, "save", fails_once)
    ended = command("train", *WORDS, "hydra.run.dir=run")
    assert ended.code == 1
    name = {2: "new", 3: "best"}[call]
    assert ended.err.strip() == (
        f"nodelens: {quiet_home}/run/checkpoints/{name}.ckpt: No space left on device; free some space, or choose another folder"
    )
    assert not list((quiet_home / "run").rglob("*.part"))
    ended = command("train", *WORDS, "hydra.run.dir=run")
    assert ended.code == 0, ended.err
    assert same(weights(quiet_home / "run"), whole)


def test_a_damaged_last_checkpoint_is_said_and_the_one_before_continues(whole, quiet_home, monkeypatch):
    def stop(self):
        if self.current_epoch == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("nodelens.models.classifier.Classifier.on_train_epoch_start", stop)
    assert command("train", *WORDS, "hydra.run.dir=run").code == 1
    monkeypatch.undo()
    monkeypatch.chdir(quiet_home)
    kept = quiet_home / "run/checkpoints"
    assert {p.name for p in kept.iterdir()} == {"best.ckpt", "last.ckpt", "previous.ckpt", MANIFEST}
    harm(kept / "last.ckpt", "flipped")
    ended = command("train", *WORDS, "hydra.run.dir=run")
    assert ended.code == 0, ended.err
    words = " ".join(ended.out.split())
    assert re.search(r"warning: \S*last.ckpt is damaged: the checksum of its record \S+ is wrong; training continues from", words)
    assert "previous.ckpt" in words
    assert same(weights(quiet_home / "run"), whole)
    assert {p.name for p in kept.iterdir()} == {"best.ckpt", "last.ckpt", MANIFEST}
