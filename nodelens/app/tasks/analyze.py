"""analyze.py: measures the units of a network in one pass, and runs the analyses of the config."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from omegaconf import DictConfig

from nodelens.analysis.analyze import add_analysis, kept_in, without_analyses
from nodelens.analysis.load import load as load_with_analyses
from nodelens.analysis.registry import load_analysis, with_metrics
from nodelens.app import startup
from nodelens.app.config import recorded, resolved
from nodelens.engine.options import AnalyzeOptions
from nodelens.engine.plan import Plan
from nodelens.engine.validation import in_bytes
from nodelens.models import find_weights
from nodelens.results.files import SUMS, plain, remove_sums
from nodelens.results.result import Result, fingerprint, load, provenance
from nodelens.statistics.processes import world

from .common import (
    build_all,
    format_score,
    initial_of,
    is_dry_run,
    launch,
    layers_of,
    loggers_of,
    main_score,
    objective_of,
    to_device,
)
from .estimate_costs import estimate_costs
from .media import result_figures
from .progress import console, print_line, progress_bar, step
from .run_folder import open_inputs, run_folder
from .sharding import check_sharding, is_sharding, sharded
from .show import show_plan, show_result
from .show_cost import size
from .splits import splits


def analyze(cfg: DictConfig) -> float:
    """Measures, evaluates, saves and draws; returns the accuracy. A finished run in the same folder is shown again."""
    check_sharding(cfg)
    with run_folder(cfg) as folder:
        if is_dry_run(cfg):
            estimate_costs(cfg, folder)
            return float("nan")
        if (folder / "metadata.json").is_file():
            return _show_again(cfg, folder)
        return launch(cfg, lambda device: _work(cfg, folder, device))


def _show_again(cfg: DictConfig, folder: Path) -> float:
    from nodelens.report import write_page

    open_inputs(cfg, folder)
    print_line(f"already finished: {folder}")
    result = load(folder)
    if world()[0] == 0:  # with the options of this start
        print_line(f"page: {write_page(folder, **resolved(cfg)['report'])}")
    _show(result)
    return main_score(result.metadata["evaluation"])


def _work(cfg: DictConfig, folder: Path, device: torch.device) -> float:
    rank, _ = world()
    startup.phase("settings and imports")
    with step("opening data and model"):
        data, module, trained_by = open_inputs(cfg, folder)
    (sharded if is_sharding(cfg) else to_device)(module.net, device)
    startup.phase("data and model")
    parts = splits(cfg, data, trained_by)
    done = folder / SUMS / "measured"
    if (done / "metadata.json").is_file():  # the run was stopped in an analysis
        print_line("measuring: already finished")
        result = load(done)
    else:
        result = _measured(cfg, folder, module.net, data, parts)
        result.metadata |= run_metadata(cfg, data, parts[0], trained_by)
        if rank == 0 and cfg.analysis and len(result.layers):  # something was measured
            result.save(done)
    _analyses(cfg, folder, module.net, data, parts, result)
    if rank == 0:
        with step("saving and drawing"):
            _finish(cfg, folder, result)
    return main_score(result.metadata["evaluation"])


def _measured(cfg: DictConfig, folder: Path, net: torch.nn.Module, data: Any, parts: tuple[str, str]) -> Result:
    """The metrics of one split, and scores on another one in the metadata."""
    from nodelens.evaluation.evaluate import evaluate

    (rank, processes), (measured, evaluated) = world(), parts
    with step("measuring"):
        known = None if cfg.results is None else _of_finished_run(cfg, net)
        result = measure(cfg, net, data, measured, save_to=folder / SUMS) if known is None else known
    started = time.perf_counter()
    loader = data.loader(evaluated, rank=rank, world=processes)
    with step("evaluating"):
        score = evaluate(net, progress_bar("evaluating", _batches(loader), rank == 0)(loader), **objective_of(cfg))
    result.metadata["seconds"]["evaluate"] = time.perf_counter() - started
    result.metadata["evaluation"] = score | {"split": evaluated}
    if cfg.evaluate:
        from nodelens.evaluation.harness import harness

        options = resolved(cfg)["evaluate"]
        result.metadata["lm_eval"] = harness(net, cfg.dataset.get("tokenizer"), **options) if rank == 0 else {}
    return result


def measure(
    cfg: DictConfig,
    net: torch.nn.Module,
    data: Any,
    split: str,
    metrics: dict[str, Any] | None = None,
    save_to: Path | None = None,
) -> Result:
    """Measures the metrics of a config on one split. save_to: a folder for the sums of an unfinished pass."""
    from nodelens.engine.analyze import analyze as measure_units

    rank, processes = world()
    loader = data.loader(split, rank=rank, world=processes)

    def on_plan(found: Plan) -> None:
        if rank == 0:
            show_plan(console(), found)
        startup.phase("plan")

    def progress(items: Iterable[Any]) -> Iterator[Any]:
        shown = progress_bar("measuring", _batches(loader), rank == 0)(items)
        return startup.until_first_batch(shown) if rank == 0 else iter(shown)

    metrics = metrics or with_metrics(build_all(cfg.metrics, "metrics"), build_all(cfg.get("analysis") or {}, "analysis"))
    if not metrics and cfg.get("analysis"):
        return _empty_result(net, cfg.seed)
    if not metrics:
        raise ValueError("no metric is chosen: give some, as in 'metrics=[rq,synergy]'")
    result = measure_units(
        net,
        loader,
        metrics,
        layers_of(cfg, net, loader),
        initial=initial_of(cfg, net),
        options=AnalyzeOptions(
            seed=cfg.seed,
            groups=cfg.groups,
            positions=cfg.positions,
            precision=cfg.precision,
            kernels=cfg.kernels,
            pairs=resolved(cfg)["pairs"],
            bias=cfg.bias,
            covariance=cfg.covariance,
            width=cfg.budget.width,
            budget=in_bytes(cfg.budget.memory),
            max_passes=cfg.budget.max_passes,
            save_to=save_to,
            save_minutes=cfg.get("save_minutes", 10),
            **objective_of(cfg),
        ),
        on_plan=on_plan,
        progress=progress,
    )
    if rank == 0 and (seconds := result.metadata["seconds"]["kernels"]) > 1:
        print_line(f"loops for the CPU were compiled or loaded in {seconds:.1f} s; they are kept on disk for later runs")
    passes, traffic = result.metadata["passes"], result.metadata["traffic"]
    if rank == 0 and processes > 1:
        own, sent = size(traffic["sums"]), size(traffic["sent"])
        print_line(f"{processes} processes: sums of {own} each; each sends {sent} to add them up")
    if rank == 0 and len(passes) > 1:
        print_line(f"the data were read {len(passes)} times, because budget.memory does not fit the sums of all layers at once")
    return result


def _of_finished_run(cfg: DictConfig, net: torch.nn.Module) -> Result:
    """The result in the folder ``results``, without its analyses.

    Raises ValueError if it is of another network, or lacks a metric that an analysis needs.
    """
    result, analyses = without_analyses(load_with_analyses(cfg.results)), build_all(cfg.analysis, "analysis")
    if not analyses:
        raise ValueError("results= gives the tables to analyses, but none is chosen: add one, as in 'analysis=[clusters]'")
    known, own = result.metadata["model"]["fingerprint"], fingerprint(net)
    if known != own:
        raise ValueError(
            f"results={cfg.results} is of a network with the fingerprint {known}, this one has {own}: give model= and "
            "ckpt_path= of that run"
        )
    there = {*result.units, *result.layers, *result.edges, *(name for _, name in result.matrices)}
    if lacks := [name for name in with_metrics({}, analyses) if name not in there]:
        raise ValueError(f"results={cfg.results} lacks {', '.join(lacks)}: leave out results=, so that it is measured")
    result.metadata |= {"results": str(cfg.results), "seconds": {}}
    return result


def run_metadata(cfg: DictConfig, data: Any, split: str, trained_by: dict | None) -> dict[str, Any]:
    """The metadata of a run: its config, data and weights."""
    config = plain(recorded(cfg))
    counts = {"counts": dict(data.counts)} if getattr(data, "counts", None) else {}  # texts: documents, tokens, excluded tokens
    return {
        "config": config,
        "data": {"split": split, "fingerprint": data.fingerprint(), **counts},
        "weights": {"ckpt_path": config["ckpt_path"], "file": _weights_file(cfg.ckpt_path), "trained_by": plain(trained_by)},
    }


def _weights_file(given: str | None) -> str | None:
    """The name of the file that weights were read from, within the folder if one was given."""
    if not given:
        return None
    file, place = find_weights(given), Path(given).expanduser().resolve()
    return str(file.relative_to(place)) if place.is_dir() else file.name


def _empty_result(net: torch.nn.Module, seed: int) -> Result:
    """The result of a run without metrics of units."""
    about = {"metrics": {}, "samples": 0, "seed": seed, "seconds": {}, "missing": []}
    model = {"class": type(net).__name__, "fingerprint": fingerprint(net)}
    units = pd.DataFrame(index=pd.MultiIndex.from_arrays([[], []], names=["layer", "unit"]))
    layers = pd.DataFrame(index=pd.Index([], name="layer"))
    return Result(units, layers, metadata=provenance() | about | {"model": model})


def _analyses(cfg: DictConfig, folder: Path, net: torch.nn.Module, data: Any, parts: tuple[str, str], result: Result) -> None:
    """Runs each analysis, saves it to a subfolder of its name and adds it to the result; a finished one is not repeated."""
    rank, processes = world()
    for name, analysis in build_all(cfg.analysis, "analysis").items():
        if (folder / name / "metadata.json").is_file():
            print_line(f"{name}: already finished")
            add_analysis(result, name, load_analysis(folder / name))
            continue
        measured, evaluated = (data.loader(split, rank=rank, world=processes) for split in parts)
        progress = progress_bar(name, _batches(measured), rank == 0)
        options = {key: value for key, value in objective_of(cfg).items() if value is not None}
        options |= kept_in(analysis, folder / SUMS, name, cfg.get("save_minutes", 10))
        with step(name):
            found = analysis(net, measured, result=result, evaluation=evaluated, seed=cfg.seed, progress=progress, **options)
        add_analysis(result, name, found)
        if rank == 0:
            found.save(folder / name)
            for line in found.summary().splitlines():
                print_line(f"{name}: {line}")


def _finish(cfg: DictConfig, folder: Path, result: Result) -> None:
    from nodelens.report import write_page
    from nodelens.results.loggers import close, log_result, log_run, log_tables

    replace(result, analyses={}).save(folder)  # each analysis was saved when it ended
    remove_sums(folder)
    page = write_page(folder, **resolved(cfg)["report"])
    loggers = loggers_of(cfg, result.metadata["config"])
    score = {f"final/{k}": v for k, v in result.metadata["evaluation"].items() if k != "split"}
    tasks = result.metadata.get("lm_eval", {})
    score |= {f"lm_eval/{task}/{name}": value for task, values in tasks.items() for name, value in values.items()}
    try:
        log_result(loggers, result, score)
        for name, found in result.analyses.items():
            log_tables(loggers, name, found.tables())
        sizes = {"units": len(result.units), "layers": len(result.layers), "samples": result.metadata["samples"]}
        seconds = {f"seconds/{step}": value for step, value in result.metadata["seconds"].items()}
        summary = score | sizes | seconds
        log_run(loggers, folder, cfg.ckpt_path, result.metadata["config"], summary, lambda: result_figures(result))
    finally:
        close(loggers)
    _show(result)
    print_line(f"page: {page}")


def _show(result: Result) -> None:
    if len(result.layers):
        show_result(console(), result)
    else:
        found = result.metadata["evaluation"]
        print_line(f"{format_score(found)}, split {found['split']!r}")
    for task, values in result.metadata.get("lm_eval", {}).items():
        print_line(f"lm_eval {task}: {', '.join(f'{name} {value:.4g}' for name, value in values.items())}")


def _batches(loader: Any) -> int | None:
    try:
        return len(loader)
    except TypeError:  # a stream has no length
        return None
