"""Train a small convolutional network on handwritten digits and measure its channels. Runs on a CPU in seconds."""

import torch
from torch.nn import functional

import nodelens as nl
from nodelens.data import Digits
from nodelens.models import cnn


def train(model: torch.nn.Module, digits: Digits, epochs: int = 3) -> None:
    """Plain PyTorch: nodelens does not need to know how a model was trained."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for batch in digits.train_dataloader():
            optimizer.zero_grad()
            functional.cross_entropy(model(batch.x), batch.y).backward()
            optimizer.step()
    model.eval()


def main() -> nl.Result:
    """Measure, print a summary, save the tables."""
    torch.manual_seed(0)
    digits = Digits()
    digits.setup()
    model = cnn(classes=10, channels=1, size=8)
    train(model, digits)

    metrics = ["redundancy", "taylor", "zero_fraction", "class_selectivity", "participation_ratio", "linear_cka"]
    result = nl.analyze(model, digits.loader("calibration"), metrics, layers="*relu")

    print("mean over the units of each layer")
    print(result.units[["zero_fraction", "redundancy", "taylor", "class_selectivity"]].groupby("layer").mean().round(3))
    print("\nchannels that matter most for the loss, with standard errors")
    print(result.units[["taylor", "taylor_se"]].nlargest(5, "taylor").round(3))
    print("\nlayers: how many dimensions they use")
    print(result.layers[["units", "participation_ratio"]].round(1))
    print("\npairs of layers: how similar they are")
    print(result.edges[["linear_cka"]].round(2))

    result.save("outputs/examples/analyze_cnn")
    return result


if __name__ == "__main__":
    main()
