"""A first call with nothing but a model and a loader: transformers of every shape give a table."""

import pytest
import torch
import transformers
from pandas.testing import assert_frame_equal
from torch import nn

import nodelens as nl
from nodelens.metrics.sets import metric_set

BLOCK = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
GROUPED = BLOCK | {"num_key_value_heads": 1, "max_position_embeddings": 16}
GPT = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16, "bos_token_id": 0, "eos_token_id": 0}
T5 = {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
CHOSEN = {  # class, its config, its options; the vocabulary is added
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config", GPT),
    "Llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "Mixtral": ("MixtralForCausalLM", "MixtralConfig", GROUPED | {"num_local_experts": 3}),
    "BERT": ("BertForMaskedLM", "BertConfig", BLOCK),
    "T5": ("T5ForConditionalGeneration", "T5Config", T5),
}
REAL = {"GPT-2": 50_257, "Llama": 128_256, "Mixtral": 32_000, "BERT": 30_522, "T5": 32_128}
PRODUCTS = ("redundancy", "synergy", "effective_rank", "participation_ratio")


def language_model(name, vocabulary):
    kind, config, options = CHOSEN[name]
    torch.manual_seed(0)
    return getattr(transformers, kind)(getattr(transformers, config)(vocab_size=vocabulary, **options)).eval()


def texts(name, vocabulary):
    """Token ids alone where the model predicts the next token; other models need labels."""
    ids = torch.randint(3, vocabulary, (6, 8), generator=torch.Generator().manual_seed(1))
    more = {} if name in ("GPT-2", "Llama", "Mixtral") else {"labels": ids.flip(1)}
    return [{"input_ids": part} | {k: v[:3] for k, v in more.items()} for part in ids.split(3)]


def check(name, vocabulary):
    """Measures and prunes with defaults; the head has its cheap metrics, the rest of the network all of them."""
    net, data = language_model(name, vocabulary), texts(name, vocabulary)
    found = nl.analyze(net, data)
    (note,) = found.metadata["warnings"]
    head = next(layer for layer in found.layers.index if found.layers.units[layer] == vocabulary)
    assert f"{head} is {vocabulary:,} wide, width is 4,096: {', '.join(PRODUCTS)}, which need products" in note
    assert f"warning: {note}" in found.summary()
    of_units, of_layers = found.units.loc[head], found.layers.loc[head]
    assert of_units[["activation_mean", "rq", "taylor", "magnitude"]].iloc[1:].notna().all(axis=None)  # 0 may be padding: zeros
    assert of_units[["redundancy", "synergy"]].isna().all(axis=None)
    assert of_layers[["effective_rank", "participation_ratio"]].isna().all()
    assert found.units.drop(head, level="layer")[["redundancy", "synergy"]].notna().any(axis=None)
    assert found.layers.drop(head)["effective_rank"].notna().any()
    reasons = {m["column"]: m["reason"] for m in found.metadata["missing"] if m["layer"] == head}
    assert all("products of its units are left out" in reasons[column] for column in PRODUCTS)
    pruned = nl.prune(net, data=data)
    assert sum(map(len, pruned.plan.removed.values())) > 0


@pytest.mark.parametrize("name", CHOSEN)
def test_a_language_model_gives_a_table_and_is_pruned_with_no_option(name):
    check(name, 4_100)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHOSEN)
def test_so_does_one_with_the_vocabulary_of_the_real_model(name):
    check(name, REAL[name])


def test_an_image_model_gives_a_table_and_is_pruned_with_no_option():
    config = transformers.ViTConfig(image_size=16, patch_size=8, num_labels=5, **BLOCK)
    net = transformers.ViTForImageClassification(config).eval()
    x, y = torch.randn(6, 3, 16, 16), torch.randint(5, (6,))
    for data in ([(x, y)], [{"pixel_values": x, "labels": y}]):
        found = nl.analyze(net, data)
        assert found.metadata["warnings"] == []
        assert {*metric_set("default")} <= {*found.units, *found.layers}
        assert nl.prune(net, data=data).plan.removed


# the wide head


@pytest.fixture(scope="module")
def llama():
    return language_model("Llama", 64), texts("Llama", 64)


def test_metrics_chosen_by_name_leave_the_head_out_too_where_no_layer_was_chosen(llama):
    found = nl.analyze(*llama, ["redundancy"], width=48)
    assert found.units.loc["lm_head", "redundancy"].isna().all()
    rest = found.units.drop("lm_head", level="layer")
    assert_frame_equal(rest, nl.analyze(*llama, ["redundancy"]).units.drop("lm_head", level="layer"))
    assert "covariance=sample:48 measures 48 of its units" in found.metadata["warnings"][0]


@pytest.mark.parametrize(
    ("metrics", "layers", "width"),
    [
        (["redundancy"], "lm_head", 48),  # the head was chosen
        (["redundancy"], "*", 20),  # the hidden units are as wide
        (["redundancy"], ["lm_head", "*.mlp.down_proj"], 48),
    ],
)
def test_products_that_were_asked_for_stay_an_error(llama, metrics, layers, width):
    with pytest.raises(ValueError, match=f"width is {width}: redundancy needs products of all its units"):
        nl.analyze(*llama, metrics, layers, width=width)


def test_products_that_no_other_layer_has_stay_an_error():
    net = nn.Linear(4, 9)
    with pytest.raises(ValueError, match="site 'Linear' is 9 wide"):
        nl.analyze(net, [torch.randn(8, 4)], ["redundancy"], width=6)


def test_default_metrics_leave_products_out_at_every_wide_layer(llama):
    found = nl.analyze(*llama, width=20)
    (note,) = found.metadata["warnings"]
    assert "lm_head is 64 wide (and 2 more sites), width is 20" in note
    assert found.units.loc["model.layers.0.mlp.up_proj", "redundancy"].isna().all()
    assert found.units.loc["model.layers.0.mlp.down_proj", "redundancy"].notna().all()


def test_a_choice_for_wide_layers_is_followed(llama):
    found = nl.analyze(*llama, layers="lm_head", width=48, covariance="sample:16")
    assert found.metadata["warnings"] == []
    assert found.units["redundancy"].notna().sum() == 16


# data without labels


def test_default_metrics_without_labels_leave_those_of_the_loss_out_and_say_so():
    net, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(24, 4)
    found = nl.analyze(net, [x])
    assert found.metadata["warnings"] == [
        "the data have no labels, so there is no loss: synergy, taylor are left out; give (x, y) batches, or labels in a dict"
    ]
    assert {"synergy", "taylor"}.isdisjoint(found.units)
    assert found.units["redundancy"].notna().all()
    with pytest.raises(ValueError, match="the loss needs labels, but the data have none"):
        nl.analyze(net, [x], ["taylor"])


def test_an_encoder_without_a_head_gives_a_table():
    net = transformers.BertModel(transformers.BertConfig(vocab_size=99, **BLOCK)).eval()
    found = nl.analyze(net, [{"input_ids": torch.randint(3, 99, (6, 8))}])
    assert found.units["rq"].notna().any()


IDS = torch.randint(3, 64, (6, 8), generator=torch.Generator().manual_seed(1))
FORMS = {"dict": {"input_ids": IDS}, "tensor": IDS, "tuple": (IDS,), "encoding": transformers.BatchEncoding({"input_ids": IDS})}
FULL = {"input_ids": IDS, "labels": IDS, "attention_mask": torch.ones_like(IDS)}


def scores(net, data):
    """A number of each function that reads a loss."""
    tuned = nl.prune(net, "magnitude", 0.3, data=data, finetune=nl.Finetune(data, data, epochs=1))
    return {
        "evaluate": nl.evaluate(net, data),
        "analyze": nl.analyze(net, data, ["taylor", "synergy"]).units.sum().to_dict(),
        "prune": {name: list(map(int, gone)) for name, gone in nl.prune(net, data=data).plan.removed.items()},
        "supernodes": nl.Supernodes(draws=2)(net, data).units["loss_proxy"].sum(),
        "finetune": tuned.finetuned["after"],
    }


@pytest.fixture(scope="module")
def with_labels(llama):
    return scores(llama[0], [FULL])


@pytest.mark.filterwarnings("ignore:`isinstance")
@pytest.mark.parametrize("form", FORMS)
def test_token_ids_alone_are_their_own_labels_in_every_function(llama, with_labels, form):
    assert scores(llama[0], [FORMS[form]]) == with_labels


def test_padding_is_no_label_where_there_are_none(llama):
    mask = torch.ones_like(IDS)
    mask[:3, 5:] = 0
    given = {"input_ids": IDS, "attention_mask": mask}
    assert nl.evaluate(llama[0], [given]) == nl.evaluate(llama[0], [given | {"labels": IDS.where(mask > 0, -100)}])


def test_a_task_that_is_given_makes_labels_of_token_ids_too():
    class Next(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(64, 6), nn.Linear(6, 64)

        def forward(self, ids):
            return self.head(self.embed(ids))

    assert nl.evaluate(Next(), [IDS], task="causal_lm")["tokens"] == 6 * 7
    with pytest.raises(ValueError, match="accuracy needs labels"):
        nl.evaluate(Next(), [IDS])
