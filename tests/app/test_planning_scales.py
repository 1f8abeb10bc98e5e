"""Planning is linear in layers and experts: no function is called more often than the size of the model explains."""

import cProfile
import pstats

import pandas as pd
import pytest
import torch
from rich.console import Console
from transformers import DeepseekV3Config, LlamaConfig

import nodelens as nl
from nodelens.app.cost_estimate import estimate_cost, model_from_config, token_batch
from nodelens.app.tasks.prune import prune
from nodelens.app.tasks.show_pruning import show_groups
from nodelens.network.objective import Objective
from nodelens.pruning.allocation.allocate import Allocation
from nodelens.pruning.context import PruningContext
from nodelens.pruning.criteria.criterion import Criterion
from nodelens.pruning.planning import PruningOptions, plan_removal

TINY = {"hidden_size": 16, "intermediate_size": 8, "num_attention_heads": 4, "vocab_size": 16, "bos_token_id": 1, "eos_token_id": 2}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
ROUTED = {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1}


def dense(layers):
    return model_from_config(LlamaConfig(**TINY, num_hidden_layers=layers))


def deep(layers):
    return model_from_config(DeepseekV3Config(**TINY, **LATENT, **ROUTED, num_hidden_layers=layers, n_routed_experts=4))


def wide(experts):
    return model_from_config(DeepseekV3Config(**TINY, **LATENT, **ROUTED, num_hidden_layers=2, n_routed_experts=experts))


def analyze_layers(model):
    estimate_cost(model, ["activation_mean", "taylor", "rq", "redundancy"], length=8)


def analyze_experts(model):
    estimate_cost(model, ["activation_mean"], "*.experts[*].hidden", length=8)


def show_prune(model):
    context = PruningContext.of(model, Objective.of(model).batch(token_batch(2, 8)))
    with Console(quiet=True) as console:
        show_groups(console, context)


def choose_units(model):
    context = PruningContext.of(model, None)
    index = pd.MultiIndex.from_tuples([(g.name, u) for g in context.groups for u in range(g.n)], names=["group", "unit"])
    table = pd.DataFrame({"magnitude": torch.ones(len(index), dtype=torch.float64).numpy()}, index=index)
    for allocation in (Allocation(), Allocation("global", per_cost="params")):
        plan_removal(context, table, PruningOptions(criterion=Criterion.of("magnitude"), amount=0.2, allocation=allocation))


def calls(work, model):
    profile = cProfile.Profile()
    profile.runcall(work, model)
    return {place: count for place, (_, count, *_) in pstats.Stats(profile).stats.items()}


@pytest.mark.parametrize(
    ("build", "work", "size"),
    [
        pytest.param(dense, analyze_layers, 5, marks=pytest.mark.slow),  # the next has the same blocks, and experts
        (deep, analyze_layers, 3),
        (dense, show_prune, 8),
        (dense, choose_units, 8),
        (wide, analyze_experts, 16),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_four_times_the_size_takes_about_four_times_the_calls(build, work, size):
    work(build(size))  # imports, caches
    few, many = calls(work, build(size)), calls(work, build(4 * size))
    grown = {place: (few.get(place, 0), n) for place, n in many.items() if n > 400 and n > 4.6 * max(100, few.get(place, 0))}
    assert not grown


def test_a_prune_is_planned_from_a_config_alone(quiet_home, capsys):
    LlamaConfig(**TINY, num_hidden_layers=3, num_key_value_heads=2).save_pretrained(quiet_home / "model")
    chosen = ["model=causal_lm", "model.path=model", "dataset=text", "dataset.path=nowhere", "dataset.length=32"]
    prune(nl.load_config("prune", ["dry_run=true", "paths.output_dir=run", "scope=ffn", *chosen]))
    assert "3 groups, 24 units; prunable tensors have" in capsys.readouterr().out
