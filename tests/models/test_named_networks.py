"""Networks of torchvision and timm by name. Stand-ins for the two packages, which are an extra, tell what is asked of them."""

import sys
import types

import pytest
import torch
from command import command
from torch import nn

import nodelens as nl
from nodelens.models import timm_model, torchvision_model


@pytest.fixture
def stand_ins(monkeypatch):
    asked = []

    def build(name, **options):
        asked.append((name, options))
        if name == "resnet18" and "img_size" in options:
            raise TypeError("unexpected keyword argument 'img_size'")
        if name == "vit_tiny" and options["img_size"] % 16:
            raise AssertionError("the size is no multiple of the patch")
        return nn.Sequential(nn.Flatten(), nn.LazyLinear(options.get("num_classes", 1000)))

    weights = types.SimpleNamespace(DEFAULT=types.SimpleNamespace(meta={"categories": ["cat"] * 1000}))
    models = types.SimpleNamespace(
        list_models=lambda module: ["vgg16", "alexnet"], get_model=build, get_model_weights=lambda name: weights
    )
    for name, module in {
        "torchvision": types.SimpleNamespace(models=models),
        "timm": types.SimpleNamespace(list_models=lambda: ["resnet18", "vit_tiny", "convnext_tiny"], create_model=build),
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    return asked


def test_a_network_is_built_for_the_classes_channels_and_size_of_the_data(stand_ins):
    torchvision_model("vgg16", 10)
    torchvision_model("vgg16", 1000, pretrained=True)
    timm_model("vit_tiny", 10, 1, 32)
    timm_model("resnet18.a1_in1k", 10, 1, 32)
    of_timm = {"num_classes": 10, "in_chans": 1, "pretrained": False}
    assert stand_ins[0] == ("vgg16", {"weights": None, "num_classes": 10})
    assert stand_ins[1][1].keys() == {"weights"}
    assert stand_ins[2] == ("vit_tiny", {"img_size": 32, **of_timm})
    assert stand_ins[3][0] == "resnet18.a1_in1k"


def test_a_network_without_a_size_takes_any(stand_ins):
    timm_model("resnet18", 10, 1, 32)
    assert [set(options) & {"img_size"} for _, options in stand_ins] == [{"img_size"}, set()]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: torchvision_model("vgg61", 10), r"torchvision has no model 'vgg61'\. Did you mean 'vgg16'\? It has 2 models"),
        (lambda: timm_model("convnxt_tiny", 10), r"timm has no model 'convnxt_tiny'\. Did you mean 'convnext_tiny'\?"),
        (lambda: torchvision_model("vgg16", 10, 1), "vgg16 reads 3 channels, the data have 1: set channels=3"),
        (lambda: torchvision_model("vgg16", 10, pretrained=True), "for 1000 classes, the data have 10: set pretrained=False"),
        (lambda: timm_model("vit_tiny", 10, 1, 30), "vit_tiny cannot be built for 1 channels of size 30: the size is no multiple"),
    ],
)
def test_what_cannot_be_built_is_said(call, words, stand_ins):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("package", ["torchvision", "timm"])
def test_the_extra_is_named_where_the_package_is_missing(package, monkeypatch, quiet_home):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr("nodelens.models.zoo.import_module", missing)
    ended = command("analyze", f"model={package}", "model.name=vgg16", "dataset.channels=3")
    assert ended.err == f"nodelens: model={package} needs {package}: pip install nodelens[zoo]\n"
    assert command("analyze", f"model={package}").err == "nodelens: model.name has no value: give model.name=...\n"


@pytest.mark.parametrize(("package", "name"), [("torchvision", "squeezenet1_1"), ("timm", "test_resnet")])
def test_a_real_network_is_analysed_pruned_and_loaded_again(package, name, quiet_home):
    pytest.importorskip(package)
    torch.manual_seed(0)
    words = ("dataset.channels=3", "dataset.size=32", "dataset.calibration=16", "metrics=[activation_mean]")
    ended = command("analyze", f"model={package}", f"model.name={name}", *words, "hydra.run.dir=run")
    assert ended.code == 0, ended.err
    assert (quiet_home / "run/units.parquet").is_file()
    ended = command(
        *("prune", f"model={package}", f"model.name={name}", *words[:3], "criterion=magnitude", "amounts=[0.3]", "finetune=none"),
        *("latency.batches=[]", "hydra.run.dir=pruned"),
    )
    assert ended.code == 0, ended.err
    smaller = nl.load_pruned(quiet_home / "pruned/pruned")
    assert smaller(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
