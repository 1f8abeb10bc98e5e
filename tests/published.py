"""The criteria published for pruning, by name, and which metrics layers have."""

from nodelens.engine.members import of_groups_only
from nodelens.metrics import METRICS, get_metric
from nodelens.network.layers import ASSOCIATION

OF_WEIGHTS = ["magnitude", "l1", "l2", "group_l2", "bn_scale", "fpgm", "lamp", "random"]
OF_SUPERNODES = ["scar_prot", "scar_conn", "supernode_protection_score", "supernode_connectivity_score"]
PUBLISHED = [
    *OF_WEIGHTS,
    *("wanda", "flap", "minitron", "activation_power", "hrank", "chip", "taylor", "taylor_producer", "loss_proxy"),
    *("router_load", "gradient", "fisher", "llm_pruner", "movement"),
    *OF_SUPERNODES,
]
# one name per metric and preset that a layer has, without those that only pruning groups have, and chance
_NAMES = [n for m in METRICS for n in (m.names[0], *m.presets) if not of_groups_only(get_metric(n)) and n != "random"]
# of derivatives through the whole model, which tensors of one layer do not have
OF_DERIVATIVES = [n for n in _NAMES if any(need.port == ASSOCIATION for need in get_metric(n).needs().values())]
OF_LAYERS = [n for n in _NAMES if n not in OF_DERIVATIVES]
