"""Analyses by name, and the folders they are loaded from."""

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from nodelens.messages import check_names, keywords_of, nearest
from nodelens.metrics import Metric
from nodelens.results.files import checked, read_json
from nodelens.results.findings import load_findings

from .base import Analysis, AnalysisResult

_HOMES = {  # where the classes are defined; conf/analysis/<name>.yaml has the same
    "attribution_patching": "nodelens.analysis.patching.patching.AttributionPatching",
    "cascade": "nodelens.analysis.cascade.cascade_analysis.CascadeAnalysis",
    "clusters": "nodelens.analysis.clusters.clusters_analysis.ClustersAnalysis",
    "future_lens": "nodelens.analysis.lenses.future_lens.FutureLens",
    "geometry": "nodelens.analysis.composed.GeometryAnalysis",
    "halo": "nodelens.analysis.clusters.halo_analysis.HaloAnalysis",
    "learned_prompt": "nodelens.training.learned_prompt.LearnedPrompt",
    "logit_attribution": "nodelens.analysis.patching.patching.LogitAttribution",
    "logit_lens": "nodelens.analysis.lenses.logit_lens.LogitLens",
    "modularity": "nodelens.analysis.modularity.modularity_analysis.ModularityAnalysis",
    "patching": "nodelens.analysis.patching.patching.Patching",
    "patchscope": "nodelens.analysis.lenses.patchscope.Patchscope",
    "supernode_lesions": "nodelens.analysis.supernodes.supernode_lesions.SupernodeLesions",
    "supernodes": "nodelens.analysis.supernodes.supernodes.Supernodes",
    "tuned_lens": "nodelens.training.tuned_lens.TunedLens",
    "validity": "nodelens.analysis.validity.validity_analysis.ValidityAnalysis",
}


Analyses = str | Analysis | Sequence[str | Analysis] | Mapping[str, Analysis]


def list_analyses() -> list[str]:
    """The names that ``nl.analyze(analysis=)`` and ``analyze.py analysis=`` know."""
    return sorted(_HOMES)


def get_analysis(name: str, **options: Any) -> Analysis:
    """An analysis by name.

    Raises ValueError for an unknown name, TypeError for an unknown option, and what the analysis raises for the values of options.
    """
    if name not in _HOMES:
        raise ValueError(f"no analysis is called {name!r}.{nearest(name, _HOMES)} There are {', '.join(list_analyses())}")
    module, kind = _HOMES[name].rsplit(".", 1)
    found = getattr(import_module(module), kind)
    check_names(f"analysis {name!r}", options, keywords_of(found))
    return found(**options)


def as_analyses(given: Analyses) -> dict[str, Analysis]:
    """{name: analysis} from names and analysis objects. Raises ValueError for an unknown name, and for one that occurs twice."""
    if isinstance(given, Mapping):
        return dict(given)
    found: dict[str, Analysis] = {}
    for each in [given] if isinstance(given, str) or not isinstance(given, Sequence) else given:
        if isinstance(each, type):
            raise ValueError(f"analysis takes analysis objects, and {each.__name__} is a class: give {each.__name__}()")
        if not isinstance(each, str) and not hasattr(each, "required_metrics"):
            raise ValueError(f"analysis takes names ({', '.join(list_analyses())}) and analysis objects, not {each!r}")
        name = each if isinstance(each, str) else name_of(each)
        if name in found:
            raise ValueError(f"analysis {name!r} is given twice; give a dict {{name: analysis}} to name two variants")
        found[name] = get_analysis(each) if isinstance(each, str) else each
    return found


def name_of(analysis: Any) -> str:
    """The name of an analysis object in the registry, or its class name in lower case."""
    kind = type(analysis)
    return next((name for name, home in _HOMES.items() if home == f"{kind.__module__}.{kind.__qualname__}"), kind.__name__.lower())


def with_metrics(metrics: Mapping[str, Metric], analyses: Mapping[str, Analysis]) -> dict[str, Metric]:
    """The metrics of the pass and those that the analyses need besides. Raises ValueError for a column with another meaning."""
    every = dict(metrics)
    for name, analysis in analyses.items():
        for column, metric in analysis.required_metrics().items():
            if every.setdefault(column, metric) != metric:
                raise ValueError(
                    f"analysis {name!r} needs {metric} in the column {column!r}, but metrics= has {every[column]} there: give "
                    "one of them another column, or leave it out of metrics="
                )
    return every


def load_analysis(folder: str | Path) -> AnalysisResult:
    """Loads the result of any analysis. Raises FileNotFoundError for an incomplete folder, ValueError for a damaged one."""
    from .geometry.bundle import load_bundle
    from .supernodes.supernode_result import load_supernodes

    metadata = Path(folder) / "metadata.json"
    known = read_json(checked(metadata)) if metadata.is_file() else {}
    known = known if isinstance(known, dict) else {}
    if "artifact_schema_version" in known:
        return load_bundle(folder)
    return load_supernodes(folder) if "supernodes_schema_version" in known else load_findings(folder)
