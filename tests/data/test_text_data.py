"""Cached and streamed texts give the same samples as texts read into memory; selections at block edges."""

import json
import logging
import tracemalloc
from itertools import islice

import datasets
import pytest
import torch
from ids import label
from real import folder

from nodelens.data import ByteTokenizer, Text
from nodelens.data.blocks import Reader, packed
from nodelens.data.corpus import Corpus
from nodelens.data.textstream import Blocks, TextStream
from nodelens.data.tokens import StoredTokenizer

TEXTS = ["Once upon a time.", "", "Zwölf Boxkämpfer jagen\nViktor", "quer über den Sylter Deich. 中文 😀!", "The end"]
BYTES = ByteTokenizer()


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "hf"))


@pytest.fixture
def encoded(monkeypatch):
    """The number of tokenised texts."""
    seen, encode = [], ByteTokenizer.encode
    monkeypatch.setattr(ByteTokenizer, "encode", lambda self, texts: seen.extend(texts) or encode(self, texts))
    return seen


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    return str(file)


def small(path=None, **options):
    return Text(path, **{"length": 16, "remainder": "keep", "calibration": 0} | options)


def every(data, *rest, **options):
    return list(data.loader("all", *rest, **options))


def same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        assert all(torch.equal(x[key], y[key]) for key in x)


def test_a_match_across_the_edge_of_blocks_counts_on_both_sides(path):
    data = small(path, length=8, select="phrase:upon")
    batches = every(data, batch_size=50)
    ids, chosen = (torch.cat([b[k].flatten() for b in batches]) for k in ("input_ids", "select"))
    assert BYTES.decode(ids[chosen].tolist()) == "upon"
    assert chosen[5:8].sum() < 4, "the first block ends inside the word"
    assert data.counts["counted"] == 4


def test_the_prefix_of_a_block_is_not_part_of_the_text(path):
    (batch,) = every(small(path, bos="block", length=500, select="phrase:O"))
    assert batch["select"].nonzero().tolist() == [[0, 1]]


def test_a_phrase_does_not_match_across_documents(tmp_path):
    (tmp_path / "a.txt").write_text("ab|cd")
    path = str(tmp_path / "a.txt")
    assert small(path, separator="|", bos=None, select="phrase:c").loader("all")
    with pytest.raises(ValueError, match=r"select='phrase:bc' selects no token of '.*a.txt'; give another selector"):
        small(path, separator="|", bos=None, select="phrase:bc").setup()


def test_phrases_of_a_stored_tokenizer():
    home = folder("NODELENS_DATA")
    model = str(home / "models/stories260K")
    text = (home / "text/tinystories_5.txt").read_text()
    file = str(home / "text/tinystories_5.txt")
    data = small(file, tokenizer=model, separator="<|endoftext|>", length=64, select="phrase:Lucy")
    rows = [b["input_ids"][b["select"]] for b in every(data)]
    tokens = StoredTokenizer.of(model).tokenizer.convert_ids_to_tokens(torch.cat(rows).tolist())
    assert "".join(tokens).replace("▁", "") == "Lucy" * text.count("Lucy")


def test_each_token_is_counted_once(path, tmp_path):
    data = small(path, mode="pad", length=40, batch_size=3, select="n//2:", special="drop", eos=True)
    padding = special = counted = total = 0
    for batch in every(data):
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        padding, total, counted = padding + int((~mask).sum()), total + mask.numel(), counted + int(batch["select"].sum())
        special += int((mask & (batch["input_ids"] >= 256)).sum())
        assert not batch["select"][batch["input_ids"] >= 256].any()
    found = {k: data.counts[k] for k in ("padding", "special_left_out", "not_selected", "counted")}
    assert found == {
        "padding": padding,
        "special_left_out": special,
        "not_selected": total - padding - special - counted,
        "counted": counted,
    }
    assert json.loads(data.save_splits(tmp_path / "run").read_text())["counts"] == data.counts
    plain = small(path, mode="pad", length=40, batch_size=3, eos=True)
    plain.setup()
    assert plain.counts["counted"] == total - padding
    assert plain.fingerprint() != data.fingerprint()


CUTS = {
    "blocks": {},
    "overlap": {"stride": 5, "remainder": "drop"},
    "block bos": {"bos": "block", "length": 9, "stride": 3},
    "no bos": {"bos": None, "eos": True, "length": 2},
    "limits": {"max_tokens": 61, "documents": 4, "side": "left"},
    "selected": {"select": "phrase:er & loss", "special": "drop", "stride": 7},
}


@pytest.mark.parametrize("buffer", [1, 40, 1 << 16])
@pytest.mark.parametrize("options", CUTS.values(), ids=list(CUTS))
def test_streamed_blocks_are_those_of_the_whole_text(options, buffer, path, monkeypatch):
    monkeypatch.setattr("nodelens.data.textstream._BUFFER", buffer)
    monkeypatch.setattr("nodelens.data.blocks._GROUP", 1)
    whole = every(small(path, **options), batch_size=3)
    data = small(path, streaming=True, **options)
    same(every(data, batch_size=3), whole)
    same(every(data, batch_size=3), whole)  # again from the start
    assert (data.unsplit, data.classes, data.source) == (True, 259, None)
    for rank in range(3):
        same(every(data, rank, 3, 2), every(small(path, **options), rank, 3, 2))


@pytest.mark.parametrize("separator", ["\n\n", "aa", "|"])
def test_plain_text_is_split_the_same_in_chunks(separator, tmp_path, monkeypatch):
    text = "one aaa two\n\n\n\n|three|\r\n four aaaa\n\nfive"
    (tmp_path / "a.txt").write_bytes(text.encode())
    monkeypatch.setattr("nodelens.data.corpus._CHUNK", 3)
    found = list(Corpus(str(tmp_path / "a.txt"), separator=separator).open()[0])
    assert found == [part.strip() for part in text.replace("\r\n", "\n").split(separator)]


def test_a_table_can_be_streamed(path, tmp_path):
    datasets.Dataset.from_dict({"text": TEXTS}).to_parquet(str(tmp_path / "t.parquet"))
    same(every(small(str(tmp_path / "t.parquet"), streaming=True)), every(small(path)))


def test_memory_does_not_grow_with_the_text():
    def blocks(documents):
        texts = lambda: ("word " * 500 for _ in range(documents))  # noqa: E731
        return TextStream(Blocks(texts, Reader(BYTES, bos=True), 128), 8)

    def peak(stream):
        tracemalloc.start()
        count = sum(len(batch["ids"]) for batch in stream)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return count, found

    (few, before), (many, after) = peak(blocks(300)), peak(blocks(1_500))
    assert (few, many) == (300 * 2501 // 128, 1_500 * 2501 // 128)
    assert after < 1.5 * before, "python and numpy hold no more of a longer text"
    held = max(len(part.ids) for part in islice(blocks(1_500).blocks.cut(8), 40))
    assert held < 4 * (1 << 16) + 64 * 2501


def test_an_endless_text_stops_at_the_limit():
    stream = TextStream(Blocks(lambda: iter(lambda: "text", None), Reader(BYTES), 10, most=205), 4)
    assert [len(batch["ids"]) for batch in stream] == [4, 4, 4, 4, 4]
    assert len(list(islice(TextStream(Blocks(lambda: iter(lambda: "text", None), Reader(BYTES), 10), 4), 7))) == 7


def test_a_stream_has_one_split(path, tmp_path):
    data = small(path, streaming=True)
    for read in (lambda: data.loader("val"), lambda: data.loader("calibration"), data.train_dataloader, data.test_dataloader):
        with pytest.raises(ValueError, match=r"^there is no split '\w+': with streaming=True and mode='pack' .* 'all'"):
            read()
    with pytest.raises(ValueError, match="rank 2 of world 2"):
        data.loader("all", 2, 2)
    assert json.loads(data.save_splits(tmp_path / "run").read_text())["fingerprint"] == data.fingerprint()
    assert small(path, streaming=True, length=9).fingerprint() != data.fingerprint() == small(path, streaming=True).fingerprint()
    same(every(small(path, streaming=True, workers=2)), every(data))
    for options, words in (
        ({"select": "phrase:nothing"}, "select='phrase:nothing' selects no token of '.*'; give another"),
        ({"length": 500, "remainder": "drop"}, "has less than one block of 500 tokens; lower length"),
        ({"cache": str(tmp_path)}, "cache stores tokens and streaming=True stores nothing; set only one"),
    ):
        with pytest.raises(ValueError, match=words):
            every(small(path, streaming=True, **options))
    with pytest.raises(FileNotFoundError, match=r"^no text at .*/no.jsonl"):
        small(str(tmp_path / "no.jsonl"), streaming=True).setup()


def cached(path, folder, **options):
    return small(path, cache=str(folder), select="phrase:e", **options)


def test_cached_tokens_are_not_made_again(path, tmp_path, encoded):
    plain, home = every(small(path, select="phrase:e")), tmp_path / "kept"
    count = len(encoded)
    assert count == len(TEXTS)
    for k, options in enumerate([{}, {}, {"length": 9}, {"batch_size": 2, "seed": 4, "mode": "pad"}]):
        data = cached(path, home, **options)
        if k < 2:
            same(every(data), plain)
        data.setup()
    assert len(encoded) == 2 * count, "made once for four"
    assert len(list(home.iterdir())) == 1, "no other file is left"
    assert data.counts["tokens"] == sum(len(text.encode()) + 1 for text in TEXTS if text)


@pytest.mark.parametrize(
    "options",
    [{"bos": None}, {"eos": True}, {"documents": 3}, {"max_tokens": 30}, {"select": "phrase:r"}, {"text_key": "other"}],
    ids=label,
)
def test_options_that_change_the_tokens_miss_the_cache(options, tmp_path, encoded):
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": text, "other": f"{text}E!"}) for text in TEXTS))
    for chosen in ({}, options):
        every(Text(str(path), **{"cache": str(tmp_path / "kept"), "length": 16, "select": "phrase:e"} | chosen))
    assert len(encoded) >= 2 * min(3, len(TEXTS))
    assert len(list((tmp_path / "kept").iterdir())) == 2


def test_a_text_of_equal_size_and_time_misses_the_cache(tmp_path, encoded):
    import os

    path = tmp_path / "a.txt"
    for text in ("the first text", "the other text"):
        path.write_text(text)
        os.utime(path, (1, 1))
        (batch,) = every(cached(str(path), tmp_path / "kept"))
        assert BYTES.decode(batch["input_ids"][0].tolist()) == text
    assert len(encoded) == 2


@pytest.mark.parametrize("harm", ["cut", "flipped", "empty", "no tensors"])
def test_a_damaged_file_is_made_again_with_a_warning(harm, path, tmp_path, caplog, encoded):
    truth = every(cached(path, tmp_path / "kept"))
    (file,) = (tmp_path / "kept").iterdir()
    held = bytearray(file.read_bytes())
    if harm == "flipped":
        held[-3] ^= 1
    file.write_bytes({"cut": held[:-20], "flipped": held, "empty": b"", "no tensors": b"\x02\0\0\0\0\0\0\0{}"}[harm])
    count = len(encoded)
    with caplog.at_level(logging.WARNING):
        same(every(cached(path, tmp_path / "kept")), truth)
    assert "are damaged" in caplog.text
    assert len(encoded) == 2 * count
    caplog.clear()
    same(every(cached(path, tmp_path / "kept")), truth)
    assert (len(encoded), caplog.text) == (2 * count, "")


def test_test_sets_and_tables_are_cached_too(tmp_path, encoded):
    both = datasets.DatasetDict(
        {"train": datasets.Dataset.from_dict({"text": TEXTS[:3]}), "test": datasets.Dataset.from_dict({"text": TEXTS[3:]})}
    )
    both.save_to_disk(str(tmp_path / "both"))
    plain = small(str(tmp_path / "both"))
    truth = {split: list(plain.loader(split)) for split in ("all", "test")}
    count = len(encoded)
    for _ in range(2):
        data = small(str(tmp_path / "both"), cache=str(tmp_path / "kept"))
        for split, batches in truth.items():
            same(list(data.loader(split)), batches)
        assert data.fingerprint() == plain.fingerprint()
    assert len(encoded) == 2 * count
    small(cache=str(tmp_path / "kept"), max_tokens=5_000).setup()
    small(cache=str(tmp_path / "kept"), max_tokens=5_000).setup()
    assert len(list((tmp_path / "kept").iterdir())) == 2


def test_bytes_of_blocks_are_summed_in_chunks(path, monkeypatch):
    truth = every(small(path, stride=5))
    monkeypatch.setattr("nodelens.data.blocks._CHUNK", 7)
    same(every(small(path, stride=5)), truth)


def test_a_continued_block_predicts_only_new_tokens():
    stream = next(Reader(BYTES).read(iter(["abcdefghij"])))
    begun = packed(stream, 4, 2, begun=True)
    assert begun.scored.tolist() == [2, 4, 6, 8]
    assert packed(stream, 4, 2).scored.tolist() == [1, 4, 6, 8]
