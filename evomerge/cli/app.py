"""The commands. They import heavy packages themselves, so that `--help` is instant."""

import json
import math
import sys
from pathlib import Path
from typing import Annotated

import typer

from evomerge.cli.making_models import align, merge
from evomerge.cli.options import AsJson, Config, Overrides, Overwrite, Run, flag
from evomerge.cli.zoo import zoo
from evomerge.core import ConfigError, Split

app = typer.Typer(
    name="evomerge",
    help="Search for the best way to merge fine-tuned language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(zoo, name="zoo")


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, flag("--version", help="Print the version and exit.")] = False,
    verbose: Annotated[bool, flag("--verbose", "-v", help="Log more.")] = False,
) -> None:
    import logging

    logging.getLogger("huggingface_hub").propagate = False  # it prints its warnings itself
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(levelname)s %(name)s: %(message)s"
    )
    if version:
        from importlib.metadata import version as installed

        print(f"evomerge {installed('evomerge')}")
        raise typer.Exit


@app.command()
def init(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL",
            show_default=False,
            help="Experts: FOLDER or NAME=FOLDER; FOLDER+ADAPTER for LoRA; or ORG/NAME from the local hub cache.",
        ),
    ] = None,
    base: Annotated[Path | None, typer.Option(help="The model they were fine-tuned from.", show_default=False)] = None,
    task: Annotated[
        list[str] | None,
        typer.Option("--task", "-t", metavar="TASK", help="lm-eval task file or name; repeatable."),
    ] = None,
    evolve: Annotated[
        Path | None,
        typer.Option("--mergekit-evolve", metavar="FILE", help="Translate this configuration of mergekit-evolve."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write.")] = Path("search.yaml"),
    overwrite: Overwrite = False,
) -> None:
    """Write a commented search configuration for these models."""
    if evolve is None:
        from evomerge.build.commands.starting import write_first_config

        *problems, next_step = write_first_config(out, models or (), base=base, tasks=task or (), overwrite=overwrite)
    elif models or base or task:
        raise ConfigError("--mergekit-evolve: models, base and tasks are taken from the file; leave them out")
    else:
        from evomerge.build.commands.mergekit_evolve import write_translated_config

        *problems, next_step = write_translated_config(out, evolve, overwrite=overwrite)
    print(f"{out}: written")
    for line in problems:
        print(line)
    print(f"next: {next_step}")


@app.command()
def doctor(
    folder: Annotated[Path, typer.Option("--run-dir", help="Folder that runs will be written to.")] = Path("runs"),
    address: Annotated[str | None, typer.Option(help="Also check this Ray cluster, e.g. auto.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check this machine (and a cluster) and say what to fix. Exit code 2 if a search would not run."""
    from dataclasses import asdict

    from evomerge.build.commands.doctor import Grade, examine

    findings = examine(folder, address)
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        from evomerge.cli.live import print_findings

        print_findings(findings)
    if any(finding.grade is Grade.BAD for finding in findings):
        raise typer.Exit(2)


@app.command()
def validate(
    config: Config,
    overrides: Overrides = None,
    show: Annotated[bool, flag("--show", help="Print every setting with its value, as JSON.")] = False,
    items: Annotated[
        bool,
        flag(
            "--items",
            help="Also load the tasks: items, tokens per candidate, and whether the longest item fits.",
        ),
    ] = False,
) -> None:
    """Check a configuration, its models and its tasks without loading weights, and show what would be searched."""
    from evomerge.build import describe, load_config, make_problem

    settings = load_config(config, overrides or ())
    problem = make_problem(settings)
    if show:
        print(json.dumps(settings.model_dump(mode="json"), indent=2))
    for line in describe(problem):
        print(line)
    if items:
        from evomerge.build.items import describe_items

        for line in describe_items(problem):
            print(line)


@app.command()
def plan(
    config: Config,
    workers: Annotated[
        list[int] | None,
        typer.Option(
            "--workers", "-w", min=1, metavar="N", help="Number of workers; repeatable. (default: 1, 4, 16, 64)"
        ),
    ] = None,
    measured: Annotated[
        Path | None,
        typer.Option("--from", metavar="RUN", help="Use the measured times and items per candidate of this run."),
    ] = None,
    seconds: Annotated[float | None, typer.Option(help="Seconds per candidate, if there is no run yet.")] = None,
    price: Annotated[float | None, typer.Option(min=0, help="Price of a worker hour.")] = None,
    simulate: Annotated[
        bool, flag("--simulate", help="Simulate the search on a virtual clock instead of estimating.")
    ] = False,
    as_json: AsJson = False,
    overrides: Overrides = None,
) -> None:
    """Estimate memory, time, utilisation and cost of a search for different numbers of workers."""
    from evomerge.build import load_config, make_problem
    from evomerge.build.commands import planning
    from evomerge.cli.tables import print_plan

    if measured is not None and seconds is not None:
        raise ConfigError("--from and --seconds: give only one of them")
    if seconds is not None and not 0 < seconds < math.inf:
        raise ConfigError(f"--seconds {seconds:g}: expected a number above 0")
    problem = make_problem(load_config(config, overrides or ()))
    if price is not None and measured is None and seconds is None and planning.synthetic_times(problem) is None:
        raise ConfigError("--price: costs are computed from times; also give --from or --seconds")
    times = (
        planning.measured_times(problem, measured)
        if measured
        else planning.same_time(problem, seconds)
        if seconds
        else planning.synthetic_times(problem)
    )
    method = planning.simulate if simulate else planning.forecast
    rows = [method(problem, times, count, price) for count in workers or (1, 4, 16, 64)] if times else []
    if as_json:
        print(json.dumps(planning.as_json(planning.sizes(problem), rows), indent=2))
        return
    print_plan(planning.sizes(problem), rows)
    if not rows:
        print("for time and cost, give --from RUN (a short run with the same models and tasks) or --seconds")


@app.command()
def search(
    config: Config,
    run_dir: Annotated[
        Path | None,
        typer.Option("--run-dir", help="Run directory to create. (default: runs/<name>-<time>-<pid>)"),
    ] = None,
    overrides: Overrides = None,
    address: Annotated[
        str | None,
        typer.Option(help="Use a running Ray cluster, e.g. auto or ray://head:10001. (default: start a local one)"),
    ] = None,
) -> None:
    """Search for the best merge. Ctrl-C stops it safely; `evomerge resume` continues."""
    from evomerge.build import default_run_directory, load_config, start_search
    from evomerge.cli.progress import watched

    if address and any(override.startswith("cluster.address=") for override in overrides or ()):
        raise ConfigError("--address and --set cluster.address: give only one of them")
    extra = [f"cluster.address={json.dumps(address)}"] if address else []
    settings = load_config(config, [*(overrides or ()), *extra])
    folder = run_dir or default_run_directory(settings, config)
    with watched(folder, settings.budget.evaluations, settings.finals.finalists) as observer:
        start_search(settings, folder, config_text=config.read_text(encoding="utf-8"), observers=[observer])


@app.command()
def resume(run: Run, overrides: Overrides = None) -> None:
    """Continue a run where it stopped, after Ctrl-C, a crash or a kill, or with a larger budget (--set budget.evaluations=N)."""
    from evomerge.build import config_on_resume, open_run, resume_search
    from evomerge.cli.progress import watched

    config = config_on_resume(run, overrides or ())
    with watched(run, config.budget.evaluations, config.finals.finalists, open_run(run).state) as observer:
        resume_search(run, overrides=overrides or (), observers=[observer])


@app.command()
def watch(
    run: Run,
    every: Annotated[
        float | None,
        typer.Option(min=0.1, metavar="SECONDS", help="Refresh interval. (default: 2)", show_default=False),
    ] = None,
    once: Annotated[bool, flag("--once", help="Print once and exit.")] = False,
) -> None:
    """Follow a run from another terminal. Ctrl-C ends watching, not the run."""
    from evomerge.build.commands.watching import Watcher
    from evomerge.cli.live import watch_run

    if once and every is not None:
        raise ConfigError("--once and --every: give only one of them")
    watch_run(Watcher(run), every or 2.0, once=once)


@app.command()
def front(
    run: Run,
    as_json: Annotated[bool, flag("--json", help="Print JSON, like front.json.")] = False,
    as_csv: Annotated[bool, flag("--csv", help="Print CSV.")] = False,
) -> None:
    """Print the non-dominated candidates of a live or finished run."""
    from evomerge.build import open_run
    from evomerge.cli.tables import print_front
    from evomerge.search import front_csv, front_of, members_of

    if as_json and as_csv:
        raise ConfigError("--json and --csv: give only one of them")
    opened = open_run(run)
    if as_json:
        print(json.dumps(opened.front(), indent=2, sort_keys=True))
    elif as_csv:
        print(front_csv(opened.state.objectives, members_of(opened.state, front_of(opened.state))), end="")
    else:
        print_front(opened)


@app.command()
def export(
    run: Run,
    choice: Annotated[
        str, typer.Option("--pick", help="best (winner of the finals), knee (of the front), or a candidate id.")
    ] = "best",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="File to write, or - for standard output. (default: ID.yaml)", show_default=False
        ),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a candidate's recipe as a file for evomerge and mergekit."""
    from evomerge.build import chosen_recipe, export_recipe
    from evomerge.recipe import mergekit_remark, recipe_to_yaml

    if out == Path("-"):
        name, recipe = chosen_recipe(run, choice)
        print(recipe_to_yaml(recipe), end="")
        place, stream = "standard output", sys.stderr
    else:
        name, recipe, path = export_recipe(run, choice, out, overwrite=overwrite)
        place, stream = str(path), sys.stdout if path.is_file() else sys.stderr  # a pipe gets the recipe alone
    count = len(recipe.models())
    print(f"{place}: {name}, {recipe.method} of {count} model{'s' if count > 1 else ''}", file=stream)
    remark = mergekit_remark(recipe)
    if remark is not None:
        print(remark, file=stream)


app.command()(merge)
app.command()(align)


@app.command(name="eval")
def evaluate(
    model: Annotated[
        Path,
        typer.Argument(
            help="Checkpoint folder, recipe file, or ORG/NAME from the local hub cache.", show_default=False
        ),
    ],
    source: Annotated[
        Path,
        typer.Option(
            "--config",
            "-c",
            help="Search configuration or run directory that defines tasks and engine.",
        ),
    ],
    split: Annotated[Split, typer.Option(help="Split to score.")] = Split.REPORT,
    show: Annotated[
        int, typer.Option(min=0, metavar="N", help="Also show N items of each task: prompt, answer, target, score.")
    ] = 0,
    as_json: AsJson = False,
    overrides: Overrides = None,
) -> None:
    """Score a model or recipe on the tasks of a configuration or run."""
    from evomerge.build import evaluate_model

    scored = evaluate_model(source, model, split, show=show, overrides=overrides or ())
    if as_json:
        print(json.dumps(scored.as_json(), indent=2))
        return
    from evomerge.cli.tables import print_evaluation, print_items

    print_evaluation(scored.model, scored.evaluation, scored.config)
    print_items(scored.shown, scored.evaluation)


@app.command()
def summary(run: Run, as_json: AsJson = False) -> None:
    """Print the result of a run: scores of sources, baselines and best recipe, with 95% intervals."""
    from evomerge.build import open_run
    from evomerge.cli.tables import print_summary

    if as_json:
        print(json.dumps(open_run(run).summary(), indent=2))
    else:
        print_summary(open_run(run))


@app.command()
def report(
    run: Run,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="File to write. (default: RUN/report.html)", show_default=False)
    ] = None,
) -> None:
    """Write an HTML report of a live or finished run: scores, progress, front, parameters, best recipe."""
    from evomerge.build.commands.report import write_report

    print(write_report(run, out))
