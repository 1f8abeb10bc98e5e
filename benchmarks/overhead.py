"""What a pass costs over the bare forward (and backward): python benchmarks/overhead.py [--rounds 9] [--profile NAME]

ResNet-18, random weights and images, all 21 layers with weights; forward metrics and gradient metrics apart.
"""

import argparse

import torch
from timing import interleaved
from torch import nn

from nodelens.collect import Pass
from nodelens.frame import Frame
from nodelens.hooks import Capture
from nodelens.layers import find_layers
from nodelens.measure import DEFAULT, _forward, as_metrics
from nodelens.models import resnet
from nodelens.modes import frozen
from nodelens.plan import Plan
from nodelens.recording import Recording
from nodelens.targets import summed_loss

SIZES = {32: ("small", 64), 64: ("imagenet", 64), 224: ("imagenet", 32)}  # pixels: stem, batch
FORWARD = [name for name in DEFAULT if name not in ("taylor", "magnitude")]


def overhead(
    model: nn.Module, batch: tuple, metrics: list[str], rounds: int, positions: int | None = None, groups: int = 8
) -> tuple[float, float]:
    """(seconds of the bare pass, ratio of the measured one): the steady state, buffers and their flushes included."""
    layers = find_layers(model)
    frame = Frame.of(batch, groups).sorted()
    plan = Plan.of(model, layers, as_metrics(metrics), Recording.of(model, layers, frame), groups, positions)
    taken = Pass(plan)
    capture = Capture(plan.sites(), taken.see, plan.overwritten)

    def bare() -> None:
        x, y = batch
        if plan.gradients:
            x = x.clone().requires_grad_()
        with torch.set_grad_enabled(plan.gradients):
            logits = model(x).logits
            if plan.gradients:
                summed_loss(logits, y).backward()

    def measured() -> None:
        with capture:
            taken.begin(frame)
            taken.end(_forward(model, frame, capture, summed_loss if plan.gradients else None))

    with frozen(model):
        for _ in range(3):
            measured()
        seconds = interleaved({"bare": bare, "measured": measured}, rounds)
    return seconds["bare"], seconds["measured"] / seconds["bare"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--sizes", type=int, nargs="*", default=list(SIZES))
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; ratio of the measured pass to the bare one")
    print(
        f"{'pixels':>6} {'batch':>5} {'bare s':>8} {'forward, all':>13} {'forward, 64 pos.':>17} {'fwd+bwd s':>10} {'gradient':>9}"
    )
    for size in options.sizes:
        stem, count = SIZES[size]
        model = resnet(depth=18, classes=10, channels=3, size=size, stem=stem).eval()
        generator = torch.Generator().manual_seed(0)
        batch = torch.randn(count, 3, size, size, generator=generator), torch.randint(10, (count,), generator=generator)
        bare, every = overhead(model, batch, FORWARD, options.rounds)
        _, some = overhead(model, batch, FORWARD, options.rounds, positions=64)
        both, gradient = overhead(model, batch, ["taylor"], options.rounds)
        print(f"{size:>6} {count:>5} {bare:>8.3f} {every:>12.2f}x {some:>16.2f}x {both:>10.3f} {gradient:>8.2f}x", flush=True)


if __name__ == "__main__":
    main()
