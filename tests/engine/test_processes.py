"""One process and three, one of them empty: the same tables, for every statistic and every metric."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cases_metrics import NAMES_PLAIN as NAMES_CONVOLUTIONAL
from cases_metrics import batches as in_batches
from cases_metrics import convolutional, rows, start_of
from compare import close, near, same
from ids import label
from laws import drifting, make
from nets import Mixed, batches, build, images

import nodelens as nl
from nodelens.statistics import STATISTICS, Accumulator
from nodelens.statistics.processes import reduce_sums


def _work(rank, world, folder, shares):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    x, start = drifting(100), sum(shares[:rank])
    sums = {}
    for statistic in STATISTICS:
        sums[statistic.__name__] = Accumulator(statistic, groups=2)
        if shares[rank]:
            sums[statistic.__name__].add(make(statistic, x[start : start + shares[rank]], start), 0)
    calls, all_reduce = [], dist.all_reduce
    dist.all_reduce = lambda tensor, op: calls.append(tensor.nbytes) or all_reduce(tensor, op)
    merged = sum(a.nbytes for a in sums.values() if a.statistic.merged)
    traffic = reduce_sums(sums, torch.device("cpu"))
    dist.all_reduce = all_reduce
    assert len(calls) <= 6, "shifts, and one for each dtype of sums and of maxima"
    parts = [part for a in sums.values() if not a.statistic.merged for part in a.parts if part is not None]
    shifts = sum(part.tensors()[name].nbytes for part in parts for name in part.shifts)
    held = sum(part.nbytes for part in parts)
    assert sum(calls[1:]) == held - shifts, "every sum is sent once"
    assert traffic.sums == held + merged
    assert traffic.sent == round(2 * (world - 1) / world * held) + (world - 1) * merged
    images_, labels = images()
    share = slice(sum(shares[:rank]), sum(shares[: rank + 1]))
    result = nl.analyze(build(Mixed), batches(images_[share], labels[share], 32) if shares[rank] else [])
    data = {k: t[share] for k, t in rows(100, (3, 9, 9)).items()}
    every = analyze(convolutional(), in_batches(data, 32) if shares[rank] else [], NAMES_CONVOLUTIONAL)
    if rank == world - 1:
        every.save(f"{folder}/every")
        torch.save({k: a.state_dict() for k, a in sums.items()}, f"{folder}/sums.pt")
        result.save(f"{folder}/result")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def alone():
    """What one process finds: the default metrics of one network, every metric of another."""
    data = in_batches(rows(100, (3, 9, 9)), 40)
    return nl.analyze(build(Mixed), batches(*images(), 40)), analyze(convolutional(), data, NAMES_CONVOLUTIONAL)


SLOW = [pytest.param(shares, marks=pytest.mark.slow) for shares in ([60, 0, 40], [13, 12, 12, 13, 0, 20, 15, 15])]


@pytest.mark.parametrize("shares", [[50, 50], *SLOW], ids=label)
def test_processes_add_up(tmp_path, shares, alone):
    mp.start_processes(
        _work,
        (len(shares), str(tmp_path), shares),
        len(shares),
        start_method="fork" if not torch.cuda.is_initialized() else "spawn",
    )
    state = torch.load(tmp_path / "sums.pt", weights_only=True)
    for statistic in STATISTICS:
        together = Accumulator(statistic, groups=2)
        together.load_state_dict(state[statistic.__name__])
        same(make(statistic, drifting(100)).widest(), together.value)
    few, every = alone
    found = nl.load(tmp_path / "result")
    close(found.units, few.units, 2e-5)
    close(found.layers, few.layers, 2e-5)
    assert found.metadata["processes"] == len(shares)
    assert 0 < found.metadata["traffic"]["sent"] <= 2 * found.metadata["traffic"]["sums"]
    assert few.metadata["traffic"]["sent"] == 0
    found = nl.load(tmp_path / "every")
    for table in ("units", "layers", "edges"):
        near(getattr(found, table), getattr(every, table))


def analyze(net, data, names):
    return nl.analyze(net, data, names, initial=start_of(net))
