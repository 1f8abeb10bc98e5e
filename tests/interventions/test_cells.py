"""Cells of a grid: many in one pass, each as if the model had run for it alone."""

import copy
from itertools import combinations, pairwise

import pytest
import torch
from lens_models import CAUSAL, family, hooks, ids, llama, stories
from torch import nn
from torch.testing import assert_close

from nodelens.interventions.cells import _PASS, WAYS, CellPasses, GridCell, _parts, repeated_logits
from nodelens.interventions.patching.grid import COMPONENTS, GridOptions, grid_sites
from nodelens.interventions.token_model import TokenModel

FAST = ["gpt2", "bloom", "mixtral", "gemma2"]
TOKENS = ids(1, 7)[0]


def all_cells(model, components=tuple(COMPONENTS), other=None):
    """Every cell of a model with the states of another prompt."""
    sites, _ = grid_sites(model, GridOptions(components))
    states, _ = model.read((ids(1, 7, seed=1) if other is None else other)[:, :7], [site.layer for site in sites])
    return [cell for site in sites for _, cell in site.cells(states[site.layer.name][0], range(7))]


def gathered(passes, cells):
    found = {}
    for part, logits in passes(cells):
        found |= dict(zip(part, logits, strict=True))
    assert sorted(found) == list(range(len(cells)))
    return torch.stack([found[k] for k in range(len(cells))])


def check(net, **options):
    model = TokenModel(net)
    with model.running():
        cells = all_cells(model, **options)
        looped = torch.cat([repeated_logits(model, TOKENS, [cell]) for cell in cells])
        assert (looped - looped[0]).abs().max() > 1e-3  # cells differ
        assert_close(gathered(CellPasses(model, TOKENS), cells), looped, rtol=1e-5, atol=1e-5 * float(looped.abs().max()))
        few = cells[:: max(1, len(cells) // 9)]
        again = gathered(CellPasses(model, TOKENS, shared=False), few)
    assert_close(again, looped[:: max(1, len(cells) // 9)], rtol=1e-5, atol=1e-5 * float(looped.abs().max()))


def present(name):
    """The components that a family has."""
    model = TokenModel(family(name))
    found = []
    for component in COMPONENTS:
        try:
            grid_sites(model, GridOptions(component))
        except ValueError:
            continue
        found.append(component)
    return tuple(found)


@pytest.mark.parametrize("name", FAST)
def test_a_grid_is_the_loop_of_single_runs(name):
    assert present(name) == tuple(COMPONENTS)
    check(family(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CAUSAL if name not in FAST])
def test_a_grid_is_the_loop_of_single_runs_in_every_family(name):
    assert {"residual", "mlp"} <= set(present(name))
    check(family(name), components=present(name))


def test_shared_ways_are_used_where_the_model_takes_them():
    model = TokenModel(llama())
    with model.running():
        passes = CellPasses(model, TOKENS)
        gathered(passes, all_cells(model))
        assert passes._ways == list(WAYS)


def test_a_model_that_takes_no_more_rows_runs_whole():
    class Stubborn(nn.Module):
        """Its blocks refuse a batch of another size than the ids'."""

        def __init__(self):
            super().__init__()
            self.inner, self.config = llama(), llama().config

        def forward(self, input_ids):
            seen = []
            handle = self.inner.model.layers[1].register_forward_pre_hook(lambda m, a: seen.append(len(a[0])))
            try:
                out = self.inner(input_ids, use_cache=False).logits
            finally:
                handle.remove()
            if seen != [len(input_ids)]:
                raise RuntimeError("another batch")
            return out

    check(Stubborn().eval())
    passes = CellPasses(TokenModel(Stubborn().eval()), TOKENS)
    with passes.model.running():
        gathered(passes, all_cells(passes.model))
    assert passes._ways == []


def test_a_model_that_gives_other_logits_then_runs_whole():
    class Averaging(nn.Module):
        """Mixes the rows of its batch after the first block, so that rows that join later differ."""

        def __init__(self):
            super().__init__()
            self.inner, self.config = llama(), llama().config

        def forward(self, input_ids):
            out = self.inner(input_ids, use_cache=False).logits
            return out + len(input_ids)  # depends on how many rows the model was given

    model = TokenModel(Averaging().eval())
    with model.running():
        passes = CellPasses(model, TOKENS)
        cells = all_cells(model)[:6]
        gathered(passes, cells)
        assert passes._ways == []


def test_a_state_into_itself_changes_nothing():
    model = TokenModel(llama())
    with model.running():
        cells = all_cells(model, other=TOKENS[None])
        base = model.logits(TOKENS[None], last=True)
        assert_close(gathered(CellPasses(model, TOKENS), cells), base.expand(len(cells), -1), rtol=1e-5, atol=1e-5)


def test_hooks_are_gone_after_an_error():
    model, before = TokenModel(llama()), hooks(llama())
    cell = GridCell(model.part(1, "output"), 1, "output", 3, torch.zeros(5))  # of another width
    with model.running(), pytest.raises(RuntimeError):
        repeated_logits(model, TOKENS, [cell])
    assert hooks(llama()) == before


def test_the_batches_of_a_trained_network_are_the_loop():
    net, tokenizer = stories()
    model = TokenModel(net)
    text = "Once upon a time, there was a little girl named Lily. She loved to play with her mom"
    prompt = torch.tensor(tokenizer(text)["input_ids"][:24])
    sites, _ = grid_sites(model, GridOptions("residual"))
    with model.running():
        states, _ = model.read(prompt.flip(0)[None], [site.layer for site in sites])
        cells = [cell for site in sites for _, cell in site.cells(states[site.layer.name][0], range(24))]
        assert len(cells) == 5 * 24
        looped = torch.cat([repeated_logits(model, prompt, [cell]) for cell in cells])
        assert_close(gathered(CellPasses(model, prompt), cells), looped, rtol=1e-5, atol=1e-4)


def test_ways_are_compared_once_for_each_length_of_a_prompt(monkeypatch):
    """The whole model runs for a first and a last cell of a grid; other prompts of that length need no comparison."""
    from nodelens.interventions import cells as module

    model, compared = TokenModel(llama()), []
    monkeypatch.setattr(module, "repeated_logits", lambda m, t, some: compared.append(len(t)) or repeated_logits(m, t, some))
    with model.running():
        for tokens in (TOKENS, ids(1, 7, seed=3)[0], ids(1, 7, seed=4)[0][:6]):
            cells = [cell for cell in all_cells(model, ("residual",)) if cell.position < 6]
            for _ in range(2):
                gathered(CellPasses(model, tokens), cells)
    assert sorted(set(compared)) == [6, 7]
    assert len(compared) == 2 * len({cell.part for cell in cells}), compared


def test_all_passes_of_a_grid_are_compared_with_one_pass_of_the_whole_model(monkeypatch):
    """The first and the last cell of each part, from a cache and without one, and one that has no effect."""
    from nodelens.interventions import cells as module

    monkeypatch.setitem(_PASS, "cpu", -99)  # as many passes as there are positions
    model, compared = TokenModel(llama()), []
    monkeypatch.setattr(module, "repeated_logits", lambda m, t, some: compared.append(some) or repeated_logits(m, t, some))
    with model.running():
        gathered(CellPasses(model, TOKENS), all_cells(model, ("residual", "mlp")))
    assert len(compared) == 1
    idle = [cell for cell in compared[0] if cell.start == 3 and cell.position < 6]
    found = {(cell.part, cell.position > 0) for cell in compared[0] if cell not in idle}
    assert found == {("output", False), ("output", True), ("mlp", False), ("mlp", True)}
    assert sorted(cell.part for cell in idle) == ["mlp", "output"]
    assert len(compared[0]) == 2 * 4 + 2


def test_cells_behind_a_cache_are_compared_too():
    """A first pass from position 0 on needs no cache, and says nothing about one."""

    class Forgetful(nn.Module):
        """Its logits depend on whether there is a cache."""

        def __init__(self):
            super().__init__()
            self.inner, self.config = llama(), llama().config

        def forward(self, input_ids, past_key_values=None, use_cache=False):
            out = self.inner(input_ids, past_key_values=past_key_values, use_cache=use_cache)
            out.logits = out.logits + (past_key_values is not None)
            return out

    model = TokenModel(Forgetful().eval())
    with model.running():
        cells = all_cells(model, ("residual",))
        looped = torch.cat([repeated_logits(model, TOKENS, [cell]) for cell in cells])
        passes = CellPasses(model, TOKENS)
        for position in (0, 3):
            chosen = [k for k, cell in enumerate(cells) if cell.position == position]
            found = gathered(passes, [cells[k] for k in chosen])
            assert_close(found, looped[chosen], rtol=1e-5, atol=1e-5 * float(looped.abs().max()))
        assert passes.shares == "blocks"


@pytest.mark.parametrize("start", [0, 2])
def test_the_cells_of_a_pass_take_the_least_time(start, monkeypatch):
    """Against all ways to cut the positions: a pass takes a while, and all tokens from its first position on."""
    monkeypatch.setitem(_PASS, "cpu", 9)
    model, blocks = TokenModel(llama()), 3
    with model.running():
        cells = [cell for cell in all_cells(model, ("residual", "attention")) if cell.position >= start]

    def time(parts):
        return sum(
            9 * blocks + (blocks + sum(blocks - cells[k].start for k in part)) * (7 - min(cells[k].position for k in part))
            for part in parts
        )

    found = list(_parts(model, 7, cells))
    assert sorted(k for part in found for k in part) == list(range(len(cells)))
    assert len(found) > 1
    inner = range(start + 1, 7)
    every = [(start, *cuts, 7) for n in range(len(inner) + 1) for cuts in combinations(inner, n)]
    ways = [[[k for k, c in enumerate(cells) if a <= c.position < b] for a, b in pairwise(w)] for w in every]
    assert time(found) == min(map(time, ways))


def test_the_prompt_runs_once_for_the_caches_of_all_passes(monkeypatch):
    monkeypatch.setitem(_PASS, "cpu", -99)  # as many passes as there are positions
    model, made = TokenModel(llama()), []
    whole = model.cache
    monkeypatch.setattr(model, "cache", lambda tokens: made.append(len(tokens[0])) or whole(tokens))
    with model.running():
        cells = all_cells(model, ("residual", "mlp"))
        assert len(list(_parts(model, 7, cells))) == 7
        looped = torch.cat([repeated_logits(model, TOKENS, [cell]) for cell in cells])
        assert_close(gathered(CellPasses(model, TOKENS), cells), looped, rtol=1e-5, atol=1e-5 * float(looped.abs().max()))
        assert made == [7]
        _, _, passes = CellPasses.read(model, torch.stack([ids(1, 7, seed=1)[0], TOKENS]), [], row=1)
        assert_close(gathered(passes, cells), looped, rtol=1e-5, atol=1e-5 * float(looped.abs().max()))
        assert made == [7]  # reading the prompt gives the cache


@pytest.mark.parametrize("name", ["llama 8/4", "gemma3", "gpt oss", "qwen3 next"])
def test_passes_from_each_position_on_are_the_loop(name, monkeypatch):
    """Caches that can be cropped, and sliding windows and recurrent states that cannot."""
    monkeypatch.setitem(_PASS, "cpu", -99)  # as many passes as there are positions
    check(family(name), components=present(name))


def test_a_model_that_mixes_tokens_after_its_last_block_shares_no_cache(monkeypatch):
    monkeypatch.setitem(_PASS, "cpu", -99)  # as many passes as there are positions

    class Summing(nn.Module):
        """Its logits depend on the final states of all tokens."""

        def __init__(self):
            super().__init__()
            self.inner, self.config = llama(), llama().config

        def forward(self, input_ids, past_key_values=None, use_cache=False):
            out = self.inner(input_ids, past_key_values=past_key_values, use_cache=use_cache)
            out.logits = out.logits.cumsum(1)
            return out

    check(Summing().eval())
    passes = CellPasses(TokenModel(Summing().eval()), TOKENS)
    with passes.model.running():
        gathered(passes, all_cells(passes.model))
    assert passes.shares == "blocks"


def test_a_model_that_mixes_tokens_behind_an_attention_runs_whole():
    """A cell of an attention then changes later tokens of its block, too, and not only its own."""

    class Shifting(nn.Module):
        """An MLP that reads the token before its own as well, as in RWKV."""

        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x + torch.cat([x[:, :1], x[:, :-1]], 1))

    net = copy.deepcopy(llama())
    for block in net.model.layers:
        block.mlp = Shifting(block.mlp)
    check(net, components=("residual", "attention"))
    passes = CellPasses(TokenModel(net), TOKENS)
    with passes.model.running():
        cells = all_cells(passes.model, ("residual",))
        gathered(passes, cells[: len(cells) - 7])  # before the last block, whose MLP reads the last token alone in the first way
        shares = passes.shares
        gathered(passes, all_cells(passes.model, ("attention",)))
    assert shares != "nothing"
    assert passes.shares == "nothing"


def test_cells_inside_a_block_take_few_rows_there(monkeypatch):
    """One extra row holds an attention at all positions; each cell has a row of its own from the next block on."""
    from nodelens.interventions.joining import JoiningRows

    model, counts = TokenModel(llama()), []
    of = JoiningRows.of
    monkeypatch.setattr(JoiningRows, "of", lambda *given: counts.append(of(*given).counts) or of(*given))
    with model.running():
        for component in ("residual", "attention", "mlp", "heads", "residual_input"):
            gathered(CellPasses(model, TOKENS), all_cells(model, (component,)))
    assert counts == [
        [1, 8, 15, 16],  # residual: without those of the last block that change nothing
        [2, 9, 16, 16],
        [2, 9, 16, 16],
        [5, 33, 61, 61],  # four heads, which need a row each at a position
        [8, 15, 22, 22],
    ]
