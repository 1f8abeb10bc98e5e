"""Published parameter counts, shapes and error messages of each model family."""

import pytest
import torch

from nodelens.models import CNN, MLP, cnn, mlp, resnet, vit


def count(net: torch.nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize(("depth", "parameters"), [(18, 11_689_512), (34, 21_797_672), (50, 25_557_032)])
def test_resnets_have_the_published_counts(depth, parameters):
    with torch.device("meta"):
        assert count(resnet(depth, 1000, 3, 224)) == parameters


def test_the_small_stem_has_the_published_count_and_keeps_every_pixel():
    net = resnet(18, 10, 3, 32)
    assert count(net) == 11_173_962
    assert net.resnet.embedder(torch.ones(1, 3, 32, 32)).shape == (1, 64, 32, 32)
    with torch.device("meta"):
        assert count(resnet(18, 10, 3, 32, stem="imagenet")) == count(resnet(18, 10, 3, 64))


def test_vit_tiny_has_the_published_width():
    assert 5.3e6 < count(vit(10, 3, 32)) < 5.4e6
    with torch.device("meta"):
        assert count(vit(1000, 3, 224, patch=16)) == 5_717_416


@pytest.mark.parametrize(("size", "patch"), [(8, 1), (28, 4), (32, 4), (224, 28), (7, 1)])
def test_the_default_patch_divides_the_image(size, patch):
    assert vit(3, 1, size, hidden=6, depth=1, mlp=4).config.patch_size == patch


@pytest.mark.parametrize(
    "make",
    [mlp, cnn, lambda *a: resnet(18, *a, width=4), lambda *a: vit(*a, hidden=6, depth=1, mlp=4)],
    ids=["mlp", "cnn", "resnet", "vit"],
)
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 12)])
def test_every_family_takes_the_same_arguments(make, channels, size):
    output = make(7, channels, size)(torch.ones(2, channels, size, size))
    assert getattr(output, "logits", output).shape == (2, 7)


def test_mlp_and_cnn_have_the_documented_layers():
    assert [name for name, _ in MLP(4, 3, [5, 6]).named_children()] == ["0", "fc1", "relu1", "fc2", "relu2", "head"]
    assert CNN(1, 3)(torch.ones(2, 1, 9, 13)).shape == (2, 3)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: resnet(19, 10, 3, 32), "depth 19 is not available; choose from 18, 34, 50"),
        (lambda: resnet(18, 10, 3, 32, stem="big"), "stem 'big' is not available; choose from auto, small, imagenet"),
        (lambda: vit(10, 3, 28, patch=8), "patch 8 does not divide size 28; set patch to one of 1, 2, 4, 7"),
        (lambda: vit(10, 3, 8, hidden=10, heads=4), "4 heads do not divide hidden 10"),
        (lambda: cnn(10, 1, 3), "3 widths need images of at least 4 pixels, size is 3"),
    ],
    ids=["depth", "stem", "patch", "heads", "pixels"],
)
def test_impossible_models_raise(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_unknown_names_of_the_package_raise():
    import nodelens.models

    with pytest.raises(AttributeError, match=r"no attribute 'resnt'"):
        _ = nodelens.models.resnt
    assert "resnet" in dir(nodelens.models)
