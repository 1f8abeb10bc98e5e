"""Metric names of NodeLens and representation-geometry: what each is called here.

The registry of metrics reads METRIC_ALIASES. A name that stands in it is found by ``get_metric`` and wherever else a metric is
named; ``list_metrics`` and the catalogue show the standard names. RENAMED says which names of the first edition of nodelens were
taken for two different quantities or said nothing, and what they are called now; all of them are aliases too. LEFT_OUT has the
names that are not offered.
"""

from collections.abc import Mapping
from typing import Any

RENAMED: dict[str, str] = {  # old name: new name
    # a plain and a conditional name for two quantities that both are conditional
    "conditional_mi": "mi_given_class",  # I(unit; target | class): the class is the condition
    "conditional_mutual_information": "mi_given_target",  # I(unit; target | another target), by partial correlation
    # mi_0 and mi_1 are the same quantity by two estimators, mi_about_class another target
    "mi_1": "mi_binning",  # plug-in of equal-width bins; mi_0 is the Gaussian one, mi_gaussian
    "mi_about_class": "class_mutual_information",  # the target is the class: continuous with discrete
    # information of a pair of units about a class, and about a continuous target
    "synergy_gaussian_mmi": "class_synergy",  # the target is the class
    "gaussian_pid_synergy_mmi": "pid_synergy",  # the target is a number per row; beside pid_redundancy and pid_unique
    # redundancy between units by their outputs, between units by weights and inputs, and between input features
    "average_redundancy": "input_side_redundancy",  # from w'Cw: rows of the input, not of the output
    "node_redundancy": "input_feature_redundancy",  # one value per input feature, mean absolute correlation: no information
    # no information about a target: the capacity of a noisy channel that carries the unit
    "gaussian_mi_analytic": "noisy_channel_information",  # noise of a given size
    "mi_in_proxy": "relative_channel_information",  # noise of the size of the layer's own variances
    # dimensions of a spectrum: shares of eigenvalues here, of singular values in effective_rank
    "d_entropy": "entropy_dimension",  # exp of the entropy of the eigenvalues' shares
}

_NO_INPUT = "it replaced missing inputs with made-up ones"
LEFT_OUT: dict[str, str] = {  # names of NodeLens that are no metrics here: what to take instead, or why there is nothing
    "adaptive_importance": "take nl.score_trends",
    "classification_alignment": _NO_INPUT,
    "connected_information": "take o_information",
    "eigenvalue_alignment": "take spectral_alignment or weight_activation_alignment",
    "eigenvalue_entropy": "take entropy_dimension",
    "feature_importance": _NO_INPUT,
    "interaction_information": "take o_information",
    "language_model_alignment": _NO_INPUT,
    "mi_fast": "take mutual_information_gaussian",
    "multi_supernode": "take the analysis supernodes with cores=2",
    "multi_supernode_importance": "take the analysis supernodes with cores=2",
    "normalized_delta_alignment": "take delta_alignment",
    "power_iteration": "take top_share",
    "reinforcement_learning_alignment": _NO_INPUT,
    "representation_quality": _NO_INPUT,
    "rq_fast": "take rayleigh_quotient",
    "rq_spatial": "take rayleigh_quotient",
    "spectral_clustering": "take the analysis modularity with method=spectral",
    "spectral_clustering_score": "take the analysis modularity with method=spectral",
    "supernode_read_halo_score": "take the criterion read_halo",
    "synergistic_information": "take o_information",
    "task_alignment": _NO_INPUT,
    "two_halo": "take the criterion read_halo",
    "vision_task_alignment": _NO_INPUT,
}

_PART = "pairwise_redundancy_gaussian"  # the parts of the composites are columns: they keep the names of their system
_NODE_SCORING = {"mutual_information_gaussian": 0.3, "gaussian_pid_synergy_mmi": 0.2, _PART: -0.3, "rayleigh_quotient": 0.2}
_RQ_MINUS_R = {"rayleigh_quotient": 1.0, _PART: -0.3}
_VISION = {"rayleigh_quotient": 1.0, "gaussian_pid_synergy_mmi": 0.5, _PART: -0.3}
_CROSS = {"rayleigh_quotient": 0.25, "downstream_importance": 0.35, _PART: -0.25, "activation_mean": 0.15}
_WITHIN = {"activation_mean": 0.6, _PART: -0.4}

METRIC_ALIASES: dict[str, tuple[str, Mapping[str, Any]]] = {alias: (name, {}) for alias, name in RENAMED.items()} | {
    # NodeLens 0.2
    "activation_l2_norm": ("activation_rms", {}),
    "activation_norm": ("activation_rms", {}),
    "activation_mean_abs": ("activation_mean", {}),
    "cond_rq": ("conditional_rayleigh_quotient", {}),
    "cond_act_norm": ("conditional_activation_norm", {}),
    "cond_mi": ("mi_given_class", {}),
    "mi_class": ("class_mutual_information", {"method": "gaussian"}),
    "mi_about_class": ("class_mutual_information", {"method": "gaussian"}),
    "synergy_gaussian_mmi": ("class_synergy", {"method": "gaussian"}),
    "mi_0": ("mutual_information_gaussian", {}),
    "mutual_information": ("mutual_information_gaussian", {}),
    "ixy": ("relative_channel_information", {}),
    "pairwise_redundancy_gaussian": ("redundancy", {}),
    "backward_fisher": ("backward_ggn", {}),
    "backward_fisher_norm": ("backward_ggn", {"normalize": True}),
    "redundancy_gaussian": ("input_side_redundancy", {}),
    "input_redundancy": ("input_feature_redundancy", {}),
    "cross_layer_redundancy": ("downstream_importance", {}),
    "synergy_continuous_target": ("pid_synergy", {}),
    "pid_shared": ("pid_redundancy", {}),
    "pid_redundancy_t": ("pid_redundancy", {}),
    "pid_unique_x": ("pid_unique", {}),
    "pid_unique_t": ("pid_unique", {}),
    "cosine_similarity": ("weight_cosine_similarity", {}),
    "combined_score": ("composite_importance", {}),
    "node_scoring": ("composite_importance", {"weights": _NODE_SCORING}),
    "alignment_minus_redundancy": ("composite_importance", {"weights": _RQ_MINUS_R, "log": ()}),
    "rq_minus_r": ("composite_importance", {"weights": _RQ_MINUS_R, "log": ()}),
    "composite_vision": ("composite_importance", {"weights": _VISION, "log": ()}),
    "cross_layer_importance": ("composite_importance", {"weights": _CROSS, "log": ()}),
    "within_layer_importance": ("composite_importance", {"weights": _WITHIN, "log": ()}),
    # representation-geometry, and its columns
    "d_pr": ("participation_ratio", {}),
    "d_pr_norm": ("participation_ratio", {"normalize": True}),
    "d_entropy_norm": ("entropy_dimension", {"normalize": True}),
    "d_pr_debiased": ("participation_ratio_debiased", {}),
    "sv_effective_rank": ("effective_rank", {}),
    "sv_stable_rank": ("stable_rank", {}),
    "sv_participation_ratio": ("participation_ratio", {}),
    "log_spectrum_slope_10_200": ("log_spectrum_slope", {"first": 10, "last": 200}),
    "top1_share": ("top_share", {"k": 1}),
    "top10_share": ("top_share", {"k": 10}),
    "top32_share": ("top_share", {"k": 32}),
    "ve_4": ("top_share", {"k": 4}),
    "ve_8": ("top_share", {"k": 8}),
    "ve_16": ("top_share", {"k": 16}),
    "ve_32": ("top_share", {"k": 32}),
    "k90": ("component_count", {"share": 0.9}),
    "k95": ("component_count", {"share": 0.95}),
}
