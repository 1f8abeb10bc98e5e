"""What a pass costs over the bare forward (and backward): python benchmarks/overhead.py [--rounds 16]

ResNet-18, random weights and images, all 21 layers with weights: the default set's forward metrics, every forward metric of
the catalogue at once (metrics=forward), and a gradient metric.
"""

import argparse
import statistics
from typing import Any

import torch
from timing import interleaved
from torch import nn

from nodelens.app.config import load_config
from nodelens.engine.collect import Pass
from nodelens.engine.driver import Driver
from nodelens.engine.dry_run import DryRun
from nodelens.engine.plan import Plan
from nodelens.engine.request import as_metrics
from nodelens.metrics.sets import metric_set
from nodelens.models import resnet
from nodelens.network.eval_mode import eval_mode
from nodelens.network.find_layers import find_layers
from nodelens.network.hooks import Capture
from nodelens.network.objective import Objective

SIZES = {32: ("small", 64), 64: ("imagenet", 64), 224: ("imagenet", 32)}  # pixels: stem, batch
EVERY = list(load_config("analyze", ["metrics=forward"]).metrics)
FORWARD = [name for name in metric_set("default") if name not in ("taylor", "magnitude")]


def plan_of(
    model: nn.Module, batch: Any, metrics: list[str], positions: int | None = None, groups: int = 8, layers: str | list[str] = "*"
) -> tuple[Plan, Objective]:
    """The plan of a pass over batches like this one, and what is made of the model's answers."""
    found = find_layers(model, layers)
    objective = Objective.of(model).settled(model, batch)
    dry_run = DryRun.of(model, found, objective.batch(batch, groups), objective)
    plan = Plan.of(model, found, as_metrics(metrics), dry_run, groups, positions)
    return plan.with_kernels("auto", torch.device("cpu")), objective


def overhead(
    model: nn.Module,
    batch: Any,
    metrics: list[str],
    rounds: int,
    positions: int | None = None,
    groups: int = 8,
    layers: str | list[str] = "*",
) -> tuple[float, float]:
    """(processor seconds of the bare pass, ratio of the measured one): means over rounds, since buffers are emptied in some only.

    Buffers hold up to 1,024 samples: 16 rounds of 64 samples, and 32 of 32, fill each of them a whole number of times.
    """
    plan, objective = plan_of(model, batch, metrics, positions, groups, layers)
    taken = Pass(plan, objective)
    driver = Driver(model, objective, groups, graph=plan.gradients, answers=plan.gradients or plan.reads_predictions)
    capture = Capture(plan.sites(), taken.see, plan.overwritten)

    def bare() -> None:
        if isinstance(batch, dict):  # of a language model
            with torch.no_grad():
                model(**batch, use_cache=False)
            return
        x, y = batch
        if plan.gradients:
            x = x.clone().requires_grad_()
        with torch.set_grad_enabled(plan.gradients):
            logits = model(x).logits
            if plan.gradients:
                objective.summed(logits, y).backward()

    def measured() -> None:
        driver.run([batch], taken, capture)

    with eval_mode(model):
        for _ in range(3):
            measured()
        taken.flush()  # the memory of all sums is taken before the rounds
        seconds = interleaved({"bare": bare, "measured": measured}, rounds, processor=True, average=statistics.fmean)
    return seconds["bare"], seconds["measured"] / seconds["bare"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--sizes", type=int, nargs="*", default=list(SIZES))
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; ratio of the measured pass to the bare one")
    print(f"{len(FORWARD)} default forward metrics; all {len(EVERY)}; with 64 positions an image for pairs and quantiles")
    heads = ("pixels", "batch", "bare s", "default", "64 pos.", "all", "64 pos.", "fwd+bwd s", "gradient")
    print("".join(f"{head:>10}" for head in heads))
    for size in options.sizes:
        stem, count = SIZES[size]
        model = resnet(depth=18, classes=10, channels=3, size=size, stem=stem).eval()
        generator = torch.Generator().manual_seed(0)
        batch = torch.randn(count, 3, size, size, generator=generator), torch.randint(10, (count,), generator=generator)
        sets = [(FORWARD, None), (FORWARD, 64), (EVERY, None), (EVERY, 64)]
        found = [overhead(model, batch, names, options.rounds, positions) for names, positions in sets]
        both, gradient = overhead(model, batch, ["taylor"], options.rounds)
        ratios = "".join(f"{ratio:>9.2f}x" for _, ratio in found)
        print(f"{size:>10}{count:>10}{found[0][0]:>10.3f}{ratios}{both:>10.3f}{gradient:>9.2f}x", flush=True)


if __name__ == "__main__":
    main()
