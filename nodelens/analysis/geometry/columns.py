"""The columns of a geometry analysis, and the metric behind each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from nodelens.engine.request import as_metrics
from nodelens.metrics import Metric, get_metric
from nodelens.metrics.spectrum import SpectrumMetric

ABLATED = (
    "d_pr",
    "d_pr_norm",
    "d_entropy",
    "d_entropy_norm",
    "stable_rank",
    "top1_share",
    "top10_share",
    "top32_share",
    "k90",
    "k95",
    "log_spectrum_slope_10_200",
)
VARIANTS = ("raw", "token_l2", "token_rms", "feature_standardized")
_SAMPLE = ("sv_effective_rank", "sv_stable_rank", "sv_participation_ratio", "cos_sim_mean", "cos_sim_std")
_CKA = ("linear_cka", "linear_cka_debiased", "layer_cosine_sim")
FAMILIES: dict[str, tuple[str, ...]] = {
    "spectrum": (*ABLATED, "d_pr_debiased", "rankme", "alpha_req", "alpha_req_r2"),
    "sample": (*_SAMPLE, "ve_4", "ve_8", "ve_16", "ve_32"),
    "novelty": ("feature_subspace_novelty", *_CKA),
    "router": (),
}
SAMPLED = {*FAMILIES["sample"], *_CKA}  # computed from a sample of rows, at almost no cost
DIAGNOSTICS = ("normalization_ablation",)

MetricSelection = str | Metric | Sequence[str | Metric] | Mapping[str, Metric] | None


@dataclass(frozen=True)
class Columns:
    """The requested metrics by column, in order, and the rows that they read.

    sampled: columns computed from the sample of rows instead of all rows; ablation: {(variant, column): metric} of all rows;
    router: whether routers are measured; required: whether they were requested by name, so that a model without one is an error
    """

    metrics: dict[str, Metric]
    sampled: frozenset[str]
    ablation: dict[tuple[str, str], SpectrumMetric]
    router: bool
    required: bool

    def of(self, kind: str) -> dict[str, Metric]:
        """The metrics of one kind: ``layer``, or ``edge`` (a layer pair)."""
        return {column: metric for column, metric in self.metrics.items() if metric.shape == kind}

    @property
    def summed(self) -> dict[str, Metric]:
        """The metrics that need sums over all rows, under unique names."""
        whole = {column: metric for column, metric in self.metrics.items() if column not in self.sampled}
        return whole | {f"{column} {variant}": metric for (variant, column), metric in self.ablation.items()}


def columns_of(metrics: MetricSelection, diagnostics: Sequence[str], novelty_k: int, sample: bool) -> Columns:
    """The columns of families (spectrum, sample, novelty, router; default: all of them), catalogue names and metric objects.

    Metrics requested by name compare ``novelty_k`` axes. Without ``sample`` every column reads all rows.
    Raises ValueError for an unknown name or diagnostic, for a metric that has no value per layer or layer pair, and for one that
    reads gradients, labels or logits.
    """
    unknown = [name for name in diagnostics if name not in DIAGNOSTICS]
    if unknown:
        raise ValueError(f"no diagnostic is called {unknown[0]!r}; available: {', '.join(DIAGNOSTICS)}")
    if isinstance(metrics, Mapping):
        chosen, words, names = dict(metrics), set[str](), set[str]()
    else:
        requested = [metrics] if isinstance(metrics, (str, Metric)) else list(metrics or ["default"])
        words = {word for word in requested if isinstance(word, str)}
        names = {name for name in _expand_families([*words]) if isinstance(name, str)}
        chosen = as_metrics([_checked(m) if isinstance(m, str) else m for m in _expand_families(requested)])
        chosen = {c: replace(m, novelty_k=novelty_k) if c in names and "novelty_k" in m.options else m for c, m in chosen.items()}  # type: ignore[call-arg]
    for column, metric in chosen.items():
        _check(column, metric)
    return Columns(
        chosen,
        frozenset(names & SAMPLED if sample else ()),
        {(v, c): _scaled(c, v) for v in VARIANTS for c in ABLATED} if diagnostics else {},
        bool(words & {"default", "router"}),
        "router" in words,
    )


def _expand_families(requested: Sequence[str | Metric]) -> list[str | Metric]:
    """Replaces families by their columns; each name occurs once."""
    families = FAMILIES | {"default": tuple(name for family in FAMILIES.values() for name in family)}
    found: list[str | Metric] = []
    for word in requested:
        for each in families.get(word, (word,)) if isinstance(word, str) else (word,):
            if not isinstance(each, str) or each not in found:
                found.append(each)
    return found


def _checked(name: str) -> str:
    try:
        get_metric(name)
    except ValueError as error:
        raise ValueError(f"{error}; the families are default, {', '.join(FAMILIES)}") from None
    return name


def _check(column: str, metric: Metric) -> None:
    if metric.shape not in ("layer", "edge"):
        raise ValueError(
            f"metric {column!r} has one value per {metric.shape}; this analysis takes metrics with one value per layer or per pair "
            "of consecutive layers. Use nl.analyze for values per unit and per pair of units"
        )
    for need in metric.needs().values():
        if need.port not in ("input", "output", "next", "projection") or need.target not in (None, "next", "input"):
            raise ValueError(
                f"metric {column!r} reads {need}; this analysis has no gradients, labels or logits. Use nl.analyze for it"
            )


def _scaled(column: str, variant: str) -> SpectrumMetric:
    """The metric of a spectrum column on scaled rows."""
    found = get_metric(column, rows=variant)
    assert isinstance(found, SpectrumMetric)
    return found
