"""Peak memory of a pass against the number of samples: python benchmarks/memory.py [--samples 1000 10000 100000]

Each count runs in a process of its own over a stream of random batches; the peak is the process's largest resident set.
"""

import argparse
import os
import resource
import subprocess
import sys
from pathlib import Path

import torch

BARE, MEASURED = -1, -2  # counts that stand for passes over ResNet-18 at 224 px


def peak(samples: int) -> float:
    """Largest resident set in MiB after a pass with every default metric over a small convolutional network."""
    import nodelens as nl
    from nodelens.models import cnn

    net = cnn(classes=10, channels=3, size=16, widths=[32, 64, 128]).eval()
    generator = torch.Generator().manual_seed(0)
    data = (
        (torch.randn(100, 3, 16, 16, generator=generator), torch.randint(10, (100,), generator=generator))
        for _ in range(samples // 100)
    )
    nl.analyze(net, data)
    return largest()


def peak_at_224(measured: bool) -> float:
    """Largest resident set in MiB after passes over ResNet-18 at 224 px, batch 32: bare, or with all forward metrics."""
    import nodelens as nl
    from nodelens.models import resnet

    net = resnet(depth=18, classes=10, channels=3, size=224, stem="imagenet").eval()
    generator = torch.Generator().manual_seed(0)
    data = [(torch.randn(32, 3, 224, 224, generator=generator), torch.randint(10, (32,), generator=generator)) for _ in range(2)]
    if measured:
        nl.analyze(net, data, "forward")
    else:
        with torch.no_grad():
            for images, _ in data:
                net(images)
    return largest()


def largest() -> float:
    """Largest resident set of this process in MiB; that of ``getrusage`` would be at least that of the process that started it."""
    status = Path("/proc/self/status")
    if status.is_file():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def peaks(counts: list[int]) -> list[float]:
    """The peak of each number of samples, MiB, measured in a process of its own."""
    environment = os.environ | {"MALLOC_ARENA_MAX": "1"}  # one heap: what other threads keep is the allocator's
    commands = [[sys.executable, __file__, f"--one={count}"] for count in counts]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True, env=environment) for command in commands]
    return [float(run.stdout) for run in runs]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, nargs="*", default=[1000, 10_000, 100_000])
    parser.add_argument("--one", type=int)
    options = parser.parse_args()
    if options.one:
        print(peak(options.one) if options.one > 0 else peak_at_224(options.one == MEASURED))
        return
    first = 0.0
    for count in options.samples:
        (found,) = peaks([count])
        first = first or found
        print(f"{count:>8,} samples: {found:8.1f} MiB peak ({100 * (found / first - 1):+.1f} %)", flush=True)


if __name__ == "__main__":
    main()
