"""States that are saved and loaded between passes, against hooks written by hand."""

import copy
import gc

import pytest
import torch
from families import build as family
from nets import generator
from torch import nn
from torch.testing import assert_close

import nodelens as nl
from nodelens.data.tokens import ByteTokenizer

PROMPT, OTHER = "a red fox and a cow", "the hen is red!"


@pytest.fixture(scope="module")
def model():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=259, max_position_embeddings=64, **sizes)).eval()
        for p in net.parameters():
            nn.init.normal_(p, float(p.ndim == 1), 0.3)
    return net


@pytest.fixture
def wrapper(model):
    return nl.ModelWrapper(model, tokenizer=ByteTokenizer())


def hidden(model, text, changes=None):
    """Outputs of embedding and blocks, and the logits, of one prompt; changes: {block: function of its output in place}."""
    ids, shown, handles = torch.tensor([list(text.encode())]), {}, []
    for name, module in [("embed", model.model.embed_tokens), *((k, layer) for k, layer in enumerate(model.model.layers))]:

        def hook(m, args, output, name=name):
            h = output.clone()
            if name in (changes or {}):
                changes[name](h)
            shown[name] = h
            return h

        handles.append(module.register_forward_hook(hook))
    try:
        with torch.no_grad():
            shown["logits"] = model(input_ids=ids).logits
    finally:
        for handle in handles:
            handle.remove()
    return shown


def Context(prompt=PROMPT, position="all", layer="all"):
    return nl.RepresentationContext(prompt, "tiny", position=position, layer=layer)


def saved(wrapper, context, names=("embed", "layer", "lm_head"), **options):
    states = nl.StateManager(nl.StateConfig(save_states=names, **options))
    wrapper.run(context, state_manager=states)
    return states


def test_states_are_what_passes_at_the_context_s_layers_and_positions(model, wrapper):
    states = saved(wrapper, Context(position="red fox", layer="n//2:"))
    shown, at = hidden(model, PROMPT), slice(2, 9)
    assert states.names == ["embed", "layer_2", "layer_3", "lm_head"]
    assert torch.equal(states.load("embed"), shown["embed"])
    assert torch.equal(states.load("layer_2"), shown[2][:, at])
    assert torch.equal(states.load("layer_3"), shown[3][:, at])
    assert torch.equal(states.load("lm_head"), shown["logits"][:, at])
    assert wrapper.n_layers == 4
    assert saved(wrapper, Context(layer=[0, -1]), "layer").names == ["layer_0", "layer_3"]
    assert saved(wrapper, Context(layer=0), "layer_2").names == ["layer_2"]


def test_a_context_selects_the_last_token_of_all_layers_by_default(model, wrapper):
    states = saved(wrapper, nl.RepresentationContext(PROMPT))
    assert torch.equal(states.load("layer_1"), hidden(model, PROMPT)[1][:, -1:])


def test_a_state_takes_the_place_of_selected_positions(model, wrapper):
    states = saved(wrapper, Context(position="red", layer=1), "layer")
    source = states.load("layer_1")
    states.update_config(nl.StateConfig(load_states="layer_1", save_states=["layer_2", "lm_head"]))
    wrapper.run(Context(OTHER, position="hen", layer=2), state_manager=states)

    def change(h):
        h[:, 4:7] = source

    expected = hidden(model, OTHER, {2: change})
    assert torch.equal(states.load("layer_2"), expected[2][:, 4:7])
    assert torch.equal(states.load("lm_head"), expected["logits"][:, 4:7])


@pytest.mark.parametrize(
    ("pair", "source", "target"),
    [
        ((2, -1), [2], [14]),
        (([0, 3], [1, 2]), [0, 3], [1, 2]),
        (("-2:", "0,5"), [17, 18], [0, 5]),
        ((0, "hen"), [0, 0, 0], [4, 5, 6]),
        ((slice(0, 2), slice(3, 5)), [0, 1], [3, 4]),
        (("all", "::2"), None, None),
    ],
    ids=str,
)
def test_positions_of_a_state_are_mapped_to_those_of_the_prompt(model, wrapper, pair, source, target):
    states = saved(wrapper, Context(layer=1), "layer")
    config = nl.StateConfig(load_states="layer_1", save_states="lm_head")
    config.position_maps["layer_1"] = pair
    states.update_config(config)
    if source is None:
        with pytest.raises(ValueError, match=r"position_maps\['layer_1'\] maps 19 positions of the state to 8 of the prompt"):
            wrapper.run(Context(OTHER, layer=3), state_manager=states)
        return
    wrapper.run(Context(OTHER, layer=3), state_manager=states)

    def change(h):
        h[:, target] = states.load("layer_1")[:, source]

    assert torch.equal(states.load("lm_head"), hidden(model, OTHER, {3: change})["logits"])


def test_every_saved_layer_loaded_into_itself_changes_no_bit(model, wrapper):
    states = saved(wrapper, Context(), ["embed", "layer", "lm_head"])
    clean = states.pop("lm_head")
    states.update_config(nl.StateConfig(load_states=["embed", "layer"], save_states="lm_head"))
    wrapper.run(Context(), state_manager=states)
    assert torch.equal(states.load("lm_head"), clean)


def test_outputs_of_several_passes_are_joined_and_others_replaced(wrapper):
    states = saved(wrapper, Context(), "layer")
    for k in range(4):
        states.update_config(nl.StateConfig(load_states=f"layer_{k}", save_states=["lm_head", "embed"], concate_outputs="lm_head"))
        wrapper.run(Context(layer=-1), state_manager=states)
    assert states.load("lm_head").shape == (4, 19, 259)
    assert states.load("embed").shape == (1, 19, 16)
    last = saved(wrapper, Context(), "lm_head").load("lm_head")
    assert torch.equal(states.load("lm_head")[3:], last)
    assert not torch.equal(states.load("lm_head")[:1], last)


def test_states_are_mapped_when_they_are_saved(model, wrapper):
    maps = {
        "layer_0": nl.StateMap(lambda h: 2 * h, retain_original=False),
        "layer_1": torch.neg,
        "layer_2": (torch.mul, 3),
    }
    states = saved(wrapper, Context(), "layer", state_maps=maps)
    shown = hidden(model, PROMPT)
    assert states.names == ["mapped_layer_0", "layer_1", "mapped_layer_1", "layer_2", "mapped_layer_2", "layer_3"]
    assert torch.equal(states.load("mapped_layer_0"), 2 * shown[0])
    assert torch.equal(states.load("mapped_layer_1"), -shown[1])
    assert torch.equal(states.load("mapped_layer_2"), 3 * shown[2])
    assert torch.equal(states.map("layer_3", torch.abs), shown[3].abs())
    assert torch.equal(states.load("mapped_layer_3"), shown[3].abs())
    states.update_config(nl.StateConfig(load_states="mapped_layer_1", save_states="lm_head"))
    wrapper.run(Context(layer=1), state_manager=states)
    assert torch.equal(states.load("lm_head"), hidden(model, PROMPT, {1: lambda h: h.neg_()})["logits"])


def test_a_soft_prompt_of_a_text_s_embeddings_is_that_text(model, wrapper):
    embedded = hidden(model, PROMPT)["embed"]
    expected = saved(wrapper, Context(position="2:5"))
    for prompt in (embedded, embedded[0]):
        states = saved(wrapper, Context(prompt, position="2:5"), ["layer", "lm_head"])
        assert all(torch.equal(states.load(name), expected.load(name)) for name in states.names)


def test_prompts_of_one_batch_have_the_states_of_each_alone(wrapper):
    context = Context([PROMPT, OTHER, "red"], position="red")
    together = saved(wrapper, context, ["layer", "lm_head"])
    for k, prompt in enumerate(context.prompt):
        alone = saved(wrapper, context.clone_with_overrides(prompt=prompt), ["layer", "lm_head"])
        for name in alone.names:
            assert_close(together.load(name)[k : k + 1], alone.load(name), rtol=1e-4, atol=1e-5)
    one = saved(wrapper, Context(position=0, layer=1), "layer")
    one.update_config(nl.StateConfig(load_states="layer_1", save_states="lm_head", position_maps={"layer_1": (0, "red")}))
    wrapper.run(Context([PROMPT, OTHER], position=-1, layer=2), state_manager=one)
    both = one.load("lm_head")
    for k, prompt in enumerate((PROMPT, OTHER)):
        wrapper.run(Context(prompt, position=-1, layer=2), state_manager=one)
        assert_close(one.load("lm_head"), both[k : k + 1], rtol=1e-4, atol=1e-5)


def test_a_clone_differs_in_what_is_overridden():
    context = Context(position=3)
    other = context.clone_with_overrides(prompt="new", layer=5)
    assert (other.prompt, other.model_name, other.position, other.layer) == ("new", "tiny", [3], [5])
    assert (context.prompt, context.layer) == (PROMPT, "all")
    with pytest.raises(TypeError, match=r"has no option 'layers'\. Did you mean 'layer'\?"):
        context.clone_with_overrides(layers=1)


def test_minterp_s_names_of_the_same_functions():
    states = nl.StateManager(nl.StateConfig())
    states.add_state("a", torch.ones(1, 2))
    assert torch.equal(states.get_state("a"), states.load_state("a"))
    assert torch.equal(states.states["a"], states.pop_state("a"))
    assert "a" not in states
    assert repr(states) == "StateManager(no states; 0 bytes in memory)"


def test_states_beyond_the_budget_are_written_and_read_again():
    config = nl.StateConfig(concate_outputs="a")
    rows, states = [torch.randn(1, 4, 8, generator=generator(k)) for k in range(9)], nl.StateManager(config, max_bytes=300)
    for row in rows:
        states.save("a", row)
        assert states.nbytes <= 300
    states.save("b", rows[0].bfloat16())
    assert repr(states) == "StateManager(a, b; 256 bytes in memory, 8 parts on disk)"
    assert torch.equal(states.load("a"), torch.cat(rows))
    assert torch.equal(states.load("b"), rows[0].bfloat16())
    folder = states._folder
    assert folder.stat().st_mode & 0o077 == 0
    assert {path.suffix for path in folder.iterdir()} == {".safetensors"}
    states.pop("a")
    assert len(list(folder.iterdir())) <= 1
    states.clear()
    assert not folder.exists()
    states.save("a", torch.ones(1, 100))
    folder = states._folder
    assert folder.exists()
    del states
    gc.collect()
    assert not folder.exists()


def test_a_pass_that_fails_saves_nothing(wrapper):
    states = nl.StateManager(nl.StateConfig(save_states=["embed", "layer"]), max_bytes=4_000, spill=False)
    states.save("kept", torch.ones(1, 2))
    words = r"states embed, layer_0, .*layer_3 take 6,080 bytes, with 8 bytes of others; max_bytes is 4,000: save fewer states"
    with pytest.raises(ValueError, match=words):
        wrapper.run(Context(), state_manager=states)
    assert states.names == ["kept"]
    assert states.nbytes == 8


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def loading(wrapper, state, name="layer_1", context=None, **options):
    states = nl.StateManager(nl.StateConfig(load_states=name, **options))
    states.save(name, state)
    wrapper.run(context or Context(), state_manager=states)


def run(wrapper, context, **options):
    wrapper.run(context, state_manager=nl.StateManager(nl.StateConfig(**options)))


class NoPad:
    pad_token_id, bos_token_id, eos_token_id, is_fast = None, None, None, True

    def __call__(self, texts):
        return {"input_ids": [list(text.encode()) for text in texts]}


MISTAKES = [
    (lambda w: nl.ModelWrapper(w.model).run(Context()), "the prompt is a text, and there is no tokenizer: give ModelWrapper"),
    (
        lambda w: run(nl.ModelWrapper(w.model, tokenizer=NoPad()), Context(["ab", "a"])),
        "the prompts have 1 to 2 tokens, .*no padding",
    ),
    (lambda w: run(w, Context([PROMPT, OTHER])), "position 'all' selects 19 tokens of prompt 0, and 15 of prompt 1: states have"),
    (lambda w: run(w, Context("")), "a prompt has no tokens: give a text that is not empty"),
    (lambda w: run(w, Context(torch.ones(3))), r"a soft prompt is \(3,\): give embeddings \(tokens, width\)"),
    (lambda w: run(w, Context(torch.ones(3, 16), position="red")), "position 'red' is searched in a text, and the prompt is soft"),
    (lambda w: run(w, Context(position="19")), "position: index '19' with n = 19: 19 is out of range"),
    (lambda w: run(w, Context(position="cat")), "the phrase 'cat' is not in the prompt 'a red fox and a cow': give another"),
    (lambda w: run(w, Context(position="a")), "the phrase 'a' occurs 3 times in the prompt"),
    (lambda w: run(w, Context(layer="n//0")), "layer: index 'n//0' with n = 4: 'n//0' divides by zero"),
    (lambda w: run(w, Context(layer=4)), "layer: 4 selects nothing among n = 4; valid are -4 to 3"),
    (
        lambda w: run(w, Context(), save_states="layer_4"),
        "there is no state 'layer_4' of this model; states are embed, layer, .* 0 to 3",
    ),
    (lambda w: run(w, Context(), load_states="layer_2"), "there is no state 'layer_2'; saved are none"),
    (
        lambda w: loading(w, torch.ones(1, 19, 8)),
        "state 'layer_1' is 8 wide float32, model.layers.0 of LlamaForCausalLM puts out 16 wide",
    ),
    (
        lambda w: loading(w, torch.ones(1, 19, 16).half()),
        "is 16 wide float16, .* puts out 16 wide float32: load states of the same",
    ),
    (
        lambda w: loading(w, torch.ones(1, 5, 16)),
        "state 'layer_1' has 5 positions, the context selects 19 of the prompt: give position",
    ),
    (
        lambda w: loading(w, torch.ones(2, 19, 16)),
        r"state 'layer_1' is \(2, 19, 16\); for 1 prompts it must be \(1 or 1, positions",
    ),
    (
        lambda w: loading(w, torch.ones(1, 19, 16), position_maps={"layer_1": (20, 0)}),
        r"position_maps\['layer_1'\], source: 20 selects nothing among n = 19|index '20' with n = 19: 20 is out of range",
    ),
    (lambda w: nl.StateConfig(position_maps={"layer_1": 3}), r"position_maps\['layer_1'\] is 3: give \(source, target\)"),
    (lambda w: nl.StateConfig(state_maps={"embed": 3}), r"state_maps\['embed'\] is 3: give a StateMap, a function"),
    (
        lambda w: run(w, Context(), save_states="embed", state_maps={"embed": len}),
        "the map of state 'embed' returns int: it must return",
    ),
    (lambda w: nl.StateManager(max_bytes=0), "max_bytes is 0: give a positive number of bytes, or None"),
    (lambda w: run(nl.ModelWrapper(copy.deepcopy(w.model).train(), tokenizer=w.tokenizer), Context()), "is in training mode"),
    (
        lambda w: run(nl.ModelWrapper(nn.Linear(2, 2).eval(), tokenizer=w.tokenizer), Context()),
        "'blocks.all.': Linear has no blocks",
    ),
]


@pytest.mark.parametrize(("call", "words"), MISTAKES, ids=[words[:30] for _, words in MISTAKES])
def test_mistakes_are_named(wrapper, call, words):
    with pytest.raises(ValueError, match=words) as error:
        call(wrapper)
    assert "\n" not in str(error.value)
    assert hooks(wrapper.model) == 0


def test_states_of_another_shape_are_not_joined():
    states = nl.StateManager(nl.StateConfig(concate_outputs="a"))
    states.save("a", torch.ones(1, 3, 4))
    for other, words in (
        (torch.ones(1, 3, 5), r"is \(1, 3, 5\) float32, and those before it \(1, 3, 4\)"),
        (torch.ones(1, 3, 4).half(), "float16"),
    ):
        with pytest.raises(ValueError, match=words):
            states.save("a", other)
    assert states.load("a").shape == (1, 3, 4)


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "bloom", "mixtral"])
def test_other_families_run_contexts(name):
    model, _ = family(name)
    wrapper = nl.ModelWrapper(model)
    prompt = model.get_input_embeddings().weight[None, 3:9].detach() * (48**0.5 if name == "gemma2" else 1)
    states = saved(wrapper, Context(prompt, position="1:3"), ["layer", "lm_head"])
    clean = states.load("lm_head")
    states.update_config(nl.StateConfig(load_states="layer_0", save_states="lm_head"))
    wrapper.run(Context(prompt, position="1:3", layer=0), state_manager=states)
    assert torch.equal(states.load("lm_head"), clean)
    wrapper.run(Context(prompt, position="2:4", layer=0), state_manager=states)
    assert not torch.equal(states.load("lm_head"), clean)
