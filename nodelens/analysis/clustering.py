"""The import path of NodeLens: clusters in the space of metrics, and halos across layers."""

from .clusters.influence import CrossLayerHaloAnalysis
from .clusters.metric_space import MetricSpaceClustering, UnitClusters

__all__ = ["CrossLayerHaloAnalysis", "MetricSpaceClustering", "UnitClusters"]
