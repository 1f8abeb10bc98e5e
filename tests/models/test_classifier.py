"""Training of classifiers: logged values, checkpoint contents and error messages."""

from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import lightning
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from nodelens.models import MLP, Classifier, logits_of

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning", "ignore:.*does not have many workers.*")


class Pair(NamedTuple):
    x: Tensor
    y: Tensor
    ids: Tensor


def loader(batch_size: int = 7) -> DataLoader:
    torch.manual_seed(0)
    return DataLoader(TensorDataset(torch.randn(24, 4), torch.arange(24) % 3), batch_size)


def classifier(**options) -> Classifier:
    torch.manual_seed(1)
    return Classifier(MLP(4, 3, [8]), **{"optimizer": partial(torch.optim.AdamW, lr=1e-2)} | options)


def trainer(folder, **options) -> lightning.Trainer:
    return lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
        log_every_n_steps=1,
        **{"max_epochs": 2} | options,
    )


def test_loss_and_accuracy_are_those_of_all_samples(tmp_path):
    module, data = classifier(), loader()  # 24 samples in batches of 7: a mean of batch means would be wrong
    found = trainer(tmp_path).test(module, data, verbose=False)[0]
    x, y = data.dataset.tensors
    logits = module.net(x).detach()
    assert_close(found["test/loss"], float(nn.functional.cross_entropy(logits, y)), rtol=1e-6, atol=0)
    assert_close(found["test/acc"], float((logits.argmax(1) == y).float().mean()), rtol=1e-6, atol=0)


def test_fit_logs_and_steps_the_scheduler(tmp_path):
    module = classifier(scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.1))
    run = trainer(tmp_path)
    run.fit(module, loader(), loader())
    assert {"train/loss", "train/acc", "val/loss", "val/acc"} <= run.callback_metrics.keys()
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-4)


def test_the_config_is_stored_in_a_checkpoint_without_code(tmp_path):
    module, run = classifier(), trainer(tmp_path, max_epochs=1)
    module.config = {"model": {"widths": [1, 2]}, "seed": 0}
    run.fit(module, loader(), loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["nodelens_config"] == module.config
    again = Classifier.load_from_checkpoint(tmp_path / "a.ckpt", net=MLP(4, 3, [8]))
    assert again.config == module.config
    assert_close(again.net.state_dict(), module.net.state_dict())
    assert Classifier(MLP(4, 3, [8]), weights=str(tmp_path / "a.ckpt")).config == module.config


def test_a_config_that_a_checkpoint_cannot_hold_raises():
    module = classifier()
    module.config = {"model": {"widths": [1, torch.Size([2])]}}
    with pytest.raises(TypeError, match=r"config.model.widths.1 is Size; a checkpoint holds plain dicts"):
        module.on_save_checkpoint({})


def test_batches_are_named_tuples_or_pairs():
    module, x, y = classifier(), torch.ones(2, 4), torch.tensor([0, 1])
    module.log = lambda *_, **__: None
    expected = module.training_step((x, y), 0)
    for batch in (Pair(x, y, y), [x, y], SimpleNamespace(x=x, y=y)):
        assert_close(module.training_step(batch, 0), expected)
    assert module.predict_step((x, y), 0).shape == (2, 3)
    with pytest.raises(TypeError, match=r"a batch is Tensor; expected .x and .y, or an"):
        module.training_step(x, 0)


def test_logits_come_from_a_tensor_or_an_output():
    x = torch.ones(2, 3)
    assert logits_of(x) is x
    assert logits_of(SimpleNamespace(logits=x)) is x
    with pytest.raises(TypeError, match=r"the network returned tuple; expected a tensor of logits"):
        logits_of((x,))


def test_training_without_an_optimizer_raises():
    with pytest.raises(ValueError, match=r"the model has no optimizer.*give optimizer=, as functools.partial"):
        classifier(optimizer=None).configure_optimizers()


def test_penalties_act_on_weight_matrices_and_are_not_in_the_logged_loss():
    module = classifier(l1=0.5, l2=0.25)
    batch = torch.randn(6, 4), torch.randint(3, (6,))
    module.log = lambda name, value, **options: logged.update({name: value})
    logged = {}
    loss = module.training_step(batch, 0)
    weights = [module.net.fc1.weight, module.net.head.weight]
    penalty = sum(0.5 * w.abs().sum() + 0.25 * w.square().sum() for w in weights)
    torch.testing.assert_close(loss, logged["train/loss"] + penalty)
    torch.testing.assert_close(logged["train/loss"], functional.cross_entropy(module(batch[0]), batch[1]).detach())


def test_dropout_is_of_hidden_units_and_has_no_weights():
    net = MLP(4, 3, [8, 8], dropout=0.5)
    assert [name for name, _ in net.named_children()] == ["0", "fc1", "relu1", "dropout1", "fc2", "relu2", "dropout2", "head"]
    assert net.state_dict().keys() == MLP(4, 3, [8, 8]).state_dict().keys()
    with pytest.raises(ValueError, match="dropout is 1; it is a probability from 0 to below 1"):
        MLP(4, 3, [8], dropout=1)


def test_penalties_of_sharded_weights_are_refused():
    module = Classifier(nn.Linear(2, 2), l2=0.1)
    module._device_mesh = {"data_parallel": None}
    with pytest.raises(ValueError, match=r"^l1= and l2= read all weights in each step, but they are sharded over processes:"):
        module.configure_model()
