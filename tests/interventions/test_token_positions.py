"""Positions as index expressions, phrases and patterns of a prompt."""

import pytest
import torch
from families import build as family
from nets import generator
from real import folder

import nodelens as nl
from nodelens import ModelWrapper
from nodelens.data.tokens import ByteTokenizer
from nodelens.interventions.token_positions import find_text, indices

TEXTS = ["a red fox and a cow", "the red hen é!"]


@pytest.fixture(scope="module")
def stories():
    transformers = pytest.importorskip("transformers")
    home = folder("NODELENS_DATA") / "models/stories260K"
    return transformers.AutoModelForCausalLM.from_pretrained(home).eval(), transformers.AutoTokenizer.from_pretrained(home)


class Bytes(torch.nn.Module):
    """Embeds bytes; the head reads one token at a time."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embed, self.head = torch.nn.Embedding(259, 4), torch.nn.Linear(4, 3)

    def forward(self, input_ids, attention_mask=None):
        return self.head(self.embed(input_ids))


def batch(texts, side, first=()):
    rows = [[*first, *text.encode()] for text in texts]
    width = max(map(len, rows)) + 1
    ids = [row + [258] * (width - len(row)) if side == "right" else [258] * (width - len(row)) + row for row in rows]
    ids = torch.tensor(ids)
    return {"input_ids": ids, "attention_mask": (ids != 258).long()}


@pytest.mark.parametrize("first", [(), (256,)], ids=["plain", "with BOS"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("positions", ["red", "phrase:red", "regex:r[a-z]d", "regex:(?<= )[a-z]+(?= (fox|hen))"])
def test_a_phrase_is_found_by_the_tokens_that_overlap_it(positions, side, first):
    net, given = Bytes().eval(), batch(TEXTS, side, first)
    for texts in (None, TEXTS):
        with nl.edit(net, nl.Edit("embed", "zero", positions=positions), tokenizer=ByteTokenizer(), texts=texts):
            h = ModelWrapper(net, "embed").forward_with_activations(given)[1]["embed"]
        zeroed = (h == 0).all(-1)
        text = [bytes(row[z].tolist()) for row, z in zip(given["input_ids"], zeroed, strict=True)]
        assert text == [b"red", b"red"]


def test_a_phrase_of_stories_is_found_and_its_edit_stays_with_the_prompt(stories):
    model, tokenizer = stories
    prompt = "Once upon a time, there was a little girl named Lily."
    ids = tokenizer(prompt, return_tensors="pt")
    found = find_text("phrase:little girl", ids.input_ids[0], torch.ones_like(ids.input_ids[0], dtype=torch.bool), tokenizer)
    assert tokenizer.decode(ids.input_ids[0, found]).strip() == "little girl"
    v = torch.randn(64, generator=generator()) * 100
    chosen = {"max_new_tokens": 12, "max_length": None, "do_sample": False, "pad_token_id": 0}
    by_phrase = nl.Edit("blocks[2]", "add", positions="phrase:little girl", value=v)
    by_index = nl.Edit("blocks[2]", "add", positions=found, value=v)
    with nl.edit(model, by_phrase, tokenizer=tokenizer):
        tokens = [model.generate(**ids, use_cache=cache, **chosen) for cache in (True, False)]
    with nl.edit(model, by_index):
        tokens += [model.generate(**ids, **chosen)]
    assert torch.equal(tokens[0], tokens[1])
    assert torch.equal(tokens[0], tokens[2])
    assert not torch.equal(tokens[0], model.generate(**ids, **chosen))


@pytest.mark.parametrize(
    ("given", "found"),
    [("n//2:", [3, 4, 5]), ("0,-1", [0, 5]), (-1, [5]), ([2, -6, 2], [2, 0]), ("all", [0, 1, 2, 3, 4, 5])],
    ids=str,
)
def test_indices_are_texts_numbers_or_lists(given, found):
    assert indices(given, 6, "positions") == found


MISTAKES = [
    ("6", "positions: index '6' with n = 6: 6 is out of range; valid are -6 to 5"),
    ([0, 7], "positions: 7 selects nothing among n = 6; valid are -6 to 5"),
    ([], "positions: an empty list selects nothing among n = 6; valid are -6 to 5"),
    ("red", "positions: index 'red' with n = 6: allowed are all, or integers, n"),
    ("9**9", "positions: index '9..9' with n = 6: "),
]


@pytest.mark.parametrize(("given", "words"), MISTAKES, ids=str)
def test_indices_out_of_range_are_named(given, words):
    with pytest.raises(ValueError, match=words):
        indices(given, 6, "positions")


def test_texts_that_are_not_found_or_not_unique_are_named():
    net, given = Bytes().eval(), batch(TEXTS, "left")
    cases = [
        ("phrase:cow", {}, "the phrase 'cow' is not in the prompt 'the red hen é!': give another"),
        ("phrase:a ", {}, r"the phrase 'a ' occurs 2 times in the prompt 'a red fox and a cow': give a longer one, or positions"),
        ("regex:e.", {}, "the regex 'e.' occurs 3 times in the prompt 'the red hen é!'"),
        ("regex:(", {}, "is not a regular expression"),
        ("phrase:", {}, "is empty: give a text after the colon"),
        (
            "phrase:red",
            {"tokenizer": None},
            "the text of the prompt for the phrase 'red': give tokenizer=, or positions as indices",
        ),
        ("m//2", {}, "the phrase 'm//2' is not in the prompt 'a red fox and a cow': give another"),
        ("phrase:red", {"texts": ["red", "red"]}, "the ids of sample 0 are not the tokens of its text: give the original texts="),
    ]
    for positions, options, words in cases:
        edit = nl.Edit("embed", "zero", positions=positions)
        with pytest.raises(ValueError, match=words) as error, nl.edit(net, edit, **{"tokenizer": ByteTokenizer()} | options):
            net(**given)
        assert "\n" not in str(error.value)
        assert not net.embed._forward_hooks


def test_a_short_sample_without_the_position_is_named():
    model, _ = family("llama 8/4")
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    words = "zero of 'blocks.0.' .positions 3. at model.layers.0: positions: index '3' with n = 2: 3 is out of range"
    with pytest.raises(ValueError, match=words), nl.edit(model, nl.Edit("blocks[0]", "zero", positions="3")):
        model(input_ids=mask + 3, attention_mask=mask)
