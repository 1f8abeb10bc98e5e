"""A saved pruned model that was damaged or made by a stranger: one line names file and field, and nothing is allocated."""

import contextlib
import copy
import json
import resource
import shutil
import struct

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import nodelens as nl
from nodelens.pruning.removal_plan import RemovalPlan, digests
from nodelens.results.files import MANIFEST

LLAMA = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA |= {"vocab_size": 48, "max_position_embeddings": 32, "tie_word_embeddings": True}
TEXT = torch.arange(1, 11)[None]
FILES = ("plan.json", "origin.json")


def llama(**changed):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA | changed)).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a pruned Llama: heads, FFN channels, tied weights, a bias that compensation added."""
    folder = tmp_path_factory.mktemp("saved")
    nl.prune(llama(), "l2", 0.5, data=[{"input_ids": TEXT}], compensate="bias").save(folder)
    return folder


@pytest.fixture(scope="module")
def content(saved):
    return {name: json.loads((saved / name).read_text()) for name in FILES}


@pytest.fixture
def folder(saved, tmp_path):
    """A copy without its list of checksums, which a stranger leaves out or writes anew."""
    return shutil.copytree(saved, tmp_path / "copy", ignore=shutil.ignore_patterns(MANIFEST))


def fields(value, path=(), depth=3):
    """Paths of the fields of a JSON value: the first three levels, with the first three entries below the top."""
    items = list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    for key, inner in items if not path else items[:3]:
        yield (*path, key)
        if depth > 1:
            yield from fields(inner, (*path, key), depth - 1)


def edits(value):
    """Other values in place of one, by the rule that is tried."""
    tried = {"wrong type": "text" if not isinstance(value, str) else 7, "nothing": None, "nested": [[value]]}
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        tried |= {
            "negative": -3,
            "huge": 10**18,
            "too many digits": 10**400,
            "NaN": float("nan"),
            "fraction": 0.5,
            "zero": 0,
            "true": True,
        }
    if isinstance(value, list):
        tried |= {"empty": [], "duplicated": value + value[:1], "shuffled": value[::-1], "longer": [*value, 1], "huge": [10**18]}
    if isinstance(value, dict):
        tried |= {"empty": {}, "unknown key": value | {"qqqq": 1}, "list": [value]}
    if isinstance(value, str):
        tried |= {"escape": "../../etc/passwd", "long": "x" * 5000, "dunder": "__class__"}
    return {name: new for name, new in tried.items() if json.dumps(new) != json.dumps(value)}


def edited(content, path, new):
    """The content with another value at a path; "missing" takes the field out."""
    found = copy.deepcopy(content)
    holder = found
    for key in path[:-1]:
        holder = holder[key]
    if new == "missing":
        del holder[path[-1]]
    else:
        holder[path[-1]] = new
    return found


def every_edit(content):
    for file, value in content.items():
        for path in fields(value):
            here = value
            for key in path:
                here = here[key]
            for rule, new in (edits(here) | {"missing": "missing"}).items():
                yield file, path, rule, edited(value, path, new)
        yield file, ("qqqq",), "unknown key", value | {"qqqq": 1}


def refusal(folder):
    """The text of the ValueError that loading ends in, empty if the model is loaded; any other error fails the test."""
    try:
        nl.load_pruned(folder)
    except ValueError as refused:
        return str(refused)
    return ""


def test_every_edit_of_a_field_ends_in_one_line_that_names_file_and_field(folder, content):
    tried = list(every_edit(content))
    assert len(tried) > 400
    for file, path, rule, value in tried:
        (folder / file).write_text(json.dumps(value))
        line = refusal(folder)
        assert line, f"{file} {path} {rule} is loaded"
        assert file in line, (path, rule, line)
        assert path[0] in line or path[:1] == ("digests",), (path, rule, line)
        assert len(line.splitlines()) == 1
        assert len(line) < 600, line
        (folder / file).write_text(json.dumps(content[file]))
    assert nl.load_pruned(folder).config.hidden_size == 32


def test_edits_whose_hashes_were_computed_again_end_in_one_line_or_load(folder, content):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ended = {"refused": 0, "loaded": 0}
    for file, path, rule, value in every_edit(content):
        if path[0] in ("digests", "schema"):
            continue
        new = copy.deepcopy(content) | {file: value}
        plan, config = new["plan.json"], new["origin.json"]
        plan["config"] = digests(config) if file == "origin.json" else plan.get("config", {})
        if path[0] == "removed" and isinstance(plan.get("removed"), dict):
            with contextlib.suppress(TypeError):  # units that are no list
                plan["key"] = RemovalPlan(plan["removed"]).key
        plan["digests"] = digests({k: v for k, v in plan.items() if k != "digests"})
        for name, text in new.items():
            (folder / name).write_text(json.dumps(text))
        line = refusal(folder)
        assert line == "" or str(folder) in line, (path, rule, line)
        assert len(line.splitlines()) <= 1
        ended["refused" if line else "loaded"] += 1  # loaded: such as notes, or options that change no shape
    assert ended["refused"] > 150, ended
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000, "kB"


def tensor_edits(weights):
    """{rule: tensors} of other weights, for every tensor of the file."""
    for name, tensor in weights.items():
        others = {k: v for k, v in weights.items() if k != name}
        yield name, "missing", others
        yield name, "renamed", others | {f"{name}x": tensor}
        yield name, "flat", others | {name: tensor.flatten()[:-1].clone()}
        yield name, "one more dimension", others | {name: tensor[None].clone()}
        yield name, "larger", others | {name: torch.cat([tensor, tensor])}
        yield name, "empty", others | {name: tensor[:0].clone()}
        yield name, "half", others | {name: tensor.half()}
        yield name, "double", others | {name: tensor.double()}
        yield name, "integers", others | {name: tensor.long()}
        yield name, "complex", others | {name: tensor.to(torch.complex64)}
    yield "more", "extra", weights | {"more": torch.zeros(2)}


def test_every_edit_of_a_tensor_is_refused_by_name(folder):
    weights = load_file(folder / "model.safetensors")
    tried = list(tensor_edits(weights))
    assert len(tried) > 66
    for name, rule, tensors in tried:
        save_file(tensors, folder / "model.safetensors")
        with pytest.raises(ValueError, match=r"model\.safetensors") as refused:
            nl.load_pruned(folder)
        assert name in str(refused.value), (rule, str(refused.value))
        assert len(str(refused.value).splitlines()) == 1


def test_a_file_of_weights_that_is_none_is_refused(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + size])
    first = next(name for name in header if name != "__metadata__")

    def with_header(change):
        text = json.dumps(header | {first: header[first] | change}).encode()
        return struct.pack("<Q", len(text)) + text + whole[8 + size :]

    tried = {
        "empty": b"",
        "text": b"no weights",
        "half": whole[: len(whole) // 2],
        "one byte less": whole[:-1],
        "one byte more": whole + b"0",
        "length": struct.pack("<Q", 1 << 60) + whole[8:],
        "huge shape": with_header({"shape": [1 << 20, 1 << 20]}),
        "negative": with_header({"shape": [-1, 4]}),
        "dtype": with_header({"dtype": "OBJECT"}),
        "outside": with_header({"data_offsets": [0, 1 << 40]}),
    }
    for rule, data in tried.items():
        (folder / "model.safetensors").write_bytes(data)
        with pytest.raises(ValueError, match=r"model.safetensors cannot be read") as refused:
            nl.load_pruned(folder)
        assert len(str(refused.value).splitlines()) == 1, rule


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(
    "text", [b"", b"[1, 2]", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}", b"NaN", b"null"]
)
def test_a_json_file_that_is_none_is_refused(file, text, folder):
    (folder / file).write_bytes(text)
    with pytest.raises(ValueError, match=file) as refused:
        nl.load_pruned(folder)
    assert len(str(refused.value).splitlines()) == 1


def test_a_model_of_a_strangers_size_takes_no_memory(folder, content):
    """The files agree with each other: only the weights of the file are allocated, and buffers have a limit."""
    plan, config = copy.deepcopy(content["plan.json"]), copy.deepcopy(content["origin.json"])
    config["config"] |= {"hidden_size": 32, "vocab_size": 1 << 28}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        plan["dense"][name][1][0] = 1 << 28
    write(folder, plan, config)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert nl.load_pruned(folder).lm_head.weight.shape == (48, 32), "the dense one would take 34 GB"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "kB"


def write(folder, plan, config, name="origin.json"):
    plan["config"] = digests(config)
    plan["digests"] = digests({k: v for k, v in plan.items() if k != "digests"})
    (folder / "plan.json").write_text(json.dumps(plan))
    (folder / name).write_text(json.dumps(config))


REFUSED = {
    "a count that grows": (
        {"numbers": {"model.layers.0.self_attn.config": {"num_attention_heads": 5}}},
        {},
        "pruning makes no count",
    ),
    "another attribute": ({"numbers": {"model": {"forward": 3}}}, {}, "numbers.model.forward is 3: a plan can set only counts"),
    "layers": ({}, {"num_hidden_layers": 10**9}, r"config.num_hidden_layers is 1000000000; the largest number in the plan is"),
    "labels": ({}, {"num_labels": 10**9}, "config.num_labels is 1000000000; the largest number"),
    "more layers": ({}, {"num_hidden_layers": 5000}, "the model cannot be built: it has more than .* parameters"),
    "a kernel": ({}, {"_attn_implementation": "a/kernel"}, r"origin.json: attention 'a/kernel' is not allowed"),
    "a dtype": (
        {"buffers": {"model.rotary_emb.inv_freq": "float33"}},
        {},
        "buffers.model.rotary_emb.inv_freq names the dtype 'float33'",
    ),
    "a buffer": ({"buffers": {"model.more": "float32"}}, {}, "buffers has 'model.more', which LlamaForCausalLM does not have"),
    "a list": ({"about": {"added_bias": "all"}}, {}, "about.added_bias is 'all'; it must be a list of names"),
    "numbers": ({"numbers": {"model": 3}}, {}, "numbers.model is 3; it must be a dictionary of counts"),
    "how": ({"apply": "run"}, {}, "apply is 'run'; it must be slice, mask or scale"),
    "no tensors": ({"dense": {}}, {}, "dense is missing or empty; it must list the tensors of the model"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_stranger_is_refused(what, folder, content):
    changes, config, words = REFUSED[what]
    origin = copy.deepcopy(content["origin.json"])
    origin["config"] |= config
    if "_attn_implementation" in config:
        origin["attention"] = config["_attn_implementation"]
    write(folder, copy.deepcopy(content["plan.json"]) | changes, origin)
    with pytest.raises(ValueError, match=words):
        nl.load_pruned(folder)


def test_tensors_of_the_plan_that_contradict_each_other_are_named(folder, content):
    for change, words in (
        (lambda p: p["kept"].pop("model.norm.weight"), r"kept has no tensor model\.norm\.weight, which the dense model has"),
        (lambda p: p["kept"].update({"a.weight": ["float32", [1]]}), r"kept has a tensor a\.weight that the dense model does not"),
        (
            lambda p: p["kept"]["model.norm.weight"].__setitem__(1, [33]),
            r"kept\.model\.norm\.weight has the shape \[33\], dense\..* has \[32\]",
        ),
        (lambda p: p["kept"].update({"model.norm.weight": 3}), r"kept\.model\.norm\.weight is 3; it must be a dtype and a shape"),
        (lambda p: p["dense"]["model.norm.weight"].__setitem__(1, [64]), "is not the dense model of .*: model.norm.weight is"),
    ):
        plan = copy.deepcopy(content["plan.json"])
        change(plan)
        write(folder, plan, content["origin.json"])
        with pytest.raises(ValueError, match=words):
            nl.load_pruned(folder)


def test_large_buffers_are_refused_before_they_are_made(folder, monkeypatch):
    monkeypatch.setattr("nodelens.pruning.surgery.load._BUFFERS", -(1 << 40))
    with pytest.raises(ValueError, match=r"origin.json: the buffer model.rotary_emb.* has the shape \[4\]: .* bytes, at most"):
        nl.load_pruned(folder)


def test_an_unknown_version_and_class_are_refused(folder, content, tmp_path):
    (folder / "plan.json").write_text(json.dumps(content["plan.json"] | {"schema": 2}))
    with pytest.raises(ValueError, match=r"plan.json: schema is 2, this version reads 1"):
        nl.load_pruned(folder)
    write(folder, copy.deepcopy(content["plan.json"]), {"transformers": "logging", "config": {}})
    with pytest.raises(ValueError, match="'logging', which is no model of transformers"):
        nl.load_pruned(folder)
    write(folder, copy.deepcopy(content["plan.json"]), {"class": "os.system", "net": {"_target_": "os.system", "command": "true"}})
    with pytest.raises(ValueError, match=r"holds a os\.system: give a model to load into"):
        nl.load_pruned(folder)
    (folder / "plan.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"plan.json is missing"):
        nl.load_pruned(folder)


def test_a_model_that_is_given_is_as_it_was_after_an_error(folder):
    net = llama()
    before = copy.deepcopy(net.state_dict())
    weights = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in weights.items() if k != "model.norm.weight"}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.norm.weight is in plan.json and not in model.safetensors"):
        nl.load_pruned(folder, net)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_a_small_network_that_does_not_fit_its_plan_is_refused(tmp_path):
    net = nl.prune(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), "l1", 0.5, example_inputs=torch.ones(2, 4))
    net.save(tmp_path)
    (tmp_path / MANIFEST).unlink()
    plan = json.loads((tmp_path / "plan.json").read_text())
    for arguments, words in (
        ({"classes": 3, "channels": 1, "size": 2, "hidden": [8]}, "MLP is not the dense model of"),
        ({"classes": 3, "channels": 1, "size": 2, "hidden": [10**12, 10**12]}, "config.json: the model cannot be built"),
        ({"classes": 3, "channels": 1, "size": 2, "hidden": "abc"}, "config.json: the model cannot be built"),
        ({"classes": 3, "colour": 1}, "config.json: the model cannot be built: .*colour"),
    ):
        write(tmp_path, copy.deepcopy(plan), {"net": {"_target_": "nodelens.models.mlp", **arguments}}, "config.json")
        with pytest.raises(ValueError, match=words):
            nl.load_pruned(tmp_path)
    write(tmp_path, copy.deepcopy(plan), {"net": 3}, "config.json")
    with pytest.raises(ValueError, match=r"config\.json: net is 3; it must be a dictionary"):
        nl.load_pruned(tmp_path)
