"""What prune.py leaves in pruned/ is a folder that transformers opens."""

import pytest
from command import command
from real import folder
from transformers import AutoModelForCausalLM, AutoTokenizer

import nodelens as nl


@pytest.mark.slow
def test_pruned_holds_model_tokenizer_and_a_card_with_the_sweep(quiet_home):
    home = folder("NODELENS_DATA")
    words = ("model=causal_lm", f"model.path={home}/models/stories260K")
    words += ("dataset=text", f"dataset.path={home}/text/tinyshakespeare.txt", "dataset.length=32", "dataset.max_tokens=4000")
    words += ("criterion=[l2,random]", "amounts=[0.25,0.5]", "scope=[ffn]")
    ended = command("prune", *words, "latency.batches=[]", "logger=none", "hydra.run.dir=run")
    assert ended.code == 0, ended.err
    model = AutoModelForCausalLM.from_pretrained("run/pruned")
    assert model.config.intermediate_size == 86
    ids = AutoTokenizer.from_pretrained("run/pruned")("Once upon a time", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] == ids.shape[1] + 3
    card = (quiet_home / "run/pruned/README.md").read_text()
    assert "## Sweep" in card
    assert "| l2 | uniform | 0.25 |" in card
    assert "perplexity" in card.split("The dense model: ")[1]
    assert nl.load_pruned("run/pruned").config.hidden_size == 64
