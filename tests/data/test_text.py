"""Tokenised texts: all corpus forms and ways of cutting; each token is predicted once and each byte counted."""

import json
import time
from itertools import islice

import datasets
import pytest
import torch
from ids import label
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from nodelens.data import ByteTokenizer, Text
from nodelens.data.blocks import TokenStream
from nodelens.data.tokens import StoredTokenizer

BYTES = ByteTokenizer()
TEXTS = ["Once upon a time.", "", "Zwölf Boxkämpfer jagen\nViktor", "quer über den Sylter Deich. 中文 😀!", "The end"]


@pytest.fixture
def write(tmp_path):
    """A .jsonl file of texts."""

    def file(texts, name="texts"):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
        return str(path)

    return file


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """A small byte-level BPE of transformers, with a BOS and no EOS."""
    folder = str(tmp_path_factory.mktemp("bpe"))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<s>"], show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 9, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(folder)
    return folder


def samples(data, split="all", size=3):
    """The real tokens of each sample."""
    found = []
    for batch in data.loader(split, batch_size=size):
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        found += [row[keep].tolist() for row, keep in zip(batch["input_ids"], mask, strict=True)]
    return found


def decoded(tokens):
    return BYTES.decode(tokens)


def small(path=None, **options):
    return Text(path, **{"length": 16, "remainder": "keep"} | options)


def test_blocks_hold_the_joined_documents(write):
    data = Text(write(TEXTS), length=16)
    blocks = samples(data)
    stream = [token for text in TEXTS if text for token in [256, *text.encode()]]
    assert {len(block) for block in blocks} == {16}
    assert [token for block in blocks for token in block] == stream[: len(stream) // 16 * 16]
    assert data.counts == {
        "documents": 4,
        "tokens": len(stream),
        "bytes": len("".join(TEXTS).encode()),
        "unused_tokens": len(stream) % 16,
        "padding": 0,
        "special_left_out": 0,
        "not_selected": 0,
        "counted": len(stream) // 16 * 16,
    }
    batch = next(iter(data.loader("all", batch_size=2)))
    assert set(batch) == {"input_ids", "labels", "bytes", "ids"}
    assert torch.equal(batch["labels"][:, 1:], batch["input_ids"][:, 1:])
    assert (data.classes, data.unsplit) == (259, True)


def test_special_tokens_are_placed_as_requested(write):
    path = write(["ab", "cd"])
    assert samples(small(path)) == [[256, 97, 98, 256, 99, 100]]
    assert samples(small(path, bos=None, eos=True)) == [[97, 98, 257, 99, 100, 257]]
    assert samples(small(path, bos="block", length=3)) == [[256, 97, 98], [256, 99, 100]]
    assert samples(small(path, mode="pad", eos=True)) == [[256, 97, 98, 257], [256, 99, 100, 257]]
    assert samples(small(path, mode="pad", bos="block", length=2)) == [[256, 97], [256, 99]]


@pytest.mark.parametrize("bos", ["document", "block", None])
@pytest.mark.parametrize("length", [2, 7, 16, 500])
@pytest.mark.parametrize("back", [0, 1, 4])
def test_each_token_is_predicted_once(bos, length, back, write):
    stride = max(1, length - (bos == "block") - back)
    data = small(write(TEXTS), bos=bos, length=length, stride=stride)
    data.setup()
    predicted, total = [], 0
    for batch in data.loader("all", batch_size=4):
        labels = batch["labels"][:, 1:]
        predicted += labels[labels >= 0].tolist()
        total += int(batch["bytes"].sum())
    stream = data.source.ids.tolist()
    skipped = stream[:: length - (bos == "block")] if bos != "block" and stride == length else [] if bos == "block" else stream[:1]
    assert len(predicted) == len(stream) - len(skipped)
    assert total == len("".join(TEXTS).encode()) - sum(token < 256 for token in skipped)
    if len(skipped) < 2:
        assert predicted == stream[len(skipped) :]
    assert data.counts["unused_tokens"] == (bos is None and stride == length and len(stream) % length == 1)


@pytest.mark.parametrize("side", ["right", "left"])
def test_padded_documents_are_whole_rows_with_a_mask(side, write):
    data = small(write(TEXTS), mode="pad", side=side, length=20)
    wanted = [[256, *text.encode()][:20] for text in TEXTS if text]
    assert samples(data) == wanted
    assert data.counts["cut_documents"] == 2
    batch = next(iter(data.loader("all", batch_size=4)))
    ids, mask, labels = (batch[name] for name in ("input_ids", "attention_mask", "labels"))
    assert mask.sum(1).tolist() == [len(row) for row in wanted]
    edge = -1 if side == "right" else 0
    assert mask[3, edge] == 0
    assert (ids[mask == 0] == BYTES.pad).all()
    assert (labels[mask == 0] == -100).all()
    assert batch["bytes"].tolist() == [len(row) - 1 for row in wanted]
    assert ("position_ids" in batch) == (side == "left")
    if side == "left":
        assert torch.equal(batch["position_ids"], (mask.cumsum(1) - 1).clamp_min(0))
    alone = next(iter(data.loader("all", batch_size=1)))
    assert set(alone) == {"input_ids", "labels", "bytes", "ids"}, "nothing is padded"


def test_documents_without_a_token_to_predict_are_dropped(write):
    assert samples(small(write(["a", "bc"]), mode="pad", bos=None)) == [[98, 99]]
    assert samples(small(write(["a", "bc"]), mode="pad")) == [[256, 97], [256, 98, 99]]


@pytest.mark.parametrize("name", ["bpe", "byt5"])
def test_a_stored_tokenizer_counts_true_bytes(name, bpe, write, tmp_path):
    folder = bpe
    if name == "byt5":  # it has no character offsets
        ByT5Tokenizer().save_pretrained(folder := str(tmp_path / "byt5"))
    tokenizer = StoredTokenizer.of(folder)
    for text, tokens in zip(TEXTS, tokenizer.encode(TEXTS), strict=True):
        assert tokenizer.tokenizer.decode(tokens.ids) == text
        assert tokens.nbytes.sum() == len(text.encode())
        assert (tokens.nbytes >= 0).all()
    data = small(write(TEXTS), tokenizer=folder, bos="document" if name == "bpe" else None, length=10_000)
    assert data.classes is None
    (batch,) = data.loader("all")
    first = 0 if name == "bpe" else 1  # without BOS the first letter is not predicted
    assert batch["bytes"].tolist() == [len("".join(TEXTS).encode()) - first]
    assert data.classes == tokenizer.size == (300 if name == "bpe" else 384)


def test_bytes_between_tokens_go_to_the_next_and_those_of_a_letter_to_its_first():
    class Gaps:
        is_fast = True

        def __call__(self, texts, **_):
            return {"input_ids": [[5, 6, 7, 8]], "offset_mapping": [[(0, 1), (3, 4), (3, 4), (4, 5)]]}

    (tokens,) = StoredTokenizer(Gaps(), 9, None, None, 0).encode(["a  é! "])
    assert tokens.nbytes.tolist() == [1, 4, 0, 2]


FORMS = ("file", "folder", "jsonl", "parquet", "saved")


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    base = tmp_path_factory.mktemp("forms")
    texts = [text for text in TEXTS if text]
    (base / "file.txt").write_text("\n---\n".join(texts))
    (base / "folder" / "deep").mkdir(parents=True)
    for k, text in enumerate(texts):
        (base / "folder" / ("deep" if k > 2 else "") / f"{k if k < 3 else 'z'}.txt").write_text(text)
    (base / "texts.jsonl").write_text("\n\n".join(json.dumps({"n": 1, "text": t}) for t in [*texts, None]))
    table = datasets.Dataset.from_dict({"text": [*texts, None], "n": list(range(5))})
    table.to_parquet(str(base / "texts.parquet"))
    table.save_to_disk(str(base / "saved"))
    datasets.DatasetDict({"train": table.select(range(3)), "test": table.select([3])}).save_to_disk(str(base / "both"))
    names = {"file": "file.txt", "jsonl": "texts.jsonl", "parquet": "texts.parquet"}
    return {form: str(base / names.get(form, form)) for form in (*FORMS, "both")}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("streaming", [False, True])
def test_every_form_gives_the_texts(form, streaming, forms):
    data = small(forms[form], mode="pad", length=99, separator="---" if form == "file" else None, streaming=streaming)
    assert sorted(map(decoded, samples(data))) == sorted(text for text in TEXTS if text)
    if form != "folder":  # its files are sorted by name
        assert [decoded(s) for s in samples(data)] == [text for text in TEXTS if text]


def test_a_separate_test_set_is_the_test_split(forms):
    data = small(forms["both"], mode="pad", length=99)
    assert [decoded(s) for s in samples(data, "test")] == ["The end"]
    assert (data.unsplit, data.indices["test"].tolist()) == (False, [3])
    assert [decoded(s) for s in samples(data)] == [text for text in TEXTS if text]
    packed = small(forms["both"], length=8)
    assert decoded(token for block in samples(packed, "test") for token in block) == "The end"
    for batch in packed.loader("test"):
        assert batch["bytes"].sum() == 7


def test_lines_and_separators(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n\n\n\nthree \n")
    path = str(tmp_path / "a.txt")
    for separator, texts in (
        (None, ["one\ntwo\n\n\n\nthree \n"]),
        ("\n\n", ["one\ntwo", "three"]),
        (r"\n\n", ["one\ntwo", "three"]),
        ("t", ["one", "wo", "hree"]),
    ):
        assert [decoded(s) for s in samples(small(path, mode="pad", length=99, separator=separator))] == texts


def test_limits_on_documents_and_tokens(write):
    path = write(TEXTS)
    assert decoded(samples(small(path, documents=1, length=99))[0]) == TEXTS[0]
    data = small(path, max_tokens=20, length=8)
    assert [len(s) for s in samples(data)] == [8, 8, 4]
    assert data.counts["documents"] == 2
    endless = iter(lambda: "text", None)
    stream = TokenStream.of(endless, BYTES, bos=True, most=1_001)
    assert len(stream) == 1_001
    assert next(endless) == "text", "it was not read to its end"
    assert stream.starts.tolist() == [*range(0, 1_001, 5), 1_001]


def test_the_embedded_text_needs_no_file():
    data = Text(length=128)
    data.setup()
    assert data.counts["bytes"] > 300_000
    assert "statement" in decoded(token for block in islice(samples(data), 50) for token in block)
    assert {name: len(ids) for name, ids in data.indices.items()}["calibration"] == 128


def test_splits_are_disjoint_seeded_and_sharded():
    data, again, other = (Text(length=64, max_tokens=9_600, calibration=20, batch_size=7, seed=seed) for seed in (0, 0, 1))
    parts = {split: samples(data, split) for split in ("train", "val", "test", "calibration")}
    assert {split: len(rows) for split, rows in parts.items()} == {"train": 85, "val": 15, "test": 30, "calibration": 20}
    assert sorted(row for rows in parts.values() for row in rows) == sorted(samples(data, "all"))
    assert samples(again, "test") == parts["test"] != samples(other, "test")
    ids = [torch.cat([b["ids"] for b in data.loader("test", rank, 4, 3)]) for rank in range(4)]
    assert torch.equal(torch.cat(ids).sort().values, data.indices["test"])
    loader = data.train_dataloader()
    first, second = (torch.cat([b["ids"] for b in loader]) for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(first.sort().values, data.indices["train"])
    assert torch.equal(torch.cat([b["ids"] for b in again.train_dataloader()]), first)
    assert len(list(data.val_dataloader())) == len(data.val_dataloader()) == 3
    assert len(list(data.test_dataloader())) == 5


def test_worker_processes_give_the_same():
    one, two = (list(Text(length=64, max_tokens=2_000, workers=workers).loader("all", batch_size=4)) for workers in (0, 2))
    assert all(torch.equal(a[k], b[k]) for a, b in zip(one, two, strict=True) for k in a)


def test_saved_splits_and_fingerprints(write, tmp_path):
    data = Text(length=64, max_tokens=9_600)
    saved = json.loads(data.save_splits(tmp_path / "run").read_text())
    assert saved["counts"] == data.counts
    assert saved["val"] == data.indices["val"].tolist()
    prints = {
        small(write(texts), **options).fingerprint() for texts, options in ((TEXTS, {}), (TEXTS[:3], {}), (TEXTS, {"length": 9}))
    }
    assert len(prints) == 3
    assert small(write(TEXTS)).fingerprint() in prints


def test_an_unavailable_tokenizer_raises_one_line_quickly(monkeypatch, tmp_path):
    def unreachable(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    start = time.monotonic()
    with pytest.raises(FileNotFoundError, match=r"^no tokenizer at 'no/body': it is not on this machine and the hub .*bytes$"):
        Text(tokenizer="no/body").setup()
    assert time.monotonic() - start < 5
    no_tokens = dict.fromkeys(("bos_token_id", "eos_token_id"))
    options = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**options, **no_tokens)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^the tokenizer at '.*' cannot be built: a folder needs tokenizer.json"):
        Text(tokenizer=str(tmp_path)).setup()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"length": 1}, "length is 1; a token is predicted from an earlier one: give 2 or more"),
        ({"stride": 0}, "stride is 0; it is 1 to 16 tokens"),
        ({"stride": 16, "bos": "block"}, "stride is 16; it is 1 to 15 tokens"),
        ({"stride": 4, "mode": "pad"}, "stride is 4; .* for mode='pack' only"),
        ({"documents": 0}, "documents is 0; it is 1 or more, or None for all"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"classes": 258}, "the byte-level tokenizer has 259 ids, more than classes=258"),
        ({"length": 500, "remainder": "drop"}, r"has 100 tokens, fewer than one block of 500; lower length"),
        ({"text_key": "body"}, r"texts.jsonl, line 1 has no 'body', it has text; set text_key"),
        ({"val": 1.0}, "val is 1.0"),
    ],
    ids=label,
)
def test_unsuitable_options_raise(options, words, write):
    with pytest.raises(ValueError, match=words):
        small(write(TEXTS), **options).setup()


def test_a_missing_special_token_raises(bpe, write):
    with pytest.raises(ValueError, match=r"the tokenizer '.*' has no EOS token; set eos=False"):
        small(write(TEXTS), tokenizer=bpe, eos=True).setup()
    with pytest.raises(ValueError, match=r"the tokenizer '.*' has 300 ids, more than classes=299"):
        small(write(TEXTS), tokenizer=bpe, classes=299).setup()


def test_unreadable_text_raises(forms, tmp_path, write):
    def check(error, words, path, **options):
        with pytest.raises(error, match=words):
            small(str(path), **options).setup()

    (tmp_path / "empty").mkdir()
    (tmp_path / "bare.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes("für".encode("latin-1"))
    (tmp_path / "wrong.jsonl").write_text('{"text": "a"}\n{"text": ')
    (tmp_path / "list.jsonl").write_text("[1]")
    (tmp_path / "number.jsonl").write_text('{"text": 1}')
    kinds = "path is a text file, a folder of .txt files"
    check(FileNotFoundError, rf"^no text at {tmp_path.resolve()}/no; {kinds}", tmp_path / "no")
    check(FileNotFoundError, rf"/no.jsonl; {kinds}", "no.jsonl")
    check(FileNotFoundError, rf"^no data set at .*/empty; {kinds}", tmp_path / "empty")
    check(FileNotFoundError, rf"^dataset 'no/body' is not on this machine and the hub cannot be reached; {kinds}", "no/body")
    check(ValueError, r"bare.txt' contains no text; set path", tmp_path / "bare.txt")
    check(ValueError, r"latin.txt is not UTF-8 text \(byte 1\)", tmp_path / "latin.txt")
    check(ValueError, "wrong.jsonl, line 2 is not JSON", tmp_path / "wrong.jsonl")
    check(ValueError, "list.jsonl, line 1 is a list; each line must be an object with a text", tmp_path / "list.jsonl")
    check(ValueError, "number.jsonl, line 1: 'text' is int, texts are strings", tmp_path / "number.jsonl")
    check(ValueError, "has no split 'tests', it has train, test; set test_split", forms["both"], test_split="tests")
    check(ValueError, "has no column 'body', it has text, n; set text_key", forms["saved"], text_key="body")
    check(ValueError, "'n' is int, texts are strings", forms["saved"], text_key="n")
