"""What a model answers: the task, the part of the output and the loss, against plain twins for twelve kinds of models."""

import copy
from typing import NamedTuple

import pytest
import torch
import transformers
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

import nodelens as nl
from nodelens.network.objective import Objective

N, TOKENS = 24, 9
TINY = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


class Case(NamedTuple):
    """A model, its data, the layer that is scored, and a twin of the summed loss of (output, batch), with its number of terms."""

    model: nn.Module
    data: list
    layer: str
    loss: object
    terms: int
    options: dict = {}  # noqa: RUF012


pytestmark = pytest.mark.filterwarnings("ignore:loss= neither adds up")  # of the contrastive case


def draw(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def whole(high, *shape, low=0, seed=2):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def seeded(build):
    torch.manual_seed(0)
    return build().eval()


def mlp(out):
    return lambda: nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, out))


def text(labels=None, left=True, positions=False):
    """Input ids, padded on both sides, with a mask and, for a model that counts the columns, with positions."""
    ids, mask = whole(60, N, TOKENS, low=1), torch.ones(N, TOKENS, dtype=torch.long)
    mask[::3, : 3 if left else 0] = 0
    mask[1::3, 6:] = 0
    own = {"position_ids": torch.arange(TOKENS).expand(N, TOKENS)} if positions else {}
    return {"input_ids": ids, "attention_mask": mask, **own} | ({} if labels is None else {"labels": labels(ids, mask)})


class Parts(nn.Module):
    """Returns features and logits, as a tuple or a dict."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.a, self.o = kind, nn.Linear(6, 12), nn.Linear(12, 4)

    def forward(self, x):
        h = self.a(x).relu()
        z = self.o(h)
        return (h, z) if self.kind is tuple else {"features": h, "scores": z}


def classes():
    x, y = draw(N, 6), whole(4, N)
    return Case(seeded(mlp(4)), [(x, y)], "0", lambda out, b: cross_entropy(out, y, reduction="sum"), N)


def multilabel():
    x, y = draw(N, 6), whole(2, N, 5).float()
    loss = lambda out, b: binary_cross_entropy_with_logits(out, y) * N  # noqa: E731
    return Case(seeded(mlp(5)), [(x, y)], "0", loss, N, {"task": "multilabel"})


def regression():
    x, y = draw(N, 6), draw(N, 3, seed=3)
    return Case(seeded(mlp(3)), [(x, y)], "0", lambda out, b: mse_loss(out, y) * N, N, {"task": "regression"})


def segmentation():
    net = seeded(lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 5, 1)))
    x, y = draw(N, 3, 6, 5), whole(5, N, 6, 5)
    y[:3, 0] = -100
    return Case(net, [(x, y)], "0", lambda out, b: cross_entropy(out, y, reduction="sum"), int((y >= 0).sum()))


def convolutional_tagger():
    """As many classes as positions: only the module that returns them tells the axis."""
    net = seeded(lambda: nn.Sequential(nn.Conv1d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv1d(8, TOKENS, 1)))
    x, y = draw(N, 4, TOKENS), whole(TOKENS, N, TOKENS)
    return Case(net, [(x, y)], "0", lambda out, b: cross_entropy(out, y, reduction="sum"), N * TOKENS)


def token_tags():
    net = seeded(lambda: transformers.BertForTokenClassification(transformers.BertConfig(**TINY, num_labels=4)))
    batch = text(lambda ids, mask: ids % 4, positions=True)
    y = batch["labels"].where(batch["attention_mask"].bool(), -100)
    loss = lambda out, b: cross_entropy(out.logits.flatten(0, 1), y.flatten(), reduction="sum")  # noqa: E731
    return Case(net, [batch], "bert.encoder.layer.0.intermediate.dense", loss, int((y >= 0).sum()))


def masked_lm():
    net = seeded(lambda: transformers.BertForMaskedLM(transformers.BertConfig(**TINY)))
    batch = text(lambda ids, mask: ids.where((whole(5, N, TOKENS, seed=5) == 0) & mask.bool(), -100), positions=True)
    loss = lambda out, b: cross_entropy(out.logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")  # noqa: E731
    return Case(net, [batch], "bert.encoder.layer.0.intermediate.dense", loss, int((batch["labels"] >= 0).sum()))


def causal_lm():
    options = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 60}
    net = seeded(lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**options)))
    batch = text(lambda ids, mask: ids.where(mask.bool(), -100), left=False)
    y = batch["labels"][:, 1:]
    loss = lambda out, b: cross_entropy(out.logits[:, :-1].flatten(0, 1), y.flatten(), reduction="sum")  # noqa: E731
    return Case(net, [batch], "model.layers.0.mlp.up_proj", loss, int((y >= 0).sum()))


def seq2seq():
    """Texts of the encoder and the decoder are equally long, and only the encoder's are padded."""
    options = {"d_model": 16, "d_ff": 24, "num_layers": 1, "num_heads": 2, "d_kv": 8, "vocab_size": 60, "dropout_rate": 0.0}
    net = seeded(lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**options, decoder_start_token_id=0)))
    batch = text(lambda ids, mask: whole(60, N, TOKENS, low=1, seed=4))
    batch["labels"][::4, 5:] = -100
    y = batch["labels"]
    loss = lambda out, b: cross_entropy(out.logits.flatten(0, 1), y.flatten(), reduction="sum")  # noqa: E731
    return Case(net, [batch], "decoder.block.0.layer.2.DenseReluDense.wi", loss, int((y >= 0).sum()))


def contrastive():
    """The loss compares the samples of a batch with each other."""
    x, y = draw(N, 6), torch.arange(N) // 2
    own = lambda z, labels: cross_entropy(z @ z.T - 1e9 * torch.eye(len(z)), torch.arange(len(z)) ^ 1, reduction="sum")  # noqa: E731
    return Case(seeded(mlp(4)), [(x, y)], "0", lambda out, b: own(out, None), N, {"loss": own, "task": "none"})


def autoencoder():
    x = draw(N, 6)
    return Case(seeded(mlp(6)), [(x, x)], "0", lambda out, b: mse_loss(out, x) * N, N, {"task": "regression"})


def part(kind, which):
    x, y = draw(N, 6), whole(4, N)
    loss = lambda out, b: cross_entropy(out[which], y, reduction="sum")  # noqa: E731
    return Case(seeded(lambda: Parts(kind)), [(x, y)], "a", loss, N, {"output": which})


CASES = {
    "classes": classes,
    "multilabel": multilabel,
    "regression": regression,
    "segmentation": segmentation,
    "tagger": convolutional_tagger,
    "token_tags": token_tags,
    "masked_lm": masked_lm,
    "causal_lm": causal_lm,
    "seq2seq": seq2seq,
    "contrastive": contrastive,
    "autoencoder": autoencoder,
    "tuple": lambda: part(tuple, 1),
    "dict": lambda: part(dict, "scores"),
}
REFUSED = {
    "multilabel": "give task=regression or task=multilabel",
    "regression": "give task=regression or task=multilabel",
    "autoencoder": "give task=regression or task=multilabel",
    "tuple": r"several tensors, 0 \(2, 12\), 1 \(2, 4\): say which one holds the predictions, as output=0 or 1",
    "dict": r"several tensors, features \(2, 12\), scores \(2, 4\): .* as output='features' or 'scores'",
}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return CASES[request.param]()


def inputs(case):
    """The batch's inputs for a plain call; an encoder-decoder gets the labels, from which it makes the decoder's."""
    batch = case.data[0]
    if not isinstance(batch, dict):
        return (batch[0],), {}
    keep = "labels" if "decoder" in case.layer else ""
    return (), {k: v for k, v in batch.items() if k != "labels" or k == keep}


def twin_scores(case):
    """E q^2 of each unit of the layer, q = output x gradient of the summed loss, added over the places of a sample that count.

    The mean is over samples with a label.
    """
    seen = []
    hook = case.model.get_submodule(case.layer).register_forward_hook(lambda m, a, out: (out.retain_grad(), seen.append(out))[0])
    args, kwargs = inputs(case)
    case.loss(case.model(*args, **kwargs), case.data[0]).backward()
    hook.remove()
    q = (seen[0].detach() * seen[0].grad).double()
    case.model.zero_grad()
    if isinstance(case.data[0], dict):
        mask = case.data[0]["labels"] != -100 if "decoder" in case.layer else case.data[0]["attention_mask"].bool()
        q = (q * mask[:, :, None]).transpose(1, 2)[(case.data[0]["labels"] != -100).any(1)]  # others have no loss
    return (q.flatten(2).sum(2) if q.ndim > 2 else q).square().mean(0)


def test_the_loss_is_that_of_a_plain_twin(case):
    objective = Objective.of(case.model, **case.options).settled(case.model, case.data[0])
    batch = objective.batch(case.data[0])
    args, kwargs = inputs(case)
    with torch.no_grad():
        expected = case.loss(case.model(*args, **kwargs), case.data[0])
    assert float(objective.summed(objective.run(case.model, batch), batch.labels).detach()) == pytest.approx(
        float(expected), rel=1e-5
    )


def test_evaluation_is_that_of_a_plain_twin(case):
    args, kwargs = inputs(case)
    with torch.no_grad():
        expected = float(case.loss(case.model(*args, **kwargs), case.data[0])) / case.terms
    assert nl.evaluate(case.model, case.data, **case.options)["loss"] == pytest.approx(expected, rel=1e-5)


def test_taylor_is_that_of_a_plain_twin(case):
    found = nl.analyze(case.model, case.data, ["taylor"], case.layer, precision="float64", **case.options).units["taylor"]
    expected = twin_scores(case)
    assert torch.tensor(found.to_numpy()).allclose(expected, rtol=1e-4, atol=1e-5 * float(expected.max()))


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_told_is_refused_with_the_option_to_give(name):
    case = CASES[name]()
    with pytest.raises(ValueError, match=REFUSED[name]):
        nl.analyze(case.model, case.data, ["taylor"], case.layer)


def test_pruning_follows_the_task_and_the_output():
    class WithInputs(Parts):
        def forward(self, x):
            return 2 * x, self.o(self.a(x).relu())

    case = part(tuple, 1)
    net = seeded(lambda: WithInputs(tuple))
    plain = nn.Sequential(copy.deepcopy(net.a), nn.ReLU(), copy.deepcopy(net.o))
    expected = list(nl.prune(plain, "taylor", 0.5, data=case.data).plan.removed.values())
    for which in (1, lambda out: out[1]):
        assert list(nl.prune(net, "taylor", 0.5, data=case.data, output=which).plan.removed.values()) == expected
    with pytest.raises(ValueError, match="say which one holds the predictions"):
        nl.prune(net, "taylor", 0.5, data=case.data)


@pytest.mark.parametrize(
    ("options", "message"),
    {
        "task": ({"task": "tagging"}, "task is 'tagging'; it is classification, multilabel, regression"),
        "name": (
            {"output": "logit"},
            r"output='logit': Parts returns features \(\d+, 12\), scores \(\d+, 4\): give output='features' or 'scores'",
        ),
        "index": (
            {"output": 4},
            r"output=4: Parts returns features \(\d+, 12\), scores \(\d+, 4\): give output='features' or 'scores'",
        ),
        "none": ({"output": "scores", "task": "none"}, "task is none, so there is no loss"),
        "shape": ({"output": "features", "task": "regression"}, r"the shape of the predictions, \(24, 12\), not \(24,\)"),
        "number": ({"output": lambda out: out["scores"].sum()}, "gives a single number; predictions are a tensor"),
    }.values(),
    ids=["task", "name", "index", "none", "shape", "number"],
)
def test_a_wrong_option_is_a_line(options, message):
    case = part(dict, "scores")
    with pytest.raises(ValueError, match=message):
        nl.evaluate(case.model, case.data, **options)


def test_a_loss_beside_the_logits_is_not_taken_for_them():
    class WithLoss(Parts):
        def forward(self, x):
            z = self.o(self.a(x).relu())
            return z.square().mean(), z

    x, y = draw(N, 6), whole(4, N)
    net, plain = seeded(lambda: WithLoss(tuple)), part(dict, "scores")
    found = nl.analyze(net, [(x, y)], ["taylor"], "a").units
    assert found.equals(nl.analyze(plain.model, [(x, y)], ["taylor"], "a", output="scores").units)


def test_a_plain_model_is_shifted_only_where_the_labels_repeat_its_inputs():
    net = seeded(lambda: nn.Sequential(nn.Embedding(60, 8), nn.Linear(8, 60)))
    ids = whole(60, N, TOKENS)
    z = net(ids).detach()
    shifted = cross_entropy(z[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert nl.evaluate(net, [(ids, ids)])["loss"] == pytest.approx(float(shifted))
    following = torch.cat([ids[:, 1:], torch.full((N, 1), -100)], 1)  # labels that are shifted already
    assert nl.evaluate(net, [(ids, following)])["loss"] == pytest.approx(float(shifted))
    assert nl.evaluate(net, [(ids, ids)], task="token_classification")["loss"] == pytest.approx(
        float(cross_entropy(z.flatten(0, 1), ids.flatten()))
    )


def test_labels_as_many_as_tokens_are_not_masked_like_tokens():
    net = seeded(lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**TINY, num_labels=TOKENS)))
    batch, seen = text(positions=True) | {"labels": torch.ones(N, TOKENS)}, []

    def loss(z, y):
        seen.append(y.unique().tolist())
        return binary_cross_entropy_with_logits(z, y, reduction="sum")

    nl.analyze(net, [batch], ["taylor"], "classifier", loss=loss)
    assert seen
    assert all(values == [1.0] for values in seen)
    assert Objective.of(net).settled(net, batch).task == "multilabel"
    assert Objective.of(net).settled(net, batch | {"labels": whole(TOKENS, N)}).task == "classification"


def test_each_stream_of_an_encoder_decoder_has_its_own_mask():
    case = seq2seq()
    found = nl.analyze(case.model, case.data, ["activation_mean"], ["encoder.*wi", "decoder.*wi", "decoder.*EncDecAttention.k"])
    rows = {row["layer"]: row["rows"] for row in found.metadata["rows"]}
    real = int(case.data[0]["attention_mask"].sum())
    assert rows["encoder.block.0.layer.1.DenseReluDense.wi"] == real
    assert rows["decoder.block.0.layer.1.EncDecAttention.k"] == real, "it reads the encoder's rows"
    assert rows["decoder.block.0.layer.2.DenseReluDense.wi"] == int((case.data[0]["labels"] >= 0).sum())


def test_samples_reach_the_model_and_the_loss_in_the_order_of_the_data():
    x, net = draw(N, 6), mlp(4)()
    for metrics in (["taylor"], ["rq", "taylor"]):
        seen = []
        nl.analyze(net, [x], metrics, "0", groups=8, loss=lambda z, y, seen=seen: (seen.append(z.detach()), z.sum())[1])
        assert torch.equal(seen[0], net(x))  # later ones are of parts of the batch


class Recurrent(nn.Module):
    """An LSTM that takes time first; with ``turned`` the model itself takes samples first."""

    def __init__(self, turned):
        super().__init__()
        self.turned, self.l, self.o = turned, nn.LSTM(6, 12), nn.Linear(12, 2)

    def forward(self, x):
        return self.o(self.l(x.transpose(0, 1) if self.turned else x)[0][-1])


@pytest.mark.parametrize("turned", [False, True])
def test_samples_that_are_not_on_the_first_axis_are_noticed(turned):
    net, x = seeded(lambda: Recurrent(turned)), draw(8, 8, 6)
    if not turned:
        with pytest.raises(ValueError, match=r"'l' takes time first .* but the first axis of the data is its time"):
            nl.analyze(net, [x], ["activation_mean"], "l")
        with pytest.raises(ValueError, match=r"layer 'o' puts out \(8, 2\) for two samples and \(8, 2\) for three"):
            nl.analyze(net, [x], ["activation_mean"], "o")
        return
    with pytest.raises(ValueError, match=r"layer 'l' puts out .* its first axis is not the samples"):
        nl.analyze(net, [x], ["activation_mean"], "l")
    found = nl.analyze(net, [x], {"m": nl.get_metric("activation_mean", absolute=False)}, "o").units["m"].to_numpy()
    assert torch.tensor(found).allclose(net(x).mean(0).double(), rtol=1e-6)


@pytest.mark.parametrize("kind", [torch.int32, torch.uint8, torch.int16, torch.int8, "column"])
def test_integer_labels_of_any_kind_are_classes(kind):
    net, x, y = seeded(mlp(4)), draw(N, 6), whole(4, N)
    given = y[:, None] if kind == "column" else y.to(kind)
    metrics = ["taylor", "synergy", "class_mi"]
    assert nl.analyze(net, [(x, given)], metrics).units.equals(nl.analyze(net, [(x, y)], metrics).units)


@pytest.mark.parametrize("metric", ["taylor", "synergy", "class_mi"])
@pytest.mark.parametrize("given", [whole(4, N).float(), torch.eye(4)[whole(4, N)]], ids=["float", "one_hot"])
def test_numbers_are_not_taken_for_classes(given, metric):
    with pytest.raises(ValueError, match=r"which are no classes: give task=|needs one integer class per row|one class per sample"):
        nl.analyze(seeded(mlp(4)), [(draw(N, 6), given)], [metric])


def test_the_encoder_s_rows_are_not_paired_with_the_decoder_s_predictions():
    case = seq2seq()
    found = nl.analyze(case.model, case.data, {"mi": nl.get_metric("mi", target="nll")}, ["encoder.*wi", "decoder.*wi"])
    by_layer = found.units["mi"].groupby("layer").count()
    assert by_layer.to_dict() == {"decoder.block.0.layer.2.DenseReluDense.wi": 24, "encoder.block.0.layer.1.DenseReluDense.wi": 0}
    assert "has 9 rows per sample of the encoder" in found.metadata["missing"][0]["reason"]


def test_an_index_counts_from_the_end_too_and_a_nested_output_asks_for_a_function():
    case = part(tuple, 1)
    assert nl.evaluate(case.model, case.data, output=-1) == nl.evaluate(case.model, case.data, output=1)

    class Nested(Parts):
        def forward(self, x):
            return {"out": {"z": self.o(self.a(x).relu())}}

    net = seeded(lambda: Nested(dict))
    with pytest.raises(ValueError, match=r"without a floating-point tensor to use as predictions: give output=, a function"):
        nl.evaluate(net, case.data)
    assert nl.evaluate(net, case.data, output=lambda out: out["out"]["z"]) == nl.evaluate(case.model, case.data, output=1)
