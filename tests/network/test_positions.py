"""Positions of texts that are padded on the left, and masks that have another name."""

import warnings

import pytest
import torch
import transformers
from pandas.testing import assert_frame_equal
from torch import nn
from torch.testing import assert_close

import nodelens as nl
from nodelens.analysis.supernodes.supernodes import Supernodes
from nodelens.network.objective import Objective
from nodelens.network.positions import Positions
from nodelens.pruning.surgery.moments import input_moments

WARNED = "padded on the left and have no position_ids: they are made from attention_mask"
SMALL = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 32}
WIDE = {"intermediate_size": 64}


def built(kind, config, **more):
    torch.manual_seed(0)
    net = getattr(transformers, kind)(getattr(transformers, config)(**more)).double().eval()
    for p in net.parameters():
        if p.ndim > 1:
            p.data.normal_(0, 0.2)
    return net


def gpt2():
    return built("GPT2LMHeadModel", "GPT2Config", vocab_size=99, n_positions=32, n_embd=32, n_layer=1, n_head=2)


MODELS = {
    "GPT-2": gpt2,
    "Llama": lambda: built("LlamaForCausalLM", "LlamaConfig", **SMALL, **WIDE),
    "BERT": lambda: built("BertForMaskedLM", "BertConfig", **SMALL, **WIDE),
    "OPT": lambda: built("OPTForCausalLM", "OPTConfig", **SMALL, ffn_dim=64, word_embed_proj_dim=32),
}
IDS = torch.randint(5, 99, (8, 10), generator=torch.Generator().manual_seed(1))


def padded(side):
    """The same texts of 10 and 7 tokens with padding on a side, or, for ``none``, one by one without."""
    lengths = [10, 7] * 4
    if side == "none":
        return [
            {"input_ids": text[None, :n], "attention_mask": torch.ones(1, n), "labels": text[None, :n]}
            for text, n in zip(IDS, lengths, strict=True)
        ]
    ids, mask = torch.ones(8, 14, dtype=torch.long), torch.zeros(8, 14, dtype=torch.long)
    for k, n in enumerate(lengths):
        place = slice(14 - n, 14) if side == "left" else slice(n)
        ids[k, place], mask[k, place] = IDS[k, :n], 1
    return [{"input_ids": ids, "attention_mask": mask, "labels": ids.where(mask > 0, -100)}]


def logits_of(net, batch):
    objective = Objective.of(net)
    return objective.run(net, objective.batch(batch))


@pytest.mark.parametrize("name", MODELS)
def test_padding_changes_no_logits(name):
    net, bare = MODELS[name](), padded("none")
    with torch.no_grad():
        expected = [logits_of(net, batch)[0] for batch in bare]
        with pytest.warns(UserWarning, match=WARNED):
            left = logits_of(net, padded("left")[0])
        right = logits_of(net, padded("right")[0])  # without a warning
    for k, wanted in enumerate(expected):
        assert_close(left[k, 14 - len(wanted) :], wanted)
        assert_close(right[k, : len(wanted)], wanted)


def test_units_have_the_values_of_the_texts_without_padding():
    net, names = gpt2(), ["activation_mean", "taylor", "scar_loss_proxy", "redundancy", "mi"]
    expected = nl.analyze(net, padded("none"), names, layers="*c_fc")
    with pytest.warns(UserWarning, match=WARNED):
        found = nl.analyze(net, padded("left"), names, layers="*c_fc")
    assert_frame_equal(found.units, expected.units, rtol=1e-6)
    assert_frame_equal(nl.analyze(net, padded("right"), names, layers="*c_fc").units, expected.units, rtol=1e-6)


@pytest.mark.parametrize("criterion", ["fisher", "gradient", "taylor"])
def test_gradients_of_weights_too(criterion):
    net = gpt2()
    groups = nl.find_groups(net, padded("none")[0])
    chosen = [group for group in groups if group.kind == "ffn"] or list(groups)
    expected = nl.analyze(net, padded("none"), [criterion], chosen).units
    with pytest.warns(UserWarning, match=WARNED):
        found = nl.analyze(net, padded("left"), [criterion], chosen).units
    assert_frame_equal(found, expected, rtol=1e-6)


def test_everything_that_reads_data_has_the_positions():
    net = gpt2()
    groups = [group for group in nl.find_groups(net, padded("none")[0]) if group.kind == "ffn"]
    expected = input_moments(net, groups, padded("none"))
    supernodes = Supernodes(scope="ffn", supernode_fraction=0.1, connectivity_topk=4, groups=2)
    scores = supernodes(net, padded("none")).units
    with pytest.warns(UserWarning, match=WARNED):
        found = input_moments(net, groups, padded("left"))
    for path, moments in expected.items():
        assert_close(found[path].mean, moments.mean)
    with pytest.warns(UserWarning, match=WARNED):
        assert_frame_equal(supernodes(net, padded("left")).units, scores, rtol=1e-6)


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
def test_models_that_take_none_have_none():
    assert Positions.of(nn.Linear(2, 2)) is None
    assert Positions.of(torch.jit.trace(nn.Linear(2, 2), torch.randn(1, 2))) is None  # without a signature


def test_it_is_said_once():
    net = gpt2()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        nl.analyze(net, padded("left") * 3, ["activation_mean"], layers="*c_fc")
    assert sum(WARNED in str(each.message) for each in told) == 1


def test_given_positions_and_those_of_the_model_are_kept():
    batch = padded("left")[0]
    own = torch.arange(14).expand(8, 14)
    with torch.no_grad():
        assert_close(logits_of(gpt2(), batch | {"position_ids": own}), gpt2()(position_ids=own, **batch).logits)
    roberta = built("RobertaForMaskedLM", "RobertaConfig", **SMALL, **WIDE, pad_token_id=1)  # counts tokens that are not padding
    with torch.no_grad():
        found = logits_of(roberta, batch)
        wanted = roberta(padded("none")[1]["input_ids"]).logits[0]
    assert_close(found[1, 7:], wanted)


class Masked(nn.Module):
    """A model that has its mask under another name."""

    def __init__(self):
        super().__init__()
        self.embed, self.fc, self.head = nn.Embedding(99, 8), nn.Linear(8, 8), nn.Linear(8, 99)

    def forward(self, input_ids, mask):
        return self.head(self.fc(self.embed(input_ids)).relu() * mask[:, :, None])


def test_a_mask_under_another_name_is_said_or_given():
    torch.manual_seed(0)
    net, names = Masked().double(), ["activation_mean", "taylor"]
    right, bare = (
        [{"mask" if k == "attention_mask" else k: v for k, v in b.items()} for b in padded(side)] for side in ("right", "none")
    )
    with pytest.warns(UserWarning, match="no attention_mask was found, so every token counts as a row; 'mask' is only passed"):
        wrong = nl.analyze(net, right, names, layers="fc")
    given = [[b | {"token_mask": b["mask"]} for b in data] for data in (right, bare)]
    found, expected = (nl.analyze(net, data, names, layers="fc") for data in given)
    assert_frame_equal(found.units, expected.units, rtol=1e-6)
    assert (wrong.units.activation_mean - expected.units.activation_mean).abs().max() > 1e-3
    padding = [b | {"labels": b["input_ids"]} for b in given[0]]  # labels of padding take part in no loss, as with attention_mask
    assert_frame_equal(nl.analyze(net, padding, names, layers="fc").units, expected.units, rtol=1e-6)
