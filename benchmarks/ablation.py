"""Every score of hidden channels against true single-channel ablation: python benchmarks/ablation.py --model DIR --text FILE

Each channel of every feed-forward block is set to zero, one at a time, and the loss of held-out text taken. All unit metrics of the
catalogue score the same channels on other text; the table is sorted by Spearman's rank correlation with
the true change, and written as Markdown and CSV. Windows are BOS and the tokens behind it; texts are ranges of characters.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from transformers import AutoTokenizer

import nodelens as nl
from nodelens.analysis.supernodes.agreement import MEAN, POOLED, agreement
from nodelens.analysis.supernodes.supernode_result import SupernodesResult, load_supernodes
from nodelens.analysis.supernodes.supernodes import Supernodes
from nodelens.engine.members import side_of
from nodelens.metrics import Metric
from nodelens.models import causal_lm
from nodelens.pruning.criteria.scoring import score_table
from nodelens.pruning.groups.find import find_groups
from nodelens.report.supernodes_figures import write_supernodes
from nodelens.results.files import read_json, write, write_json

_PLACES = {"group": "pruning group", "reader": "hidden", "maker": "gate and up"}


def windows(tokenizer: AutoTokenizer, text: str, chars: str, length: int, batch: int) -> list[dict[str, torch.Tensor]]:
    start, end = (int(part) for part in chars.split(":"))
    ids = tokenizer(text[start:end], add_special_tokens=False, verbose=False).input_ids
    rows = [[tokenizer.bos_token_id, *ids[k : k + length - 1]] for k in range(0, len(ids) - length + 2, length - 1)]
    return [{"input_ids": part, "labels": part} for part in torch.tensor(rows).split(batch)]


def every_score() -> dict[str, Metric]:
    """All unit metrics, once each, under their own names and those of their presets."""
    found: dict[str, Metric] = {}
    for name in sorted(nl.list_metrics(), key=lambda name: (nl.get_metric(name).names[0] != name, name)):
        metric = nl.get_metric(name)
        if metric.shape == "unit" and metric not in found.values():
            found[name] = metric
    return found


def ablated(net, data: list, held_out: list, options: argparse.Namespace) -> SupernodesResult:
    """The analysis, with all figures; one that lies finished in the folder is read again."""
    if not (options.out / "metadata.json").is_file():
        count = options.ablate if options.ablate == "all" else int(options.ablate)
        analysis = Supernodes(connectivity_topk=options.topk, ablate=count, ablate_tokens=None)
        analysis(net, data, evaluation=held_out).save(options.out)
    write_supernodes(options.out)
    return load_supernodes(options.out)


def measured(net, layers: Sequence[str], scores: dict[str, Metric], data: list, out: Path) -> tuple[pd.DataFrame, dict[str, str]]:
    """Every score of the layers' channels, and why some have none; what lies in the folder is read again."""
    if not (out / "scores.json").is_file():
        refused: dict[str, str] = {}
        groups = [group for group in find_groups(net) if group.name in layers]
        few = [{name: value[:2, :64] for name, value in data[0].items()}]
        for name, score in scores.items():
            try:
                score_table(net, groups, {name: score}, few)
            except (ValueError, TypeError) as error:
                refused[name] = str(error).splitlines()[0]
        table = score_table(net, groups, {name: score for name, score in scores.items() if name not in refused}, data)
        table.index.names = ["layer", "unit"]
        write(out / "scores.parquet", table.to_parquet)
        write_json(out / "scores.json", refused)
    return pd.read_parquet(out / "scores.parquet"), read_json(out / "scores.json")


def shown(change: pd.DataFrame, size: pd.DataFrame, scores: dict[str, Metric]) -> str:
    """Agreement with the change and with its size as Markdown, the best mean over layers first."""
    place = {which: change[change["layer"] == which].set_index("score") for which in (MEAN, POOLED)}
    place["size"] = size[size["layer"] == MEAN].set_index("score")
    own = change[~change["layer"].isin([MEAN, POOLED])].groupby("score")["spearman"]
    low, high = own.min(), own.max()
    lines = ["| score | read at | mean over layers | layers | pooled | mean, size of the change |", "|---|---|---|---|---|---|"]
    for score in place[MEAN].sort_values("spearman", ascending=False).index:
        mean, pooled, large = (f"{t.loc[score, 'spearman']:.3f} ± {t.loc[score, 'spearman_se']:.3f}" for t in place.values())
        where = "`Supernodes`" if score not in scores else _PLACES[side_of(scores[score])]
        name = score.removeprefix("supernodes.")
        lines.append(f"| `{name}` | {where} | {mean} | {low[score]:.2f} to {high[score]:.2f} | {pooled} | {large} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder written by save_pretrained, or a hub id")
    parser.add_argument("--text", required=True, help="a text file")
    parser.add_argument("--score", default="60000:110000", help="characters that scores are taken on")
    parser.add_argument("--loss", default="1000:51000", help="characters that the loss is taken on")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--ablate", default="all", help="channels of each layer: all, or a number drawn by the seed")
    parser.add_argument("--topk", type=int, default=256, help="connectivity_topk; fewer than the model is wide")
    parser.add_argument("--out", type=Path, default=Path("ablation"), help="a folder for tables and figures")
    options = parser.parse_args()
    net = causal_lm(options.model).eval()
    tokenizer, text = AutoTokenizer.from_pretrained(options.model), Path(options.text).read_text(encoding="utf-8")
    data, held_out = (windows(tokenizer, text, chars, options.length, options.batch) for chars in (options.score, options.loss))

    started = time.perf_counter()
    result = ablated(net, data, held_out, options)
    print(result.summary(), f"{time.perf_counter() - started:.0f} s", sep="\n", flush=True)
    scores = every_score()
    table, refused = measured(net, list(result.layers.index), scores, data, options.out)
    own = result.units[["loss_proxy", "first_order", "largest", "curvature", "connectivity"]].rename(
        columns=lambda name: f"supernodes.{name}"
    )
    table = result.ablation.join(table).join(own)
    known = [name for name in table.columns.drop(["change", "change_se"]) if table[name].nunique() > 1]
    found, size = agreement(table, known), agreement(table.assign(size=table["change"].abs()), known, "size")
    found.to_csv(options.out / "every_score.csv", index=False)
    print(shown(found, size, scores), f"\n{time.perf_counter() - started:.0f} s", sep="\n")
    for name in sorted(set(scores) - set(known)):
        print(f"- `{name}`: {refused.get(name, 'the same, or no number, for every channel')}")


if __name__ == "__main__":
    main()
