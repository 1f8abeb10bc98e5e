"""Edits while a model generates, against a loop that reads all tokens again at each step and changes rows by hand."""

import inspect

import pytest
import torch
import transformers
from families import FAMILIES
from families import build as family
from nets import generator

import nodelens as nl

STEPS = 4
CAUSAL = [name for name, (_, _, head, _) in FAMILIES.items() if head == "CausalLM"]
FEW = ["llama 8/4", "gpt2", "bloom", "qwen3 next"]
FAST = [pytest.param(name, marks=() if name in FEW else pytest.mark.slow) for name in CAUSAL]


def padded(lengths, side, width=None):
    """Token ids and mask of samples of these lengths, padded with 0 on one side."""
    width = width or max(lengths)
    ids, mask = torch.zeros(len(lengths), width, dtype=torch.long), torch.zeros(len(lengths), width, dtype=torch.long)
    for k, n in enumerate(lengths):
        place = slice(width - n, None) if side == "left" else slice(0, n)
        ids[k, place] = torch.randint(3, 64, (n,), generator=generator(k))
        mask[k, place] = 1
    return ids, mask


def by_hand(model, ids, mask, site, change, steps=STEPS):
    """Greedy decoding without a cache; ``change(h, step)`` edits the whole output of a site in place."""
    module = model.get_submodule(site)
    scores = []
    for step in range(steps):

        def hook(m, args, output, step=step):
            h = (output[0] if isinstance(output, tuple) else output).clone()
            change(h, step)
            return (h, *output[1:]) if isinstance(output, tuple) else h

        handle = module.register_forward_hook(hook)
        try:
            with torch.no_grad():
                positions = (mask.cumsum(1) - 1).clamp_min(0)
                places = {"position_ids": positions} if "position_ids" in inspect.signature(model.forward).parameters else {}
                last = model(input_ids=ids, attention_mask=mask, use_cache=False, **places).logits[:, -1]
        finally:
            handle.remove()
        scores.append(last)
        ids = torch.cat([ids, last.index_fill(1, torch.tensor([2]), -torch.inf).argmax(-1)[:, None]], 1)  # not the end of the text
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return ids, torch.stack(scores)


def generate(model, ids, mask, edits, cache=True, steps=STEPS, **options):
    chosen = {"do_sample": False, "min_new_tokens": steps, "max_new_tokens": steps, "pad_token_id": 0, "eos_token_id": 2} | options
    with torch.no_grad(), nl.edit(model, edits):
        found = model.generate(
            ids, attention_mask=mask, use_cache=cache, return_dict_in_generate=True, output_logits=True, **chosen
        )
    return found.sequences, torch.stack(found.logits)


def vector(model):
    return 3 * torch.randn(model.config.get_text_config().hidden_size, generator=generator(5))


def block(model, k=0):
    return nl.find_layers(model, f"blocks[{k}]")[0].name


CHANGES = {  # edits of a site: options, and the same by hand for prompts of 6 tokens and of 4, padded on the left to 6
    "last of the prompt": ({"positions": -1}, lambda h, v, step: h[:, 5].add_(v)),
    "prompt": ({"phase": "prompt"}, lambda h, v, step: h[:, :6].add_(v)),
    "all tokens": ({}, lambda h, v, step: h.add_(v)),
    "generated": ({"phase": "generated"}, lambda h, v, step: h[:, 6:].add_(v)),
    "second generated, sample 1": (
        {"phase": "generated", "positions": "1", "samples": [1]},
        lambda h, v, step: h[1, 7:8].add_(v),
    ),
    "middle": ({"positions": "n//2"}, lambda h, v, step: (h[0, 3].add_(v), h[1, 4].add_(v))),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", FAST)
def test_generated_tokens_are_those_of_the_loop_with_and_without_a_cache(name, change):
    model, _ = family(name)
    options, hand = CHANGES[change]
    ids, mask = padded([6, 4], "left")
    site, v = block(model), vector(model)
    edit = nl.Edit(site, "add", value=v, **options)
    tokens, scores = by_hand(model, ids, mask, site, lambda h, step: hand(h, v, step))
    for cache in (True, False):
        found, found_scores = generate(model, ids, mask, edit, cache)
        assert torch.equal(found, tokens), cache
        torch.testing.assert_close(found_scores, scores, rtol=1e-3, atol=1e-3)
    assert "generate" not in model.__dict__


def parts_of(model):
    """The parts of the first block that a family has."""
    found = []
    for part in ("attention", "mlp", "heads"):
        try:
            nl.find_layers(model, f"blocks[0].{part}")
        except ValueError:
            continue
        found.append(f"blocks[0].{part}")
    return found


@pytest.mark.parametrize("name", FAST)
def test_edits_of_parts_of_a_block_give_the_same_tokens_with_and_without_a_cache(name):
    model, _ = family(name)
    ids, mask = padded([6, 6], "left")
    plain, sites = generate(model, ids, mask, [])[1], parts_of(model)
    assert "blocks[0].mlp" in sites
    for site in sites:  # of heads, the first entries of the first one
        units = ":4" if site.endswith("heads") else None
        edits = [
            nl.Edit(site, "scale", units=units, value=-2.0, positions="n//2:"),
            nl.Edit(site, "zero", units=units, phase="generated"),
        ]
        tokens, scores = generate(model, ids, mask, edits)
        again, others = generate(model, ids, mask, edits, cache=False)
        assert torch.equal(tokens, again), site
        torch.testing.assert_close(scores, others, rtol=1e-3, atol=1e-3)
        assert (scores - plain).abs().max() > 1e-3, site


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}], ids=str)
def test_beams_belong_to_the_sample_that_they_continue(options):
    model, _ = family("llama 8/4")
    ids, mask = padded([6, 4], "left")
    edit = nl.Edit(block(model), "add", value=vector(model), samples=[1], positions="1:3")
    both = generate(model, ids, mask, edit, **options)[0]
    per = options.get("num_return_sequences", 1)
    plain = generate(model, ids[:1], mask[:1], [], **options)[0]
    edited = generate(model, ids[1:], mask[1:], nl.Edit(block(model), "add", value=vector(model), positions="1:3"), **options)[0]
    assert torch.equal(both[:per], plain)
    assert torch.equal(both[per:], edited)
    assert torch.equal(both, generate(model, ids, mask, edit, cache=False, **options)[0])


RECURRENT = {"Mamba": {"state_size": 4}, "Mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1}}


@pytest.mark.parametrize("kind", RECURRENT)
def test_tokens_are_counted_where_a_cache_holds_states_without_a_length(kind):
    config = getattr(transformers, f"{kind}Config")(vocab_size=64, hidden_size=32, num_hidden_layers=2, **RECURRENT[kind])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
    v = 3 * torch.randn(32, generator=generator(5))
    edits = [
        nl.Edit("blocks[0]", "add", value=v, positions=-1),
        nl.Edit("blocks[1]", "scale", value=-0.5, phase="generated", positions=":2"),
    ]
    ids, mask = padded([6, 6], "left")
    found, scores = generate(model, ids, mask, edits)
    wanted, whole = generate(model, ids, mask, edits, cache=False)
    assert torch.equal(found, wanted)
    torch.testing.assert_close(scores, whole, rtol=1e-3, atol=1e-3)
    own, cache, given = [], None, ids
    with torch.no_grad(), nl.edit(model, edits):
        for _ in range(STEPS):
            output = model(given, use_cache=True, **({} if cache is None else {"cache_params": cache}))
            cache, last = output.cache_params, output.logits[:, -1]
            given = last.index_fill(1, torch.tensor([2]), -torch.inf).argmax(-1)[:, None]
            own.append(given)
    assert torch.equal(torch.cat([ids, *own], 1), wanted)


def test_values_of_several_positions_are_written_as_their_tokens_pass():
    model, _ = family("llama 8/4")
    ids, mask = padded([6, 4], "left")
    rows = torch.randn(3, 48, generator=generator(1))
    edit = nl.Edit(block(model), "set", positions=[0, 2, 1], value=rows, phase="generated")

    def change(h, step):
        for k, row in zip((0, 2, 1), rows, strict=True):
            h[:, 6 + k : 7 + k] = row

    tokens, _ = by_hand(model, ids, mask, block(model), change)
    assert torch.equal(generate(model, ids, mask, edit)[0], tokens)
    assert torch.equal(generate(model, ids, mask, edit, cache=False)[0], tokens)


def test_resampled_values_are_the_same_with_and_without_a_cache():
    model, _ = family("llama 8/4")
    ids, mask = padded([6, 4, 5], "left")
    for value in (None, torch.randn(9, 48, generator=generator(1))):
        edit = nl.Edit(block(model), "resample", units=":24", value=value)
        found, scores = generate(model, ids, mask, edit)
        again, same = generate(model, ids, mask, edit, cache=False)
        assert torch.equal(found, again)
        torch.testing.assert_close(scores, same, rtol=1e-3, atol=1e-3)
        assert not torch.equal(found, generate(model, ids, mask, [])[0])


def test_a_loop_with_a_cache_of_one_s_own_counts_the_tokens_in_it():
    model, _ = family("llama 8/4")
    ids, _ = padded([6, 6], "left")
    site, v = block(model), vector(model)
    edits = [nl.Edit(site, "add", value=v, positions=-1), nl.Edit(site, "scale", value=2, phase="generated", positions=[1])]
    with torch.no_grad(), nl.edit(model, edits):
        out = model(input_ids=ids[:, :4], use_cache=True)
        shown = [out.logits[:, -1]]
        for k in (4, 5):
            out = model(input_ids=ids[:, k : k + 1], past_key_values=out.past_key_values, use_cache=True)
            shown.append(out.logits[:, -1])

    def change(h, step):
        h[:, 3].add_(v)
        h[:, 5:6].mul_(2)

    _, last = by_hand(model, ids, torch.ones_like(ids), site, change, steps=1)
    torch.testing.assert_close(shown[-1], last[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name", [case for case in FAST if case.values != ("trocr",)]
)  # trocr counts padding, and takes no positions
def test_padding_on_either_side_changes_nothing(name):
    model, _ = family(name)
    site, v = block(model), vector(model)
    edits = [
        nl.Edit(site, "add", value=v, positions="n//2:"),
        nl.Edit(site, "add", value=v, positions=[[0, 2], [1, 3]]),
        nl.Edit(block(model, -1), "zero", units=":4", positions=-1, samples=[1]),
    ]
    shown = {}
    takes = inspect.signature(model.forward).parameters
    for side, width in (("left", 6), ("right", 6), ("left", 9), ("right", 9)):
        ids, mask = padded([6, 4], side, width)
        places = {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)} if "position_ids" in takes else {}
        with torch.no_grad(), nl.edit(model, edits):
            found = model(input_ids=ids, attention_mask=mask, use_cache=False, **places).logits
        shown[side, width] = found[mask.bool()]
    alone = []
    for k, n in enumerate((6, 4)):
        ids = padded([6, 4], "right")[0][k : k + 1, :n]
        own = [nl.Edit(site, "add", value=v, positions="n//2:"), nl.Edit(site, "add", value=v, positions=[[0, 2], [1, 3]][k])]
        own += [nl.Edit(block(model, -1), "zero", units=":4", positions=-1)] if k else []
        with torch.no_grad(), nl.edit(model, own):
            alone.append(model(input_ids=ids, use_cache=False).logits[0])
    for found in shown.values():
        torch.testing.assert_close(found, torch.cat(alone), rtol=1e-3, atol=1e-3)


def test_a_prompt_of_embeddings_is_a_prompt():
    model, _ = family("llama 8/4")
    ids, mask = padded([6, 4], "left")
    edit = nl.Edit(block(model), "add", value=vector(model), positions="1:3")
    embedded = model.get_input_embeddings()(ids).detach()
    chosen = {"do_sample": False, "min_new_tokens": 4, "max_new_tokens": 4, "pad_token_id": 0, "eos_token_id": 2}
    with torch.no_grad(), nl.edit(model, edit):
        found = model.generate(inputs_embeds=embedded, attention_mask=mask, **chosen)
    assert torch.equal(found, generate(model, ids, mask, edit)[0][:, 6:])
    phrase = nl.Edit(block(model), "zero", positions="phrase:a")
    with pytest.raises(ValueError, match="search the text of the prompt, but its token ids are not known"), nl.edit(model, phrase):
        model(inputs_embeds=embedded)


class Adapter(torch.nn.Module):
    """Holds a model that generates, as adapters of peft do: ``generate`` calls the model inside, not the adapter."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, *args, **kwargs):
        return self.base(*args, **kwargs)

    def generate(self, *args, **kwargs):
        return self.base.generate(*args, **kwargs)


def test_a_model_inside_an_adapter_is_followed():
    model, _ = family("llama 8/4")
    ids, mask = padded([6, 4], "left")
    holder, site = Adapter(model).eval(), block(model)
    for options in ({"positions": -1}, {"phase": "generated", "positions": ":2"}):
        edit = nl.Edit(f"base.{site}", "add", value=vector(model), **options)
        expected = generate(model, ids, mask, nl.Edit(site, "add", value=vector(model), **options))[0]
        for cache in (True, False):
            assert torch.equal(generate(holder, ids, mask, edit, cache)[0], expected)
    assert "generate" not in model.__dict__
    assert "generate" not in holder.__dict__
    words = "positions count the tokens of a call: call the model that nl.edit was given, or its generate"
    with pytest.raises(ValueError, match=words), nl.edit(holder, nl.Edit("base.model.norm", "zero", positions=-1)):
        model.model.norm(torch.ones(1, 3, 48))


@pytest.mark.parametrize("positions", [-1, "n//2", [-2], "phrase:a", "regex:a"], ids=str)
def test_generated_tokens_are_counted_from_the_first(positions):
    model, _ = family("llama 8/4")
    ids, mask = padded([6, 4], "left")
    edit = nl.Edit(block(model), "zero", positions=positions, phase="generated")
    with pytest.raises(ValueError, match="of generated tokens: how many there will be is not known; count from the first"):
        generate(model, ids, mask, edit)
    assert "generate" not in model.__dict__


def test_positions_where_rows_are_no_tokens_are_refused():
    model, _ = family("mixtral")
    ids, mask = padded([6, 4], "left")
    router = next(name for name, m in model.named_modules() if name.endswith("gate"))
    edit = nl.Edit(router, "zero", positions=[1])  # reads tokens of all samples, flattened
    generate(model, ids, mask, edit)

    class Pooled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = torch.nn.Embedding(9, 4), torch.nn.Linear(4, 2)

        def forward(self, input_ids):
            return self.head(self.embed(input_ids).mean(1))

    words = "it shows 2 x 1 rows, the call has 2 samples of 5 tokens: leave out positions and phase, or name a site"
    with pytest.raises(ValueError, match=words), nl.edit(pooled := Pooled().eval(), nl.Edit("head", "zero", positions=[0])):
        pooled(torch.ones(2, 5, dtype=torch.long))


def test_an_encoder_decoder_counts_the_tokens_of_its_decoder():
    model, _ = family("bart")
    ids, mask = padded([6, 4], "right")
    v = 3 * torch.randn(48, generator=generator(5))
    decoder = model.get_decoder().layers[0]
    site = next(name for name, module in model.named_modules() if module is decoder)
    chosen = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5, "attention_mask": mask, "pad_token_id": 0}
    found = {}
    for phase, positions in (("all", None), ("prompt", None), ("generated", [1]), ("all", -1)):
        for cache in (True, False):
            with torch.no_grad(), nl.edit(model, nl.Edit(site, "add", value=v, phase=phase, positions=positions)):
                found[phase, str(positions), cache] = model.generate(ids, use_cache=cache, **chosen)
    for phase, positions in (("all", "None"), ("prompt", "None"), ("generated", "[1]"), ("all", "-1")):
        assert torch.equal(found[phase, positions, True], found[phase, positions, False]), (phase, positions)
    assert torch.equal(found["prompt", "None", True], found["all", "-1", True])  # the decoder starts from one token
    assert not torch.equal(found["all", "None", True], found["all", "-1", True])
    encoder = nl.Edit(site.replace("decoder", "encoder"), "zero", samples=[1])
    with torch.no_grad(), nl.edit(model, encoder):
        alone = model.generate(ids, **chosen)
    assert torch.equal(alone[0], model.generate(ids, **chosen)[0])
    assert not torch.equal(alone[1], model.generate(ids, **chosen)[1])
    words = "an encoder's tokens are not counted: leave out positions and phase, or name a site in the decoder"
    with pytest.raises(ValueError, match=words), nl.edit(model, nl.Edit(encoder.site, "zero", positions=[0])):
        model.generate(ids, **chosen)
