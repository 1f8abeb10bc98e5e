"""Configs from strangers: no code of theirs is run, nothing is asked at the terminal, and no kernel of the hub is loaded."""

import json
import shutil

import pytest
import torch
import transformers
from command import command

from nodelens.app.cost_estimate import meta_lm, model_from_config
from nodelens.data.opening import open_sets
from nodelens.data.tokens import StoredTokenizer
from nodelens.models import causal_lm, resnet, tiny_lm
from nodelens.models.trusted import check_implementations

KERNEL = "kernels-community/flash-attn"
CODE = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model", "AutoTokenizer": ["code.Tokens", None]}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Folders of a language model and of an image model."""
    home = tmp_path_factory.mktemp("stored")
    with torch.random.fork_rng():
        tiny_lm(width=16, layers=1, heads=2, kv_heads=1, mlp=24).save_pretrained(home / "lm")
        resnet(18, 10, 3, 32, width=8).save_pretrained(home / "images")
    return home


@pytest.fixture
def edited(stored, tmp_path, monkeypatch):
    """A function: the path of a folder with changed fields of its config, and code beside it. A prompt is an error."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks at the terminal"))

    def edit(which, **fields):
        folder = shutil.copytree(stored / which, tmp_path / which)
        config = json.loads((folder / "config.json").read_text()) | fields
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))
        (folder / "code.py").write_text("raise SystemExit('it ran')")
        return str(folder)

    return edit


BUILD = {
    "lm": causal_lm,
    "images": lambda path: resnet(18, 10, 3, 32, path=path),
    "estimate": meta_lm,
}


@pytest.mark.parametrize("model_type", ["mine", "absent"])
@pytest.mark.parametrize("which", BUILD)
def test_a_config_that_needs_code_of_its_own_is_refused(which, model_type, edited):
    path = edited("images" if which == "images" else "lm", auto_map=CODE, model_type=model_type)
    words = r"needs code of its own \(auto_map in config.json\), which is never run: load the model yourself, and give the model"
    with pytest.raises(ValueError, match=words):
        BUILD[which](path)


def test_a_known_model_is_built_from_the_library_and_its_auto_map_is_ignored(edited):
    assert type(causal_lm(edited("lm", auto_map=CODE))).__module__.startswith("transformers.")
    assert type(resnet(18, 10, 3, 32, path=edited("images", auto_map=CODE))).__module__ == "nodelens.models.hf"


def test_the_command_line_refuses_code_in_one_line(edited, quiet_home):
    path = edited("images", auto_map=CODE, model_type="mine")
    ended = command("analyze", "model=resnet18", f"model.net.path={path}", "dataset=digits", "metrics=rq")
    assert ended.code == 1
    assert "needs code of its own (auto_map in config.json), which is never run" in ended.err


@pytest.mark.parametrize("which", BUILD)
@pytest.mark.parametrize("field", ["_attn_implementation", "attn_implementation"])
def test_a_kernel_of_the_hub_in_a_config_is_refused(which, field, edited):
    path = edited("images" if which == "images" else "lm", **{field: KERNEL})
    with pytest.raises(
        ValueError, match=rf"attention '{KERNEL}' is not allowed \(no kernels of the hub are run\): choose eager, sdpa"
    ):
        BUILD[which](path)


@pytest.mark.parametrize("name", [KERNEL, "evil/kernel:function", "paged|eager", "fast", "sonicmoe"])
def test_other_implementations_are_refused_wherever_they_are_given(name, stored):
    path = str(stored / "lm")
    config = transformers.AutoConfig.from_pretrained(path, attn_implementation=name)
    calls = {
        "attention": [
            lambda: causal_lm(path, attention=name),
            lambda: causal_lm(path, config={"attn_implementation": name}),
            lambda: causal_lm(model_type="llama", config={"_attn_implementation": name}),
            lambda: meta_lm(path, attention=name),
            lambda: model_from_config(config),
        ],
        "experts": [lambda: causal_lm(path, config={"experts_implementation": name})],
    }
    for what, tried in calls.items():
        for call in tried:
            with pytest.raises(
                ValueError, match=rf"{what} .* is not allowed \(no kernels of the hub are run\): choose eager"
            ) as refused:
                call()
            assert len(str(refused.value).splitlines()) == 1


def test_parts_of_a_config_are_checked_too():
    config = transformers.LlavaConfig()
    check_implementations(config, "llava")
    config.vision_config._attn_implementation = KERNEL
    with pytest.raises(ValueError, match=r"^llava, vision_config: attention .* is not allowed"):
        check_implementations(config, "llava")


def test_flash_attention_needs_its_package_because_the_fallback_is_a_kernel_of_the_hub(stored, monkeypatch):
    monkeypatch.setattr("nodelens.models.trusted._PACKAGES", {"flash_attention_2": ("flash-attn", lambda: False)})
    with pytest.raises(ValueError, match=r"attention 'flash_attention_2' needs the package flash-attn: install it, or choose sdpa"):
        causal_lm(str(stored / "lm"), attention="flash_attention_2")
    monkeypatch.setattr("nodelens.models.trusted._PACKAGES", {"flash_attention_2": ("flash-attn", lambda: True)})
    config = transformers.LlamaConfig(attn_implementation="flash_attention_2")
    check_implementations(config, "llama")
    monkeypatch.setattr(transformers.LlamaForCausalLM, "_compatible_flash_implementations", ["a/kernel"], raising=False)
    with pytest.raises(ValueError, match="'flash_attention_2' does not fit this model, whose own is a kernel of the hub"):
        check_implementations(config, "llama")


def test_implementations_of_the_library_work(stored):
    for name in ("eager", "sdpa", "flex_attention"):
        assert causal_lm(str(stored / "lm"), attention=name).config._attn_implementation == name


def test_a_tokenizer_with_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks at the terminal"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": CODE, "tokenizer_class": "Mine"}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": CODE}))
    (tmp_path / "code.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(ValueError, match=r"the tokenizer at .* cannot be built: .*, and no code of its own, which is never run"):
        StoredTokenizer.of(str(tmp_path))


def test_a_data_set_that_is_a_script_is_refused(tmp_path):
    (tmp_path / f"{tmp_path.name}.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(ValueError, match=r"cannot be opened: .*scripts.*; code is never run: convert the data to parquet files"):
        open_sets(str(tmp_path))
