"""Language models from the text to the table: padding that changes nothing, published numbers, the three scripts."""

import json
from dataclasses import replace
from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch
from command import command
from ids import label
from real import folder
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import nodelens as nl
from nodelens.app.tasks.common import to_device
from nodelens.data import Text
from nodelens.evaluation.evaluate import evaluate
from nodelens.models import causal_lm

TEXTS = ["abc", "The quick brown fox", "é\n", "jumps over the lazy dog.", "0123456789", "a b", "x = y", "Zzzz zzz zz z"]
METRICS = ["activation_mean", "activation_variance", "activation_rms", "rq", "redundancy", "rankme", "taylor", "lp"]
SMALL = ("model.net.width=32", "model.net.layers=1", "model.net.heads=4", "model.net.mlp=48", "dataset.length=64")
SMALL += ("dataset.max_tokens=30000", "logger=none")
NO_TOKENS = dict.fromkeys(("bos_token_id", "eos_token_id"))


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        **NO_TOKENS,
    )
    return LlamaForCausalLM(config).eval()


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=259, n_embd=16, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2, **NO_TOKENS)
    return GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Batches of all texts, by batch size, side and id of the padding."""
    file = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    file.write_text("\n".join(json.dumps({"text": t}) for t in TEXTS))

    def read(size, side="right", pad=258):
        data = Text(str(file), mode="pad", side=side, batch_size=size)
        data.setup()
        data.source = replace(data.source, pad=pad)
        # as batches are often given: labels of all tokens, no numbers of the samples
        return [{k: v for k, v in batch.items() if k != "ids"} | {"labels": batch["input_ids"]} for batch in data.loader("all")]

    return read


@pytest.fixture(scope="module", params=[llama, gpt2])
def measured(request, texts):
    """A model, and what is found of it where each text is a batch of its own, without padding."""
    net, bare = request.param(), texts(1)
    assert not any("attention_mask" in batch for batch in bare)
    return net, evaluate(net, bare), nl.analyze(net, bare, METRICS)


PADS = {"pad 0": 0, "pad equal to eos": 257, "pad of its own": 258}
FAST = [(3, "left", "pad equal to eos"), (8, "right", "pad of its own")]  # each side; make test-all has all of them


@pytest.mark.parametrize(
    ("size", "side", "pad"),
    [pytest.param(*how, marks=() if how in FAST else pytest.mark.slow) for how in product((3, 8), ("left", "right"), PADS)],
)
def test_padding_and_batches_change_no_number(measured, size, side, pad, texts):
    net, score, truth = measured
    padded = texts(size, side, PADS[pad])
    assert all("attention_mask" in batch for batch in padded)
    assert evaluate(net, padded) == pytest.approx(score, rel=1e-5)
    found = nl.analyze(net, padded, METRICS)
    for a, b in ((truth.units, found.units), (truth.layers, found.layers)):
        assert list(a) == list(b)
        for column in a.select_dtypes("number"):
            x, y = a[column].to_numpy(), b[column].to_numpy()
            np.testing.assert_allclose(y, x, rtol=1e-5, atol=1e-5 * np.nanmax(np.abs(x)), err_msg=column)


def test_a_model_with_absolute_positions_reads_them_from_the_batch(texts):
    net, truth = gpt2(), evaluate(gpt2(), texts(1))
    assert evaluate(net, texts(8, "left"))["loss"] == pytest.approx(truth["loss"], rel=1e-6)
    wrong = [
        batch | {"position_ids": torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])}
        for batch in texts(8, "left")
    ]
    assert abs(evaluate(net, wrong)["loss"] / truth["loss"] - 1) > 1e-3


def test_positions_are_made_from_the_mask_where_the_batch_has_none(texts):
    net, truth = gpt2(), evaluate(gpt2(), texts(1))
    blind = [{k: v for k, v in batch.items() if k != "position_ids"} for batch in texts(8, "left")]
    with pytest.warns(UserWarning, match="padded on the left and have no position_ids: they are made from attention_mask"):
        assert evaluate(net, blind)["loss"] == pytest.approx(truth["loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("text", "part", "options", "nats", "bits"),
    [
        ("tinystories_5", slice(None), {"separator": "<|endoftext|>"}, 1.300, 0.912),
        ("grimms_fairy_tales", slice(1_000, 51_000), {}, 3.680, 2.776),
    ],
    ids=["stories", "tales"],
)
def test_a_published_model_has_its_published_loss(text, part, options, nats, bits, tmp_path):
    home = folder("NODELENS_DATA")
    (tmp_path / "text.txt").write_text((home / f"text/{text}.txt").read_text()[part])
    model = str(home / "models/stories260K")
    options |= {"length": 513, "stride": 512, "remainder": "keep"}  # windows of 512 predictions, each token predicted but the first
    data = Text(str(tmp_path / "text.txt"), tokenizer=model, **options)
    found = evaluate(causal_lm(model), data.loader("all"))
    assert found["loss"] == pytest.approx(nats, abs=5e-4)
    assert found["bits_per_byte"] == pytest.approx(bits, abs=5e-4)
    assert found["tokens"] == data.counts["tokens"] - 1


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    home = tmp_path_factory.mktemp("lm") / "run"
    ended = command("train", "experiment=tiny_lm", *SMALL, "logger=csv", f"hydra.run.dir={home}")
    assert ended.code == 0, ended.err
    return home


def test_a_training_on_the_embedded_text_learns(trained):
    curves = pd.read_csv(trained / "csv/version_0/metrics.csv")
    assert curves["train/loss"].dropna().iloc[0] < np.log(259)
    assert curves["val/loss"].dropna().is_monotonic_decreasing
    found = json.loads((trained / "result.json").read_text())
    assert found["loss"] < 3.1, "a letter's own frequency says less"
    assert found["bits_per_byte"] == pytest.approx(found["loss"] / np.log(2), rel=0.01), "all but BOS are bytes"
    assert json.loads((trained / "splits.json").read_text())["counts"]["tokens"] == 30_000


def test_what_was_trained_is_measured_and_pruned(trained, quiet_home):
    weights = f"ckpt_path={trained}/checkpoints/best.ckpt"
    chosen = ("model=tiny_lm", "dataset=text", *SMALL, weights)
    ended = command("analyze", *chosen, "metrics=[rq,redundancy,taylor]", "hydra.run.dir=analysis")
    assert ended.code == 0, ended.err
    result = nl.load("analysis")
    assert result.metadata["evaluation"]["split"] == "test"
    assert result.metadata["evaluation"]["loss"] == pytest.approx(json.loads((trained / "result.json").read_text())["loss"])
    ended = command("prune", *chosen, "criterion=[wanda,random]", "amounts=[0.25]", "latency.batches=[]", "hydra.run.dir=pruned")
    assert ended.code == 0, ended.err
    table = pd.read_parquet("pruned/sweep.parquet")
    assert (table["status"] == "done").all()
    assert (table["loss"] > table["dense_loss"]).all()
    assert table["dense_loss"].eq(result.metadata["evaluation"]["loss"]).all()


def test_two_processes_score_as_one_does(trained, quiet_home):
    chosen = ("model=tiny_lm", "dataset=text", *SMALL, f"ckpt_path={trained}/checkpoints/best.ckpt", "metrics=[activation_rms]")
    scores = []
    for k, more in enumerate(((), ("trainer=ddp", "dataset.batch_size=7"))):
        ended = command("analyze", *chosen, *more, f"hydra.run.dir=run{k}")
        assert ended.code == 0, ended.err
        scores.append({k: v for k, v in nl.load(f"run{k}").metadata["evaluation"].items() if k != "split"})
    assert scores[0]["bits_per_byte"] > 0
    assert scores[1] == pytest.approx(scores[0], rel=1e-5)


def test_the_experiment_measures_what_tokens_have(trained, quiet_home):
    ended = command(
        "analyze",
        "experiment=tiny_lm",
        *SMALL,
        f"ckpt_path={trained}/checkpoints/best.ckpt",
        "layers=*.up_proj",
        "hydra.run.dir=run",
    )
    assert ended.code == 0, ended.err
    units = nl.load("run").units
    assert len(units) == 48
    assert units.notna().all(axis=None)


def test_any_stored_model_is_taken_with_its_tokenizer(quiet_home):
    home = folder("NODELENS_DATA")
    ended = command(
        "analyze",
        "model=causal_lm",
        f"model.path={home}/models/stories260K",
        "dataset=text",
        f"dataset.path={home}/text/tinystories_5.txt",
        "dataset.separator='<|endoftext|>'",
        "dataset.length=513",
        "dataset.stride=512",
        "dataset.remainder=keep",
        "metrics=[rq]",
        "logger=none",
        "hydra.run.dir=run",
    )
    assert ended.code == 0, ended.err
    assert nl.load("run").metadata["evaluation"]["loss"] == pytest.approx(1.3, abs=5e-4)
    assert "are random" not in ended.out


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model=causal_lm"], "model.path has no value: give model.path=..."),
        (["model=causal_lm", "model.path=nobody/nothing"], "no tokenizer at 'nobody/nothing': it is not on this machine"),
        (["model=causal_lm", "model.path=nobody/nothing", "dataset.tokenizer=null"], "no model to load at 'nobody/nothing'"),
        (["model=tiny_lm", "dataset.path=nobody/nothing"], "dataset 'nobody/nothing' is not on this machine"),
        (["model=tiny_lm", "dataset.mode=packed"], "dataset.mode is 'packed'; nodelens.data.Text takes 'pack' or 'pad'"),
        (["model=tiny_lm", "dataset.length=1"], "dataset.length is 1"),
        (["model=tiny_lm", "model.net.heads=3"], "tiny_lm: width 128, 3 heads, 2 kv_heads"),
    ],
    ids=label,
)
def test_what_cannot_be_is_said_in_a_line(overrides, words, quiet_home):
    ended = command("analyze", "dataset=text", "metrics=[rq]", "logger=none", *overrides)
    assert ended.code != 0
    assert words in ended.err
    assert ended.err.startswith("nodelens: ")
    assert ended.err.count("\n") == 1


def test_layers_by_role_on_the_command_line_and_a_sweep_by_perplexity(quiet_home):
    words = ("model=tiny_lm", "dataset=text", *SMALL)
    ended = command("analyze", *words, "layers=blocks[-1].mlp.hidden", "metrics=[scar_loss_proxy]", "hydra.run.dir=run")
    assert ended.code == 0, ended.err
    assert "perplexity" in ended.out
    metadata = json.loads((quiet_home / "run/metadata.json").read_text())
    assert metadata["layers"] == {"blocks[-1].mlp.hidden": ["model.layers.0.mlp.down_proj.input"]}
    criteria = "criterion=[wanda,scar_prot,random]"
    ended = command(
        "prune", *words, criteria, "amounts=[0.5]", "latency.batches=[]", "compensate=least_squares", "hydra.run.dir=cut"
    )
    assert ended.code == 0, ended.err
    assert "test perplexity by amount" in ended.out
    table = pd.read_parquet("cut/sweep.parquet")
    assert (table["perplexity"] - torch.tensor(table["loss"].to_numpy()).exp().numpy()).abs().max() < 1e-6
    assert {"bits_per_byte", "loss_se", "dense_perplexity"} <= set(table)
    ranking = pd.read_parquet("cut/ranking.parquet")
    assert ranking["area"].is_monotonic_increasing, "lower is better"
    assert nl.load_pruned("cut/pruned").generate(torch.ones(1, 2, dtype=torch.long), max_new_tokens=3).shape == (1, 5)


@pytest.mark.parametrize("mark", [{"hf_device_map": {"": "cpu"}}, {"is_quantized": True}])
def test_a_model_whose_parts_lie_where_they_were_put_is_not_moved(mark):
    net = llama()
    vars(net).update(mark)
    assert to_device(net, torch.device("meta")) is net
    assert next(net.parameters()).device.type == "cpu"
    assert next(to_device(llama(), torch.device("meta")).parameters()).device.type == "meta"
