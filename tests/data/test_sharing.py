"""Processes that read the same text tokenise a share of it each."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from nodelens.data.blocks import Reader, TokenStream
from nodelens.data.sharing import shared
from nodelens.data.tokens import ByteTokenizer

TEXTS = [f"document {k}: " + "words " * (k % 7) for k in range(1000)]


class Counting(ByteTokenizer):
    """A tokenizer that keeps what it is given."""

    def encode(self, texts):
        SEEN.extend(texts)
        return super().encode(texts)


SEEN: list[str] = []


def _unreadable():
    """Items of which one process cannot read those after the first round."""
    yield from range(3)
    raise OSError("a disk fails")


def _read(rank, world, folder, most):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    stream = TokenStream.join(Reader(Counting(), bos=True).read(iter(TEXTS), most, share=True))
    try:
        list(shared(lambda k: 1 // k, iter([2, 1, 0, 3])))
        told = ""
    except ZeroDivisionError as error:
        told = str(error)
    try:
        list(shared(str, _unreadable() if rank == 1 else iter(range(6))))
        lost = ""
    except OSError as error:
        lost = str(error)
    torch.save({"ids": stream.ids, "starts": stream.starts, "seen": SEEN, "told": told, "lost": lost}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("most", [None, 5000])
def test_each_process_tokenises_its_share_and_has_every_token(most, tmp_path):
    mp.start_processes(_read, (3, str(tmp_path), most), 3, start_method="fork")
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(3)]
    alone = TokenStream.join(Reader(ByteTokenizer(), bos=True).read(iter(TEXTS), most))
    for one in found:
        assert torch.equal(one["ids"], alone.ids)
        assert torch.equal(one["starts"], alone.starts)
        assert "division" in one["told"], "every process raises what one does"
        assert one["lost"] == "a disk fails", "also while one reads"
    seen = [text for one in found for text in one["seen"]]
    assert len(seen) == len(set(seen)), "no text is tokenised twice"
    assert most is not None or len(seen) == 1000
    assert max(len(one["seen"]) for one in found) <= len(seen) / 3 + 64


def test_one_process_does_all_of_it():
    assert list(shared(str, iter(range(5)))) == ["0", "1", "2", "3", "4"]
