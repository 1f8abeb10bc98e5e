"""Token selectors compared with slow loops under any padding, and metrics of selected tokens with direct means."""

import contextlib
import json
import re
import time

import numpy as np
import pytest
import torch
from real import folder
from torch.testing import assert_close
from transformers import AutoTokenizer, ByT5Tokenizer

import nodelens as nl
from nodelens.data import ByteTokenizer, Text, select_tokens
from nodelens.data.selectors import Selector
from nodelens.data.tokens import StoredTokenizer
from nodelens.evaluation.evaluate import evaluate
from nodelens.models import LanguageModel, tiny_lm
from nodelens.network.batch import Batch
from nodelens.network.expressions import parse_index

BYTES = ByteTokenizer()
TEXTS = ["Zwölf Boxkämpfer", "ab", "quer über den Sylter Deich. 中文 😀!", "aaa", "the end, the end"]
PLACES = ("0", "-1", "1:", "n//2:", "last", "3", "-4:-1", "0, 2, -1", "::2", "n//3")


def model():
    torch.manual_seed(0)
    return tiny_lm(width=16, layers=1, mlp=24).eval()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    file = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    return str(file)


def padded(side, pad=258):
    """Ids, mask and labels of the texts with a BOS, and of a single token; two labels are ignored."""
    rows = [[256, *text.encode()] for text in TEXTS] + [[0]]
    width = max(map(len, rows)) + 2 * (side == "both")
    ids, mask = torch.full((len(rows), width), pad), torch.zeros(len(rows), width, dtype=torch.int64)
    for k, row in enumerate(rows):
        at = {"left": width - len(row), "right": 0, "both": 1}[side]
        ids[k, at : at + len(row)], mask[k, at : at + len(row)] = torch.tensor(row), 1
    labels = ids.where(mask.bool(), -100)
    labels[0, labels.shape[1] // 2 :: 3] = -100
    return ids, mask, labels


def places(expression, n):
    """The positions that an expression selects among n, computed slowly."""
    if expression == "last":
        expression = "-1"
    found = []
    for item in expression.split(","):
        with contextlib.suppress(ValueError):
            found += parse_index(item, n)
    return found


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("pad", [0, 97, 257, 258])
@pytest.mark.parametrize("term", [*PLACES, "all", "loss", "loss & n//2:"])
def test_selectors_agree_with_a_slow_loop(term, pad, side):
    ids, mask, labels = padded(side, pad)
    wanted = torch.zeros_like(mask).bool()
    for row in range(len(ids)):
        real = mask[row].nonzero()[:, 0].tolist()
        for k, at in enumerate(real):
            predicts = k + 1 < len(real) and int(labels[row, real[k + 1]]) != -100
            meets = {"loss": predicts, "all": True, "loss & n//2:": predicts and k in places("n//2:", len(real))}
            wanted[row, at] = meets[term] if term in meets else k in places(term, len(real))
    assert torch.equal(select_tokens(ids, term, mask=mask, labels=labels), wanted)
    assert wanted.any()


def test_labels_of_padding_do_not_count():
    ids, mask, _ = padded("both")
    real = mask.bool()
    wanted = real & torch.cat([real[:, 1:], torch.zeros(len(ids), 1, dtype=torch.bool)], 1)
    assert torch.equal(select_tokens(ids, "loss", mask=mask, labels=ids), wanted)


@pytest.mark.parametrize("term", PLACES)
def test_without_a_mask_every_token_is_real(term):
    ids = torch.zeros(2, 5, dtype=torch.int64)
    wanted = torch.tensor([k in places(term, 5) for k in range(5)])
    assert torch.equal(select_tokens(ids, term), wanted.expand(2, 5))


def slow_words(ids, mask, kind, words):
    """Single-byte tokens inside an occurrence, found by testing every substring."""
    found = torch.zeros_like(mask).bool()
    for row in range(len(ids)):
        at = [k for k in range(ids.shape[1]) if mask[row, k] and ids[row, k] < 256]
        text = bytes(ids[row, at].tolist()).decode()
        if kind == "phrase":
            spans = [(k, k + len(words)) for k in range(len(text)) if text[k : k + len(words)] == words]
        else:
            spans = [m.span() for m in re.finditer(words, text)]
        for a, b in spans:
            for k in range(len(text[:a].encode()), len(text[:b].encode())):
                found[row, at[k]] = True
    return found


WORDS = ["phrase:aa", "phrase:ö", "phrase: the", "phrase:文 😀", r"regex:[äöü]|中.", r"regex:\bthe\b", "regex:a*"]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("term", WORDS)
def test_matches_in_bytes_agree_with_a_slow_loop(term, side):
    kind, _, words = term.partition(":")
    ids, mask, _ = padded(side)
    ids, mask = ids[:-1], mask[:-1]
    wanted = slow_words(ids, mask, kind, words)
    assert torch.equal(select_tokens(ids, f"{kind}:{words}", mask=mask, tokenizer=BYTES), wanted)
    assert torch.equal(select_tokens(ids, f"{kind}:{words}", mask=mask, tokenizer=BYTES, texts=TEXTS), wanted)
    both = select_tokens(ids, f"n//2: & {kind}:{words}", mask=mask, tokenizer=BYTES)
    assert torch.equal(both, wanted & select_tokens(ids, "n//2:", mask=mask))
    assert wanted.any()


def test_a_phrase_is_found_by_the_pieces_of_a_stored_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(str(folder("NODELENS_DATA") / "models/stories260K"))
    texts = ["Once upon a time, Zwölf 😀 Once", "time is time. Öl"]
    rows = [tokenizer(text, add_special_tokens=False, return_offsets_mapping=True) for text in texts]
    width = max(len(row["input_ids"]) for row in rows) + 1
    ids, mask = torch.zeros(2, width, dtype=torch.int64), torch.zeros(2, width, dtype=torch.int64)
    for k, row in enumerate(rows):
        some = [tokenizer.bos_token_id, *row["input_ids"]]
        ids[k, width - len(some) :], mask[k, width - len(some) :] = torch.tensor(some), 1
    for words in ("time", "Once", "ö", "😀", "upon a", "Ö"):
        found = select_tokens(ids, f"phrase:{words}", mask=mask, tokenizer=tokenizer, texts=texts)
        assert found.any()
        for k, (text, row) in enumerate(zip(texts, rows, strict=True)):
            lit = [m.span() for m in re.finditer(words, text)]
            offsets = row["offset_mapping"]
            touched = [any(a < end and start < b for a, b in lit) for start, end in offsets]
            assert found[k, width - len(offsets) :].tolist() == touched, words
    again = select_tokens(ids, "phrase:time", mask=mask, tokenizer=StoredTokenizer.around(tokenizer))
    assert torch.equal(again, select_tokens(ids, "phrase:time", mask=mask, tokenizer=tokenizer, texts=texts))


def test_a_token_without_bytes_belongs_to_the_previous_character():
    nbytes = np.array([0, 1, 4, 0, 0, 1, 0])
    for words, marks in (("b", "0000011"), ("😀", "0011100"), ("a", "0100000"), ("a😀", "0111100"), ("c", "0000000")):
        found = Selector.parse(f"phrase:{words}").marked("a😀b", nbytes)
        assert "".join(str(int(mark)) for mark in found) == marks
    assert Selector.parse("phrase:b & regex:[a-z]").marked("", np.empty(0, np.int32)).tolist() == []


def test_special_ids_are_compared_one_by_one():
    class Tokens:
        bos_token_id, eos_token_id, pad_token_id, is_fast = 0, 7, 7, True

        def get_vocab(self):
            return {"a": 9}

    ids = torch.tensor([[0, 5, 7, 7], [7, 7, 0, 3]])
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1]])
    kept = select_tokens(ids, mask=mask, special="drop", tokenizer=Tokens())
    assert kept.tolist() == [[False, True, False, False], [False, False, False, True]]
    Tokens.eos_token_id = Tokens.pad_token_id = None
    kept = select_tokens(ids, mask=mask, special="drop", tokenizer=Tokens())
    assert kept.tolist() == [[False, True, True, False], [False, False, False, True]], "7 is no special token now"


@pytest.mark.parametrize(
    ("selector", "words"),
    [
        ("lst", "^no selector is called 'lst'; choose from all, loss, last, positions .*joined by ' & '$"),
        ("", "^no selector is called ''"),
        ("0 & lst", "^no selector is called 'lst'"),
        ("3:1", "^selector '3:1' selects no token in samples of any length: it selects nothing"),
        ("1//0", "selects no token in samples of any length: '1//0' divides by zero"),
        ("0, (1", "selects no token in samples of any length: '\\(1' is not an expression"),
        ("regex:(a", r"^selector 'regex:\(a' is not a regular expression: missing \)"),
        ("phrase:", "^selector 'phrase:' is empty: give a text after the colon"),
    ],
)
def test_invalid_selectors_raise(selector, words, path):
    with pytest.raises(ValueError, match=words):
        Selector.parse(selector)
    with pytest.raises(ValueError, match=words):
        Text(path, select=selector).setup()


def test_missing_arguments_of_a_selector_raise(tmp_path):
    ids = torch.tensor([[97, 98]])
    for options, words in (
        ({"selector": "loss"}, "selector 'loss' needs the loss, but the batch has no labels"),
        ({"selector": "phrase:a"}, "needs the tokenizer: give tokenizer="),
        ({"special": "drop"}, "selector 'all' with special=drop needs the tokenizer"),
        ({"special": "no"}, "special is 'no'; it is keep or drop"),
        ({"selector": "phrase:a", "tokenizer": BYTES, "texts": ["a", "b"]}, "a batch has 1 samples and 2 texts"),
        ({"selector": "phrase:a", "tokenizer": BYTES, "texts": ["ba"]}, "the ids of sample 0 are not the tokens of its text"),
        ({"selector": "phrase:a", "tokenizer": ByT5Tokenizer()}, "this tokenizer gives no character offsets"),
    ):
        with pytest.raises(ValueError, match=words):
            select_tokens(ids, **options)
    ByT5Tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="this tokenizer gives no character offsets"):
        Text(tokenizer=str(tmp_path), bos=None, select="phrase:a").setup()
    assert select_tokens(ids, "phrase:a", tokenizer=BYTES, texts=["ab and more"]).tolist() == [[True, False]]


def batches(path, size=2, **options):
    return list(Text(path, **{"mode": "pad", "length": 40} | options).loader("all", batch_size=size))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("selector", ["last", "n//2:", "phrase:e", "loss & phrase:the"])
def test_a_batch_marks_selected_tokens_and_nothing_else_changes(selector, side, path):
    net, size = model(), 5
    (plain,), (chosen,) = (batches(path, size, side=side, select=s) for s in ("all", selector))
    assert "select" not in plain
    assert chosen.keys() - plain.keys() == {"select"}
    assert all(torch.equal(plain[k], chosen[k]) for k in plain)
    wanted = select_tokens(
        plain["input_ids"], selector, mask=plain["attention_mask"], labels=plain["labels"], tokenizer=BYTES, texts=TEXTS
    )
    assert torch.equal(chosen["select"], wanted)
    before, now = Batch.of(plain), Batch.of(chosen)
    assert torch.equal(now.mask, wanted)
    assert torch.equal(now.labels, before.labels)
    assert torch.equal(now.hashes, before.hashes)
    assert now.kwargs.keys() == before.kwargs.keys()
    seen = []
    handle = net.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    assert_close(LanguageModel(net)(chosen), LanguageModel(net)(plain), rtol=0, atol=0)
    handle.remove()
    assert seen[0].keys() == seen[1].keys() == plain.keys() - {"labels", "ids", "bytes"}
    assert evaluate(net, [chosen]) == evaluate(net, [plain])


def test_a_selection_without_padding_is_the_mask():
    ids = torch.zeros(2, 3, dtype=torch.int64)
    mask = torch.tensor([[True, False, True], [False, False, True]])
    assert torch.equal(Batch.of({"input_ids": ids, "select": mask}).mask, mask)
    assert torch.equal(Batch.of({"input_ids": ids, "select": mask}).mask, mask)
    with pytest.raises(ValueError, match=r"select is \(3, 2\), but the tokens are \(2, 3\): give one bool per token"):
        Batch.of({"input_ids": ids, "select": mask.T})


def each_output(net, path, selector):
    """The output of the measured layer for each text alone, (1, T, d) float64, and its selected tokens, (1, T)."""
    layer, seen = net.model.layers[0].mlp.up_proj, []
    forward = layer.forward
    layer.forward = lambda x: seen.append(forward(x).detach().double()) or forward(x)
    for batch in batches(path, 1):
        net(batch["input_ids"])
        yield seen.pop(), select_tokens(batch["input_ids"], selector, tokenizer=BYTES, texts=[TEXTS[int(batch["ids"])]])
    del layer.forward


METRICS = ["activation_mean", "activation_variance", "activation_rms", "redundancy"]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("selector", ["last", "1:", "n//2:", "phrase:e"])
def test_metrics_are_those_of_the_selected_rows(selector, side, path):
    net = model()
    found = nl.analyze(net, batches(path, side=side, select=selector), METRICS, "model.layers.0.mlp.up_proj").units
    rows = torch.cat([part[keep] for part, keep in each_output(net, path, selector)])
    assert_close(torch.tensor(found["activation_mean"].to_numpy()), rows.abs().mean(0), rtol=1e-5, atol=1e-6)
    assert_close(torch.tensor(found["activation_variance"].to_numpy()), rows.var(0), rtol=1e-4, atol=1e-7)
    assert_close(torch.tensor(found["activation_rms"].to_numpy()), rows.square().mean(0).sqrt(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("selector", ["1:", "n//2:"])
def test_the_geometry_is_that_of_the_selected_tokens(selector, side, path):
    net = model()
    options = {"hook_point": "module_output:model.layers.0.mlp.up_proj", "sample_limit": 80}
    found, alone = (
        nl.analyze_model(model=net, dataloader=batches(path, size, side=side, select=selector), **options).metrics.iloc[0]
        for size in (5, 1)
    )
    rows = torch.cat([part[keep] for part, keep in each_output(net, path, selector)])
    assert found["tokens_observed"] == alone["tokens_observed"] == len(rows)
    for column in found.index[[isinstance(value, float) for value in found]]:
        assert_close(found[column], alone[column], rtol=1e-4, atol=1e-6, equal_nan=True, msg=column)
    spectrum = torch.linalg.eigvalsh(torch.cov(rows.T)).flip(0)
    assert_close(found["d_pr"], float(spectrum.sum() ** 2 / spectrum.square().sum()), rtol=1e-4, atol=0)
    assert_close(found["top1_share"], float(spectrum[0] / spectrum.sum()), rtol=1e-4, atol=0)


def test_a_limit_on_tokens_counts_selected_tokens(path):
    found = nl.analyze_model(model=model(), dataloader=batches(path, side="left", select="1:"), layers=[0], max_tokens=21)
    assert found.metadata["tokens_observed"] == 21


@pytest.mark.parametrize("pattern", ["(a+)+b", "(a|aa)+$", "(.*a){25}b"])
def test_a_pattern_that_backtracks_without_end_is_refused_in_time(pattern, monkeypatch):
    monkeypatch.setattr("nodelens.data.selectors._SECONDS", 0.2)
    started = time.monotonic()
    with pytest.raises(
        ValueError, match=r"takes more than 0.2 seconds on a text of 4001 characters: nested repetitions"
    ) as refused:
        Selector.parse(f"regex:{pattern}").marked("a" * 4000 + "c", np.ones(4001, np.int64))
    assert pattern in str(refused.value)
    assert time.monotonic() - started < 5


LIKE_RE = ["[0-9]+", r"\bthe\b", "(?i)the", "a.c", "(a)(?P<b>b)", "[^aeiou ]{2,}", r"(\w)\1", "x*", "^a|c$", "(?m)^b", "é+"]


@pytest.mark.parametrize("pattern", LIKE_RE)
def test_matches_are_those_of_pythons_re(pattern):
    text = "The abc aac 12 and 345 the\nb ééa book, then a\ud7ff letter; " * 3
    found = Selector.parse(f"regex:{pattern}").words[0].spans(text).tolist()
    assert found == [list(m.span()) for m in re.finditer(pattern, text) if m.end() > m.start()]


@pytest.mark.parametrize("pattern", ["(", "[", "a{2,1}", "(?P<a", r"\p{L}", "*a"])
def test_what_re_does_not_read_is_refused(pattern):
    with pytest.raises(ValueError, match="is not a regular expression"):
        Selector.parse(f"regex:{pattern}")
