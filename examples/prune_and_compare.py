"""Prune a network by several criteria, with and without compensation, and compare the accuracies. Runs on a CPU in seconds."""

import pandas as pd
import torch
from torch.nn import functional

import nodelens as nl
from nodelens.data import Digits
from nodelens.evaluation.evaluate import evaluate
from nodelens.models import cnn

CRITERIA = {
    "taylor": "taylor",
    "magnitude": "magnitude",
    "wanda": "wanda",
    "taylor, less redundancy": {"taylor": 1.0, "redundancy": -0.5},
    "random": "random",
}


def main() -> pd.DataFrame:
    """One row per criterion, one column per compensation: test accuracy after removing a quarter of the channels."""
    torch.manual_seed(0)
    digits = Digits()
    digits.setup()
    model = cnn(classes=10, channels=1, size=8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(3):
        for batch in digits.train_dataloader():
            optimizer.zero_grad()
            functional.cross_entropy(model(batch.x), batch.y).backward()
            optimizer.step()
    model.eval()

    calibration, test = digits.loader("calibration"), digits.loader("test")
    print(f"dense: test accuracy {evaluate(model, test)['accuracy']:.3f}\n")
    table = {}
    for name, criterion in CRITERIA.items():
        table[name] = {}
        for compensate in ("none", "bias", "batch_norm"):
            pruned = nl.prune(model, criterion, 0.25, data=calibration, compensate=compensate)
            table[name][compensate] = evaluate(pruned.model, test)["accuracy"]
    about = pruned.plan.about
    frame = pd.DataFrame(table).T
    print(f"pruned: {about['macs'] / about['dense_macs']:.0%} of the multiply-accumulate operations are left")
    print(frame.round(3))

    best = nl.prune(model, "taylor", 0.25, data=calibration, compensate="batch_norm")
    best.save("outputs/examples/pruned")
    again = nl.load_pruned("outputs/examples/pruned", model=cnn(classes=10, channels=1, size=8))
    x = next(iter(test)).x
    print("\nthe saved network gives the same outputs:", torch.equal(again(x), best.model(x)))
    return frame


if __name__ == "__main__":
    main()
