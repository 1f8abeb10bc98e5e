"""Image folders, parquet, save_to_disk and streams give equal samples and numbers; error messages."""

import time
from functools import partial

import datasets
import lightning
import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from nodelens.data import Hub, ImageBatch
from nodelens.data.columns import decoded
from nodelens.data.stream import Stream
from nodelens.models import CNN, Classifier

FORMS = ("saved", "parquet", "imagefolder")


def gathered(loader) -> ImageBatch:
    return ImageBatch(*(torch.cat(part) for part in zip(*loader, strict=True)))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_pictures(form, stored, pictures):
    data = Hub(stored[form])
    whole = gathered(data.loader("all", batch_size=8))
    assert (data.classes, data.channels, data.size, data.unsplit) == (3, 3, 10, form != "imagefolder")
    assert torch.equal(whole.ids, torch.arange(41))
    shown = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    if form == "imagefolder":  # in the order of its folders
        assert data.indices["test"].tolist() == list(range(30, 41))
        order = [i for part in (range(30), range(30, 41)) for kind in range(3) for i in part if i % 3 == kind]
        shown = shown[order]
        assert whole.y.tolist() == [i % 3 for i in order]
    assert_close(whole.x, shown)


def test_a_single_parquet_file_is_read(stored):
    assert len(gathered(Hub(stored["parquet"] + "/train.parquet").loader("all")).y) == 41


STREAMS = [(form, workers) for form in FORMS for workers in (0, 2)]
FAST = [(form, 2 if form == "parquet" else 0) for form in FORMS]


@pytest.mark.parametrize(
    ("form", "workers"), [pytest.param(*case, marks=() if case in FAST else pytest.mark.slow) for case in STREAMS]
)
def test_a_stream_equals_the_table(form, workers, stored):
    options = {"size": 8, "mean": 0.5, "std": 0.25, "batch_size": 4}
    table, stream = Hub(stored[form], **options), Hub(stored[form], streaming=True, workers=workers, **options)
    for split in ("train", "val", "test", "calibration", "all"):
        for rank in range(3):
            rows, flow = list(table.loader(split, rank, 3)), list(stream.loader(split, rank, 3))
            assert len(rows) == len(flow) == len(stream.loader(split, rank, 3))
            for a, b in zip(rows, flow, strict=True):
                assert_close(tuple(a), tuple(b), rtol=0, atol=0)
    assert list(stream.loader("val", 5, 6)) == []


@pytest.mark.parametrize("buffer", [5, 1024])
def test_a_stream_trains_in_another_order_each_epoch(buffer, stored, monkeypatch):
    monkeypatch.setattr("nodelens.data.stream._BUFFER", buffer)
    data = Hub(stored["parquet"], streaming=True, batch_size=4)
    loader = data.train_dataloader()
    first, second = gathered(loader).ids, gathered(loader).ids
    assert not torch.equal(first, second)
    for order in (first, second):
        assert torch.equal(order.sort().values, data.indices["train"])
    assert torch.equal(gathered(Hub(stored["parquet"], streaming=True, batch_size=4).train_dataloader()).ids, first)


def test_processes_of_a_trainer_see_equally_many_streamed_batches(stored):
    data = Hub(stored["parquet"], streaming=True, calibration=0)
    shared = {"train": [], "test": []}
    for rank in range(3):
        data.trainer = type("Trainer", (), {"world_size": 3, "global_rank": rank})()
        shared["train"].append(data._shared("train", even=True))
        shared["test"].append(data._shared("test"))
    for split, parts in shared.items():
        assert len({len(part) for part in parts}) == 1
        seen = set(torch.cat(parts).tolist())
        lost = set(data.indices[split].tolist()) - seen
        assert seen <= set(data.indices[split].tolist())
        assert len(lost) < (3 if split == "train" else 1)


def test_a_stream_that_ends_early_raises(stored):
    data = Hub(stored["parquet"], streaming=True)
    data.setup()
    data.source.counts[0] = 50
    with pytest.raises(ValueError, match=r"declares 50 samples, but its stream ended after 41; set streaming"):
        list(Stream(data.source, torch.tensor([49]), data._convert(), 4, 3))


def test_fingerprints_change_with_the_samples(stored, table, tmp_path):
    table.select(range(40)).save_to_disk(str(tmp_path / "fewer"))
    assert Hub(stored["saved"]).fingerprint() == Hub(stored["saved"]).fingerprint()
    assert Hub(stored["saved"]).fingerprint() != Hub(str(tmp_path / "fewer")).fingerprint()
    streams = [Hub(path, streaming=True).fingerprint() for path in (stored["saved"], str(tmp_path / "fewer"))]
    assert streams[0] != streams[1]


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
@pytest.mark.parametrize("streaming", [False, True])
def test_a_trainer_runs_on_it(streaming, stored, tmp_path):
    data = Hub(stored["imagefolder"], streaming=streaming, batch_size=8)
    module = Classifier(CNN(3, 3, [4]), partial(torch.optim.SGD, lr=0.1))
    run = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    run.fit(module, data)
    assert 0 <= run.test(module, data, verbose=False)[0]["test/acc"] <= 1


def test_an_unavailable_dataset_raises_one_line_quickly(monkeypatch):
    def unreachable(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    start = time.monotonic()
    words = (
        r"^dataset 'nobody/nothing' is not on this machine and the hub cannot be reached; give the path of "
        r"a folder with images or parquet$"
    )
    for streaming in (False, True):
        with pytest.raises(FileNotFoundError, match=words):
            Hub("nobody/nothing", streaming=streaming).setup()
    assert time.monotonic() - start < 5
    assert datasets.config.HF_HUB_OFFLINE in (True, False)


def test_a_missing_or_empty_folder_raises(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"no folder at {tmp_path.resolve()}/no; set path"):
        Hub(str(tmp_path / "no")).setup()
    with pytest.raises(FileNotFoundError, match=rf"no data set at {tmp_path.resolve()}; path is a folder"):
        Hub(str(tmp_path)).setup()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"train_split": "all"}, "has no split 'all', it has train; set train_split"),
        ({"test_split": "valid"}, "has no split 'valid', it has train; set test_split"),
        ({"test_split": "train"}, "train and test are the same split 'train'"),
        ({"image_key": "img"}, "has no column 'img', it has image, label; set image_key"),
        ({"label_key": "fine"}, "has no column 'fine', it has image, label; set label_key"),
        ({"classes": 2}, "labels run from 0 to 2, classes is 2; set classes=3"),
    ],
)
def test_missing_splits_and_columns_raise(options, words, stored):
    with pytest.raises(ValueError, match=words):
        Hub(stored["saved"], **options).setup()


def test_labels_beyond_the_classes_raise_in_a_stream(stored):
    data = Hub(stored["saved"], classes=2, streaming=True)
    with pytest.raises(ValueError, match=r"labels run from 0 to 2, classes is 2"):
        list(data.loader("all"))


def test_several_or_no_label_columns_raise(table, tmp_path):
    two = table.add_column("coarse", [0] * 41).cast_column("coarse", datasets.ClassLabel(names=["animal"]))
    two.save_to_disk(str(tmp_path / "two"))
    with pytest.raises(ValueError, match=r"has several label columns \(label, coarse\).*set label_key"):
        Hub(str(tmp_path / "two")).setup()
    assert gathered(Hub(str(tmp_path / "two"), label_key="coarse").loader("all")).y.sum() == 0
    table.remove_columns("label").save_to_disk(str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"has no label column, its columns are image; set label_key"):
        Hub(str(tmp_path / "none")).setup()
    table.remove_columns("label").add_column("label", ["a"] * 41).save_to_disk(str(tmp_path / "words"))
    with pytest.raises(ValueError, match=r"column 'label' is (large_)?string; labels are integers"):
        Hub(str(tmp_path / "words")).setup()


def test_plain_bytes_and_integers_are_read(table, tmp_path):
    stored = table.cast_column("image", datasets.Image(decode=False))
    rows = [{"img": {"bytes": row["image"]["bytes"], "path": ""}, "target": row["label"]} for row in stored]
    plain = datasets.Dataset.from_list(rows)
    plain.save_to_disk(str(tmp_path / "plain"))
    for streaming in (False, True):
        data = Hub(str(tmp_path / "plain"), streaming=streaming, classes=3 if streaming else None)
        assert gathered(data.loader("all")).x.shape == (41, 3, 10, 10)
        assert data.classes == 3
    with pytest.raises(ValueError, match=r"the number of classes of the source is unknown; set classes"):
        Hub(str(tmp_path / "plain"), streaming=True).setup()


def test_image_modes():
    grey = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4))
    assert decoded(grey).shape == (1, 3, 4)
    assert decoded(grey).flatten().tolist() == list(range(12))
    assert decoded(grey.convert("RGBA")).shape == (3, 3, 4)
    assert decoded(grey.convert("1")).shape == (1, 3, 4)
    with pytest.raises(ValueError, match=r"an image has mode I;16; only eight bits per channel are supported"):
        decoded(Image.fromarray(np.ones((3, 4), np.uint16)))
