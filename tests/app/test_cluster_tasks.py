"""analyze.py analysis=[clusters,halo]: what it writes and shows."""

import pandas as pd
import pytest
from command import command

import nodelens as nl
from nodelens.results.files import read_json


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    home = tmp_path_factory.mktemp("clusters")
    words = ("model=mlp", "metrics=[rq]", "analysis=[clusters,halo]", "analysis.clusters.draws=5", "analysis.halo.permutations=50")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        ended = command("analyze", *words, "logger=none", "hydra.run.dir=run")
    assert ended.code == 0, ended.err
    return home / "run", ended.out


def test_the_terminal_and_the_page_say_what_was_found(run):
    folder, out = run
    assert "clusters: silhouette" in out
    assert "halo: halo of critical units in" in out
    page = (folder / "report.html").read_text()
    assert "<h2>Clusters</h2>" in page
    assert "<h2>Halo</h2>" in page
    for name in ("clusters-clusters", "clusters-composition", "halo-flow"):
        assert f"data-name='{name}'" in page


def test_a_run_loads_with_types_and_halos(run):
    result = nl.load(run[0])
    assert set(result.units["unit_type"]) <= {"critical", "redundant", "synergistic", "background", "none"}
    assert result.analyses["clusters"].metadata["options"]["draws"] == 5
    assert (folder_tables := nl.load_runs(str(run[0]), "clusters.clusters")) is not None
    assert {"layer", "cluster", "type"} <= set(folder_tables)


def test_a_sweep_prunes_by_the_types_of_the_run(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("model=mlp", "criterion=[magnitude,cluster_aware]", "amounts=[0.25]", "latency.batches=[]", "logger=none")
    unset = command("prune", *words, "hydra.run.dir=unset")
    assert "criterion.cluster_aware.types.units has no value: give criterion.cluster_aware.types.units=..." in unset.err
    given = f"criterion.cluster_aware.types.units={run[0]}"
    ended = command("prune", *words, given, "hydra.run.dir=run", "save=all")
    assert ended.code == 0, ended.err
    sweep = pd.read_parquet(tmp_path / "run" / "sweep.parquet")
    assert set(sweep["status"]) == {"done"}
    kinds = nl.load(run[0]).units["unit_type"]
    plan = read_json(tmp_path / "run" / "pruned" / sweep["name"].iloc[-1] / "plan.json")
    removed = [kind for group, ids in plan["removed"].items() for kind in kinds.loc[group].loc[ids]]
    assert "critical" not in removed
    assert len(removed) > 0
