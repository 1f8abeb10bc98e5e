"""Which columns the geometry of a language model has, and what each is made of."""

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
SAMPLED = {*FAMILIES["sample"], *_CKA}  # what a sample of rows tells, at next to no cost
DIAGNOSTICS = ("normalization_ablation",)

Asked = str | Metric | Sequence[str | Metric] | Mapping[str, Metric] | None


@dataclass(frozen=True)
class Columns:
    """What is asked for: metrics by column, in order, and how they are taken.

    sampled: those that read the sample of rows and not all of them; ablation: {(variant, column): metric} of all rows;
    router: whether the routers are wanted, ``required``: by name, so that a model without any is an error
    """

    metrics: dict[str, Metric]
    sampled: frozenset[str]
    ablation: dict[tuple[str, str], SpectrumMetric]
    router: bool
    required: bool

    def of(self, kind: str) -> dict[str, Metric]:
        """The metrics of a layer, or of an edge: two layers."""
        return {column: metric for column, metric in self.metrics.items() if metric.shape == kind}

    @property
    def summed(self) -> dict[str, Metric]:
        """What a pass adds up for, under names of its own."""
        whole = {column: metric for column, metric in self.metrics.items() if column not in self.sampled}
        return whole | {f"{column} {variant}": metric for (variant, column), metric in self.ablation.items()}


def columns_of(metrics: Asked, diagnostics: Sequence[str], novelty_k: int, sample: bool) -> Columns:
    """The columns of families (spectrum, sample, novelty, router; default is all), of the catalogue's names, and of metric objects.

    ``novelty_k`` axes in what compares subspaces by name; without ``sample`` all columns read all rows.
    Raises ValueError for a name that is neither, a metric whose value is not of a layer or of two, one that reads gradients,
    labels or logits, and an unknown diagnostic.
    """
    unknown = [name for name in diagnostics if name not in DIAGNOSTICS]
    if unknown:
        raise ValueError(f"no diagnostic is called {unknown[0]!r}; there is {', '.join(DIAGNOSTICS)}")
    if isinstance(metrics, Mapping):
        chosen, words, names = dict(metrics), set[str](), set[str]()
    else:
        asked = [metrics] if isinstance(metrics, (str, Metric)) else list(metrics or ["default"])
        words = {word for word in asked if isinstance(word, str)}
        names = {name for name in _spread([*words]) if isinstance(name, str)}
        chosen = as_metrics([_known(m) if isinstance(m, str) else m for m in _spread(asked)])
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


def _spread(asked: Sequence[str | Metric]) -> list[str | Metric]:
    """Families as their columns, each name once."""
    families = FAMILIES | {"default": tuple(name for family in FAMILIES.values() for name in family)}
    found: list[str | Metric] = []
    for word in asked:
        for each in families.get(word, (word,)) if isinstance(word, str) else (word,):
            if not isinstance(each, str) or each not in found:
                found.append(each)
    return found


def _known(name: str) -> str:
    try:
        get_metric(name)
    except ValueError as error:
        raise ValueError(f"{error}, and families are default, {', '.join(FAMILIES)}") from None
    return name


def _check(column: str, metric: Metric) -> None:
    if metric.shape not in ("layer", "edge"):
        raise ValueError(
            f"metric {column!r} has a value a {metric.shape}: here each layer, or two that follow each other, has one; "
            "nl.analyze has a table of units and matrices of pairs"
        )
    for need in metric.needs().values():
        if need.port not in ("input", "output", "next", "projection") or need.target not in (None, "next", "input"):
            raise ValueError(
                f"metric {column!r} reads {need}: here are rows alone, no gradient, label or logit; nl.analyze has them"
            )


def _scaled(column: str, variant: str) -> SpectrumMetric:
    """A column of the spectrum of scaled rows."""
    found = get_metric(column, rows=variant)
    assert isinstance(found, SpectrumMetric)
    return found
