"""A saved pruned model of transformers is a folder that transformers opens without nodelens."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import real
import torch
import transformers

import nodelens as nl
from nodelens.pruning.hub.card import as_text
from nodelens.pruning.hub.files import hub_files
from nodelens.pruning.surgery.save import stored_tensors

BASE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
BASE |= {"max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2}
IMAGES = {"image_size": 32, "patch_size": 8, "num_labels": 5}
KINDS = {
    "llama": ("Llama", BASE | {"num_key_value_heads": 2}, "CausalLM"),
    "tied": ("Llama", BASE | {"num_key_value_heads": 4, "tie_word_embeddings": True}, "CausalLM"),
    "qwen3": ("Qwen3", BASE | {"num_key_value_heads": 2, "head_dim": 8}, "CausalLM"),
    "gpt2": ("GPT2", GPT2, "CausalLM"),
    "mixtral": ("Mixtral", BASE | {"num_key_value_heads": 2, "num_local_experts": 4}, "CausalLM"),
    "bert": ("Bert", BASE, "MaskedLM"),
    "vit": ("ViT", BASE | IMAGES, "ImageClassification"),
}
# what is pruned: (options, the fields of the config that change, or None for a modelling file)
CASES = {
    ("llama", "all"): {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 24},
    ("tied", "heads"): {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48},
    ("qwen3", "all"): {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24},
    ("gpt2", "ffn"): {"n_inner": 64, "n_head": 4},
    ("gpt2", "all"): None,  # its projections of queries, keys and values are as wide as its residual stream
    ("mixtral", "experts"): {"intermediate_size": 24, "num_local_experts": 4, "num_attention_heads": 4},
    ("bert", "ffn"): {"intermediate_size": 24},
    ("bert", "all"): None,
    ("vit", "all"): {"intermediate_size": 24, "num_attention_heads": 2, "head_dim": 8},
    ("llama", "unequal"): None,
    ("llama", "bias"): None,
    ("llama", "masked"): BASE | {"num_key_value_heads": 2},
}


def model_of(kind):
    config, options, head = KINDS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = getattr(transformers, f"{config}Config")(**options)
        model = getattr(transformers, f"AutoModelFor{head}").from_config(made).eval()
        x = {"pixel_values": torch.randn(2, 3, 32, 32)} if kind == "vit" else {"input_ids": torch.randint(3, 64, (2, 10))}
    return model, x


def pruned_of(kind, how):
    model, x = model_of(kind)
    options = {
        "ffn": {"scope": ["ffn"]},
        "heads": {"scope": ["head"]},
        "experts": {"scope": ["moe_ffn"]},
        "unequal": {"allocation": "global", "amount": 0.3},
        "bias": {"compensate": "bias", "data": [x]},
        "masked": {"apply": "mask"},
    }.get(how, {})
    return nl.prune(model, "l2", **{"amount": 0.5, "example_inputs": x, **options}), x


def logits(model, x):
    with torch.no_grad():
        return model(**x).logits


@contextlib.contextmanager
def without_nodelens():
    """An import of nodelens, or of any of its modules, raises."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in sys.modules if name.partition(".")[0] == "nodelens"]:
            patch.setitem(sys.modules, name, None)
        yield


@pytest.mark.parametrize(("kind", "how"), CASES)
def test_transformers_opens_the_folder_and_gives_the_same_logits(kind, how, tmp_path):
    pruned, x = pruned_of(kind, how)
    expected, fields = logits(pruned.model, x), CASES[kind, how]
    folder = pruned.save(tmp_path / "pruned")
    config = json.loads((folder / "config.json").read_text())
    assert (folder / "modeling_pruned.py").is_file() == ("auto_map" in config) == (fields is None)
    auto = getattr(transformers, f"AutoModelFor{KINDS[kind][2]}")
    with without_nodelens():
        opened = auto.from_pretrained(folder, trust_remote_code=fields is None).eval()
        assert torch.equal(logits(opened, x), expected)
    assert {name: getattr(opened.config, name) for name in fields or {}} == (fields or {})
    assert sum(p.numel() for p in opened.parameters()) == sum(p.numel() for p in pruned.model.parameters())
    assert torch.equal(logits(nl.load_pruned(folder), x), expected)
    if how == "unequal":
        with pytest.raises(ValueError, match="trust_remote_code"):
            auto.from_pretrained(folder, trust_remote_code=False)
        with pytest.raises(ValueError, match="needs code of its own"):
            nl.models.causal_lm(str(folder))


def test_a_number_of_heads_that_the_config_refuses_gets_a_modelling_file(tmp_path):
    model, x = model_of("tied")
    pruned = nl.prune(model, "l2", 0.25, example_inputs=x, scope=["head"])  # 3 heads do not divide a width of 32
    folder = pruned.save(tmp_path)
    opened = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(opened).__name__ == "PrunedLlamaForCausalLM"
    assert torch.equal(logits(opened, x), logits(pruned.model, x))


def test_weights_carry_the_names_from_which_the_others_are_tied():
    model, _ = model_of("tied")
    assert "model.embed_tokens.weight" in stored_tensors(model)
    assert "lm_head.weight" not in stored_tensors(model)


def test_no_code_of_a_folder_is_run_by_nodelens(tmp_path):
    pruned, x = pruned_of("llama", "unequal")
    folder = pruned.save(tmp_path)
    (folder / "modeling_pruned.py").write_text("raise SystemExit('was run')")
    assert torch.equal(logits(nl.load_pruned(folder), x), logits(pruned.model, x))


def test_a_model_of_another_library_gets_a_card_and_no_config_of_transformers(tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    pruned = nl.prune(net, "l1", 0.5, example_inputs=torch.ones(2, 4))
    assert hub_files(pruned) == {}
    folder = pruned.save(tmp_path)
    assert "library_name: nodelens" in (folder / "README.md").read_text()
    assert not (folder / "origin.json").exists()


def test_the_card_has_the_way_to_open_it_and_the_sweep_as_text(tmp_path):
    pruned, _ = pruned_of("llama", "all")
    pruned.model.config._name_or_path = "user/base"
    rows = {"status": "done", "criterion": ["<script>|x", "[a](b)"], "allocation": "uniform", "amount": [0.25, 0.5]}
    sweep = pd.DataFrame(rows | {"accuracy": [0.9, None], "params_share": 0.75, "dense_accuracy": 0.95})
    text = (pruned.save(tmp_path, sweep=sweep) / "README.md").read_text()
    assert text.startswith('---\nlibrary_name: transformers\nbase_model: "user/base"\n')
    assert 'AutoModelForCausalLM.from_pretrained("path/to/this/folder")' in text
    assert "| ffn | 48 | 24 | model.layers.0.mlp, model.layers.1.mlp |" in text
    assert r"\<script\>\|x" in text
    assert "<script>" not in text
    assert "The dense model: accuracy 0.9500." in text
    assert as_text("a_b\n`c`") == r"a\_b \`c\`"


def test_a_tokenizer_is_saved_with_the_model(tmp_path):
    pruned, _ = pruned_of("llama", "ffn")
    tokenizer = transformers.AutoTokenizer.from_pretrained(real.folder("NODELENS_DATA") / "models/stories260K")
    folder = pruned.save(tmp_path, tokenizer=tokenizer)
    assert transformers.AutoTokenizer.from_pretrained(folder)("Lily").input_ids == tokenizer("Lily").input_ids


def test_a_tokenizer_that_cannot_be_saved_is_refused(tmp_path):
    pruned, _ = pruned_of("llama", "ffn")
    with pytest.raises(TypeError, match="tokenizer is str; give one of transformers"):
        pruned.save(tmp_path, tokenizer="path")


class FakeApi:
    """The two calls of huggingface_hub's client, which keep what they are given."""

    calls: tuple = ()

    def __init__(self, **options):
        FakeApi.calls = (options,)

    def create_repo(self, repo_id, **options):
        FakeApi.calls += (("create_repo", repo_id, options),)
        return type("Repo", (), {"repo_id": repo_id})

    def upload_folder(self, **options):
        files = sorted(path.name for path in Path(options["folder_path"]).iterdir())
        FakeApi.calls += (("upload_folder", options["repo_id"], files),)
        return f"https://hub/{options['repo_id']}/commit/1"


def test_a_push_creates_the_repository_and_uploads_what_save_writes(monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", FakeApi)
    pruned, _ = pruned_of("llama", "all")
    assert pruned.push_to_hub("user/name", token="secret", private=True) == "https://hub/user/name/commit/1"
    options, created, uploaded = FakeApi.calls
    assert options["token"] == "secret"
    assert created == ("create_repo", "user/name", {"private": True, "exist_ok": True})
    assert {"config.json", "generation_config.json", "model.safetensors", "origin.json", "plan.json", "README.md"} <= {*uploaded[2]}


def test_a_push_without_the_hub_is_one_line_with_the_way_out(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    pruned, _ = pruned_of("llama", "ffn")
    with pytest.raises(
        OSError, match=r"user/name was not pushed \(OfflineModeIsEnabled: .*upload the folder where the hub"
    ) as error:
        pruned.push_to_hub("user/name")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"'no id at all!' is no id of the hub, such as user/name"):
        pruned.push_to_hub("no id at all!")


ALONE = """
import sys
from pathlib import Path
sys.modules["nodelens"] = None  # an import raises
import torch, transformers
folder, x, expected = sys.argv[1], torch.load(sys.argv[2]), torch.load(sys.argv[3])
model = transformers.AutoModelForCausalLM.from_pretrained(folder)
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
with torch.no_grad():
    assert torch.equal(model(x).logits, expected["logits"])
    text = model.generate(x[:1, :5], max_new_tokens=20, do_sample=False)
assert torch.equal(text, expected["text"]), text
print(type(model).__name__, len(tokenizer.decode(text[0])) > 10)
"""


@pytest.mark.slow  # a new interpreter; without_nodelens is the fast form
def test_a_pruned_story_teller_opens_where_nodelens_cannot_be_imported(tmp_path):
    home = real.folder("NODELENS_DATA") / "models/stories260K"
    model = transformers.AutoModelForCausalLM.from_pretrained(home).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(home)
    x = tokenizer(["Once upon a time, there was a little girl named Lily."], return_tensors="pt").input_ids
    pruned = nl.prune(model, "l2", 0.5, example_inputs={"input_ids": x})
    folder = pruned.save(tmp_path / "pruned", tokenizer=tokenizer)
    text = pruned.model.generate(x[:1, :5], max_new_tokens=20, do_sample=False)
    torch.save(x, tmp_path / "x.pt")
    torch.save({"logits": logits(pruned.model, {"input_ids": x}), "text": text}, tmp_path / "expected.pt")
    words = [sys.executable, "-c", ALONE, str(folder), str(tmp_path / "x.pt"), str(tmp_path / "expected.pt")]
    ended = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert ended.stdout.split() == ["LlamaForCausalLM", "True"]
