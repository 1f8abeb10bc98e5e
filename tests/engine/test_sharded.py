"""A model that FSDP2 has sharded over two processes: the tables of the whole model, and a training that measuring leaves alone."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cases_metrics import NAMES_PLAIN, OF_NORMS, batches, convolutional, rows, start_of
from compare import close, near
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.testing import assert_close

import nodelens as nl
from nodelens.network.sharded import check_data_parallel, class_name, full, is_sharded, load_state
from nodelens.network.sharded import shard as shard_blocks

FEW = [
    "rq",
    "taylor",
    "average_redundancy",
    "delta_alignment",
    "bn_scale",
    "activation_zero_fraction",
    "scar_curvature",
    "linear_cka",
]
OF_GROUPS = ["taylor", "wanda", "taylor_producer", "group_l2", "network_slimming", "fanout_entropy"]
EVERY = pytest.param(([2, 2], [*NAMES_PLAIN, *OF_NORMS]), marks=pytest.mark.slow)
CASES = [([3, 1], FEW), ([4, 0], FEW), EVERY]  # batches of each process, and metrics of layers


def data():
    return batches(rows(60, (3, 9, 9)), 16)


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)).eval()


def shard(net):
    """Shards one convolution by itself and the rest together."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(net[3], mesh=mesh)
    return fully_shard(net, mesh=mesh)


def measured(net, names, groups, given):
    of_layers = nl.analyze(net, given, names, initial=start_of(convolutional()), groups=4)
    return of_layers, nl.analyze(net, given, OF_GROUPS, groups, groups=4)


def gradients(net):
    """Those of a step of training, whole."""
    net.train()
    net(data()[0]["x"]).square().sum().backward()
    return {name: full(p.grad) for name, p in net.named_parameters()}


def refusals(net, groups):
    """What is said of calls that need the whole model."""
    calls = {
        "prune": lambda: nl.prune(net, "taylor", data=data()),
        "groups": lambda: nl.find_groups(net, data()[0]),
        "gradient": lambda: nl.analyze(net, data(), "gradient", groups),
        "derivative": lambda: nl.analyze(net, data(), "backward_jac"),
        "analysis": lambda: nl.analyze(net, data(), analysis="modularity"),
        "ablate": lambda: nl.ablate(net, data(), layers="0"),
        "object": lambda: nl.get_analysis("modularity")(net, data()),
    }
    said = {}
    for name, call in calls.items():
        with pytest.raises(ValueError) as error:
            call()
        said[name] = str(error.value)
    return said


def of_buffers(net, rank):
    """What is said where the processes have other buffers."""
    net[1].running_mean += rank
    with pytest.raises(ValueError) as error:
        nl.analyze(net, data(), "rq")
    return str(error.value)


def _work(rank, folder, share, names):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    net = convolutional()
    groups = nl.find_groups(net, data()[0])
    shard(net)
    own = data()[sum(share[:rank]) : sum(share[: rank + 1])]
    of_layers, of_groups = measured(net, names, groups, own)
    scores = nl.evaluate(net, own)
    kept = [p.requires_grad and p.grad is None for p in net.parameters()]
    after = gradients(net)
    said = refusals(net.eval(), groups)
    buffers = of_buffers(net, rank)
    if rank == 1:  # every process has the whole table
        of_layers.save(f"{folder}/layers")
        of_groups.save(f"{folder}/groups")
        torch.save(after, f"{folder}/gradients.pt")
        about = {
            "scores": scores,
            "class": class_name(net),
            "sharded": is_sharded(net),
            "kept": all(kept),
            "said": said,
            "buffers": buffers,
        }
        Path(folder, "about.json").write_text(json.dumps(about))
    dist.destroy_process_group()


@cache
def alone(*names):
    """What one process finds, with the whole model."""
    net = convolutional()
    of_layers, of_groups = measured(net, list(names), nl.find_groups(net, data()[0]), data())
    return of_layers, of_groups, nl.evaluate(net, data()), gradients(net)


@pytest.fixture(scope="module", params=CASES, ids=["shares", "empty", "every"])
def found(request, tmp_path_factory):
    """The folder to which two processes write, and what is expected there."""
    folder, (share, names) = tmp_path_factory.mktemp("sharded"), request.param
    expected = alone(*names)  # first, so that the processes find everything imported
    mp.start_processes(_work, (str(folder), share, names), 2, start_method="fork")
    return folder, expected


def test_the_tables_are_those_of_the_whole_model(found):
    found, alone = found
    for name, expected in zip(("layers", "groups"), alone, strict=False):
        result = nl.load(found / name)
        for table in ("units", "layers", "edges"):
            near(getattr(result, table), getattr(expected, table))
        assert result.metadata["model"] == expected.metadata["model"], "class and fingerprint"
        assert result.metadata["missing"] == expected.metadata["missing"]
        assert result.metadata["samples"] == 60


def test_the_scores_are_those_of_the_whole_model(found):
    found, alone = found
    about = json.loads((found / "about.json").read_text())
    assert about["scores"] == pytest.approx(alone[2], rel=1e-9)


def test_measuring_leaves_a_training_as_it_was(found):
    found, alone = found
    assert json.loads((found / "about.json").read_text())["kept"], "flags of parameters, and no gradient"
    after = torch.load(found / "gradients.pt", weights_only=True)
    assert after.keys() == alone[3].keys()
    for name, gradient in after.items():
        assert_close(gradient, alone[3][name], rtol=1e-9, atol=1e-12)


def test_calls_that_need_the_whole_model_say_so(found):
    about = json.loads((found[0] / "about.json").read_text())
    assert about["class"] == "Sequential"
    assert about["sharded"]
    begins = {
        "prune": "nl.prune",
        "groups": "nl.find_groups",
        "gradient": "metric 'gradient'",
        "derivative": "metric 'backward_jac'",
        "analysis": "analysis modularity",
        "ablate": "nl.ablate",
        "object": "ModularityAnalysis",
    }
    for name, said in about["said"].items():
        assert said == (
            f"{begins[name]}: Sequential is sharded over processes (fully_shard): gather its weights by get_model_state_dict("
            "model, options=StateDictOptions(full_state_dict=True)), and load them into the model in one process; nl.analyze and "
            "nl.evaluate take it as it is"
        )


def test_buffers_that_differ_are_no_model(found):
    about = json.loads((found[0] / "about.json").read_text())
    assert about["buffers"] == (
        "the processes have other buffers of Sequential, such as running statistics of batch norms, which fully_shard leaves to "
        "each process: copy those of the first one, torch.distributed.broadcast(buffer, 0) for each"
    )


def _of_language(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    net = llama()
    shard_blocks(net, init_device_mesh("cpu", (2,)))
    result = nl.analyze(net, texts()[rank:] if rank else texts()[:1], "default")
    if rank == 0:
        result.save(f"{folder}/result")
    dist.destroy_process_group()


def texts():
    ids = torch.randint(30, (12, 7), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": part, "labels": part} for part in ids.split(3)]


@pytest.mark.slow
def test_a_language_model_that_is_sharded_by_blocks(tmp_path):
    expected = nl.analyze(llama(), texts(), "default")
    mp.start_processes(_of_language, (str(tmp_path),), 2, start_method="fork")
    result = nl.load(tmp_path / "result")
    assert result.metadata["model"] == expected.metadata["model"]
    for table in ("units", "layers"):
        close(getattr(result, table), getattr(expected, table), 2e-5)


def test_blocks_are_sharded_by_themselves(tmp_path):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList([nn.Sequential(nn.Linear(4, 4))])

    net = nn.Sequential(nn.Linear(4, 4), nn.Sequential(Block(), Block()), nn.ModuleDict({"head": nn.Linear(4, 2)}))
    whole = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        shard_blocks(net, init_device_mesh("cpu", (1,)))
        assert [name for name, module in net.named_modules() if isinstance(module, FSDPModule)] == [
            "",
            "1.0",
            "1.1",
        ]
        load_state(net, {name: tensor + 1 for name, tensor in whole.items()})
        for name, tensor in net.state_dict().items():
            assert_close(full(tensor), whole[name] + 1)
    finally:
        dist.destroy_process_group()


def test_other_kinds_of_sharding_are_refused(tmp_path):
    class FullyShardedDataParallel(nn.Module):
        pass

    with pytest.raises(ValueError, match="FullyShardedDataParallel, whose parameters have lost their shapes: shard it by torch"):
        check_data_parallel("nl.analyze", FullyShardedDataParallel())
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        net = parallelize_module(convolutional(), init_device_mesh("cpu", (1,)), {"11": ColwiseParallel()})
        with pytest.raises(
            ValueError, match=r"^nl.analyze: 11.weight of Sequential is sharded by tensor parallelism, within which"
        ):
            nl.analyze(net, data(), "rq")
    finally:
        dist.destroy_process_group()


def test_other_models_are_not_sharded():
    net = convolutional()
    assert not is_sharded(net)
    assert full(net[0].weight) is net[0].weight
    assert class_name(net) == "Sequential"
