"""nl.patch: grids of patches between a clean and a corrupt prompt."""

import math
import re

import numpy as np
import pytest
import torch
import transformers
from lens_models import family, hooks, ids, llama, stories

import nodelens as nl
from nodelens.analysis.patching.patching import AttributionPatching, LogitAttribution, Patching
from nodelens.data import ByteTokenizer
from nodelens.interventions.patching.attribution import AttributionOptions, attribution_grid
from nodelens.interventions.patching.pairs import read_pairs
from nodelens.interventions.token_model import TokenModel
from nodelens.network.hooks import edit
from nodelens.report.patching_figures import figures_of

CLEAN, CORRUPT = ids(1, 6)[0], ids(1, 6, seed=3)[0]
CORRUPT[:2] = CLEAN[:2]
NAMES = ["logit_difference", "probability", "surprisal", "kl"]


def last(model, tokens):
    with torch.no_grad():
        return model(tokens[None]).logits[0, -1]


def by_hand(logits, reference, answer, wrong):
    logs, own = logits.log_softmax(0), reference.log_softmax(0)
    kl = float((own.exp() * (own - logs)).sum())
    return [float(logits[answer] - logits[wrong]), float(logs[answer].exp()), -float(logs[answer]), kl]


def states_of(net, tokens, module, side):
    """What passes at a module in a plain run."""
    kept = []
    hook = (lambda m, a: kept.append(a[0].clone())) if side == "input" else (lambda m, a, o: kept.append(first_tensor(o).clone()))
    register = module.register_forward_pre_hook if side == "input" else module.register_forward_hook
    handle = register(hook)
    last(net, tokens)
    handle.remove()
    return kept[0]


def first_tensor(output):
    return output if isinstance(output, torch.Tensor) else output[0]


@pytest.mark.parametrize(
    ("component", "path", "side"),
    [
        ("residual", "model.layers.{}", "output"),
        ("attention", "model.layers.{}.self_attn", "output"),
        ("mlp", "model.layers.{}.mlp", "output"),
        ("heads", "model.layers.{}.self_attn.o_proj", "input"),
    ],
)
def test_each_cell_is_a_run_with_one_state_replaced(component, path, side):
    net = llama()
    found = nl.patch(net, CLEAN, CORRUPT, answer=5, wrong=9, components=component)["cells"]
    assert len(found) == 3 * 6 * (4 if component == "heads" else 1)
    clean, corrupt = last(net, CLEAN), last(net, CORRUPT)
    for _, row in found[found["position"] > 1].iloc[::5].iterrows():
        module = net.get_submodule(path.format(row["layer"]))
        source = states_of(net, CLEAN, module, side)
        columns = slice(row["head"] * 12, row["head"] * 12 + 12) if component == "heads" else slice(None)

        def change(state, source=source, at=row["position"], columns=columns):
            state = state.clone()
            state[0, at, columns] = source[0, at, columns]
            return state

        with edit(*({}, {module: change}) if side == "input" else ({module: change}, {})):
            patched = last(net, CORRUPT)
        wanted = by_hand(patched, clean, 5, 9)
        np.testing.assert_allclose(row[NAMES].astype(float), wanted, rtol=1e-4, atol=1e-5)
        span = (clean[5] - clean[9]) - (corrupt[5] - corrupt[9])
        assert math.isclose(
            row["recovered"], (wanted[0] - float(corrupt[5] - corrupt[9])) / float(span), rel_tol=1e-3, abs_tol=1e-4
        )


def test_clean_into_clean_is_the_identity():
    found = nl.patch(llama(), CLEAN, CLEAN, answer=5, wrong=9, components=["residual", "attention", "mlp", "heads"])
    base = found["runs"].iloc[0]
    for name in NAMES:
        assert (found["cells"][name] == base[name]).all()


def test_the_last_block_at_the_last_token_restores_everything():
    found = nl.patch(llama(), CLEAN, CORRUPT, answer=5, wrong=9, layers=-1, positions=-1)["cells"]
    assert math.isclose(found["recovered"].item(), 1, rel_tol=1e-5)
    assert abs(found["kl"].item()) < 1e-6


def test_what_both_prompts_share_changes_nothing():
    found = nl.patch(llama(), CLEAN, CORRUPT, answer=5, wrong=9, components=["residual", "heads"])["cells"]
    assert (found.loc[found["position"] < 2, "recovered"] == 0).all()


def test_the_other_direction_is_the_pair_swapped():
    there = nl.patch(llama(), CLEAN, CORRUPT, answer=5, wrong=9, into="clean")["cells"]
    back = nl.patch(llama(), CORRUPT, CLEAN, answer=5, wrong=9)["cells"]
    np.testing.assert_allclose(there[[*NAMES, "recovered"]], back[[*NAMES, "recovered"]], rtol=1e-6)


def test_by_default_the_first_choices_are_compared():
    found = nl.patch(llama(), CLEAN, CORRUPT)
    clean, corrupt = last(llama(), CLEAN), last(llama(), CORRUPT)
    assert found["runs"]["answer"].tolist() == [f"#{int(clean.argmax())}"] * 2
    assert found["runs"]["wrong"].tolist() == [f"#{int(corrupt.argmax())}"] * 2
    same = nl.patch(llama(), CLEAN, CLEAN, positions=-1)
    assert same["cells"]["logit_difference"].isna().all()
    assert same.metadata["missing"][0]["reason"] == "both runs have the same first choice: give answer= and wrong="


@pytest.mark.parametrize("name", ["gpt2", "opt", "falcon", "qwen3 moe"])
def test_other_families(name):
    components = ["residual", "attention", "mlp", "heads"]
    before = hooks(family(name))
    found = nl.patch(family(name), CLEAN, CORRUPT, answer=5, wrong=9, components=components, positions="n//2:")["cells"]
    assert set(found["component"]) == set(components)
    assert found[[*NAMES, "recovered"]].notna().all().all()
    assert found.groupby("component")["recovered"].apply(lambda v: v.abs().max()).min() > 0
    assert hooks(family(name)) == before


SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4}
CACHES = {  # of a convolution's states between keys and values; two caches in one
    "Lfm2": {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention", "conv"]},
    "MegatronBert": {"is_decoder": True},
}


@pytest.mark.parametrize("kind", CACHES)
def test_a_cache_without_rows_to_choose_is_left_alone(kind):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(**SIZES | CACHES[kind])
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
    found = nl.patch(model, CLEAN, CORRUPT, answer=5, wrong=9, positions=[3])["cells"].set_index("layer")
    block, state = nl.find_layers(model, "blocks[0]")[0].module, []
    with torch.no_grad():
        handle = block.register_forward_hook(lambda m, a, o: state.append(first_tensor(o)))
        model(CLEAN[None])
        handle.remove()
        edit_of = nl.Edit("blocks[0]", "set", value=state[0][0, 3], positions=3)
        with nl.edit(model, edit_of):
            logits = model(CORRUPT[None]).logits[0, -1]
    assert found.loc[0, "logit_difference"] == pytest.approx(float(logits[5] - logits[9]), abs=1e-5)


def test_several_pairs_have_answers_of_their_own():
    found = nl.patch(llama(), [CLEAN, CORRUPT], [CORRUPT, CLEAN], answer=[5, 6], wrong=9, positions=[3])
    assert found["runs"]["answer"].tolist() == ["#5", "#5", "#6", "#6"]
    one = nl.patch(llama(), CORRUPT, CLEAN, answer=6, wrong=9, positions=[3])["cells"]
    two = found["cells"].query("pair == 1").reset_index(drop=True)
    np.testing.assert_allclose(two["recovered"], one["recovered"])


def test_the_summary_names_the_best_cell_on_average_over_pairs():
    rows = ids(4, 6)
    found = nl.patch(llama(), rows[:2], rows[2:], answer=5, wrong=9, components=["residual", "heads"])
    means: dict[tuple, list[float]] = {}
    for row in found["cells"].itertuples():
        head = "" if row.component == "residual" else f", head {row.head}"
        means.setdefault((row.component, f"layer {row.layer}{head}, position {row.position}"), []).append(row.recovered)
    for component in ("residual", "heads"):
        value, where = max((sum(v) / 2, where) for (own, where), v in means.items() if own == component)
        assert f"{component}: {where} recovers most, {value:.0%} of the difference" in found.summary()


def test_attribution_is_the_derivative_along_the_difference():
    net, model = llama(), TokenModel(llama())
    options = AttributionOptions(["residual", "attention", "mlp", "heads"], exact="all")
    found = attribution_grid(model, read_pairs(CLEAN, CORRUPT, None, 5, 9), options)["cells"]
    for component, path, side in (("mlp", "model.layers.1.mlp", "output"), ("heads", "model.layers.1.self_attn.o_proj", "input")):
        module = net.get_submodule(path)
        step = (states_of(net, CLEAN, module, side) - states_of(net, CORRUPT, module, side)).double()
        row = found.query(f"component == '{component}' and layer == 1 and position == 3").iloc[-1]
        columns = slice(36, 48) if component == "heads" else slice(None)
        slope = {}
        for sign in (1, -1):

            def change(state, sign=sign, step=step, columns=columns):
                new = state.clone()
                new[0, 3, columns] += (sign * 1e-2 * step[0, 3, columns]).to(new)
                return new

            with edit(*({}, {module: change}) if side == "input" else ({module: change}, {})):
                z = last(net, CORRUPT)
            slope[sign] = float(z[5] - z[9])
        assert math.isclose(row["attribution"], (slope[1] - slope[-1]) / 2e-2, rel_tol=2e-2, abs_tol=1e-3)
    exact = nl.patch(net, CLEAN, CORRUPT, answer=5, wrong=9, components=["residual", "attention", "mlp", "heads"])
    change = exact["cells"]["logit_difference"] - exact["runs"]["logit_difference"][1]
    np.testing.assert_allclose(found["exact"], change, rtol=1e-4, atol=1e-5)


def test_the_heads_of_an_attention_add_up():
    model = TokenModel(llama())
    found = attribution_grid(model, read_pairs(CLEAN, CORRUPT, None, 5, 9), AttributionOptions(["attention", "heads"], exact=0))[
        "cells"
    ]
    sums = found.groupby(["component", "layer", "position"])["attribution"].sum()
    np.testing.assert_allclose(sums["heads"], sums["attention"], rtol=1e-4, atol=1e-6)
    assert found["exact"].isna().all()


def test_the_best_cells_are_patched_exactly():
    found = AttributionPatching(clean=CLEAN, corrupt=CORRUPT, answer=5, wrong=9, exact=4)(llama())
    best = found["cells"]["attribution"].abs().nlargest(4).index
    assert sorted(found["cells"].dropna(subset="exact").index) == sorted(best)
    assert found.metadata["exact"] == 4
    assert "18 cells from one backward pass per pair; 4 patched exactly, Spearman" in found.summary()


def test_a_trained_network_finds_who_she_is():
    model, tokenizer = stories()
    clean, corrupt = (f"Once upon a time, there was a little {who}." for who in ("girl named Lily", "boy named Tim"))
    found = nl.patch(model, clean, corrupt, tokenizer, answer=" She", wrong=" He", components=["residual", "heads"])
    runs = found["runs"].set_index("run")
    assert runs.loc["clean", "probability"] > 0.9
    assert runs.loc["corrupt", "probability"] < 0.01
    names = found["cells"].query("component == 'residual' and layer == 0").set_index("position")["recovered"]
    assert names.idxmax() == 14  # the name, which differs
    rank = {}
    for component in ("residual", "attention", "mlp", "heads"):
        options = AttributionOptions(component, exact="all")
        rank[component] = attribution_grid(TokenModel(model), read_pairs(clean, corrupt, tokenizer, " She", " He"), options)
    found = {name: each.metadata["spearman"] for name, each in rank.items()}
    assert min(found["attention"], found["mlp"], found["heads"]) > 0.8
    assert found["residual"] > 0.5  # larger steps, of which the first order is a worse guess


def test_an_answer_without_its_space_is_told_so():
    model, tokenizer = stories()
    with pytest.raises(
        ValueError, match=r"'She' is 2 tokens after the prompt, S \| he: give one that is a single token, such as ' She'"
    ):
        nl.patch(model, "The girl was sad.", "The girl was sad.", tokenizer, answer="She")


def test_figures_are_drawn_and_findings_load_again(tmp_path):
    every = ["residual", "heads"]
    patched = Patching(every, clean=CLEAN, corrupt=CORRUPT, answer=5, wrong=9)(llama())
    attributed = AttributionPatching(every, clean=CLEAN, corrupt=CORRUPT, answer=5, wrong=9)(llama())
    for name, found in {"patched": patched, "attributed": attributed}.items():
        again = nl.load(found.save(tmp_path / name))
        assert again["cells"].equals(found["cells"])
        names = [plot.name for plot in figures_of(again)]
        assert names == ["patching-residual", "patching-heads", "by-head"] + ["exact"] * (name == "attributed")


@pytest.mark.parametrize("analysis", [Patching, AttributionPatching])
def test_a_heatmap_names_each_token_with_its_position(analysis):
    found = analysis(["residual"], clean=[3, 3, 5, 6], corrupt=[3, 3, 4, 6], answer=5, wrong=9)(llama())
    figure = next(iter(figures_of(found))).figure
    ticks = list(figure.layout.xaxis.ticktext)
    assert ticks == ["#3 0", "#3 1", "#5/#4 2", "#6 3"], "repeated tokens differ, and both prompts are there"
    layer, position = figure.data[0].z.shape[0] - 1, 2
    assert figure.data[0].customdata[0][position] == f"layer {layer}, position 2<br>residual, token #5 / #4"
    assert "%{z" in figure.data[0].hovertemplate


@pytest.mark.parametrize(
    ("call", "message"),
    {
        "other lengths": (
            lambda: nl.patch(llama(), CLEAN, CORRUPT[:4]),
            "clean prompt has 6 tokens, .* the corrupt one 4, .*: states",
        ),
        "other numbers": (
            lambda: nl.patch(llama(), [CLEAN, CLEAN], [CORRUPT]),
            "there are 2 clean prompts and 1 corrupt ones: give",
        ),
        "no tokenizer": (
            lambda: nl.patch(llama(), "a", "b"),
            "the prompt 'a' is a text and there is no tokenizer: give tokenizer=",
        ),
        "a position out of range": (lambda: nl.patch(llama(), CLEAN, CORRUPT, positions=6), r"positions: .*6 is out of range"),
        "a layer out of range": (lambda: nl.patch(llama(), CLEAN, CORRUPT, layers=7), "layers=7 of LlamaForCausalLM with 3 blocks"),
        "an unknown component": (
            lambda: nl.patch(llama(), CLEAN, CORRUPT, components="head"),
            r"components is 'head'; it takes residual, .*heads. Did you mean 'heads'\?",
        ),
        "an unknown direction": (lambda: nl.patch(llama(), CLEAN, CORRUPT, into="both"), "into is 'both'; it is corrupt or clean"),
        "answers of other pairs": (lambda: nl.patch(llama(), CLEAN, CORRUPT, answer=[1, 2]), "answer has 2 tokens for 1 pairs"),
        "an answer of text": (
            lambda: nl.patch(llama(), CLEAN, CORRUPT, answer=" a"),
            "the prompt is given as ids: give the answer's id",
        ),
        "an answer of two tokens": (
            lambda: nl.patch(llama(), "ab", "cd", ByteTokenizer(), answer="ef"),
            r"the answer 'ef' is 2 tokens after the prompt, e \| f: give one that is a single token, or an id, .* 101",
        ),
        "no prompts": (lambda: Patching()(llama()), "patching compares pairs of prompts: give clean="),
        "the same choice": (
            lambda: AttributionPatching(clean=CLEAN, corrupt=CLEAN)(llama()),
            r"pair 0: '#.*' is the first choice of both the clean and the corrupt run: give answer= and wrong=, or metric=kl",
        ),
        "an unknown metric": (lambda: AttributionPatching(metric="loss"), "metric is 'loss'; it is logit_difference, probability"),
        "an unknown number": (lambda: AttributionPatching(exact=-1), "exact is -1; it is a number of cells, or all"),
    }.values(),
)
def test_bad_input_is_named(call, message):
    before = hooks(llama())
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
    assert hooks(llama()) == before


def test_blocks_without_a_part_are_left_out():
    model = family("qwen3 next")
    found = nl.patch(model, CLEAN, CORRUPT, answer=5, wrong=9, components=["residual", "heads"])
    assert set(found["cells"]["component"]) == {"residual", "heads"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"answer": 64}, "the answer has the token id 64; the model has logits for 0 to 63"),
        ({"answer": 5, "wrong": -1}, "the answer has the token id -1; the model has logits for 0 to 63"),
        ({"layers": 1.5}, "layers is 1.5; it takes all, an index, a list of indices, or an expression"),
        ({"positions": 1.5}, "positions is 1.5; it takes an index, a list of indices, or an expression such as n//2:"),
    ],
    ids=str,
)
def test_answers_and_places_that_are_none_are_named(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        nl.patch(llama(), *ids(2, 5), **options)


def test_tokens_of_another_vocabulary_are_named():
    message = "token id 64 is not in the vocabulary of LlamaForCausalLM, 0 to 63: give ids of this model, and texts with its own"
    with pytest.raises(ValueError, match=message):
        nl.lens(llama(), [3, 64])
    with pytest.raises(ValueError, match=r"the answer has the token id 99; the model has logits for 0 to 63"):
        LogitAttribution([[4, 5]], answer=99)(llama())
    with pytest.raises(ValueError, match=r"answer and wrong are both the token 5, .*: give two tokens"):
        nl.patch(llama(), ids(1, 4)[0], ids(1, 4, seed=1)[0], answer=5, wrong=5)
    with pytest.raises(ValueError, match=r"the answer is 1.5; it is a text of one token, or the id of one"):
        LogitAttribution([[4, 5]], answer=1.5)(llama())


def test_it_says_whether_cells_share_passes(monkeypatch):
    rows, options = ids(2, 5), {"answer": 5, "wrong": 6}
    found = nl.patch(llama(), rows[0], rows[1], **options)
    assert found.metadata["shares"] == ["cache and blocks"]
    assert "whole" not in found.summary()

    def refuse(*given, **named):
        raise NotImplementedError

    monkeypatch.setattr("nodelens.interventions.cells.CellPasses._joined", refuse)
    alone = nl.patch(llama(), rows[0], rows[1], **options)
    assert alone.metadata["shares"] == ["nothing"]
    assert "the model ran whole for each cell of 1 of 1 prompts: it does not take shared passes" in alone.summary()


def test_training_mode_is_refused():
    model = family("llama 8/4")
    model.train()
    try:
        with pytest.raises(ValueError, match=r"nl.patch: LlamaForCausalLM is in training mode"):
            nl.patch(model, CLEAN, CORRUPT)
    finally:
        model.eval()
