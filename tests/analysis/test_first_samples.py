"""Options that count samples, predictions or tokens mean the same ones for any number of processes."""

import json
import warnings

import pandas as pd
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import nodelens as nl
from nodelens.interventions.prompts import first_prompts

LENGTHS = [9, 14, 3, 11, 12, 1, 7, 10, 5, 13, 8]
SIZE = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
LIMITS = {"ablate": 41, "geometry": 50, "prompts": 4}


def llama():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(**SIZE, num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3)
        return LlamaForCausalLM(config).double().eval()


def batches(size, first=0, step=1, side="right"):
    """Texts first, first + step, ... in padded batches; the last one may be smaller."""
    generator = torch.Generator().manual_seed(1)
    own = [torch.randint(1, 32, (length,), generator=generator) for length in LENGTHS][first::step]
    found = []
    for k in range(0, len(own), size):
        pad = {"batch_first": True, "padding_side": side}
        ids = nn.utils.rnn.pad_sequence(own[k : k + size], **pad)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(text) for text in own[k : k + size]], **pad)
        found.append({"input_ids": ids, "labels": ids, "attention_mask": mask})
    return found


def measured(folder, data):
    """What the options measure; files of one process."""
    found = nl.ablate(llama(), data, sample=3, predictions=LIMITS["ablate"])
    sets = nl.ablate_sets(
        llama(), data, {"two": {"model.layers.0.mlp": [1, 3]}}, how="resample", predictions=LIMITS["ablate"], seed=3
    )
    geometry = nl.analyze_model(llama(), data, max_tokens=LIMITS["geometry"], metrics=["spectrum", "sample"], sample_limit=20)
    prompts = [prompt.ids.tolist() for prompt in first_prompts(data, LIMITS["prompts"])]
    if not (dist.is_initialized() and dist.get_rank()):
        found.units.to_csv(folder / "units.csv")
        sets.to_csv(folder / "sets.csv")
        geometry.metrics.to_csv(folder / "geometry.csv")
        numbers = {name: found.metadata[name] for name in ("loss", "predictions", "samples")}
        (folder / "numbers.json").write_text(json.dumps([numbers, geometry.metadata["tokens_observed"], prompts]))


def share(rank, folder, takers, sizes, side):
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="batches are padded on the left")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=len(sizes))
    measured(folder, batches(sizes[rank], takers.index(rank), len(takers), side) if rank in takers else [])
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    measured(folder, batches(3))
    return folder


CASES = {"one": ([0], [4], "left"), "two": ([0, 1], [2, 3], "right"), "three": ([0, 1, 2], [1, 3, 2], "left")}
CASES |= {"one is empty": ([1, 2], [1, 4, 2], "right")}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_limits_mean_the_same_samples_for_any_number_of_processes(tmp_path, alone, case):
    takers, sizes, side = case
    method = "spawn" if torch.cuda.is_initialized() else "fork"
    mp.start_processes(share, (tmp_path, takers, sizes, side), len(sizes), start_method=method)
    for name in ("units", "sets", "geometry"):
        own, wanted = (pd.read_csv(folder / f"{name}.csv") for folder in (tmp_path, alone))
        pd.testing.assert_frame_equal(own, wanted, rtol=1e-9, atol=1e-11)
    (own, *rest), (wanted, *others) = (json.loads((folder / "numbers.json").read_text()) for folder in (tmp_path, alone))
    assert own == pytest.approx(wanted, rel=1e-12)
    assert rest == others


def test_the_limits_are_met(alone):
    numbers, tokens, prompts = json.loads((alone / "numbers.json").read_text())
    assert numbers["predictions"] == 8 + 13 + 2 + 10 + 11  # whole texts, until there are 41
    assert tokens == LIMITS["geometry"]
    assert [len(prompt) for prompt in prompts] == LENGTHS[: LIMITS["prompts"]]
