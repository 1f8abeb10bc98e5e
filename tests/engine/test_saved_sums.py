"""A pass that was stopped continues from its saved sums, and ends with the numbers of an undisturbed one to the bit."""

import os
import signal
import threading
import time

import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cases_criteria import EVERY, conv_groups, conv_net
from cases_metrics import NAMES_PLAIN, convolutional, rows, start_of
from cases_metrics import batches as in_batches
from nets import Mixed, Tokens, batches, build, images
from torch.utils.data import DataLoader, TensorDataset

import nodelens as nl
from nodelens.engine.saved_sums import _can_start_anywhere
from nodelens.engine.signals import StoppedError, noted
from nodelens.metrics.sets import metric_set


def equal(one, two):
    """All that two results hold, to the bit, but for the time."""
    for table in ("units", "layers", "edges"):
        pd.testing.assert_frame_equal(getattr(one, table), getattr(two, table), check_exact=True)
    assert one.matrices.keys() == two.matrices.keys()
    for key, matrix in one.matrices.items():
        np.testing.assert_array_equal(matrix, two.matrices[key])
    a, b = ({k: v for k, v in result.metadata.items() if k != "seconds"} for result in (one, two))
    assert repr(a) == repr(b)


class Stream:
    """Batches that can be read several times, but only from the start. At one of them this process sends itself a signal."""

    def __init__(self, data, at=None, number=signal.SIGTERM):
        self.data, self.at, self.number, self.read = data, at, number, 0

    def __iter__(self):
        for batch in self.data:
            self.read += 1
            if self.read == self.at:
                os.kill(os.getpid(), self.number)
            yield batch


def stop(model, data, at, folder, *args, number=signal.SIGTERM, **options):
    with pytest.raises(StoppedError, match=r"stopped by SIG\w+: the sums of \d+ batches of this reading of the data are saved in"):
        nl.analyze(model, Stream(data, at, number), *args, save_to=folder, **options)
    assert list(folder.rglob("*.pt"))


def counted(model):
    """A list that grows by one with each batch the model runs on."""
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("size", [5, 40], ids=["buffered", "large"])
@pytest.mark.parametrize(
    "names", [list(metric_set("default")), pytest.param(NAMES_PLAIN, marks=pytest.mark.slow)], ids=["default", "every"]
)
def test_metrics_continue_to_the_bit(names, size, tmp_path):
    net, data = convolutional(torch.float32), in_batches(rows(100, (3, 9, 9), torch.float32), size)
    whole = nl.analyze(net, Stream(data), names, initial=start_of(net))
    at = len(data) // 2 + 2  # the first reading of a batch is for the plan
    stop(net, data, at, tmp_path, names, initial=start_of(net))
    calls = counted(net)
    equal(nl.analyze(net, Stream(data), names, initial=start_of(net), save_to=tmp_path), whole)
    assert len(calls) - 2 < len(data) - 1, "batches in the sums are not run again, but for two calls of the plan"


@pytest.mark.parametrize("at", [2, pytest.param(5, marks=pytest.mark.slow), 8, pytest.param(11, marks=pytest.mark.slow)])
def test_sums_over_the_whole_model_continue_in_any_round(at, tmp_path):
    """Gradients of weights, a copy in training, and products with supernodes, which read the data twice."""
    g = torch.Generator().manual_seed(5)
    data = [(torch.randn(6, 2, 5, 5, generator=g, dtype=torch.float64), torch.randint(5, (6,), generator=g)) for _ in range(5)]
    names = ["gradient", "fisher", "llm_pruner", "supernode_connectivity_score", "taylor"]
    metrics = {name: EVERY[name] for name in names} | {"movement": nl.get_metric("movement", epochs=3)}
    whole = nl.analyze(conv_net(), Stream(data), metrics, conv_groups())
    stop(conv_net(), data, at, tmp_path, metrics, conv_groups())
    equal(nl.analyze(conv_net(), Stream(data), metrics, conv_groups(), save_to=tmp_path), whole)


def test_a_pass_may_be_stopped_again_and_again(tmp_path):
    net, data = build(Mixed), batches(*images(), 8)
    whole = nl.analyze(net, Stream(data))
    for at in (3, 5, 5, 8, 10, 13):  # before, at and behind what is saved, and at the last batch
        try:
            nl.analyze(net, Stream(data, at), save_to=tmp_path)
        except StoppedError:
            continue
    equal(nl.analyze(net, Stream(data), save_to=tmp_path), whole)


def test_several_passes_continue(tmp_path):
    net, data = build(Mixed), batches(*images(), 16)
    options = {"metrics": ["rq", "redundancy", "linear_cka"], "budget": "90MB", "max_passes": 9}
    whole = nl.analyze(net, Stream(data), **options)
    assert len(whole.metadata["passes"]) > 1
    for at in (4, 9):
        stop(net, data, at, tmp_path, **options)
    equal(nl.analyze(net, Stream(data), save_to=tmp_path, **options), whole)


def test_paired_rows_and_token_targets_continue(tmp_path):
    g = torch.Generator().manual_seed(0)
    data = [
        {
            "input_ids": torch.randint(11, (4, 5), generator=g),
            "attention_mask": (torch.arange(5) < torch.randint(2, 6, (4, 1), generator=g)).long(),
            "labels": torch.randint(3, (4,), generator=g),
        }
        for _ in range(6)
    ]
    names = ["linear_cka", "synergy", "taylor", "mi"]
    whole = nl.analyze(build(Tokens), Stream(data), names)
    stop(build(Tokens), data, 4, tmp_path, names)
    equal(nl.analyze(build(Tokens), Stream(data), names, save_to=tmp_path), whole)


class Counting(TensorDataset):
    fetched = 0

    def __getitem__(self, index):
        type(self).fetched += 1
        return super().__getitem__(index)


def test_a_loader_in_a_fixed_order_starts_behind_the_saved_batches(tmp_path, monkeypatch):
    net, data = build(Mixed), Counting(*images())
    whole = nl.analyze(net, DataLoader(data, batch_size=8))
    seen = counted(net)

    def term(*_):
        if len(seen) == 9:
            os.kill(os.getpid(), signal.SIGUSR1)

    hook = net.register_forward_hook(term)
    with pytest.raises(StoppedError, match="stopped by SIGUSR1"):
        nl.analyze(net, DataLoader(data, batch_size=8), save_to=tmp_path)
    hook.remove()
    monkeypatch.setattr(Counting, "fetched", 0)
    equal(nl.analyze(net, DataLoader(data, batch_size=8), save_to=tmp_path), whole)
    assert Counting.fetched < 8 * 8, "the first batch, the last saved one, and those behind it"


def test_a_list_starts_behind_the_saved_batches(tmp_path):
    net, data = build(Mixed), batches(*images(), 8)
    whole = nl.analyze(net, data)
    seen = counted(net)
    hook = net.register_forward_hook(lambda *_: os.kill(os.getpid(), signal.SIGTERM) if len(seen) == 6 else None)
    with pytest.raises(StoppedError):
        nl.analyze(net, data, save_to=tmp_path)
    hook.remove()
    equal(nl.analyze(net, data, save_to=tmp_path), whole)


def test_other_data_are_an_error_and_other_questions_start_again(tmp_path):
    net, data = build(Mixed), batches(*images(), 16)
    stop(net, data, 4, tmp_path, ["rq"])
    for other in ([data[0], *data[:0:-1]], data[:2]):
        with pytest.raises(
            ValueError, match=r"holds the sums of 3 batches, but the data do not begin with these batches: give the"
        ):
            nl.analyze(net, Stream(other), ["rq"], save_to=tmp_path)
    for metrics, options in ((["activation_mean"], {}), (["rq"], {"seed": 1}), (["rq"], {"groups": 4})):
        equal(
            nl.analyze(net, Stream(data), metrics, save_to=tmp_path, **options), nl.analyze(net, Stream(data), metrics, **options)
        )


def test_a_damaged_file_of_sums_is_named(tmp_path):
    net, data = build(Mixed), batches(*images(), 16)
    stop(net, data, 4, tmp_path, ["rq"])
    (file,) = tmp_path.rglob("*.pt")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{file.name} is damaged: its SHA-256 is not the one"):
        nl.analyze(net, Stream(data), ["rq"], save_to=tmp_path)


def test_sums_are_saved_every_so_many_minutes(tmp_path):
    net, data = build(Mixed), batches(*images(), 16)
    nl.analyze(net, Stream(data), ["rq"], save_to=tmp_path / "never")
    assert not (tmp_path / "never").exists(), "a short pass writes nothing"
    saved = nl.analyze(net, Stream(data), ["rq"], save_to=tmp_path / "each", save_minutes=0)
    assert list((tmp_path / "each").rglob("*.pt"))
    calls = counted(net)
    equal(nl.analyze(net, Stream(data), ["rq"], save_to=tmp_path / "each", save_minutes=0), saved)
    assert len(calls) == 3, "two for the plan, and the last batch"
    with pytest.raises(ValueError, match="save_minutes is -1; it is 0"):
        nl.analyze(net, data, save_minutes=-1)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGHUP", "SIGINT"])
def test_signals_are_as_they_were_afterwards(name, tmp_path):
    number, net, data = getattr(signal, name), build(Mixed), batches(*images(), 16)
    before = signal.getsignal(number)
    stop(net, data, 4, tmp_path, ["rq"], number=number)
    assert signal.getsignal(number) == before


def test_a_former_handler_is_called_when_the_sums_are_saved_and_an_ignored_signal_stays_ignored(tmp_path):
    net, data, called = build(Mixed), batches(*images(), 16), []
    former = signal.signal(signal.SIGUSR1, lambda *_: called.append(len(list(tmp_path.rglob("*.pt")))))
    hangup = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        found = nl.analyze(net, Stream(data, 4, signal.SIGUSR1), ["rq"], save_to=tmp_path)
        nl.analyze(net, Stream(data, 4, signal.SIGHUP), ["rq"], save_to=tmp_path / "ignored")
    finally:
        signal.signal(signal.SIGUSR1, former)
        signal.signal(signal.SIGHUP, hangup)
    assert called == [1]
    assert not (tmp_path / "ignored").exists()
    equal(found, nl.analyze(net, Stream(data), ["rq"]))


def test_a_signal_that_nobody_obeyed_arrives_again_when_the_reading_fails():
    called = []
    former = signal.signal(signal.SIGUSR1, lambda number, _: called.append(number))

    def failing(signals):
        os.kill(os.getpid(), signal.SIGUSR1)
        while not signals.arrived:
            time.sleep(0.001)
        raise ZeroDivisionError

    try:
        with pytest.raises(ZeroDivisionError), noted() as signals:
            failing(signals)
    finally:
        signal.signal(signal.SIGUSR1, former)
    assert called == [signal.SIGUSR1]


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    net, data = build(Mixed), batches(*images(), 16)
    once = threading.Event()

    def twice(*_):
        if not once.is_set():
            once.set()
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    net.head.register_forward_hook(twice)
    with pytest.raises(KeyboardInterrupt) as error:
        nl.analyze(net, Stream(data), ["rq"], save_to=tmp_path)
    assert not isinstance(error.value, StoppedError)


def _process(rank, folder, at):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet{at[0]}", rank=rank, world_size=len(at))
    g = torch.Generator().manual_seed(rank)
    data = [(torch.randn(6, 2, 5, 5, generator=g, dtype=torch.float64), torch.randint(5, (6,), generator=g)) for _ in range(4)]
    metrics = {name: EVERY[name] for name in ("supernode_connectivity_score", "taylor", "gradient")}
    try:
        found = nl.analyze(conv_net(), Stream(data, at[rank]), metrics, conv_groups(), save_to=f"{folder}/sums")
        found.save(f"{folder}/whole{rank}" if at[rank] is None else f"{folder}/unused{rank}")
    except StoppedError:
        os._exit(0)


@pytest.mark.parametrize(
    "at",
    [pytest.param((3, 4), marks=pytest.mark.slow), (7, 3), pytest.param((7, 8), marks=pytest.mark.slow)],
    ids=["first round", "one process ahead", "second round"],
)
def test_several_processes_continue_together(at, tmp_path):
    """Each saves its own sums. A process that had already begun the second round goes back to the round of the others."""
    folder = tmp_path / "stopped"
    for home, stops in ((tmp_path / "whole", (None, None)), (folder, at), (folder, (None, None))):
        home.mkdir(exist_ok=True)
        context = mp.start_processes(_process, (str(home), stops), len(stops), start_method="fork", join=False)
        if stops == at:
            for process in context.processes:
                process.join(60)
                process.kill()
        else:
            while not context.join():
                pass
    assert list((folder / "sums").rglob("*.pt"))
    equal(nl.load(folder / "whole0"), nl.load(tmp_path / "whole/whole0"))


class Pairs:
    """A batch sampler of one's own: pairs of samples, from the last to the first."""

    def __iter__(self):
        return iter([[k, k - 1] for k in range(11, 0, -2)])

    def __len__(self):
        return 6


def test_a_loader_with_a_batch_sampler_of_its_own_is_read_again_from_the_start():
    assert not _can_start_anywhere(DataLoader(TensorDataset(torch.arange(12)), batch_sampler=Pairs()))
    assert _can_start_anywhere(DataLoader(TensorDataset(torch.arange(12)), batch_size=2))
    assert not _can_start_anywhere(DataLoader(TensorDataset(torch.arange(12)), batch_size=2, shuffle=True))
