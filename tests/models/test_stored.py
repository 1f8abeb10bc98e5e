"""Models from folders written by save_pretrained, and errors for unsuitable or missing ones."""

import json
import logging
import time

import pytest
import torch
from torch.testing import assert_close
from transformers.utils import logging as hf_logging

from nodelens.models import resnet, vit


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("resnet")
    torch.manual_seed(0)
    resnet(18, 10, 3, 32, width=8).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def vit_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    vit(10, 3, 8, hidden=6, depth=1, mlp=4).save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("stem", ["small", "imagenet"])
def test_a_stored_resnet_loads_unchanged(stem, tmp_path):
    torch.manual_seed(1)
    net = resnet(18, 10, 3, 32, stem=stem, width=8).eval()
    net.save_pretrained(tmp_path)
    again = resnet(18, 10, 3, 32, path=str(tmp_path)).eval()
    x = torch.randn(2, 3, 32, 32)
    assert_close(again(x).logits, net(x).logits, rtol=0, atol=0)


def test_a_stored_vit_loads_unchanged(vit_folder):
    torch.manual_seed(0)
    x, net = torch.ones(2, 3, 8, 8), vit(10, 3, 8, hidden=6, depth=1, mlp=4).eval()
    assert_close(vit(10, 3, 8, path=vit_folder).eval()(x).logits, net(x).logits, rtol=0, atol=0)


def test_other_classes_get_a_new_head_and_one_log_line(folder, caplog, capsys):
    verbosity = hf_logging.get_verbosity()
    with caplog.at_level(logging.INFO):
        net = resnet(18, 4, 3, 32, path=folder)
    assert caplog.messages == [f"'{folder}' has a head of 10 classes; it is replaced by a new one of 4"]
    assert net(torch.ones(1, 3, 32, 32)).logits.shape == (1, 4)
    stored = resnet(18, 10, 3, 32, path=folder).resnet.state_dict()
    assert_close(dict(net.resnet.state_dict()), dict(stored), rtol=0, atol=0)
    assert hf_logging.get_verbosity() == verbosity
    assert hf_logging.is_progress_bar_enabled()
    assert "REPORT" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"channels": 1}, "stored with channels 3, but channels 1 is needed"),
        ({"depth": 34}, r"stored with depths \[2, 2, 2, 2\], but depths \[3, 4, 6, 3\] is needed"),
        ({"stem": "imagenet"}, "stored with stem small, but stem imagenet is needed"),
    ],
    ids=["channels", "depth", "stem"],
)
def test_a_resnet_of_another_shape_raises(options, words, folder):
    with pytest.raises(ValueError, match=words):
        resnet(**{"depth": 18, "classes": 10, "channels": 3, "size": 32, "path": folder} | options)


def test_a_vit_of_another_shape_raises(folder, vit_folder):
    with pytest.raises(ValueError, match=r"stored with size 8, but size 32 is needed"):
        vit(10, 3, 32, path=vit_folder)
    with pytest.raises(ValueError, match=r"stored with patch 1, but patch 2 is needed"):
        vit(10, 3, 8, patch=2, path=vit_folder)
    with pytest.raises(ValueError, match=r"holds a model of type resnet, but vit is needed"):
        vit(10, 3, 8, path=folder)


def test_weights_that_do_not_fit_their_config_raise(tmp_path, folder):
    resnet(18, 10, 3, 32, width=8).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"embedding_size": 16}))
    for classes in (10, 4):  # a new head does not make the rest lenient
        with pytest.raises(ValueError, match=r"do not fit"):
            resnet(18, classes, 3, 32, path=str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"cannot be read"):
        resnet(18, 10, 3, 32, path=str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"it has a config.json and no model.safetensors"):
        resnet(18, 10, 3, 32, path=str(tmp_path))


def test_an_unavailable_model_raises_one_line_quickly(tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    start = time.monotonic()
    with pytest.raises(
        OSError,
        match=r"no model to load at 'nobody/nothing': it is not a local folder, it is not in the "
        "cache, and the hub cannot be reached; give a local folder",
    ):
        resnet(18, 10, 3, 32, path="nobody/nothing")
    with pytest.raises(OSError, match=r"the folder holds no readable config.json"):
        vit(10, 3, 8, path=str(tmp_path))
    assert time.monotonic() - start < 5
