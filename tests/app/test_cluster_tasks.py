"""analyze.py analysis=[clusters,halo]: what it writes and shows."""

import pytest
from command import command

import nodelens as nl


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    home = tmp_path_factory.mktemp("clusters")
    words = ("model=cnn", "metrics=[rq]", "analysis=[clusters,halo]", "analysis.clusters.draws=5", "analysis.halo.permutations=50")
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
    names = {path.name for path in (folder / "figures").iterdir()}
    assert {"clusters-scatter.png", "clusters-composition.png", "halo-flow.png"} <= names


def test_a_run_loads_with_types_and_halos(run):
    result = nl.load(run[0])
    assert set(result.units["unit_type"]) <= {"critical", "redundant", "synergistic", "background", "none"}
    assert result.analyses["clusters"].metadata["options"]["draws"] == 5
    assert (folder_tables := nl.load_runs(str(run[0]), "clusters.clusters")) is not None
    assert {"layer", "cluster", "type"} <= set(folder_tables)
