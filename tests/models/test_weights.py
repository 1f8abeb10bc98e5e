"""Weights from untrusted files are copied if all fit; otherwise an error is raised and nothing is copied."""

import os
import pickle
import re
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from nodelens.models import MLP, Classifier, find_weights, load_weights


def net(hidden: int = 5, seed: int = 0) -> MLP:
    torch.manual_seed(seed)
    return MLP(4, 3, [hidden])


def same(a: torch.nn.Module, b: torch.nn.Module) -> None:
    for name, tensor in a.state_dict().items():
        assert_close(tensor, b.state_dict()[name], rtol=0, atol=0)


def stored(kind: str, folder, source: torch.nn.Module) -> str:
    state = source.state_dict()
    path = folder / {"safetensors": "w.safetensors", "folder": "model.safetensors"}.get(kind, "w.ckpt")
    if kind in ("safetensors", "folder"):
        save_file(state, path)
    elif kind == "plain":
        torch.save(state, path)
    else:
        keys = {f"net.{name}": tensor for name, tensor in state.items()}
        torch.save({"state_dict": keys, "epoch": 1, "nodelens_config": {"model": {"hidden": [5]}}}, path)
    return str(folder if kind == "folder" else path)


@pytest.mark.parametrize("kind", ["safetensors", "folder", "plain", "lightning"])
def test_every_form_gives_the_same_weights(kind, tmp_path):
    target = net(seed=1)
    config = load_weights(target, stored(kind, tmp_path, net()))
    same(target, net())
    assert config == ({"model": {"hidden": [5]}} if kind == "lightning" else None)


def test_a_classifier_loads_them_into_its_network(tmp_path):
    module = Classifier(net(seed=1), weights=stored("lightning", tmp_path, net()))
    same(module.net, net())
    assert module.config == {"model": {"hidden": [5]}}


def test_a_missing_file_raises_with_its_full_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=rf"no weights at {tmp_path.resolve()}/no.safetensors; give a"):
        load_weights(net(), "no.safetensors")
    with pytest.raises(FileNotFoundError, match=r"model.safetensors"):
        load_weights(net(), tmp_path)


@pytest.mark.parametrize(
    "prefix", ["net.", "model.", "module.", "_orig_mod.", "model.module._orig_mod.", "net._orig_mod.", "module.model.net.module."]
)
def test_prefixes_of_wrappers_do_not_matter(prefix, tmp_path):
    target = net(seed=1)
    torch.save({f"{prefix}{name}": tensor for name, tensor in net().state_dict().items()}, tmp_path / "w.ckpt")
    load_weights(target, tmp_path / "w.ckpt")
    same(target, net())


class Wrapped(torch.nn.Module):
    """A network with a part whose name is that of a wrapper."""

    def __init__(self, seed, inner=lambda part: part):
        super().__init__()
        self.model = inner(net(seed=seed))
        self.head = torch.nn.Linear(3, 2)


class Compiled(torch.nn.Module):
    """A module inside which another one lies as torch.compile leaves it."""

    def __init__(self, inner):
        super().__init__()
        self._orig_mod = inner


@pytest.mark.parametrize("saved", [lambda part: part, Compiled])
@pytest.mark.parametrize("target", [lambda part: part, Compiled])
def test_a_compiled_part_and_a_part_named_like_a_wrapper_keep_their_weights(saved, target, tmp_path):
    source, found = Wrapped(0, saved), Wrapped(1, target)
    torch.save({"state_dict": {f"net.{name}": tensor for name, tensor in source.state_dict().items()}}, tmp_path / "w.ckpt")
    load_weights(found, tmp_path / "w.ckpt")
    for a, b in zip(source.parameters(), found.parameters(), strict=True):
        assert_close(a, b, rtol=0, atol=0)


def test_names_of_another_network_raise_behind_a_prefix_too(tmp_path):
    torch.save({"module.other.weight": torch.ones(1)}, tmp_path / "w.ckpt")
    with pytest.raises(ValueError, match=r"1 in the file are not expected \(other.weight\)"):
        load_weights(net(), tmp_path / "w.ckpt")


def test_the_folder_of_a_run_gives_its_best_checkpoint(tmp_path):
    for seed, name in enumerate(("last", "best")):
        (tmp_path / "checkpoints").mkdir(exist_ok=True)
        torch.save({"state_dict": net(seed=seed).state_dict()}, tmp_path / "checkpoints" / f"{name}.ckpt")
    target = net(seed=5)
    load_weights(target, tmp_path)
    same(target, net(seed=1))
    assert find_weights(tmp_path) == tmp_path / "checkpoints" / "best.ckpt"


class Counting(torch.nn.Linear):
    """A layer with a state that is no tensor."""

    seen = 0

    def get_extra_state(self):
        return {"seen": self.seen}

    def set_extra_state(self, state):
        self.seen = state["seen"]


def test_state_that_is_no_tensor_is_loaded_too(tmp_path):
    source, target = Counting(2, 2), Counting(2, 2)
    source.seen = 7
    torch.save(source.state_dict(), tmp_path / "w.ckpt")
    load_weights(target, tmp_path / "w.ckpt")
    assert target.seen == 7
    torch.save({"weight": torch.ones(2, 2), "bias": None, "_extra_state": None}, tmp_path / "w.ckpt")
    with pytest.raises(ValueError, match=r"holds more than weights \(bias are not tensors\)"):
        load_weights(target, tmp_path / "w.ckpt")


class Trap:
    """A pickle that creates a marker file if its code is run."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("name", ["w.safetensors", "w.ckpt", "w.pt"])
@pytest.mark.parametrize("write", [pickle.dumps, "torch"], ids=["pickle", "torch"])
def test_a_pickle_raises_and_is_not_run(name, write, tmp_path):
    marker, path = tmp_path / "marker", tmp_path / name
    if write == "torch":
        torch.save({"state_dict": Trap(marker)}, path)
    else:
        path.write_bytes(write(Trap(marker)))
    with pytest.raises(ValueError, match=r"is not a safetensors file or a weights-only checkpoint.*save_file"):
        load_weights(net(), path)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Trap(marker)))
    assert marker.exists()  # the pickle does run code in an unrestricted loader


@pytest.mark.parametrize("content", [b"", b"hello world\n", b'{"a": 1}', bytes(range(256)) * 9, b"PK\x03\x04half"])
def test_other_files_raise(content, tmp_path):
    path = tmp_path / "w.ckpt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"is not a safetensors file"):
        load_weights(net(), path)


def test_a_checkpoint_without_weights_raises(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"holds no state dict"):
        load_weights(net(), tmp_path / "a.ckpt")
    torch.save({"model": net().state_dict(), "epoch": 3}, tmp_path / "b.ckpt")
    with pytest.raises(ValueError, match=r"holds more than weights \(model, epoch are not tensors\)"):
        load_weights(net(), tmp_path / "b.ckpt")
    torch.save(torch.ones(3), tmp_path / "c.ckpt")
    with pytest.raises(ValueError, match=r"is not a safetensors file"):
        load_weights(net(), tmp_path / "c.ckpt")


def test_different_names_raise_with_both_lists(tmp_path):
    target, before = MLP(4, 3, [5, 5]), MLP(4, 3, [5, 5])
    before.load_state_dict(target.state_dict())
    state = net().state_dict() | {f"extra{i}": torch.ones(1) for i in range(5)}
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(
        ValueError,
        match=r"2 of its 6 weights are missing \(fc2.weight, fc2.bias\), "
        r"5 in the file are not expected \(extra0, extra1, extra2, ...\)",
    ):
        load_weights(target, tmp_path / "w.safetensors")
    same(target, before)


def test_different_shapes_raise_and_nothing_is_copied(tmp_path):
    save_file(net(6).state_dict(), tmp_path / "w.safetensors")
    target = net(seed=1)
    with pytest.raises(ValueError, match=r"fc1.weight is \(6, 4\) in the file and \(5, 4\) in the model \(3 of 4"):
        load_weights(target, tmp_path / "w.safetensors")
    same(target, net(seed=1))


FIRST = "fc1.weight"
FOREIGN = {  # what is stored in place of the first weight, and what is said of it
    "sparse": (lambda w: w.to_sparse(), f"{FIRST} is sparse (torch.sparse_coo)"),
    "compressed": (lambda w: w.to_sparse_csr(), f"{FIRST} is sparse (torch.sparse_csr)"),
    "meta": (lambda w: w.to("meta"), f"{FIRST} is on the meta device, without values"),
    "quantized": (lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8), f"{FIRST} is quantized"),
    "nested": (lambda w: torch.nested.nested_tensor([w]), f"{FIRST} is nested"),
    "complex": (
        lambda w: w.to(torch.complex64),
        f"{FIRST} has the dtype torch.complex64 in the file and torch.float32 in the model",
    ),
    "integers": (lambda w: w.long(), f"{FIRST} has the dtype torch.int64"),
    "booleans": (lambda w: w.bool(), f"{FIRST} has the dtype torch.bool"),
    "expanded": (lambda w: torch.zeros(1).expand(1 << 20, 1 << 20), f"{FIRST} is (1048576, 1048576) in the file"),
    "no tensor": (lambda w: [1.0], f"({FIRST} are not tensors)"),
}


@pytest.mark.filterwarnings("ignore")  # of prototypes of torch
@pytest.mark.parametrize("what", FOREIGN)
@pytest.mark.parametrize("form", ["plain", "state_dict"])
def test_tensors_without_plain_values_are_refused_by_name(what, form, tmp_path):
    change, words = FOREIGN[what]
    state = net().state_dict() | {FIRST: change(net().state_dict()[FIRST])}
    torch.save({"state_dict": state} if form == "state_dict" else state, tmp_path / "w.ckpt")
    target = net(seed=1)
    with pytest.raises(ValueError, match=re.escape(words)) as refused:
        load_weights(target, tmp_path / "w.ckpt")
    assert "w.ckpt" in str(refused.value)
    same(target, net(seed=1))


@pytest.mark.parametrize("key", [0, (1, 2), 1.5, None])
def test_names_that_are_no_texts_are_refused(key, tmp_path):
    for state in ({key: torch.ones(2)}, net().state_dict() | {key: torch.ones(2)}, {"state_dict": {key: torch.ones(2)}}):
        torch.save(state, tmp_path / "w.ckpt")
        with pytest.raises(ValueError, match=rf"w\.ckpt: a tensor is named {re.escape(repr(key))}; names are texts"):
            load_weights(net(), tmp_path / "w.ckpt")


def test_other_precisions_are_weights_too(tmp_path):
    for dtype in (torch.float16, torch.float64):
        torch.save({name: tensor.to(dtype) for name, tensor in net().state_dict().items()}, tmp_path / "w.ckpt")
        target = net(seed=1)
        load_weights(target, tmp_path / "w.ckpt")
        assert_close(target.fc1.weight, net().fc1.weight, rtol=1e-3, atol=1e-4)


def test_a_checkpoint_that_was_compressed_is_refused_before_it_is_read(tmp_path):
    torch.save(net().state_dict() | {"x": torch.zeros(1 << 22)}, tmp_path / "w.ckpt")
    with zipfile.ZipFile(tmp_path / "w.ckpt") as whole, zipfile.ZipFile(tmp_path / "s.ckpt", "w", zipfile.ZIP_DEFLATED) as small:
        for entry in whole.infolist():
            small.writestr(entry.filename, whole.read(entry.filename))
    assert (tmp_path / "s.ckpt").stat().st_size < 30_000
    with pytest.raises(ValueError, match=r"s\.ckpt declares 16\d+ bytes in a file of \d+ \(torch.save does not compress\)"):
        load_weights(net(), tmp_path / "s.ckpt")
