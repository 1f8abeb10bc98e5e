"""Compiled convolutions: the numbers of direct ones, and those of whole models in ``nl.ablate``."""

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d

import nodelens as nl
from nodelens.analysis.ablation import damage, winograd

EPS = torch.finfo(torch.float32).eps


@pytest.fixture
def loops(compiler, monkeypatch):
    """Loops that are in use from the first value on."""
    monkeypatch.setattr(damage, "WORTH", 1)


def seeded(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def last(maps):
    return maps.contiguous(memory_format=torch.channels_last)


def refuse(maps):
    raise AssertionError(f"{maps.dtype} maps of shape {(*maps.shape,)} were refused")


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("read", "made"), [(32, 32), (40, 33), (64, 100)])
@pytest.mark.parametrize(("samples", "height", "width"), [(1, 1, 1), (3, 7, 9), (5, 8, 8), (2, 2, 31), (0, 4, 4)])
def test_numbers_of_a_direct_convolution(compiler, samples, height, width, read, made, threads):
    maps, weight, bias = last(seeded((samples, read, height, width))), seeded((made, read, 3, 3), 1), seeded(made, 2)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    found = winograd.convolution(weight, bias, refuse)(maps)
    torch.set_num_threads(before)
    exact = conv2d(maps.double(), weight.double(), bias.double(), padding=1)
    size = conv2d(maps.double().abs(), weight.double().abs(), bias.double().abs(), padding=1)
    assert found.shape == exact.shape
    assert found.is_contiguous(memory_format=torch.channels_last)
    # each tile's sums are of up to 16 values in size, each rounded a few times
    assert ((found - exact).abs() <= 16 * EPS * size.amax((1, 2, 3), keepdim=True) if samples else found == exact).all()


def test_a_kernel_of_one_value_shifts_the_map(compiler):
    """A closed form: the output is the input one row further down, with a border of zeros."""
    maps, weight = last(seeded((2, 32, 5, 6))), torch.zeros(32, 32, 3, 3)
    weight[range(32), range(32), 0, 1] = 1
    found = winograd.convolution(weight, torch.zeros(32), refuse)(maps)
    want = torch.cat([torch.zeros(2, 32, 1, 6), maps[:, :, :-1]], 2)
    torch.testing.assert_close(found, want, rtol=0, atol=8 * EPS * float(maps.abs().max()))


def test_other_maps_run_otherwise(compiler):
    weight, bias, maps = seeded((32, 32, 3, 3)), seeded(32), last(seeded((2, 32, 4, 4)))
    run = winograd.convolution(weight, bias, lambda maps: "otherwise")
    assert isinstance(run(maps), torch.Tensor)
    others = [maps.contiguous(), maps.double(), maps[:, :, ::2], maps.to("meta"), maps[0], last(maps[:, :31]), nn.Parameter(maps)]
    assert [run(each) for each in others] == ["otherwise"] * len(others)


@pytest.mark.parametrize(
    "other",
    [
        nn.Conv2d(32, 32, 3),
        nn.Conv2d(32, 32, 3, padding=1, stride=2),
        nn.Conv2d(32, 32, 3, padding=2, dilation=2),
        nn.Conv2d(32, 32, 5, padding=2),
        nn.Conv2d(32, 32, 3, padding=1, groups=2),
        nn.Conv2d(32, 32, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(16, 64, 3, padding=1),
        nn.Conv2d(32, 32, 3, padding=1).double(),
        nn.ConvTranspose2d(32, 32, 3, padding=1),
        nn.Linear(32, 32),
    ],
)
def test_other_layers_do_not_fit(other):
    assert winograd.fits(nn.Conv2d(32, 40, 3, padding=1))
    assert winograd.fits(nn.Conv2d(32, 40, 3, padding="same"))
    assert not winograd.fits(other)


class Blocks(nn.Module):
    """Convolutions of 3 by 3 with norms, behind one another; the maps have an odd number of rows."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 32, 3, padding=1), nn.Linear(32, 4)
        self.convs = nn.ModuleList(nn.Conv2d(32, 32, 3, padding=1, bias=False) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(32) for _ in range(3))

    def forward(self, x):
        x = torch.relu(self.stem(x))
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = torch.relu(norm(conv(x)))
        return self.head(x.mean((2, 3)))


@pytest.fixture
def blocks():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Blocks().eval()
        for norm in net.norms:
            nn.init.uniform_(norm.running_var, 0.5, 2)
            nn.init.normal_(norm.running_mean)
    return net, [(seeded((12, 3, 7, 6), k), torch.arange(12) % 4) for k in range(2)]


def test_ablation_gives_the_numbers_of_the_whole_model(loops, blocks, monkeypatch):
    net, data = blocks
    counted, real = [], winograd.convolution

    def counting(*given):
        run = real(*given)
        return lambda maps: counted.append(len(maps)) or run(maps)

    monkeypatch.setattr(winograd, "convolution", counting)
    fast, whole = nl.ablate(net, data, layers=["stem", "convs.0"]), nl.ablate(net, data, layers=["stem", "convs.0"], replay=False)
    assert counted
    assert (fast.metadata["kernels"], whole.metadata["kernels"]) == ("compiled", "torch")
    assert not fast.metadata["whole_model"]
    torch.testing.assert_close(*(torch.tensor(each.units["damage"].to_numpy()) for each in (fast, whole)), rtol=0, atol=1e-6)


def test_ablation_does_without_a_compiler(loops, blocks, monkeypatch):
    monkeypatch.setattr(winograd, "available", lambda: False)
    assert nl.ablate(*blocks, layers=["stem"], sample=2).metadata["kernels"] == "torch"


def test_convolutions_without_a_norm_compile_nothing(loops, blocks, monkeypatch):
    net, data = blocks
    net.norms = nn.ModuleList(nn.Identity() for _ in net.norms)
    monkeypatch.setattr(winograd, "available", lambda: pytest.fail("the compiler was called"))
    assert nl.ablate(net, data, layers=["stem"], sample=2).metadata["kernels"] == "torch"


def test_a_short_ablation_compiles_nothing(blocks, monkeypatch):
    monkeypatch.setattr(winograd, "available", lambda: pytest.fail("the compiler was called"))
    assert nl.ablate(*blocks, layers=["stem"], sample=2).metadata["kernels"] == "torch"


def test_a_library_that_cannot_be_had(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", "false")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for each in (winograd.available, winograd._library, winograd.compiler.load):
        each.cache_clear()
    assert not winograd.available()
    winograd.available.cache_clear()
