"""Edits against the same change written by hand, their order, their containers, and what is left of them afterwards."""

import copy
import gc
import json

import pandas as pd
import pytest
import torch
import transformers
from families import build as family
from ids import label
from nets import Mixed, Tokens, build, generator
from torch import nn
from torch.testing import assert_close

import nodelens as nl
from nodelens.pruning.surgery.mask import masked, scaled
from nodelens.pruning.surgery.slice import slice_units


class Pair(nn.Module):
    """Returns a tensor in a container of each kind."""

    def __init__(self, kind):
        super().__init__()
        self.fc, self.kind = nn.Linear(4, 4), kind

    def forward(self, x):
        return self.kind(self.fc(x))


class Holder(nn.Module):
    def __init__(self, inner, read):
        super().__init__()
        self.inner, self.read = inner, read

    def forward(self, x):
        return self.read(self.inner(x))


@pytest.fixture
def mlp():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)).eval()


@pytest.fixture
def x():
    return torch.randn(4, 3, generator=generator())


@pytest.fixture
def texts():
    model, groups = family("llama 8/4")
    ids = torch.randint(3, 64, (3, 6), generator=generator())
    return model, groups, ids


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) + ("generate" in model.__dict__)


def run(model, x, *edits, **options):
    with torch.no_grad(), nl.edit(model, list(edits), **options):
        return model(x)


def logits(model, ids, *edits, mask=None, **options):
    positions = None if mask is None else (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad(), nl.edit(model, list(edits), **options):
        return model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits


V = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0])
CASES = {
    "zero": (nl.Edit("0", "zero"), lambda h: h * 0),
    "zero units": (nl.Edit("0", "zero", units=[1, -1]), lambda h: h.index_fill(1, torch.tensor([1, 4]), 0)),
    "mean": (nl.Edit("0", "mean", value=V), lambda h: V.expand_as(h)),
    "set a unit": (nl.Edit("0", "set", units="n//2", value=7), lambda h: h.index_fill(1, torch.tensor([2]), 7)),
    "set some of all": (
        nl.Edit("0", "set", units=[3, 0], value=V),
        lambda h: torch.cat([V[:1].expand(4, 1), h[:, 1:3], V[3:4].expand(4, 1), h[:, 4:]], 1),
    ),
    "scale": (nl.Edit("0", "scale", value=0.5), lambda h: h / 2),
    "add": (nl.Edit("0", "add", value=V.numpy()), lambda h: h + V),
    "add a column of a table": (nl.Edit("0", "add", value=pd.Series(V.numpy()).sort_index()), lambda h: h + V),
    "add to samples": (nl.Edit("0", "add", samples=":2", value=V), lambda h: torch.cat([h[:2] + V, h[2:]])),
    "one value per sample": (
        nl.Edit("0", "set", samples=[3, 0], value=torch.stack([V, 2 * V])[:, None]),
        lambda h: torch.stack([2 * V, h[1], h[2], V]),
    ),
    "project out": (nl.Edit("0", "project_out", value=V), lambda h: h - (h @ V / (V @ V))[:, None] * V),
    "module": (
        nl.Edit("0", "module", units="1:3", value=nn.Tanh()),
        lambda h: torch.cat([h[:, :1], h[:, 1:3].tanh(), h[:, 3:]], 1),
    ),
    "two in order": ([nl.Edit("0", "add", value=1), nl.Edit("0", "scale", value=3)], lambda h: (h + 1) * 3),
    "two in the other order": ([nl.Edit("0", "scale", value=3), nl.Edit("0", "add", value=1)], lambda h: h * 3 + 1),
    "output and input": ([nl.Edit("0", "add", value=1), nl.Edit("1.input", "scale", value=3)], lambda h: (h + 1) * 3),
}


@pytest.mark.parametrize("case", CASES)
def test_an_edit_is_the_change_written_by_hand(mlp, x, case):
    edits, by_hand = CASES[case]
    with torch.no_grad():
        expected = mlp[2](mlp[1](by_hand(mlp[0](x))))
    found = run(mlp, x, *(edits if isinstance(edits, list) else [edits]))
    assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert not torch.equal(found, mlp(x))
    assert hooks(mlp) == 0


def test_a_value_of_numpy_is_a_copy():
    column = V.numpy().copy()
    column.flags.writeable = False
    edit = nl.Edit("0", "add", value=column)
    edit.value[0] = 9
    assert column[0] == 1


def test_several_directions_are_projected_out_together(mlp, x):
    directions = torch.randn(2, 5, generator=generator(1))
    with torch.no_grad(), nl.edit(mlp, nl.Edit("0", "project_out", value=directions)):
        h = mlp[0](x)
    assert_close(h @ directions.T, torch.zeros(4, 2), rtol=0, atol=1e-5)
    beyond = torch.linalg.svd(directions).Vh[2:]
    assert_close(h @ beyond.T, mlp[0](x).detach() @ beyond.T)


def test_edits_may_come_from_a_generator(mlp, x):
    every = [nl.Edit("0", "zero", units=[0]), nl.Edit("0", "add", value=V)]
    with torch.no_grad(), nl.edit(mlp, (each for each in every)):
        found = mlp(x)
    assert found.equal(run(mlp, x, *every))


def test_nested_edits_come_after_those_of_the_outer_context(mlp, x):
    add, scale = nl.Edit("0", "add", value=1), nl.Edit("0", "scale", value=3)
    shown = []
    handle = mlp[0].register_forward_hook(lambda m, args, output: shown.append(output))
    with torch.no_grad(), nl.edit(mlp, add), nl.edit(mlp, scale):
        found = mlp(x)
    handle.remove()
    assert torch.equal(found, run(mlp, x, add, scale))
    assert_close(shown[0], (mlp[0](x) + 1) * 3)


def test_a_measurement_sees_the_edited_values(mlp, x):
    with nl.edit(mlp, nl.Edit("0", "set", units=[2], value=7)):
        means = nl.analyze(mlp, [x], metrics=["activation_mean"], layers="0").units["activation_mean"]
    assert means.iloc[2] == 7
    assert (means.iloc[[0, 1, 3, 4]].abs() < 3).all()


def test_identity_edits_change_no_bit():
    net, images = build(Mixed), torch.randn(3, 3, 9, 9, generator=generator())
    with torch.no_grad():
        clean = net(images)
        inside = {}
        for name in ("stem", "up", "head"):
            handle = net.get_submodule(name).register_forward_hook(lambda m, a, o, name=name: inside.update({name: o.clone()}))
            net(images)
            handle.remove()
    for name, value in inside.items():
        for edit in (nl.Edit(name, "set", value=value), nl.Edit(name, "scale", value=1), nl.Edit(name, "add", value=0)):
            assert torch.equal(run(net, images, edit), clean)
    zeros = nl.Edit("0", "add", value=0)
    assert run(nn.Sequential(nn.Identity()).eval(), torch.tensor([[-0.0]]), zeros).signbit().all()


def test_clean_into_clean_patching_changes_no_bit(texts):
    model, _, ids = texts
    blocks = nl.find_layers(model, "blocks[*]")
    shown = {}
    handles = [la.module.register_forward_hook(lambda m, a, o, la=la: shown.update({la.name: o.clone()})) for la in blocks]
    clean = logits(model, ids)
    for handle in handles:
        handle.remove()
    patches = [
        nl.Edit(name, "set", samples=[2, 0], positions=[1, 4, 3], value=h[[2, 0]][:, [1, 4, 3]]) for name, h in shown.items()
    ]
    assert torch.equal(logits(model, ids, *patches), clean)
    other = nl.Edit(blocks[0].name, "set", samples=[0], positions=[1], value=shown[blocks[0].name][:1, 2:3])
    moved = logits(model, ids, other)
    assert torch.equal(moved[1:], clean[1:])
    assert torch.equal(moved[:, :1], clean[:, :1])
    assert not torch.equal(moved[0, 1:], clean[0, 1:])


def test_maps_are_edited_by_channel_and_position():
    net, images = build(Mixed), torch.randn(2, 3, 9, 9, generator=generator())
    with nl.edit(net, nl.Edit("stem", "set", units=[5], positions="n//2", samples=[1], value=9)):
        edited = nl.ModelWrapper(net, "stem").forward_with_activations(images)[1]["stem"]
    expected = net.stem(images).detach().clone()
    expected[1, 5, 4, 4] = 9
    assert_close(edited, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_dtype_is_kept_and_gradients_reach_the_value_and_the_input(mlp, x, dtype):
    net = mlp.to(dtype)
    value = V.clone().requires_grad_()
    inputs = x.to(dtype).requires_grad_()
    with nl.edit(net, nl.Edit("0", "add", value=value, samples=[1])):
        outputs = net(inputs)
    assert outputs.dtype == dtype
    outputs.sum().backward()
    assert value.grad.abs().sum() > 0
    assert inputs.grad[1].abs().sum() > 0


KINDS = {
    "tuple": (lambda h: (h, "rest"), lambda o: o[0] if o[1] == "rest" and type(o) is tuple else None),
    "list": (lambda h: [h, None], lambda o: o[0] if type(o) is list else None),
    "dict": (lambda h: {"h": h, "n": 3}, lambda o: o["h"] if o["n"] == 3 and type(o) is dict else None),
    "named tuple": (lambda h: torch.return_types.max((h, h.long())), lambda o: o.values),
}


@pytest.mark.parametrize("kind", KINDS)
def test_containers_are_kept(kind):
    wrap, read = KINDS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Holder(Pair(wrap), read).eval()
    x = torch.randn(2, 4, generator=generator())
    assert_close(run(net, x, nl.Edit("inner", "scale", value=2)), 2 * net(x).detach(), rtol=0, atol=0)


class Named(nn.Module):
    """Its inner module reads None and an integer by place, and what it computes with by name."""

    def __init__(self):
        super().__init__()
        self.inner = Reader()

    def forward(self, x):
        return self.inner(None, torch.arange(3), x=x)


class Reader(nn.Module):
    def forward(self, mask, places, x=None):
        return x[:, places]


def test_a_tensor_passed_by_name_behind_other_arguments_is_read(x):
    net, wanted = Named().eval(), x.clone()
    wanted[:, 1] = 0
    assert_close(run(net, x, nl.Edit("inner.input", "zero", units=[1])), wanted, rtol=0, atol=0)
    found = nl.analyze(net, [x], metrics=["activation_mean"], layers=["inner.input"]).units["activation_mean"]
    assert_close(torch.tensor(found.to_numpy()), x.double().abs().mean(0), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"batch_first": True, "num_layers": 2}], ids=label)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_the_last_states_of_a_recurrent_module_are_those_of_its_output(kind, options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(kind(4, 3, **options)).eval()
    x = torch.randn(5, 6, 4, generator=generator())
    plain, same, edited = (
        found[1] if kind is nn.GRU else found[1][0]
        for found in (net(x), run(net, x, nl.Edit("0", "scale", value=1.0)), run(net, x, nl.Edit("0", "zero", units=[1])))
    )
    assert_close(same, plain, rtol=0, atol=1e-6)
    last = -2 if options.get("bidirectional") else -1
    wanted = plain.detach().clone()
    wanted[last, :, 1] = 0
    assert_close(edited, wanted, rtol=0, atol=1e-6)


class Started(nn.Module):
    """A recurrent module that is given its first states."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(4, 3)

    def forward(self, x):
        ones = x.new_ones(1, x.shape[1], 3)
        return self.rnn(x, (ones, -ones))[0]


def test_the_input_of_a_recurrent_module_is_edited_and_its_first_states_are_not():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Started().eval()
    x = torch.randn(5, 6, 4, generator=generator())
    without = x.clone()
    without[..., 2] = 0
    assert_close(run(net, x, nl.Edit("rnn.input", "zero", units=[2])), net(without), rtol=0, atol=0)


def sequence_first():
    """XLNet: its blocks show tokens before samples."""
    config = transformers.XLNetConfig(vocab_size=64, d_model=32, n_layer=2, n_head=4, d_inner=40)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.XLNetLMHeadModel(config).eval()


@pytest.mark.parametrize("tokens", [7, 8])  # of two samples
def test_tokens_may_come_before_samples(tokens):
    net, ids = sequence_first(), torch.randint(3, 60, (2, tokens), generator=generator())
    v = torch.randn(32, generator=generator(1))
    cases = [
        (nl.Edit("transformer.layer.0", "add", value=v, positions=-1, samples=[1]), lambda h: h[-1, 1].add_(v)),
        (nl.Edit("transformer.layer.0", "zero", positions="1:3", units=[4]), lambda h: h[1:3, :, 4].zero_()),
        (nl.Edit("transformer.layer.0", "resample"), lambda h: h.copy_(h.flip(1))),
        (nl.Edit("transformer.layer.0", "module", value=Times(), positions=2), lambda h: h[2].mul_(1.5)),
        (nl.Edit("transformer.layer.0", "module", value=Times()), lambda h: h.mul_(1.5)),
    ]
    for edit, change in cases:

        def hook(module, args, output, change=change):
            h = output[0].clone()
            change(h)
            return (h, *output[1:])

        handle = net.transformer.layer[0].register_forward_hook(hook)
        wanted = net(ids).logits.detach()
        handle.remove()
        with torch.no_grad(), nl.edit(net, edit):
            assert_close(net(ids).logits, wanted, rtol=0, atol=0)


class Times(nn.Module):
    def forward(self, x):
        return 1.5 * x


def test_the_second_name_of_a_module_is_told_the_first(mlp, x):
    mlp.add_module("again", mlp[0])
    with pytest.raises(ValueError, match="'again' is the same module as '0': give this name"):
        run(mlp, x, nl.Edit("again", "zero"))


def test_a_value_is_copied_into_nothing_of_the_model(mlp, x):
    before = {name: p.clone() for name, p in mlp.named_parameters()}
    shared = torch.zeros(4, 5)
    net = nn.Sequential(Holder(nn.Identity(), lambda h: h), mlp[2]).eval()
    run(net, shared, nl.Edit("0", "set", value=1))
    assert shared.abs().sum() == 0
    run(mlp, x, nl.Edit("0", "zero"))
    assert all(torch.equal(p, before[name]) for name, p in mlp.named_parameters())


@pytest.mark.parametrize("name", ["llama 8/4", "gpt2", "mixtral", "phi"])
def test_zeroing_a_unit_of_a_group_equals_the_masked_and_the_sliced_model(name):
    model, groups = family(name)
    ids = torch.randint(3, 64, (2, 7), generator=generator())
    for group in [group for group in groups if group.exact][:4]:
        units = [0, group.n - 1] if group.n > 2 else [0]
        edit = nl.Edit(group.name, "zero", units=units)
        found = logits(model, ids, edit, groups=groups)
        with torch.no_grad(), masked(model, groups, {group.name: units}):
            assert torch.equal(found, model(input_ids=ids, use_cache=False).logits)
        if group.equal_count is None:
            sliced = slice_units(copy.deepcopy(model), groups, {group.name: units})
            assert_close(found, logits(sliced, ids), rtol=1e-4, atol=1e-5)
        assert not torch.equal(found, logits(model, ids))


def test_scaling_a_group_by_its_gates_is_the_gated_model(texts):
    model, groups, ids = texts
    group = groups[0]
    gate = torch.rand(group.n, generator=generator())
    with torch.no_grad(), scaled(model, groups, {group.name: gate}):
        expected = model(input_ids=ids, use_cache=False).logits
    assert torch.equal(logits(model, ids, nl.Edit(group.name, "scale", value=gate), groups=groups), expected)


def test_resampling_takes_another_sample_s_values_and_is_seeded(mlp, x):
    with torch.no_grad():
        h = mlp[0](x)
    donors = []
    for seed in (0, 0, 1, 2, 3):
        with torch.no_grad(), nl.edit(mlp, nl.Edit("0", "resample", seed=seed)):
            taken = mlp[0](x)
            mlp(x)
        donors.append([int((row == h).all(1).nonzero()) for row in taken])
    assert donors[0] == donors[1]
    assert len({tuple(d) for d in donors}) > 1
    assert all(sorted(d) == [0, 1, 2, 3] and all(k != own for k, own in enumerate(d)) for d in donors)


def test_resampling_from_rows_draws_each_of_them(mlp):
    x, rows = torch.randn(400, 3, generator=generator()), torch.arange(15.0).reshape(3, 5)
    with torch.no_grad(), nl.edit(mlp, nl.Edit("0", "resample", units=[0], value=rows)):
        taken = mlp[0](x)[:, 0]
        mlp(x)
    counts = torch.stack([(taken == v).sum() for v in (0, 5, 10)])
    assert counts.sum() == 400
    assert counts.min() > 100


ROUND_TRIPS = [
    nl.Edit("fc", "zero"),
    nl.Edit("blocks[n//2:].mlp", "add", units="n//3:", positions=[1, 2], samples=0, value=V, port="input", phase="prompt"),
    nl.Edit("fc", "resample", seed=3),
    nl.Edit("fc", "set", positions=[[0], [2]], value=torch.ones(2, 1, 3)),
]


@pytest.mark.parametrize("edit", ROUND_TRIPS, ids=str)
def test_an_edit_survives_json_and_hydra(edit):
    hydra = pytest.importorskip("hydra.utils")
    given = json.loads(json.dumps(edit.to_dict()))
    assert nl.Edit.from_dict(given) == edit
    assert hydra.instantiate({"_target_": "nodelens.Edit"} | given) == edit
    assert nl.Edit.from_dict(given | {"seed": 9}) != edit


def test_a_module_is_stored_by_name_only():
    edit = nl.Edit("fc", "module", value=nn.Tanh())
    assert edit.to_dict()["value"] == {"module": "torch.nn.modules.activation.Tanh"}
    with pytest.raises(ValueError, match=r"made by the module torch.nn.modules.activation.Tanh: give value= the module itself"):
        nl.Edit.from_dict(edit.to_dict())


def test_hooks_are_gone_after_errors_interrupts_and_dropped_generators():
    model, ids = build(Tokens), torch.randint(11, (2, 4), generator=generator())
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    edit = nl.Edit("ffn", "add", positions=[1], value=1)

    def dropped():
        with nl.edit(model, edit):
            yield model(**call)

    def raising(error):
        with nl.edit(model, edit):
            model(**call)
            raise error

    def objects():
        gc.collect()
        return len(gc.get_objects())

    with torch.no_grad():
        counts = []
        for k in range(200):
            next(dropped())
            for error in (RuntimeError(), KeyboardInterrupt()):
                with pytest.raises(type(error)):
                    raising(error)
            with pytest.raises(IndexError), nl.edit(model, edit):
                model(**call | {"input_ids": ids + 64})
            assert hooks(model) == 0
            if k in (20, 199):
                counts.append(objects())
    assert counts[1] - counts[0] < 200  # objects of the tests themselves


def test_edits_of_a_compiled_model_reach_it(mlp, x):
    compiled = torch.compile(mlp, backend="eager")
    with torch.no_grad():
        compiled(x)
        with nl.edit(compiled, nl.Edit("0", "zero")):
            found = compiled(x)
        assert torch.equal(found, run(mlp, x, nl.Edit("0", "zero")))
        assert torch.equal(compiled(x), mlp(x))


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.spare = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.fc(x)


E = nl.Edit
MISTAKES = [
    (lambda m, x: E("0", "nil"), "operation is 'nil'; it is one of zero, mean"),
    (lambda m, x: E("0", "zero", port="grad"), "port is 'grad'; it is one of output, input"),
    (lambda m, x: E("0", "zero", phase="later"), "phase is 'later'; it is one of all, prompt, generated"),
    (lambda m, x: E("0", "zero", value=1), "zero takes no value; use set"),
    (
        lambda m, x: E("0", "mean"),
        r"mean of '0' needs a value: give value=the means \(units,\), such as those of .* activation_mean",
    ),
    (lambda m, x: E("0", "add"), r"add of '0' needs a value: give value=a vector"),
    (
        lambda m, x: E("0", "add", value="big"),
        "value is 'big'; give a number, a tensor or an nn.Module|value is 'big': give a number",
    ),
    (lambda m, x: E("0", "set", value=nn.ReLU()), "set of '0' is given a ReLU as value; module takes an nn.Module"),
    (
        lambda m, x: E.from_dict({"site": "0", "operation": "zero", "unit": 3}),
        "an edit has no field 'unit'; it has site, operation",
    ),
    (lambda m, x: run(m.train(), x, E("0", "zero")), r"Sequential is in training mode, .* call model.eval\(\) first"),
    (
        lambda m, x: run(m, x, E("fc9", "zero")),
        r"zero of 'fc9': no layer matches 'fc9'.*give groups=nl.find_groups\(model, batch\)",
    ),
    (lambda m, x: run(m, x, E("0", "zero", units=[5])), "zero of '0' .units .5.. at 0: units: 5 .* among n = 5; valid are -5 to 4"),
    (lambda m, x: run(m, x, E("0", "zero", units="9")), "units: index '9' with n = 5: 9 is out of range; valid are -5 to 4"),
    (lambda m, x: run(m, x, E("0", "zero", units=[])), "units: an empty list selects nothing among n = 5"),
    (lambda m, x: run(m, x, E("0", "zero", samples="4")), "samples: index '4' with n = 4: 4 is out of range"),
    (lambda m, x: run(m, x, E("0", "add", value=[1, 2])), r"value is \(2,\), the edited values are \(4, 5\): give a number"),
    (
        lambda m, x: run(m, x, E("0", "set", samples=[1, 2], value=torch.ones(3, 1, 5))),
        r"value is \(3, 1, 5\), selected are 2 samples of 1 positions",
    ),
    (lambda m, x: run(m, x, E("0", "module", value=nn.Linear(5, 2))), r"Linear returns \(4, 2\) for values of shape \(4, 5\)"),
    (lambda m, x: run(m, x, E("0", "project_out", value=[0.0] * 5)), "1 directions of project_out are zero or linearly dependent"),
    (lambda m, x: run(m, x[:1], E("0", "resample")), "another sample, and the batch has one: give larger batches, or value=rows"),
    (lambda m, x: run(m, x, E("0", "resample", value=torch.ones(3, 4))), r"value is \(3, 4\), the site is 5 units wide: give rows"),
    (
        lambda m, x: run(m, x, E("0", "zero", phase="generated")),
        "no such row has passed in 1 calls of Sequential: phase is 'generated'",
    ),
    (lambda m, x: run(Unused().eval(), x, E("spare", "zero")), "spare was never called by Unused.forward .* name another site"),
    (lambda m, x: run(nn.Sequential(nn.Flatten()).eval(), x.long(), E("0", "zero")), "it shows int64: edits change floating-point"),
    (
        lambda m, x: run(nn.Sequential(Holder(nn.Identity(), lambda h: h[:3])).eval(), x, E("0", "zero", samples=[0])),
        "it shows .3, 3. for a batch of 4 samples: the first axis has to be that of the samples",
    ),
]


@pytest.mark.parametrize(("call", "words"), MISTAKES, ids=label)
def test_mistakes_are_named(mlp, x, call, words):
    with pytest.raises(ValueError, match=words) as error:
        call(mlp, x)
    assert "\n" not in str(error.value)
    assert hooks(mlp) == 0


def test_other_things_than_edits_are_refused(mlp):
    with pytest.raises(TypeError, match=r"nl.edit takes edits, such as nl.Edit\('fc1', 'zero'\), and not str"), nl.edit(mlp, ["0"]):
        pass


def test_a_pattern_of_which_some_modules_never_run_is_a_warning():
    net = Unused().eval()
    with pytest.warns(UserWarning, match=r"zero of '\*': 1 of its 2 modules were never called, such as spare"):
        run(net, torch.ones(1, 3), nl.Edit("*", "zero"))


def test_a_model_that_is_not_called_is_no_mistake(mlp):
    with nl.edit(mlp, nl.Edit("0", "zero")):
        pass
    assert hooks(mlp) == 0


def test_units_of_experts_in_shared_tensors_are_edited_as_groups():
    model, groups = family("mixtral")
    ids = torch.randint(3, 64, (2, 5), generator=generator())
    experts = next(la.name for la in nl.find_layers(model, "blocks[0].mlp.hidden"))
    with pytest.raises(ValueError, match=r"are units of an expert in shared tensors.*groups=nl.find_groups"):
        logits(model, ids, nl.Edit(experts, "zero"))
    shared = next(group for group in groups if any(p.entry is not None for p in group.slices))
    with pytest.raises(ValueError, match="its experts share their tensors: their units can only be zeroed or scaled, for all"):
        logits(model, ids, nl.Edit(shared.name, "set", value=1), groups=groups)
    whole = groups.opt_in[0]
    with pytest.raises(ValueError, match="its units are whole experts, which are edited by their router"):
        logits(model, ids, nl.Edit(whole.name, "zero", units=[0]), groups=[*groups, whole])


def test_what_is_no_edit_is_named():
    net = nn.Linear(2, 2).eval()
    for given in (None, [None], ["fc1"], 3):
        with pytest.raises(TypeError, match=r"nl.edit takes edits, such as nl.Edit\('fc1', 'zero'\), and not"), nl.edit(net, given):
            pass
    with pytest.raises(TypeError, match=r"nl.edit takes pruning groups as groups="), nl.edit(net, [], groups=["fc1"]):
        pass
    with pytest.raises(ValueError, match=r"an edit is stored as a dictionary of its fields, and not as NoneType"):
        nl.Edit.from_dict(None)
    with pytest.raises(ValueError, match=r"value has complex numbers, complex64: activations are real"):
        nl.Edit("fc1", "set", value=torch.zeros(2, dtype=torch.complex64))
    outer = nn.Sequential(net).eval()
    for mask in ([False, True], torch.tensor([False, True]), True):
        message = r"units are booleans; they are indices, as np.flatnonzero\(mask\) gives them"
        with pytest.raises(ValueError, match=message), nl.edit(outer, nl.Edit("0", "zero", units=mask)):
            outer(torch.ones(1, 2))
    where, message = {"a": 1}, r"positions is \{'a': 1\}; it takes an index, a list of indices, or an expression"
    with pytest.raises(ValueError, match=message), nl.edit(outer, nl.Edit("0", "zero", positions=where)):
        outer(torch.ones(1, 2))
