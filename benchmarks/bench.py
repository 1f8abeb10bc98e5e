"""One table of ratios, with goals and peers: python benchmarks/bench.py [--minutes 10] [--rounds 16] [--keep]

Each ratio is of interleaved runs in processor time: of medians, and of means for the passes over ResNet-18 and Llama, whose
buffers are emptied in some rounds only. The table is compared with benchmarks/results.json, the last one that was kept; --keep
writes the new one there. Rows that would begin after the time limit are left out, and named.
"""

import argparse
import json
import platform
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from geometry import llama, seconds_of, texts
from groups import NETWORKS, compared
from memory import BARE, MEASURED, peaks
from overhead import EVERY, FORWARD, SIZES, overhead
from timing import cells, interleaved

import nodelens as nl
from nodelens.engine.request import as_metrics
from nodelens.models import resnet

KEPT = Path(__file__).with_name("results.json")


def reads_rows_alone(metric: nl.Metric) -> bool:
    """Whether a metric needs no label, next layer or weight, so that it exists at every site of a language model."""
    needs = metric.needs().values()
    return bool(needs) and not metric.weighted and all(need.target is None and need.port == "output" for need in needs)


LANGUAGE = [name for name, metric in as_metrics("forward").items() if reads_rows_alone(metric)]


class Row(NamedTuple):
    """One measurement: what is measured, over what, and the goal; a smaller value is better."""

    work: str
    value: float
    unit: str
    goal: float | None = None


def case(size: int, samples: int | None = None) -> tuple[torch.nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    stem, batch = SIZES[size]
    model = resnet(depth=18, classes=10, channels=3, size=size, stem=stem).eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(samples or batch, 3, size, size, generator=generator)
    return model, (images, torch.randint(10, (len(images),), generator=generator))


def passes(rounds: int, size: int) -> Iterator[Row]:
    """What a pass over ResNet-18 costs."""
    model, batch = case(size)
    for name, metrics, goal in (("default set", FORWARD, 1.2), (f"all {len(EVERY)} forward metrics", EVERY, 1.6)):
        _, ratio = overhead(model, batch, metrics, rounds)
        yield Row(f"ResNet-18, {size} px, {name}", ratio, "x the bare pass", goal)
    _, ratio = overhead(model, batch, ["taylor"], rounds)
    yield Row(f"ResNet-18, {size} px, a gradient metric", ratio, "x forward and backward", 1.05)


def whole_call() -> Iterator[Row]:
    """The whole call, plan and table included, once, beside the bare passes over the same images."""
    model, (x, y) = case(32, 128)
    data = list(zip(x.split(64), y.split(64), strict=True))

    def bare() -> None:
        with torch.no_grad():
            for images, _ in data:
                model(images)

    contestants = {"bare": bare, "call": lambda: nl.analyze(model, data, metrics=EVERY)}
    seconds = interleaved(contestants, 1, processor=True)
    ratio = seconds["call"] / seconds["bare"]
    yield Row("ResNet-18, 128 images, the whole call with all forward metrics", ratio, "x the bare passes", 5)


def pruning(rounds: int) -> Iterator[Row]:
    """Finding groups, and pruning by magnitude, beside Torch-Pruning."""
    for name in NETWORKS:
        try:
            found = compared(name, rounds)
        except ImportError:
            continue  # without torchvision
        peer = found.get("Torch-Pruning")
        for what in ("find groups", "prune"):
            if peer:
                yield Row(f"{name}, {what}", found[what] / peer, "x Torch-Pruning", 1)
            else:
                yield Row(f"{name}, {what}", found[what], "s")


def memory() -> Iterator[Row]:
    """How the peak memory grows with the number of samples."""
    small, large = peaks([1000, 10_000])
    yield Row("peak memory, 1,000 to 10,000 samples", large / small, "x", 1.03)
    bare, measured = peaks([BARE, MEASURED])
    yield Row("peak memory, ResNet-18, 224 px, all forward metrics", measured / bare, "x the bare pass", 1.3)


def language(rounds: int) -> Iterator[Row]:
    """A Llama of 6 layers, 384 wide: forward metrics of its units, and the geometry of its residual stream at several widths."""
    net, batch = llama().eval(), next(texts(1))
    for layers in ("blocks", "blocks.attention", "blocks.mlp.hidden"):
        _, ratio = overhead(net, batch, LANGUAGE, rounds, layers=layers)
        yield Row(f"Llama, 6 x 384, {len(LANGUAGE)} forward metrics, {layers}", ratio, "x the bare pass", 1.25)
    for width in (64, 384, 1024):
        seconds = seconds_of(8192, min(rounds, 3), width, processor=True)
        bare = seconds["bare, blocks"]
        yield Row(f"geometry of every block, 6 x {width}, 8,192 tokens", seconds["nodelens"] / bare, "x the blocks", 1.05)
        if "representation-geometry" in seconds:
            yield Row(
                f"representation-geometry, 6 x {width}, 8,192 tokens", seconds["representation-geometry"] / bare, "x the blocks"
            )


def measured(parts: Iterable[tuple[str, Callable[[], Iterator[Row]]]], minutes: float) -> Iterator[Row]:
    """The rows of all parts that begin within the limit."""
    start = time.monotonic()
    for name, part in parts:
        if time.monotonic() - start > 60 * minutes:
            print(f"left out, because the time is up: {name}")
            continue
        yield from part()


def report(rows: Iterable[Row], before: dict[str, dict]) -> dict[str, dict]:
    """Prints each row when it is there, beside its goal and the value that was kept; returns the rows as plain values."""
    found: dict[str, dict] = {}
    for row in rows:
        kept = before.get(row.work, {}).get("value")
        shown = {
            "work": f"{row.work:66}",
            "value": row.value,
            "goal": "" if row.goal is None else row.goal,
            "kept": "" if kept is None else float(kept),
            "change": "" if kept is None else f"{100 * (row.value / kept - 1):+.0f} %",
            "": row.unit,
        }
        print(cells(shown, head=not found), flush=True)
        found[row.work] = {"value": round(row.value, 4), "unit": row.unit, "goal": row.goal}
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--keep", action="store_true", help=f"write the table to {KEPT.name}")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    before = json.loads(KEPT.read_text()) if KEPT.is_file() else {"rows": {}}
    about = {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine()}
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    parts = [
        ("ResNet-18, 32 px", lambda: passes(options.rounds, 32)),
        ("memory", memory),
        ("the whole call", whole_call),
        ("pruning", lambda: pruning(3)),
        ("ResNet-18, 64 px", lambda: passes(options.rounds, 64)),
        ("language models", lambda: language(4)),
        ("ResNet-18, 224 px", lambda: passes(4, 224)),
    ]
    rows = report(measured(parts, 0.7 * options.minutes), before["rows"])  # the last part may take the rest
    text = json.dumps({**about, "rows": rows}, indent=1) + "\n"
    target = KEPT if options.keep else Path("outputs/bench.json")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text)
    print(f"written to {target}; --keep writes it to {KEPT.name}, with which later tables are compared")


if __name__ == "__main__":
    main()
