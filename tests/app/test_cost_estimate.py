"""Cost estimates from shapes alone, compared with the passes themselves."""

import json
import resource

import pytest
import torch
import transformers
from ids import label
from omegaconf import OmegaConf
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

import nodelens as nl
from nodelens.analysis.geometry.columns import columns_of
from nodelens.analysis.geometry.reading import read
from nodelens.analysis.geometry.sites import hook_points
from nodelens.analysis.geometry.tokens import TokenReader
from nodelens.app.cost_estimate import (
    Machine,
    Placement,
    estimate_cost,
    estimate_geometry_cost,
    image_batch,
    meta_model,
    model_from_config,
    token_batch,
)
from nodelens.app.tasks.common import is_dry_run
from nodelens.app.tasks.estimate_costs import estimate_costs, machine_of
from nodelens.app.tasks.run_folder import _flat, create_run_dir
from nodelens.engine.analyze import run_pass
from nodelens.engine.dry_run import DryRun
from nodelens.models import resnet
from nodelens.network.batch import Batch
from nodelens.network.find_layers import find_layers
from nodelens.network.objective import Objective

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SHAPES = {
    "8b": (8_030_261_248, {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}),
    "70b": (70_553_706_496, {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}),
}
UNITS = ["activation_mean", "taylor", "redundancy", "rq", "linear_cka"]


def llama(**options):
    return LlamaConfig(**TINY | options)


def large(shape):
    return LlamaConfig(**SHAPES[shape][1], num_key_value_heads=8, vocab_size=128256, dtype="bfloat16")


def built(config):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


def texts(samples, length):
    ids = torch.randint(64, (samples, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


@pytest.fixture(scope="module")
def tiny():
    return built(llama())


@pytest.mark.parametrize("layers", ["*", "model.layers.*.mlp.up_proj", ["blocks[1:].mlp.hidden", "lm_head"]], ids=label)
def test_the_plan_of_a_config_is_that_of_the_pass_and_the_sums_are_as_large(tiny, layers):
    metrics = [name for name in UNITS if name != "rq" or "hidden" not in str(layers)]  # which have no weights of their own
    plans = []
    result = nl.analyze(tiny, [texts(16, 12)], metrics, layers, groups=2, on_plan=plans.append)
    found = estimate_cost(llama(), metrics, layers, samples=16, length=12, rows=192, groups=2)
    assert found.statistics == result.metadata["plan"]["statistics"]
    assert found.bytes["total"] == result.metadata["plan"]["bytes"]
    assert found.forward["overhead"] == result.metadata["plan"]["estimated_overhead"]
    sums = run_pass(tiny, plans[0], [texts(16, 12)], Objective.of(tiny)).sums()
    assert found.bytes["statistics"] == sum(each.nbytes for each in sums.values())


@pytest.mark.parametrize("layers", ["blocks.input", "blocks[:].mlp.hidden", ["blocks[n//2:].attention", "final_norm"]], ids=label)
def test_roles_are_taken_of_a_config_alone(tiny, layers):
    metrics = ["activation_variance", "redundancy", "linear_cka"]
    found = estimate_cost(llama(), metrics, layers, samples=8, length=12, groups=2)
    result = nl.analyze(tiny, [texts(8, 12)], metrics, layers, groups=2)
    assert [site["layer"] for site in found.sites] == list(result.layers.index)
    assert found.statistics == result.metadata["plan"]["statistics"]
    assert found.bytes["statistics"] + found.bytes["buffers"] == result.metadata["plan"]["bytes"]


@pytest.mark.parametrize("points", ["residual_input", ["residual_input", "residual_output"]], ids=label)
@pytest.mark.parametrize("diagnostics", [None, "normalization_ablation"])
def test_the_geometry_is_planned_as_it_is_read(tiny, points, diagnostics):
    columns = columns_of("default", [diagnostics] if diagnostics else [], 4, True)
    takes = {"input_ids": None, "use_cache": False, "logits_to_keep": 1}
    stream = TokenReader([{"input_ids": texts(4, 12)["input_ids"]}], takes, None)
    seen = read(tiny, lambda: stream, hook_points(tiny, points), columns, 16).values.plan
    found = estimate_geometry_cost(
        llama(), hook_point=points, diagnostics=diagnostics, sample_limit=16, novelty_k=4, samples=4, length=12
    )
    assert found.statistics == seen.rows()
    assert found.forward["overhead"] == pytest.approx(seen.overhead())
    assert found.bytes["total"] == seen.total_bytes + len(seen.layers) * 16 * 32 * 4  # the sample's rows, in float32


@pytest.mark.parametrize("shape", ["8b", pytest.param("70b", marks=pytest.mark.slow)])
def test_large_models_take_no_memory_and_cost_what_their_shape_says(shape):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = estimate_geometry_cost(large(shape), length=128)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 1e9
    parameters, shape = SHAPES[shape]
    width, depth = shape["hidden_size"], shape["num_hidden_layers"]
    assert found.model["parameters"] == parameters
    assert found.model["bytes"] == pytest.approx(2 * parameters, rel=1e-6)
    assert [site["width"] for site in found.sites] == [width] * depth
    gram = 8 * (width**2 * 5 // 8 + 3 * width + 1)  # four bands of the upper triangle
    assert found.bytes["statistics"] == pytest.approx(depth * gram, rel=2 / width)
    embeddings = 2 * 128256 * width
    norms = (2 * depth + 1) * width  # which multiply no matrix
    attention = 4 * 128 * width * depth  # each query with every key, and the values
    head = 2 * 128256 * width / 128  # of one token of 128
    assert found.forward["flops_per_row"] == pytest.approx(2 * (parameters - embeddings - norms) + attention + head, rel=1e-6)


@pytest.mark.parametrize(
    "config",
    [
        transformers.GPT2Config(vocab_size=64, n_embd=48, n_layer=3, n_head=6, bos_token_id=1, eos_token_id=2),
        transformers.MixtralConfig(**TINY, num_local_experts=4),
        transformers.Gemma3TextConfig(**TINY, head_dim=8),
        transformers.MambaConfig(vocab_size=64, hidden_size=48, num_hidden_layers=3, state_size=4),
    ],
    ids=lambda config: config.model_type,
)
def test_a_forward_without_weights_shows_and_costs_what_the_real_one_does(config):
    config.dtype = torch.bfloat16  # the experts of a mixture are counted in one implementation and in the other
    real, empty = built(config), model_from_config(config)
    names = [layer.name for layer in find_layers(real, "blocks")]
    batch = Batch.of(texts(2, 16) | {"ids": torch.arange(2)})
    seen = DryRun.of(real, find_layers(real, names), batch)
    shapes = DryRun.of(empty, find_layers(empty, names), Batch.of(token_batch(2, 16)))
    assert shapes.flops == seen.flops > 0
    assert shapes.seen == seen.seen
    assert all(parameter.is_meta for parameter in empty.parameters())


def test_tensors_without_memory_are_told_apart():
    def small():
        return resnet(depth=18, classes=64, channels=3, size=16, width=4)

    real, empty = small().eval(), meta_model(small)
    layers = {net: find_layers(net, ["*", "*.normalization", "resnet.pooler"]) for net in (real, empty)}
    images = {"x": torch.randn(2, 3, 16, 16), "ids": torch.arange(2)}
    seen = DryRun.of(real, layers[real], Batch.of(images))
    shapes = DryRun.of(empty, layers[empty], Batch.of(image_batch(2, 3, 16)))
    assert shapes.seen == seen.seen
    assert shapes.norms == seen.norms
    assert len(set(shapes.norms.values())) == 20  # one behind each convolution
    assert [name for name, site in shapes.seen.items() if site.final] == ["classifier.1.output"]


def test_bytes_lie_where_the_blocks_do():
    asked = large("8b"), ["activation_variance", "linear_cka"], "blocks.input"
    found = estimate_cost(*asked, machine=Machine(devices=4, memory=24e9), budget=None)
    alone = estimate_cost(*asked, machine=Machine(memory=24e9), budget=None)
    (one,) = alone.devices
    assert found.bytes == alone.bytes
    for key in ("weights", "statistics", "buffers", "total"):
        assert sum(row[key] for row in found.devices) == one[key]
    assert one["statistics"] + one["buffers"] == found.bytes["total"]
    assert [row["device"] for row in found.devices] == [0, 1, 2, 3]
    devices = [site["device"] for site in found.sites]
    assert devices == sorted(devices)
    by_device = [sum(site["bytes"] for site in found.sites if site["device"] == k) for k in range(4)]
    assert by_device == [row["statistics"] for row in found.devices]
    assert not one["fits"]
    assert all(row["fits"] == (row["total"] <= 24e9) for row in found.devices)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_network_without_weights_is_planned_from_a_batch_on_either_device(device):
    def cost(net, batch):
        return estimate_cost(net, ["rq", "effective_rank"], "*", batch=batch, rows=100)

    def made():
        return torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3))

    with torch.device("meta"):
        net = made()
    found, expected = (
        cost(net, (torch.ones(6, 5, device=device), torch.ones(6, device=device).long())),
        cost(made(), (torch.ones(6, 5), torch.ones(6).long())),
    )
    assert (found.bytes, found.forward) == (expected.bytes, expected.forward)


def test_what_finds_no_room_says_so():
    found = estimate_cost(large("8b"), ["activation_variance"], "blocks.input", machine=Machine(devices=2, memory=5e9))
    assert found.devices[-1]["device"] is None
    assert not found.devices[-1]["fits"]
    assert found.sites[-1]["device"] is None
    assert sum(row["weights"] for row in found.devices) == found.model["bytes"]


@pytest.mark.parametrize("tied", [False, True])
def test_parts_are_laid_out_in_order(tied):
    place = Placement.of(model_from_config(llama(tie_word_embeddings=tied)), 2)
    blocks = [place.devices[f"model.layers.{k}"] for k in range(3)]
    assert blocks == sorted(blocks)
    assert set(blocks) == {0, 1}
    (head,) = find_layers(place.net, "head")
    assert place.device_of(head) == (0 if tied else 1)
    (block,) = find_layers(place.net, "blocks[-1].input")
    assert place.device_of(block) == 1
    (act,) = find_layers(place.net, "model.layers.0.mlp.act_fn")  # which has no weights
    assert place.device_of(act) == blocks[0]


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "mixtral", "llama"])
@pytest.mark.parametrize("spare", [3, 1.1, 0.9])
def test_devices_are_filled_as_transformers_fills_them(model_type, spare):
    pytest.importorskip("accelerate", reason="transformers fills devices with accelerate alone")
    from transformers.integrations.accelerate import get_balanced_memory, infer_auto_device_map

    net = model_from_config(transformers.AutoConfig.for_model(model_type))
    for devices in (1, 2, 3, 8):
        memory = int(spare * sum(p.nbytes for p in net.parameters()) / devices)
        limits = get_balanced_memory(net, dict.fromkeys(range(devices), memory), net._no_split_modules)
        theirs = infer_auto_device_map(net, limits, net._no_split_modules)
        ours = Placement.of(net, devices, memory)
        for name, parameter in net.named_parameters():
            path = max((key for key in theirs if not key or f"{name}.".startswith(f"{key}.")), key=len)
            place = theirs[path] if isinstance(theirs[path], int) else None
            assert ours.devices[ours.homes[parameter]] == place, name


def test_the_rate_follows_from_rows_hours_and_passes():
    config, options = llama(), {"samples": 8, "length": 16, "rows": 36_000, "groups": 1}
    metrics = ["activation_variance", "redundancy"]
    found = estimate_cost(config, metrics, "blocks.input", machine=Machine(ranks=7, hours=0.5), **options)
    share, rate = found.forward["overhead"], found.rate
    assert rate["rows_per_second"] == 20
    assert rate["samples_per_second"] == 1.25
    assert rate["flops_per_second"] == pytest.approx(20 * found.forward["flops_per_row"] * (1 + share))
    assert found.ranks == {
        "ranks": 7,
        "bytes": found.model["bytes"] + found.bytes["total"],
        "rows": 5143,
        "all_reduce_bytes": found.bytes["statistics"],
    }
    alone = max(site["bytes"] + site["buffers"] for site in found.sites)
    several = estimate_cost(config, metrics, "blocks.input", budget=alone * 1.01, **options)
    assert [len(each["layers"]) for each in several.passes] == [1, 1, 1]
    assert all(each["bytes"] <= alone for each in several.passes)
    assert several.devices[0]["statistics"] + several.devices[0]["buffers"] == alone
    assert several.rate["flops"] == pytest.approx(36_000 * found.forward["flops_per_row"] * (3 + share))
    assert "budget.max_passes=3" in several.refused[0]
    assert not estimate_cost(config, metrics, "blocks.input", budget=alone * 1.01, max_passes=3, **options).refused
    none = estimate_cost(config, metrics, "blocks.input", budget=1000, **options)
    assert not none.passes
    assert "more passes do not help" in none.refused[0]


def test_gradients_are_a_backward_pass_more():
    found = estimate_cost(llama(), ["taylor"], "blocks.mlp.hidden", samples=4, length=8, rows=3600)
    assert found.forward["gradients"]
    assert found.rate["flops_per_second"] == pytest.approx(3 * found.forward["flops_per_row"] * (1 + found.forward["overhead"]))


def test_a_width_beyond_the_limit_is_estimated_with_the_reason_of_its_refusal():
    found = estimate_cost(llama(), ["redundancy"], "blocks.input", samples=4, length=8, width=16)
    assert "covariance=diagonal" in found.refused[0]
    assert found.bytes["statistics"] > 8 * 32**2
    drawn = estimate_cost(llama(), ["redundancy"], "blocks.input", samples=4, length=8, width=16, covariance="sample:8")
    assert not drawn.refused
    assert drawn.bytes["statistics"] < found.bytes["statistics"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"devices": 0}, "cost.devices is 0; it is a number above 0"),
        ({"ranks": 1.5}, "cost.ranks is 1.5"),
        ({"hours": -1}, "cost.hours is -1"),
        ({"memory": 0}, "cost.memory is 0"),
    ],
)
def test_machines_that_are_none_are_refused(given, words):
    with pytest.raises(ValueError, match=words):
        Machine(**given)


def test_what_cannot_be_planned_says_so():
    with pytest.raises(ValueError, match="max_tokens is null"):
        estimate_geometry_cost(llama(), max_tokens=None)
    with pytest.raises(ValueError, match="0 devices of 1 bytes"):
        Placement.of(model_from_config(llama()), 0, 1)
    with pytest.raises(ValueError, match=r"no layer matches 'blocsk.input'"):
        estimate_cost(llama(), ["activation_mean"], "blocsk.input")


# ---- the task


def planned(folder, *overrides):
    """What dry_run=true does."""
    cfg = nl.load_config("analyze", ["dry_run=true", f"paths.output_dir={folder}", *overrides])
    return estimate_costs(cfg, create_run_dir(cfg))


def test_a_folder_with_a_config_alone_is_planned(quiet_home, capsys):
    llama(dtype="bfloat16").save_pretrained(quiet_home / "model")
    assert [path.name for path in (quiet_home / "model").iterdir()] == ["config.json"]
    options = ("devices=2", "memory=80GB", "ranks=4", "hours=2")
    found = planned(
        "run",
        "model=causal_lm",
        "model.path=model",
        "dataset=text",
        "dataset.path=nowhere",
        "dataset.length=32",
        "dataset.max_tokens=1000",
        "metrics=[activation_rms]",
        "layers='blocks[:].mlp.hidden'",
        "analysis=geometry",
        *(f"++cost.{option}" for option in options),
    )
    assert json.loads((quiet_home / "run/plan.json").read_text()) == {name: each.plain() for name, each in found.items()}
    assert (found["units"].rate["rows"], found["units"].rate["hours"]) == (1000, 2)
    assert found["geometry"].rate["rows"] == 100_000
    assert found["units"].model["dtype"] == "bfloat16"
    assert [site["width"] for site in found["units"].sites] == [48, 48, 48]
    assert found["units"].ranks["rows"] == 250
    out = capsys.readouterr().out
    assert "model.layers.*.mlp.down_proj.input" in out
    assert "4 ranks" in out
    assert "placement, in the order of device_map=auto" in out


def test_images_are_planned_without_the_data(quiet_home, capsys):
    found = planned("run", "model=resnet18", "dataset=cifar10", "metrics=[rq]")["units"]
    assert found.model["parameters"] == 11_173_962  # with the stem for small images and ten classes
    assert (found.forward["row"], found.rate["rows"]) == ("sample", 512)
    assert "samples per second" in capsys.readouterr().out


class Asks(nn.Sequential):
    """A network whose way depends on a value."""

    def forward(self, x):
        x = x.flatten(1)
        return super().forward(x if x.mean().item() > -100 else -x)


def asking(features: int = 64) -> nn.Module:
    return Asks(nn.Linear(features, 10))


def test_a_model_that_asks_for_values_is_run_for_real(quiet_home, capsys):
    found = planned("run", "model=custom", f"model.net._target_={__name__}.asking", "metrics=[activation_mean]")["units"]
    assert "the forward of Asks reads values" in capsys.readouterr().out
    assert found.forward["flops_per_row"] == 2 * 64 * 10
    assert found.rate["rows"] == 512


def test_mistakes_of_a_plan_are_named(quiet_home):
    with pytest.raises(ValueError, match="there is no pass to estimate"):
        planned("a", "metrics=none")
    with pytest.raises(ValueError, match="no layer matches 'nothing'"):
        planned("b", "layers=nothing", "metrics=[activation_mean]")
    cfg = nl.load_config("analyze")
    cfg.cost.memory = "80 parsecs"
    with pytest.raises(ValueError, match=r"cost.memory is '80 parsecs'; it takes bytes"):
        machine_of(cfg)


@pytest.mark.parametrize("name", ["dry_run", "plan_only"])
def test_deprecated_keys_mean_the_same_in_a_config_and_in_saved_settings(name):
    assert is_dry_run(OmegaConf.create({name: True}))
    assert not is_dry_run(OmegaConf.create({name: False}))
    assert _flat({name: False, "forecast": {"rows": 3}}) == _flat({"dry_run": False, "cost": {"rows": 3}})
    for group in ("cost", "forecast"):
        assert machine_of(OmegaConf.create({group: {"devices": 2, "rows": 5}})) == Machine(devices=2)
