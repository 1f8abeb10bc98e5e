"""The calls that users of representation-geometry 0.1 write, and the folders that it wrote."""

import inspect
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import transformers

import nodelens as nl
from nodelens import analyze_model

SIZES = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 16, "intermediate_size": 24}
SIZES |= {"num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32}


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
        return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def dataloader():
    return [{"input_ids": torch.randint(3, 50, (2, 12), generator=torch.Generator().manual_seed(k))} for k in range(3)]


@pytest.fixture(scope="module")
def path(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return str(folder)


def test_the_call_as_it_is_written(path, dataloader, tmp_path):
    results = analyze_model(
        model_name=path,
        dataloader=dataloader,
        max_tokens=60,
        layers="all",
        hook_point="residual_input",
        metrics="default",
        diagnostics=["normalization_ablation"],
        sample_limit=512,
        novelty_k=4,
        save_mode="bundle",
        save_dir=tmp_path / "run",
        tokenizer_name="bytes",
        dataset_name="random",
        run_metadata={"tags": ["a", "b"]},
        model_kwargs={"torch_dtype": torch.float32, "attn_implementation": "eager"},
        output_router_logits=True,
    )
    assert len(results.metrics) == len(results.router) == 3
    assert list(results.novelty.transition) == ["0->1", "1->2"]
    assert len(results.diagnostics["normalization_ablation"]) == 12
    assert results.eigenvalues["layer_00"].shape == (16,)
    assert results.metadata["layers"] == [0, 1, 2]
    assert results.metadata["hook_targets"] == [f"model.layers.{k}.input" for k in range(3)]
    assert results.metadata["tokens_observed"] == 60
    assert results.metadata["run_metadata"] == {"tags": ["a", "b"]}
    assert results.artifact_dir == (tmp_path / "run").resolve()
    again = nl.load_bundle(results.artifact_dir)
    pd.testing.assert_frame_equal(again.metrics, results.metrics, check_dtype=False, rtol=0, atol=0)
    assert again.metadata["layers"] == [0, 1, 2]


def test_its_parameters_stand_in_the_signature():
    theirs = (
        "model_name dataloader model max_tokens metrics diagnostics layers hook_point save_mode save_dir sample_limit novelty_k"
    )
    theirs += " device model_kwargs trust_remote_code output_router_logits run_name tokenizer_name dataset_name run_metadata"
    known = inspect.signature(analyze_model).parameters
    assert set(theirs.split()) <= set(known)
    assert list(known)[:2] == ["model_name", "dataloader"]


def test_how_a_model_is_loaded(path, dataloader):
    half = analyze_model(path, dataloader, model_kwargs={"dtype": "bfloat16"}, metrics="spectrum", layers="0,2")
    whole = analyze_model(path, dataloader, metrics="spectrum", layers=[0, 2])
    assert half.metadata["layers"] == [0, 2]
    assert not np.allclose(half.metrics.d_pr, whole.metrics.d_pr, rtol=1e-6)
    np.testing.assert_allclose(half.metrics.d_pr, whole.metrics.d_pr, rtol=0.05)


def test_routers_are_left_out_on_request(model, dataloader):
    every = analyze_model(model, dataloader, metrics=["default"])
    without = analyze_model(model, dataloader, output_router_logits=False)
    assert len(every.router) == 3
    assert not len(without.router)
    pd.testing.assert_frame_equal(every.metrics, without.metrics)
    assert analyze_model(model, dataloader, output_router_logits=False, metrics=["spectrum"]).metrics.d_pr.notna().all()


def test_several_hook_points_keep_their_names(model, dataloader):
    points = ["residual_input", "module_output:lm_head"]
    found = analyze_model(model, dataloader, hook_point=points, metrics="spectrum").metadata
    assert found["layers"] == {"residual_input": [0, 1, 2], "module_output:lm_head": [0]}
    assert found["hook_targets"]["module_output:lm_head"] == ["lm_head"]


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_a_folder_that_it_wrote_is_loaded(model, dataloader, tmp_path, kind):
    found = analyze_model(
        model, dataloader, diagnostics=["normalization_ablation"], metrics=["default"], save_mode="json", save_dir=tmp_path
    )
    tables = {name: table for name, table in found.tables().items() if name != "experts"}
    for name, table in tables.items():
        (tmp_path / f"{name}.json").unlink()
        if kind == "csv":
            table.to_csv(tmp_path / f"{name}.csv", index=False)
        else:
            (tmp_path / f"{name}.json").write_text(json.dumps(table.to_dict(orient="records"), default=float))
    (tmp_path / "experts.json").unlink()
    for manifest in tmp_path.rglob("SHA256SUMS"):
        manifest.unlink()
    theirs = {
        "artifact_schema_version": "0.1",
        "model_id": "m",
        "layers": [0, 1, 2],
        "save_mode": "json" if kind == "json" else "bundle",
    }
    (tmp_path / "metadata.json").write_text(json.dumps(theirs))
    again = nl.load_bundle(tmp_path)
    assert again.tables().keys() == found.tables().keys()
    for name, table in tables.items():
        pd.testing.assert_frame_equal(again.tables()[name], table, check_dtype=False, rtol=1e-12)
    assert all((again.eigenvalues[k] == v).all() for k, v in found.eigenvalues.items())
    assert again.metadata == theirs
    assert again.artifact_dir == Path(tmp_path).resolve()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model_kwargs": {"dtype": "float32"}}, "says how a model is loaded, and the model is here already"),
        ({"model_name": "x", "model": None, "model_kwargs": {"dtipe": 1}}, "model_kwargs has no 'dtipe'. Did you mean 'dtype'"),
        ({"trust_remote_code": True}, "code that lies beside weights is not run; load the model yourself"),
        (
            {"metrics": ["spectrum", "router"], "output_router_logits": False},
            "metrics names router and output_router_logits is False",
        ),
    ],
)
def test_what_does_not_fit_is_named(model, dataloader, options, words):
    with pytest.raises(ValueError, match=words):
        analyze_model(**({"model": model, "dataloader": dataloader} | options))


def test_modes_in_upper_case_to_dict_and_nl_load(model, dataloader, tmp_path):
    options = {"save_mode": "BUNDLE", "save_dir": tmp_path, "run_name": "first", "diagnostics": ["normalization_ablation"]}
    found = analyze_model(model, dataloader, **options)
    again = nl.load(tmp_path)
    assert type(again) is type(found)
    assert again.metadata["run_name"] == "first"
    assert again.metadata["save_mode"] == "bundle"
    plain = found.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert [row["d_pr"] for row in plain["metrics"]] == list(found.metrics.d_pr)
    assert plain["eigenvalues"]["layer_00"] == found.eigenvalues["layer_00"].tolist()
    assert len(plain["diagnostics"]["normalization_ablation"]) == 12
    assert len(plain["router"]) == 3
    assert (plain["metadata"]["run_name"], plain["artifact_dir"]) == ("first", str(tmp_path.resolve()))
    with pytest.raises(ValueError, match="save_mode is 'zip'; it must be json, csv, bundle"):
        analyze_model(model, dataloader, save_mode="zip", save_dir=tmp_path)


def test_an_empty_router_table_is_a_table_without_rows(model, dataloader, tmp_path):
    analyze_model(model, dataloader, output_router_logits=False, save_mode="bundle", save_dir=tmp_path)
    theirs = {"artifact_schema_version": "0.1", "model_id": "m", "save_mode": "bundle"}
    (tmp_path / "metadata.json").write_text(json.dumps(theirs))
    (tmp_path / "SHA256SUMS").unlink()
    (tmp_path / "router.csv").write_text("\n")
    found = nl.load(tmp_path)
    assert len(found.router) == 0
    assert len(found.metrics) == 3


class Bare(torch.nn.Module):
    """A language model whose blocks are bare layers."""

    def __init__(self):
        super().__init__()
        self.embed, self.layers = torch.nn.Embedding(50, 8), torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3))

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + layer(x)
        return x


def test_blocks_may_be_bare_layers(dataloader):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Bare().eval()
    found = analyze_model(model=net, dataloader=dataloader, metrics="spectrum")
    assert found.metadata["hook_targets"] == ["layers.0.input", "layers.1.input", "layers.2.input"]
    rows = torch.cat([net.embed(batch["input_ids"]).flatten(0, 1) for batch in dataloader]).double()
    values = torch.linalg.eigvalsh(torch.cov(rows.T)).flip(0)
    np.testing.assert_allclose(found.eigenvalues["layer_00"], values.detach().numpy(), rtol=1e-5)


def field_edits(metadata):
    """(field, value) of metadata that were edited by rule: what is read, and what the folder holds."""
    for field, values in {
        "artifact_schema_version": ["0.2", 2, None, True, 1.0, [1], "missing"],
        "save_mode": ["zip", 3, None, ["csv"], "missing"],
        "tables": [3, "x", [], {"metrics": 3}, {"metrics": ["a", "a"]}, {"../../etc/passwd": ["a"]}, {"diagnostics/../x": []}],
        "arrays": [
            3,
            "layer_00",
            [3],
            ["layer_00"],
            ["layer_00", "layer_00"],
            ["layer_00", "layer_01", "layer_02", "layer_03"],
            [],
        ],
    }.items():
        for value in values:
            if (field, value) not in [("tables", []), ("arrays", [])]:
                yield field, value
    for name in ("metrics", "novelty"):
        yield "tables", {k: v for k, v in metadata["tables"].items() if k != name}
    yield "tables", metadata["tables"] | {"metrics": metadata["tables"]["metrics"][::-1]}
    yield "tables", metadata["tables"] | {"metrics": [*metadata["tables"]["metrics"], "more"]}


@pytest.mark.parametrize("mode", ["bundle", "json"])
def test_a_bundle_that_was_damaged_is_one_line_with_file_and_field(model, dataloader, tmp_path, mode):
    analyze_model(model, dataloader, metrics=["spectrum", "novelty"], save_mode=mode, save_dir=tmp_path)
    metadata = json.loads((tmp_path / "metadata.json").read_text())
    (tmp_path / "SHA256SUMS").unlink()  # a stranger leaves it out
    every = list(field_edits(metadata))
    last = [value for _, value in every[-2:]]
    for field, value in every:
        edited = {k: v for k, v in (metadata | {field: value}).items() if v != "missing"}
        if (mode, field) == ("json", "tables") and value in last:
            continue  # rows of a JSON table have columns in no order, and may lack some
        (tmp_path / "metadata.json").write_text(json.dumps(edited))
        with pytest.raises(ValueError, match=r"metadata\.json|metrics\.") as refused:
            nl.load_bundle(tmp_path)
        assert field in str(refused.value) or "columns" in str(refused.value), (field, value, refused.value)
        assert len(str(refused.value).splitlines()) == 1
    (tmp_path / "metadata.json").write_text(json.dumps(metadata))
    kind = "json" if mode == "json" else "csv"
    whole = (tmp_path / f"metrics.{kind}").read_text()
    for text in ("", "[1, 2]", "{", '"a', "a,b\n1,2,3\n4", "\x00\xff", "null", "[[[[1]]]]"):
        (tmp_path / f"metrics.{kind}").write_text(text)
        with pytest.raises(ValueError, match=rf"metrics\.{kind}"):
            nl.load_bundle(tmp_path)
    (tmp_path / f"metrics.{kind}").write_text(whole)
    for arrays, words in (
        (
            {"layer_00": np.ones(16), "layer_01": np.ones(16), "layer_02": np.ones((4, 4))},
            r"layer_02 has the shape \(4, 4\) of float64",
        ),
        ({"layer_00": np.ones(16), "layer_01": np.ones(16), "layer_02": np.ones(17)}, r"layer_02 has the shape \(17,\) of float64"),
        ({"layer_00": np.ones(16), "layer_01": np.ones(16), "layer_02": np.ones(16, complex)}, "of complex128; eigenvalues are"),
        ({"layer_00": np.ones(16)}, "has the arrays .*, metadata.json lists"),
        ({}, "has the arrays .*, metadata.json lists"),
    ):
        np.savez(tmp_path / "eigenvalues.npz", **arrays)
        with pytest.raises(ValueError, match=rf"eigenvalues\.npz.*{words}"):
            nl.load_bundle(tmp_path)
    (tmp_path / "eigenvalues.npz").unlink()
    with pytest.raises(ValueError, match=r"eigenvalues\.npz is missing; metadata\.json lists"):
        nl.load_bundle(tmp_path)
    (tmp_path / f"novelty.{kind}").unlink()
    with pytest.raises(ValueError, match=rf"novelty\.{kind} is missing; metadata\.json lists the table"):
        nl.load_bundle(tmp_path)
