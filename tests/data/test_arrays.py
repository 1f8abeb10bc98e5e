"""Digits and .npz files: loaders, sharding and error messages."""

import os
import pickle
from functools import partial
from pathlib import Path

import lightning
import numpy as np
import pytest
import torch
from torch.testing import assert_close

from nodelens.data import Digits, ImageBatch, ImageData, Npz
from nodelens.models import MLP, Classifier

DATA = os.environ.get("NODELENS_DATA")
needs_data = pytest.mark.skipif(DATA is None, reason="NODELENS_DATA does not name the folder with the real data")


def arrays(n: int = 30, seed: int = 0) -> dict[str, np.ndarray]:
    dice = np.random.default_rng(seed)
    return {"x": dice.integers(0, 256, (n, 8, 8, 3), dtype=np.uint8), "y": np.arange(n, dtype=np.uint8) % 4}


def npz(folder: Path, name: str = "a.npz", **stored: np.ndarray) -> str:
    np.savez(folder / name, **(stored or arrays()))
    return str(folder / name)


def gathered(loader) -> ImageBatch:
    return ImageBatch(*(torch.cat(part) for part in zip(*loader, strict=True)))


def test_digits_have_the_documented_shapes_and_scale():
    data = Digits()
    data.setup()
    source = data.source
    data.setup("fit")
    assert data.source is source
    assert (data.classes, data.channels, data.size, data.unsplit) == (10, 1, 8, False)
    batch = next(iter(data.val_dataloader()))
    assert isinstance(batch, ImageBatch)
    assert batch.x.shape == (64, 1, 8, 8)
    assert batch.x.dtype == torch.float32
    assert batch.y.dtype == batch.ids.dtype == torch.int64
    assert batch.x.min() >= 0
    assert batch.x.max() == 1


def test_loaders_have_a_fixed_order_and_training_does_not():
    data = Digits()
    for split in ("train", "val", "test", "calibration"):
        assert torch.equal(gathered(data.loader(split)).ids, data.indices[split])
    assert len(gathered(data.loader("all")).ids) == 1797
    loader, again = data.train_dataloader(), Digits().train_dataloader()
    first, second = gathered(loader).ids, gathered(loader).ids
    assert not torch.equal(first, second)
    assert torch.equal(first.sort().values, second.sort().values)
    assert torch.equal(gathered(again).ids, first)


def test_sample_numbers_identify_samples_in_every_loader():
    data, whole = Digits(mean=0.3, std=0.4), gathered(Digits(mean=0.3, std=0.4, seed=9).loader("all"))
    for split in ("val", "calibration"):
        batch = gathered(data.loader(split, batch_size=7))
        assert_close(batch.x, whole.x[batch.ids], rtol=0, atol=0)
        assert torch.equal(batch.y, whole.y[batch.ids])
    assert_close(data.loader("val").dataset[3].x, gathered(data.loader("val")).x[3])


@pytest.mark.parametrize("workers", [0, 2])
def test_three_ranks_see_each_sample_once(workers, tmp_path):
    data = Npz(npz(tmp_path), workers=workers)
    parts = [gathered(data.loader("val", rank, 3, batch_size=2)).ids for rank in range(3)]
    assert [len(part) for part in parts] == [1, 1, 1]
    assert torch.equal(torch.cat(parts).sort().values, data.indices["val"])
    assert list(data.loader("val", 3, 4)) == []


def test_a_single_npz_set_is_split_and_marked_unsplit(tmp_path):
    stored = arrays()
    data = Npz(npz(tmp_path))
    whole = gathered(data.loader("all"))
    assert data.unsplit
    assert (data.classes, data.channels, data.size) == (4, 3, 8)
    assert_close(whole.x, torch.from_numpy(stored["x"]).permute(0, 3, 1, 2).float() / 255)
    assert whole.y.tolist() == stored["y"].tolist()


def test_the_test_set_of_an_npz_file_is_used(tmp_path):
    train, test = arrays(20), arrays(6, seed=1)
    both = npz(tmp_path, "b.npz", x_train=train["x"], y_train=train["y"], x_test=test["x"], y_test=test["y"])
    apart = Npz(npz(tmp_path, "c.npz", **train), test_path=npz(tmp_path, "d.npz", **test))
    for data in (Npz(both), apart):
        batch = gathered(data.loader("test"))
        assert not data.unsplit
        assert batch.ids.tolist() == list(range(20, 26))
        assert_close(batch.x, torch.from_numpy(test["x"]).permute(0, 3, 1, 2).float() / 255)
    assert apart.fingerprint() == Npz(both).fingerprint() != Npz(npz(tmp_path)).fingerprint()


def test_grey_float_images_are_not_rescaled(tmp_path):
    x = np.linspace(-3, 3, 10 * 9 * 9).reshape(10, 9, 9)
    data = Npz(npz(tmp_path, x=x, y=np.arange(10) % 2), channels=3, size=9)
    assert_close(gathered(data.loader("all")).x[:, 2], torch.from_numpy(x).float())


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        ({"x": arrays()["x"]}, "has no array y, it has x; name the arrays x, y, or x_train"),
        ({"a": np.ones(3)}, "has no array x and y, it has a"),
        ({"x_train": arrays()["x"], "y_train": arrays()["y"]}, "has no array x_test and y_test, it has x_train, y_train"),
        (arrays() | {"y": np.arange(29)}, "x has 30 samples and y has 29; the numbers must be equal"),
        (arrays() | {"y": np.ones(30)}, r"y is float64 \(30,\); labels are integers"),
        (arrays() | {"y": np.ones((30, 1), int)}, r"y is int64 \(30, 1\)"),
        (arrays() | {"x": arrays()["x"].astype(int)}, "x is int64; images are uint8"),
        (arrays() | {"x": np.moveaxis(arrays()["x"], -1, 1)}, r"shape \(30, 3, 8, 8\).*numpy.moveaxis\(x, 1, -1\)"),
        (arrays() | {"x": np.ones((30, 4))}, r"x has shape \(30, 4\); images are"),
        (arrays() | {"y": np.arange(30) - 1}, "labels run from -1 to 28, .*remove the samples without a label"),
    ],
)
def test_unsuitable_arrays_raise(stored, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        Npz(npz(tmp_path, **stored)).setup()


def test_labels_beyond_the_classes_raise(tmp_path):
    with pytest.raises(ValueError, match=r"labels run from 0 to 3, classes is 3; set classes=4"):
        Npz(npz(tmp_path), classes=3).setup()


def test_a_test_file_of_another_shape_raises(tmp_path):
    other = npz(tmp_path, "b.npz", **arrays() | {"x": np.ones((30, 9, 9, 3), np.uint8)})
    with pytest.raises(ValueError, match=r"images are torch.uint8 \(3, 8, 8\), test images torch.uint8 \(3, 9"):
        Npz(npz(tmp_path), test_path=other).setup()


class Trap:
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def test_pickles_raise_and_are_not_run(tmp_path):
    marker = tmp_path / "marker"
    (tmp_path / "p.npz").write_bytes(pickle.dumps(Trap(marker)))
    objects = npz(tmp_path, "o.npz", x=np.array([Trap(marker)], object), y=np.arange(1))
    (tmp_path / "t.npz").write_bytes(b"text")
    (tmp_path / "e.npz").write_bytes(b"")
    np.save(tmp_path / "n.npy", np.ones(3))
    for path in (objects, *(tmp_path / name for name in ("p.npz", "t.npz", "e.npz", "n.npy"))):
        with pytest.raises(ValueError, match=r"is not an .npz file of plain arrays \(pickled objects are never read\)"):
            Npz(str(path)).setup()
    assert not marker.exists()


def test_a_missing_file_raises_with_its_full_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=rf"no file at {tmp_path.resolve()}/no.npz; set path"):
        Npz("no.npz").setup()


def test_a_source_without_read_raises():
    with pytest.raises(NotImplementedError, match=r"ImageData does not define read"):
        ImageData().setup()


@pytest.fixture
def one_thread():
    """One thread, because on a busy machine synchronising threads makes training 20 times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
@pytest.mark.usefixtures("one_thread")
def test_the_default_learns_the_digits(tmp_path):
    lightning.seed_everything(0, verbose=False)
    module = Classifier(MLP(64, 10, [64, 64]), partial(torch.optim.AdamW, lr=3e-3, weight_decay=0.01))
    run = lightning.Trainer(
        max_epochs=20,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    data = Digits(mean=0.3053, std=0.376)
    run.fit(module, data)
    assert run.test(module, data, verbose=False)[0]["test/acc"] >= 0.95


@needs_data
def test_real_files_are_read():
    mnist = Npz(f"{DATA}/images/mnist.npz", channels=1, mean=0.1307, std=0.3081)
    batch = gathered(mnist.loader("all", batch_size=5000))
    assert len(batch.y) == 70_000
    assert len(mnist.indices["test"]) == 10_000
    assert not mnist.unsplit
    assert abs(batch.x[:60_000].mean()) < 1e-3
    assert abs(batch.x[:60_000].std() - 1) < 1e-3
    cifar = Npz(f"{DATA}/images/cifar10_train4000.npz", test_path=f"{DATA}/images/cifar10_test_first500.npz", size=28)
    assert gathered(cifar.loader("test")).x.shape == (500, 3, 28, 28)
