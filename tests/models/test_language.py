"""Language models: construction, values logged in training, and error messages."""

import importlib.util
import json
import time
from functools import partial

import lightning
import pytest
import torch
from ids import label
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import logging as hf_logging

from nodelens.data import ByteTokenizer, Text
from nodelens.models import LanguageModel, causal_lm, check_vocabulary, language_config, tiny_lm
from nodelens.models.language import BYTES, next_tokens
from nodelens.network.objective import Objective

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning", "ignore:.*does not have many workers.*")
SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300}


def small(**options):
    torch.manual_seed(0)
    return tiny_lm(**{"width": 16, "layers": 1, "mlp": 24} | options)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("stored"))
    small().save_pretrained(folder)
    return folder


@pytest.fixture
def data():
    return Text(length=32, max_tokens=2_000, calibration=0)


def batches(side="left"):
    texts = ["abcdef", "xyz", "The end.", "q", "12345", "ab", "abcabc"]
    tokens = [torch.tensor([256, *text.encode()]) for text in texts]
    for some in (tokens[:3], tokens[3:5], tokens[5:]):
        pad = partial(nn.utils.rnn.pad_sequence, batch_first=True, padding_side=side)
        ids, mask = pad(some), pad([torch.ones_like(t) for t in some])
        yield {"input_ids": ids, "labels": ids, "attention_mask": mask, "ids": torch.arange(len(some)), "bytes": mask.sum(1) - 1}


def trainer(folder, **options):
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    return lightning.Trainer(
        accelerator="cpu", default_root_dir=folder, log_every_n_steps=1, **quiet, **{"max_epochs": 1} | options
    )


def test_a_tiny_model_has_the_byte_level_vocabulary():
    net = small()
    assert net.config.vocab_size == BYTES == ByteTokenizer().size
    assert net(torch.tensor([[256, 104, 105]])).logits.shape == (1, 3, 259)
    assert small(classes=50).config.vocab_size == 50
    assert len(small(layers=3).model.layers) == 3
    for options in ({"heads": 3}, {"kv_heads": 3}, {"width": 12, "heads": 4}):
        with pytest.raises(ValueError, match=r"^tiny_lm: width \d+, \d heads, \d kv_heads; heads must divide the width"):
            small(**options)


def test_a_stored_model_loads_unchanged(stored, capsys):
    bar = hf_logging.is_progress_bar_enabled()
    net, ids = causal_lm(stored), torch.tensor([[256, 104, 105]])
    assert_close(net(ids).logits, small().eval()(ids).logits, rtol=0, atol=0)
    half = causal_lm(stored, dtype="bfloat16", attention="eager")
    assert half.dtype == torch.bfloat16
    assert half.config._attn_implementation == "eager"
    assert (
        causal_lm(stored, config={"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}).config.rope_parameters[
            "rope_theta"
        ]
        == 5
    )
    assert capsys.readouterr().err == ""
    assert hf_logging.is_progress_bar_enabled() == bar


def test_a_model_type_gives_random_weights():
    with torch.device("meta"):
        net = causal_lm(model_type="gpt2", config={"n_embd": 32, "n_head": 4, "n_layer": 3})
    assert next(net.parameters()).is_meta
    assert len(net.transformer.h) == 3
    assert language_config(model_type="llama", config=SHAPE).hidden_size == 16


def test_a_stored_config_is_read_without_weights(stored):
    assert language_config(stored, config={"num_hidden_layers": 7}).num_hidden_layers == 7


def test_an_unavailable_model_raises_one_line_quickly(tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    start = time.monotonic()
    words = r"^no model to load at 'no/body': it is not a local folder, .*; give a folder .* or take nodelens.models.tiny_lm$"
    with pytest.raises(OSError, match=words):
        causal_lm("no/body")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **SHAPE}))
    with pytest.raises(OSError, match=r"it has a config.json and no model.safetensors"):
        causal_lm(str(tmp_path))
    torch.save({}, tmp_path / "pytorch_model.bin")  # a pickle is never read
    with pytest.raises(OSError, match=r"it has a config.json and no model.safetensors"):
        causal_lm(str(tmp_path))
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "give path, or model_type for random weights: one of the two"),
        ({"path": "stored", "model_type": "llama"}, "one of the two"),
        ({"model_type": "lama"}, "^'lama' cannot be built: Unrecognized model identifier: lama$"),
        ({"model_type": "t5"}, "has the model type t5, which is not a causal language model$"),
        (
            {"model_type": "llama", "config": {"hidden_size": 9}},
            r"^'llama' cannot be built: The hidden size \(9\) is not a multiple",
        ),
        ({"path": "stored", "config": {"trust_remote_code": True}}, r"^trust_remote_code=True: '.*' needs code of its own"),
        ({"path": "stored", "config": {"num_hidden_layers": 2}}, r"9 of its weights are missing \(model.layers.1"),
        ({"path": "stored", "config": {"hidden_size": 32}}, "cannot be read, or do not fit its config; save them again"),
    ],
    ids=label,
)
def test_an_impossible_model_raises_one_line(options, words, stored):
    options = {k: stored if v == "stored" else v for k, v in options.items()}
    with pytest.raises(ValueError, match=words) as refused:
        causal_lm(**options)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is not None, reason="accelerate is here")
def test_a_device_map_requires_accelerate(stored):
    with pytest.raises(ValueError, match=r"cannot be built: .* requires `accelerate`$"):
        causal_lm(stored, device_map="auto")


def test_quantization_requires_libraries_and_stored_weights(stored, monkeypatch):
    with pytest.raises(ValueError, match=r"^quantization is '3bit'; it is 8bit, 4bit or None$"):
        causal_lm(stored, quantization="3bit")
    with pytest.raises(ValueError, match=r"^quantization='8bit' is for stored weights: give path$"):
        causal_lm(model_type="llama", quantization="8bit")
    monkeypatch.setattr("nodelens.models.language.importlib.util.find_spec", lambda name: None)
    words = r"^quantization='4bit' needs bitsandbytes and accelerate: pip install nodelens\[quantized\]$"
    with pytest.raises(ValueError, match=words):
        causal_lm(stored, quantization="4bit")


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("bits", "share", "error"), [("8bit", 0.6, 0.05), ("4bit", 0.45, 0.4)])
def test_quantized_weights_are_smaller_and_nearly_equal(bits, share, error, tmp_path):
    torch.manual_seed(0)
    tiny_lm(width=128, mlp=256, layers=2).save_pretrained(tmp_path)
    exact, ids = causal_lm(str(tmp_path)), torch.arange(64)[None]
    net = causal_lm(str(tmp_path), quantization=bits)
    assert net.get_memory_footprint() < share * exact.get_memory_footprint()
    with torch.no_grad():
        true, found = exact(ids).logits, net(ids).logits.float()
    assert (found - true).norm() < error * true.norm()


@pytest.mark.parametrize("side", ["left", "right"])
def test_loss_and_accuracy_are_those_of_all_predicted_tokens(side, tmp_path):
    module, every = LanguageModel(small()), DataLoader(list(batches(side)), batch_size=None)
    found = trainer(tmp_path).test(module, every, verbose=False)[0]
    right = total = 0
    nats = 0.0
    for given in batches("right"):
        objective = Objective.of(module.net)
        batch = objective.batch(given)
        logits = batch.run(module.net).logits.detach()
        nats += float(objective.summed(logits, batch.labels))
        total += int(batch.predicted.sum())
        right += int((logits[:, :-1].argmax(-1) == batch.labels[:, 1:]).sum())
        assert torch.equal(next_tokens(given), batch.labels[:, 1:])
    assert_close(found["test/loss"], nats / total, rtol=1e-5, atol=0)
    assert_close(found["test/acc"], right / total, rtol=1e-6, atol=0)


def test_fit_learns_and_stores_the_config(data, tmp_path):
    torch.manual_seed(0)
    module, run = LanguageModel(small(), partial(torch.optim.AdamW, lr=1e-2)), trainer(tmp_path, max_epochs=2)
    module.config = {"model": {"width": 16}}
    run.fit(module, data)
    assert {"train/loss", "train/acc", "val/loss", "val/acc"} <= run.callback_metrics.keys()
    assert run.callback_metrics["train/loss"] < 5.5, "less than of equal chances, 5.56"
    run.save_checkpoint(tmp_path / "a.ckpt")
    again = LanguageModel(small(), weights=str(tmp_path / "a.ckpt"))
    assert again.config == module.config
    assert_close(again.net.state_dict(), module.net.state_dict())


def test_a_stored_model_is_trained_with_its_dropout(tmp_path, data):
    config = GPT2Config(vocab_size=259, n_embd=8, n_layer=1, n_head=2, bos_token_id=256, eos_token_id=257)
    module = LanguageModel(GPT2LMHeadModel(config).eval(), partial(torch.optim.SGD, lr=0.1), path="somewhere")
    seen = []
    module.net.transformer.drop.forward = lambda x: seen.append(module.net.training) or x
    trainer(tmp_path, limit_train_batches=1, limit_val_batches=0).fit(module, data)
    assert seen == [True]
    assert module.path == "somewhere"


def test_a_batch_without_labels_raises():
    with pytest.raises(TypeError, match="a batch is Tensor; expected a dict with input_ids and labels"):
        LanguageModel(small()).training_step(torch.zeros(1, 2), 0)
    ids = torch.tensor([[3, 5, 4, 6]])
    module = LanguageModel(small()).eval()
    module.log = lambda *_, **__: None
    assert module.training_step({"input_ids": ids}, 0) == module.training_step({"input_ids": ids, "labels": ids}, 0)
    logits = LanguageModel(small()).predict_step({"input_ids": torch.zeros(1, 2).long(), "ids": torch.zeros(1)}, 0)
    assert logits.shape == (1, 2, 259)


def test_a_batch_without_a_token_to_predict_has_zero_loss():
    module, ids = LanguageModel(small()), torch.tensor([[256]])
    module.log = lambda *_, **__: None
    assert module.training_step({"input_ids": ids, "labels": ids}, 0).item() == 0


def test_a_vocabulary_larger_than_the_embeddings_raises():
    check_vocabulary(small(), 259)
    check_vocabulary(nn.Linear(2, 2), 10**6)
    with pytest.raises(ValueError, match=r"the data's tokenizer has 512 ids, but LlamaForCausalLM has 259; set tokenizer"):
        check_vocabulary(small(), 512)
