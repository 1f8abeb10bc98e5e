"""What newcomers get wrong, in Python and on the command line: each ends in one line that names the thing and the way out."""

import numpy as np
import pytest
import torch
from command import command
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import nodelens as nl
from nodelens.data import Digits


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.relu, self.fc2 = nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)

    def forward(self, x):
        return self.fc2(self.relu(self.fc1(x)))


class Conv(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(self.conv(x).relu().mean((2, 3)))


class Texts(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.fc = nn.Embedding(11, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(self.embedding(x).mean(1))


NET, X, Y = Net(), torch.randn(20, 8, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 3
DATA = [(X, Y)]
RQ = type(nl.get_metric("rq"))
TOKENS = torch.arange(12).reshape(2, 6)
ANALYZE = "nl.analyze takes a model, a torch.nn.Module, and not"
PRUNE = {"data": DATA, "criterion": "magnitude"}
IN_PYTHON = {  # a call, and parts of its message
    "swapped arguments": (lambda: nl.analyze(DataLoader(TensorDataset(X, Y)), NET), f"{ANALYZE} DataLoader", "swap them"),
    "swapped in prune": (lambda: nl.prune(DATA, NET), "nl.prune takes a model", "swap them"),
    "swapped in evaluate": (lambda: nl.evaluate(DATA, NET), "nl.evaluate takes a model", "swap them"),
    "a class": (lambda: nl.analyze(Net, DATA), f"{ANALYZE} the class Net: give an object, Net(...)"),
    "a name": (lambda: nl.analyze("resnet18", DATA), f"{ANALYZE} the text 'resnet18': build or load it first"),
    "a state dict": (lambda: nl.analyze(NET.state_dict(), DATA), f"{ANALYZE} OrderedDict", "load_state_dict(...)"),
    "no network": (lambda: nl.find_layers(None), "nl.find_layers takes a model", "not None: give the network itself"),
    "weights on meta": (lambda: nl.analyze(Net().to("meta"), DATA), "Net has weights on the meta device, without values"),
    "a tensor as data": (lambda: nl.analyze(NET, X), "data is Tensor (20, 8)", "give a list of batches, [x]"),
    "an array as data": (lambda: nl.analyze(NET, X.numpy()), "data is ndarray (20, 8)", "give a list of batches, [x]"),
    "a pair as data": (lambda: nl.analyze(NET, (X, Y)), "an (x, y) pair is one batch: give a list of batches, [(x, y)]"),
    "a dict as data": (lambda: nl.analyze(NET, {"x": X, "y": Y}), "a dict of x, y is one batch: give a list of batches, [batch]"),
    "a dataset as data": (
        lambda: nl.analyze(NET, TensorDataset(X, Y)),
        "data is TensorDataset",
        "DataLoader(dataset, batch_",
    ),
    "a name as data": (lambda: nl.evaluate(NET, "digits"), "data is the text 'digits'; give batches: a DataLoader"),
    "a number as data": (lambda: nl.analyze(NET, 3), "data is int; give batches"),
    "an empty loader": (lambda: nl.analyze(NET, []), "the data are empty: not one batch"),
    "nothing to evaluate": (lambda: nl.evaluate(NET, []), "the data are empty: nothing to evaluate"),
    "no data": (lambda: nl.analyze(NET, None, ["rq"]), "rq is measured on data: give data="),
    "data in the place of the criterion": (lambda: nl.prune(NET, DATA), "criterion is list", "nl.prune(model, data=...)"),
    "two criteria": (
        lambda: nl.prune(NET, DATA, criterion="taylor"),
        "nl.prune: multiple values for argument 'criterion'; the arguments in order are model, criterion, amount; give others",
    ),
    "a dict of other keys": (
        lambda: nl.analyze(NET, [{"image": X, "label": Y}]),
        "unexpected keyword argument 'image'; the batch is a dict of image, and forward takes x: give a dict",
    ),
    "a wrong width": (
        lambda: nl.analyze(NET, [(torch.randn(4, 9), Y[:4])]),
        "Net cannot take the data, input 0 (2, 9) float32: mat1 and mat2 shapes cannot be multiplied (2x9 and 8x6); give inputs of",
    ),
    "a wrong width in prune": (
        lambda: nl.prune(NET, data=[torch.randn(4, 9)]),
        "Net cannot take the data",
        "give inputs of the shape",
    ),
    "a wrong width in evaluate": (
        lambda: nl.evaluate(NET, [(torch.randn(4, 9), Y[:4])]),
        "Net cannot take the data, input 0 (2, 9)",
    ),
    "a wrong width later": (lambda: nl.analyze(NET, [X, torch.randn(4, 9)], ["rq"]), "Net cannot take the data, input 0 (2, 9)"),
    "channels last": (
        lambda: nl.analyze(Conv(), [(torch.randn(4, 8, 8, 1), Y[:4])]),
        "to have 1 channels, but got 8 channels instead; the channels are on the last axis: move them to the second",
    ),
    "another type": (
        lambda: nl.analyze(NET, [(X.double(), Y)]),
        "is float64, the weights of Net are float32: convert the input to float32",
    ),
    "integers": (lambda: nl.analyze(NET, [(X.long(), Y)]), "its weights are float32 and the inputs int64: convert the inputs"),
    "ids beyond the embeddings": (
        lambda: nl.analyze(Texts(), [(TOKENS, Y[:2])]),
        "the largest id is 11, its embeddings have 11 rows: use the model's own tokenizer",
    ),
    "numbers as ids": (
        lambda: nl.analyze(Texts(), [(TOKENS.float(), Y[:2])]),
        "it reads token ids, which are integers: give",
    ),
    "only NaN": (lambda: nl.analyze(NET, [(X * float("nan"), Y)]), "input 0 of the first batch, (20, 8), has no finite number"),
    "no labels": (lambda: nl.analyze(NET, [X], ["taylor"]), "the loss needs labels, but the data have none: give (x, y) batches"),
    "labels of other classes": (lambda: nl.analyze(NET, [(X, Y + 5)], ["taylor"]), "has 3 classes, but labels run from 5 to 7"),
    "fewer labels": (lambda: nl.analyze(NET, [(X, Y[:3])], ["taylor"]), "20 samples and 3 labels: give one label per sample"),
    "a metric's typing error": (
        lambda: nl.analyze(NET, DATA, ["synergi"]),
        "'synergi'; did you mean 'synergy'",
        "nl.list_metrics() has",
    ),
    "a metric that is no name": (lambda: nl.get_metric(["rq"]), "a metric is given by its name, such as 'rq', not as list"),
    "a number for metrics": (lambda: nl.analyze(NET, DATA, 3), "metrics is int; it takes names such as 'rq', metric objects"),
    "no metrics": (lambda: nl.analyze(NET, DATA, None), "metrics is None; it takes names"),
    "an empty list of metrics": (lambda: nl.analyze(NET, DATA, []), "metrics is empty: give names, such as ['rq'], or a set, such"),
    "an empty dict of metrics": (lambda: nl.analyze(NET, DATA, {}), "metrics is empty", "or ask for an analysis, analysis="),
    "pairs as a number": (lambda: nl.analyze(NET, DATA, ["cka"], pairs=3), "pairs is int; it is consecutive, all, or a list of"),
    "bias in words": (lambda: nl.analyze(NET, DATA, ["rq"], bias="yes"), "bias is 'yes'; it is True or False"),
    "a number on a plan": (lambda: nl.analyze(NET, DATA, ["rq"], on_plan=3), "on_plan is int; it is a function, such as print"),
    "a number as progress": (lambda: nl.analyze(NET, DATA, ["rq"], progress=3), "progress is int; it is a function"),
    "a negative budget": (lambda: nl.analyze(NET, DATA, ["rq"], budget=-1), "budget is -1; it takes bytes, or a size such as 4GB"),
    "a budget of nothing": (lambda: nl.analyze(NET, DATA, ["rq"], budget="0GB"), "budget is '0GB'; it takes bytes", "more than 0"),
    "an option of a metric in words": (
        lambda: nl.get_metric("rq", relative="yes"),
        "rayleigh_quotient: relative is 'yes'; it is True or",
    ),
    "an option of a metric as a list": (lambda: nl.get_metric("rq", regularization=[1]), "regularization is [1]; it is a number"),
    "a precision's typing error": (
        lambda: nl.analyze(NET, DATA, ["rq"], precision="float8"),
        "precision is 'float8'; products are",
    ),
    "a reduction's typing error": (lambda: nl.analyze(NET, DATA, ["rq"], reduce="avg"), "reduce is 'avg'; it is sum, mean, max"),
    "no pass": (lambda: nl.analyze(NET, DATA, ["rq"], max_passes=0), "max_passes is 0; it is how often the data may be read"),
    "a negative width": (lambda: nl.analyze(NET, DATA, ["rq"], width=-5), "width is -5; it is a number of units, 1 or more"),
    "negative labels": (lambda: nl.analyze(NET, [(X, Y - 2)], ["taylor"]), "has 3 classes, but labels run from -2 to 0"),
    "labels without a number": (
        lambda: nl.analyze(NET, [(X, Y * float("nan"))], ["taylor"]),
        "labels (20,) float32, which are no",
    ),
    "labels in words": (lambda: nl.analyze(NET, [(X, ["a"] * 20)], ["taylor"]), "labels of a batch are a list of 20: (str,"),
    "only infinity": (lambda: nl.analyze(NET, [(X * float("inf"), Y)]), "has no finite number, only NaN or infinity"),
    "a text as a batch": (
        lambda: nl.analyze(NET, ["abc"], ["rq"]),
        "a batch is a tensor, an (x, y) pair or a dict of tensors, not a",
    ),
    "an empty batch": (lambda: nl.analyze(NET, [()], ["rq"]), "not a tuple of 0: ()"),
    "batches without rows": (lambda: nl.analyze(NET, [(X[:0], Y[:0])], ["rq"]), "the data are empty: not one batch to measure"),
    "initial weights of another network": (
        lambda: nl.analyze(NET, DATA, ["delta_alignment"], initial=Conv()),
        "layer 'fc1' has a weight (6, 8), but the start has none: give weights of the same network",
    ),
    "a protected unit in words": (lambda: nl.prune(NET, protect={"fc1": ["a"]}, **PRUNE), "protect.fc1 is ['a']; it is a list of"),
    "a protected number": (
        lambda: nl.prune(NET, protect={"fc1": 3}, **PRUNE),
        "protect.fc1 is 3; it is a list of numbers of units",
    ),
    "a gate in words": (lambda: nl.prune(NET, gate="a", apply="scale", **PRUNE), "gate is 'a'; it is a number by which removed"),
    "a name as custom groups": (
        lambda: nl.prune(NET, custom_groups="fc1", **PRUNE),
        "custom_groups has the text 'fc1'; it is a list",
    ),
    "numbers as custom groups": (
        lambda: nl.prune(NET, custom_groups=[3], **PRUNE),
        "custom_groups has int; it is a list of groups",
    ),
    "an amount in words": (lambda: nl.prune(NET, amount="half", **PRUNE), "amount is half: a share to remove"),
    "no amount at all": (lambda: nl.prune(NET, amount=float("nan"), **PRUNE), "amount is nan: a share to remove"),
    "a way of removal's typing error": (lambda: nl.prune(NET, apply="slise", **PRUNE), "apply is 'slise'; it is slice, mask or sc"),
    "a schedule's typing error": (
        lambda: nl.prune(NET, schedule="iterativ", **PRUNE),
        "schedule.kind is 'iterativ'; it is one_sho",
    ),
    "an allocation's typing error": (
        lambda: nl.prune(NET, allocation="globl", **PRUNE),
        "allocation.kind is 'globl'; there are un",
    ),
    "a compensation's typing error": (lambda: nl.prune(NET, compensate="biass", **PRUNE), "compensate is 'biass'; it is none, bia"),
    "a criterion without a term": (lambda: nl.prune(NET, {}, data=DATA), "criterion '' has no term: it is a metric's name, or"),
    "scores of another length": (lambda: nl.prune(NET, {"fc1": torch.ones(3)}, data=DATA), "gives scores of the shape (3,), group"),
    "no steps": (lambda: nl.Schedule("iterative", 0), "steps is 0: a schedule has at least one"),
    "numbers as overrides": (lambda: nl.load_config("analyze", [3]), "overrides has int in it; it is a list of texts, such as"),
    "tensors under another name": (
        lambda: nl.get_metric("rq").compute(input=X, weights=torch.ones(3, 8)),
        "a convolution's geometry, not input. Did you mean 'inputs'?",
    ),
    "one row of no axis": (
        lambda: nl.get_metric("rq").compute(inputs=X[0], weights=torch.ones(3, 8)),
        "inputs is (8,); it has two",
    ),
    "a metric's class": (lambda: nl.analyze(NET, DATA, [RQ]), "has the class RayleighQuotient in it: give an object, Rayle"),
    "a metric's class alone": (lambda: nl.analyze(NET, DATA, RQ), "metrics is the class RayleighQuotient; it takes names"),
    "a metric's class in a dict": (lambda: nl.analyze(NET, DATA, {"a": RQ}), "give an object, RayleighQuotient()"),
    "a name in a dict": (lambda: nl.analyze(NET, DATA, {"a": "rq"}), "metrics has the text 'rq' in it", "{column: metric object}"),
    "a function among metrics": (lambda: nl.analyze(NET, DATA, ["rq", len]), "metrics has builtin_function_or_method in it"),
    "a number for layers": (lambda: nl.analyze(NET, DATA, ["rq"], 3), "layers is int; it takes names, patterns or roles"),
    "no layers": (lambda: nl.analyze(NET, DATA, ["rq"], None), "layers is None; it takes names"),
    "a dict for layers": (lambda: nl.analyze(NET, DATA, ["rq"], {"fc1": 1}), "layers is dict; it takes names"),
    "numbers among layers": (lambda: nl.analyze(NET, DATA, ["rq"], ["fc1", 3]), "layers has int in it; it takes names"),
    "a module for layers": (lambda: nl.analyze(NET, DATA, ["rq"], NET.fc1), "layers is Linear; name it: layers='fc1'"),
    "modules among layers": (lambda: nl.analyze(NET, DATA, ["rq"], [NET.fc2]), "layers has Linear in it; name it: layers='fc2'"),
    "a number as a pattern": (lambda: nl.find_layers(NET, [3]), "patterns has int in it; it is a name or a list of names"),
    "costs with data": (lambda: nl.estimate_cost(NET, DATA), "nl.estimate_cost reads no data: give one batch", "rows="),
    "costs of a loader": (lambda: nl.estimate_cost(NET, DataLoader(TensorDataset(X, Y))), "nl.estimate_cost reads no data"),
    "costs, swapped": (
        lambda: nl.estimate_cost(DATA, NET),
        "takes a network or a config of transformers, not list: the model comes",
    ),
    "costs of a name": (lambda: nl.estimate_cost("analyze"), "not the text 'analyze': such as one of from_pretrained"),
    "costs without a batch": (lambda: nl.estimate_cost(NET), "Net takes no token ids: give one batch of the size to come, batch="),
    "costs without a model": (lambda: nl.estimate_cost(), "missing a required argument: 'model'"),
    "a seed in words": (lambda: nl.analyze(NET, DATA, ["rq"], seed="a"), "seed is 'a'; it is an integer"),
    "a negative seed": (lambda: nl.analyze(NET, DATA, ["rq"], seed=-1), "seed is -1; it is an integer from 0 to 2**63 - 1"),
    "a seed of 80 bits": (lambda: nl.analyze(NET, DATA, ["rq"], seed=1 << 80), "it is an integer from 0 to 2**63 - 1"),
    "a seed of 400 bits": (lambda: nl.prune(NET, seed=1 << 400, **PRUNE), "seed is an integer of more than 60 digits; it is an"),
    "a seed of a pruning": (lambda: nl.prune(NET, seed=-1, **PRUNE), "seed is -1; it is an integer from 0 to"),
    "a seed as a fraction": (lambda: nl.prune(NET, seed=0.5, **PRUNE), "seed is 0.5; it is an integer"),
    "a seed of a strategy": (lambda: nl.PruningConfig(seed=-1), "seed is -1; it is an integer from 0 to"),
    "a seed of an ablation": (lambda: nl.ablate(NET, DATA, seed=-1), "seed is -1; it is an integer from 0 to"),
    "a seed of sets": (lambda: nl.ablate_sets(NET, DATA, {}, seed=-1), "seed is -1; it is an integer from 0 to"),
    "a seed of modules": (lambda: nl.find_modules(torch.ones(4, 4), seed=-1), "seed is -1; it is an integer from 0 to"),
    "a seed of compared modules": (lambda: nl.compare_modules([], seed=-1), "seed is -1; it is an integer from 0 to"),
    "a seed of an analysis": (lambda: nl.get_analysis("clusters")(NET, DATA, seed=-1), "seed is -1; it is an integer from 0 to"),
    "a seed of an edit": (lambda: nl.Edit("fc1", "resample", seed=-1), "seed is -1; it is an integer from 0 to"),
    "a seed of fine-tuning": (lambda: nl.Finetune(DATA, DATA, seed=-1), "seed is -1; it is an integer from 0 to"),
    "a seed of data": (lambda: Digits(seed=-1), "seed is -1; it is an integer from 0 to"),
    "an output of a single tensor": (
        lambda: nl.analyze(NET, DATA, ["taylor"], output=3),
        "output=3: Net returns one tensor (",
        ", 3), without parts: leave output out, or give a function of it",
    ),
    "an output by another name": (
        lambda: nl.evaluate(NET, DATA, output="logits"),
        "output='logits': Net returns one tensor (20, 3), without parts",
    ),
    "no patterns of runs": (lambda: nl.load_runs([]), "the list of patterns of runs is empty: give folders of runs, such as"),
    "a pattern without runs": (lambda: nl.load_runs("nope/*"), "no finished run matches 'nope/*': give the folder of"),
    "a number for a folder": (lambda: nl.analyze(NET, DATA, ["rq"], save_to=3), "save_to takes the path of a folder"),
    "a number for weights": (lambda: nl.analyze(NET, DATA, ["rq"], initial=3), "initial is int; it is the network before training"),
    "a number for a config": (lambda: nl.run(3), "nl.run takes the config of a task, as nl.load_config(", "not int"),
    "a number for a run": (lambda: nl.load(3), "nl.load takes the path of a folder, such as 'outputs/run', not int"),
    "a number for a model": (lambda: nl.load_pruned(3), "nl.load_pruned takes the path of a folder"),
    "a list for a training": (
        lambda: nl.score_trends([]),
        "nl.score_trends takes the path of a folder, such as 'outputs/run', not list",
    ),
    "a number for a bundle": (lambda: nl.load_bundle(3), "nl.load_bundle takes the path of a folder"),
    "a number for runs": (
        lambda: nl.load_runs(3),
        "nl.load_runs takes a pattern of folders, such as 'outputs/**', or a list of them, not int",
    ),
    "a number for a strategy": (lambda: nl.get_pruning_strategy(3), "is given by its name, such as 'magnitude', not as int"),
    "a number for a criterion": (
        lambda: nl.prune(NET, 3, data=DATA),
        "criterion is int; it is a metric's name, or weights by name",
    ),
    "a misspelt criterion without data": (lambda: nl.prune(NET, "tayler"), "no metric is called 'tayler'; did you mean 'taylor'?"),
    "a class for a criterion": (lambda: nl.prune(NET, RQ, data=DATA), "criterion is the class RayleighQuotient; give an object"),
    "a number for a scope": (lambda: nl.prune(NET, scope=3, **PRUNE), "scope is int; it is a name or a list of names, such as"),
    "a number for freeze": (lambda: nl.prune(NET, freeze=[3], **PRUNE), "freeze has int in it; it is a name or a list of names"),
    "a list for protect": (lambda: nl.prune(NET, protect=["fc1"], **PRUNE), "protect is list; it takes a dict {group: units to"),
    "a number for a schedule": (lambda: nl.prune(NET, schedule=3, **PRUNE), "schedule is int; it takes a name or nl.Schedule(...)"),
    "a number for an allocation": (lambda: nl.prune(NET, allocation=3, **PRUNE), "allocation is int; it takes a name or nl.Alloc"),
    "a layer's typing error": (lambda: nl.analyze(NET, DATA, ["rq"], "fc9"), "no layer matches 'fc9'; did you mean 'fc2'"),
    "a layer without weights": (
        lambda: nl.analyze(NET, DATA, ["rq"], "relu"),
        "'rq' needs weights, but layer 'relu' (ReLU) has none; leave the metric out, or name layers with weights (layers=)",
    ),
    "an option's typing error": (lambda: nl.analyze(NET, DATA, ["rq"], group=3), "no option 'group'. Did you mean 'groups'?"),
    "negative positions": (lambda: nl.analyze(NET, DATA, ["rq"], positions=-1), "positions is -1; it must be 1 or more, or None"),
    "complex labels": (
        lambda: nl.analyze(NET, [(X, Y.to(torch.complex64))], ["taylor"]),
        "the labels of a batch are complex numbers (20,): give real numbers, or the index of each class",
    ),
    "words for a number": (lambda: nl.analyze(NET, DATA, ["rq"], groups="many"), "groups is 'many'; it must be 1 or more"),
    "a size in words": (
        lambda: nl.analyze(NET, DATA, ["rq"], budget="lots"),
        "budget is 'lots'; it takes bytes, or a size",
    ),
    "a budget too small": (lambda: nl.analyze(NET, DATA, ["rq"], budget="10B"), "budget is 10 bytes; the largest", "layers="),
    "initial weights": (lambda: nl.analyze(NET, DATA, ["delta_alignment"]), "the initial weights", "are unknown: give initial="),
    "a loss by name": (
        lambda: nl.analyze(NET, DATA, ["taylor"], loss="mse"),
        "loss is 'mse'; it is a function of (predictions",
    ),
    "a task's typing error": (
        lambda: nl.evaluate(NET, DATA, task="clasification"),
        "task is 'clasification'; it is class",
    ),
    "amounts for amount": (lambda: nl.prune(NET, amounts=0.5, **PRUNE), "nl.prune has no option 'amounts'. Did you mean 'amount'?"),
    "a list for an amount": (lambda: nl.prune(NET, amount=[0.5], **PRUNE), "amount is [0.5]: a share to remove, from 0 up to"),
    "per cent": (lambda: nl.prune(NET, amount=50, **PRUNE), "amount is 50: a share to remove, from 0 up to but not including 1"),
    "a criterion without data": (lambda: nl.prune(NET, "taylor"), "which needs an input: give data="),
    "a scope's typing error": (lambda: nl.prune(NET, scope="fc9", **PRUNE), "scope 'fc9' matches no group; there are fc1"),
    "units that are not there": (lambda: nl.prune(NET, protect={"fc1": [99]}, **PRUNE), "group 'fc1' has units 0 to 5, not [99]"),
    "fine-tuning as a number": (lambda: nl.prune(NET, finetune=3, **PRUNE), "finetune is 3; it is a callable, such as nl.Finetune"),
    "a metric without tensors": (lambda: nl.get_metric("rq").compute(), "needs inputs= and weights=; given: nothing"),
    "tensors that do not fit": (
        lambda: nl.get_metric("rq").compute(inputs=X, weights=torch.ones(3, 9)),
        "the weight reads 9 inputs, the rows are 8 wide",
    ),
    "tensors by position": (
        lambda: nl.get_metric("rq").compute(X, X),
        "compute() takes its tensors by name, as compute(",
    ),
    "no run": (lambda: nl.load("nope"), "nope is no folder; that of a run holds metadata.json"),
    "a folder that is no pruned model": (lambda: nl.load_pruned("nope"), "nope is no folder; that of a pruned model holds "),
    "a function's typing error": (lambda: nl.analyse(NET, DATA), "no attribute 'analyse'. Did you mean 'analyze'?"),
    "a task's name": (lambda: nl.load_config("analyse"), "no task is called 'analyse'; there are train, analyze, prune"),
    "a config key": (
        lambda: nl.load_config("analyze", ["modle=mlp"]),
        "no key 'modle' in the config of analyze. Did you mean 'model'",
    ),
    "an option of a group": (lambda: nl.load_config("analyze", ["model=resnet19"]), "no option 'model/resnet19'; available: "),
    "overrides as a text": (lambda: nl.load_config("analyze", "model=mlp"), "overrides is the text 'model=mlp'; give a list"),
    "an argument too many": (lambda: nl.list_metrics("unit"), "too many positional arguments; it takes no argument without a name"),
}
ON_THE_COMMAND_LINE = [  # words, and a part of the line
    (
        "analyze metrics=[rq] metrics.synergy.target=nll",
        "synergy is not among the chosen metrics (rq); choose it too: 'metrics=",
    ),
    ("analyze experiment=quick metrics.synergy.target=nll", "synergy is not among the chosen metrics (rq, taylor)"),
    (
        "train model.optimizer=adamm",
        "model.optimizer is 'adamm'; nodelens.models.Classifier takes a section with _target_ or null",
    ),
    ("train experiment.trainer.max_epochs=3", "without a prefix: write trainer.max_epochs=3"),
    ("analyze +experiment=quik", "experiment: no option 'quik'. Did you mean 'quick'?"),
    ("prune amounts=1.5", "amount is 1.5: a share to remove, from 0 up to but not including 1"),
    ("prune latency.batches=1", "latency.batches is 1; it takes a list: 'latency.batches=[1]'"),
    ("prune amount=0.5", "no key 'amount' in the config of prune. Did you mean 'amounts'?"),
    ("prune amounts=[-0.1]", "amount is -0.1: a share to remove, from 0 up to but not including 1"),
    ("prune protect.fc1=[0]", "protect is empty: a new entry has a leading +, as in +protect.fc1=[0]"),
    ("prune +protect.fc9=[0] criterion=magnitude latency.batches=[]", "protect 'fc9' matches no group; there are fc1, fc2"),
    ("analyze model=causal_lm model.path=gpt2", "the model reads texts", "dataset=text"),
    ("analyze model=tiny_lm", "the data are images (nodelens.data.Digits): choose texts, dataset=text, or a model of images"),
    ("analyze dataset=text", "image models need images; for texts use model=tiny_lm"),
    ("analyze ckpt_path=nope.ckpt", "ckpt_path: there is nothing at", "nope.ckpt; give a .safetensors file"),
    ("analyze initial_path=nope", "initial_path: there is nothing at"),
    ("analyze ckpt_path=empty", "no weights at", "a folder that holds model.safetensors"),
    ("analyze model=vgg16", "model: no option 'vgg16'", "model=torchvision model.name=vgg16"),
    ("analyze layers=relu1 metrics=[rq]", "layer 'relu1' (ReLU) has none; leave the metric out, or name layers with weights"),
    ("analyze metrics=[delta_alignment]", "the initial weights of layer 'fc1' (Linear) are unknown: give initial_path="),
    ("analyze metrics=[rqq]", "metrics: no option 'rqq'. Did you mean 'rq'?"),
    ("analyze budget.memory=1KB", "budget.memory is 1000 bytes"),
    ("analyze objective.loss=torch.nope", "objective.loss=torch.nope cannot be imported"),
    ("analyze objective.task=regression metrics=[taylor]", "give objective.output= or objective.loss="),
    ("train model.optimizer.lr=fast", "model.optimizer.lr is 'fast'; torch.optim.AdamW takes float or Tensor"),
    ("analyze dataset=npz dataset.channels=1 dataset.size=8 dataset.path=nan.npz", "has no finite number, only NaN or infinity"),
    ("analyze dataset=npz dataset.path=broken.npz", "broken.npz is not an .npz file"),
    ("analyze dataset=npz dataset.path=keys.npz", "keys.npz has no array x and y, it has a; name the arrays"),
    ("analyze dataset=text model=tiny_lm dataset.path=nope.txt", "nope.txt; dataset.path is a text file"),
    (
        "analyze model=cnn model.net.channels=3",
        "change the data's channels and size (dataset.channels=, dataset.size=)",
    ),
    ("analyze --cfg jobs", "invalid choice: 'jobs'", "--hydra-help"),
    ("analyze =3", "'=3' sets nothing: settings are key=value"),
    ("analyze hydra.run.dir=", "hydra.run.dir is empty: give a folder"),
    ("analyze metrics=[]", "no metric is chosen: give some, as in 'metrics=[rq,synergy]'"),
    ("analyze dataset.batch_size=0", "dataset.batch_size is 0; give a count of samples, 1 or more"),
    ("analyze dataset.workers=-1", "dataset.workers is -1; give a count of processes, 0 to read without any"),
    ("analyze model=tiny_lm dataset=text dataset.path=texts.txt dataset.batch_size=-3", "dataset.batch_size is -3; give a count"),
    ("train model.optimizer.lr=-1 logger=none", "model.optimizer.lr: Invalid learning rate: -1"),
    ("train model.optimizer.weight_decay=-2 logger=none", "model.optimizer.weight_decay: Invalid weight_decay value: -2"),
    ("train model.net.hidden=[8,-3]", "model.net.hidden is [8, -3]; every width is 1 or more"),
    ("train model.optimizer.lrr=0.1", "no key 'model.optimizer.lrr' in the config of train. Did you mean 'model.optimizer.lr'?"),
    ("analyze budget.memmory=1GB", "no key 'budget.memmory' in the config of analyze. Did you mean 'budget.memory'?"),
    ("analyze budget.memory=-1", "budget.memory is '-1'; it takes bytes, or a size such as 4GB"),
    ("analyze objective.task=regresion", "objective.task is 'regresion'; it is classification, multilabel, regression"),
    ("analyze metrics=[rq] metrics.rq.regularization=-1", "nodelens: metrics.rq.regularization is -1; it must be 0 or more"),
    ("analyze metrics=[mi] metrics.mi.target=lable", "nodelens: metrics.mi.target is 'lable'; "),
    ("analyze analysis=clusters analysis.clusters.draws=-1", "nodelens: analysis.clusters.draws is -1 and most 8; they are"),
    (
        "analyze metrics=[rq,eigenvalue_alignment]",
        "no option 'eigenvalue_alignment', a name of NodeLens that is left out: take spectral_al",
    ),
    (
        "prune criterion=two_halo",
        "criterion: no option 'two_halo', a name of NodeLens that is left out: take the criterion read_halo",
    ),
    ("train callbacks=measure callbacks.measure.seed=-1 logger=none", "nodelens: callbacks.measure.seed is -1; it is an integer"),
    ("analyze seed=-1", "nodelens: seed is -1; it is an integer from 0 to 2**63 - 1"),
    ("train dataset.seed=-1", "nodelens: dataset.seed is -1; it is an integer from 0 to"),
    ("prune seeds=[0,-1]", "nodelens: seeds[1] is -1; it is an integer from 0 to"),
    ("analyze metrics=[taylor] objective.output=3", "objective.output=3: ", "leave objective.output out, or give a function of it"),
    ("analyze metrics=[rq] metrics.rq.relative=yes", "metrics.rq.relative is 'yes'; nodelens.metrics.RayleighQuotient takes bool"),
    ("analyze analysis=[foo]", "analysis: no option 'foo'. Available: "),
    ("analyze results=nope", "nope is no folder; that of a run holds metadata.json"),
    ("prune amounts=[]", "the sweep has no amount: give at least one"),
    ("prune criterion=[]", "the sweep has no criterion: give at least one"),
    ("prune sweep.workers=0", "sweep.workers is 0; it is a number of processes, 1 or more"),
    ("analyze trainer=gpus", "trainer: no option 'gpus'. Did you mean 'gpu'?"),
]


@pytest.mark.parametrize("mistake", IN_PYTHON)
def test_a_mistake_in_python_is_one_line(mistake, quiet_home):
    call, *parts = IN_PYTHON[mistake]
    with pytest.raises((TypeError, ValueError, OSError, MemoryError, AttributeError)) as raised:
        call()
    message = str(raised.value)
    assert "\n" not in message.strip()
    assert all(part in message for part in parts), message
    assert not any(word in message for word in ("dataset.", "budget.", "objective.", "initial_path")), message


@pytest.fixture
def files(quiet_home):
    (quiet_home / "empty").mkdir()
    (quiet_home / "broken.npz").write_text("no archive")
    np.savez("nan.npz", x=np.full((60, 8, 8), np.nan, np.float32), y=np.arange(60) % 10)
    (quiet_home / "texts.txt").write_text("some words\n" * 40)
    np.savez("keys.npz", a=np.zeros((60, 8, 8)))
    return quiet_home


# others alike are above or in tests/app/test_cli.py and test_tasks.py
ALIKE = {
    "analyze metrics=[delta_alignment]",
    "analyze model=cnn model.net.channels=3",
    "train model.optimizer.weight_decay=-2 logger=none",
    "prune amounts=[-0.1]",
    "analyze model=tiny_lm dataset=text dataset.path=texts.txt dataset.batch_size=-3",
    "analyze metrics=[rqq]",
    "analyze budget.memmory=1GB",
    "train model.optimizer.lrr=0.1",
    "prune amount=0.5",
    "analyze metrics=[rq] metrics.rq.relative=yes",
}


@pytest.mark.parametrize(
    ("words", "parts"),
    [pytest.param(words, parts, marks=[pytest.mark.slow] * (words in ALIKE)) for words, *parts in ON_THE_COMMAND_LINE],
)
def test_a_mistake_on_the_command_line_is_one_line(words, parts, files):
    ended = command(*words.split())
    assert ended.code in (1, 2)
    assert ended.err.startswith("nodelens: ")
    assert len(ended.err.strip().splitlines()) == 1, ended.err
    assert all(part in ended.err for part in parts), ended.err
