"""The composition root: configuration -> live objects -> runs. The only reader of `evomerge.config` besides the CLI."""

from evomerge.build.commands.aligning import AlignedModels, align_models
from evomerge.build.commands.describing import describe
from evomerge.build.commands.merging import merge_recipe
from evomerge.build.commands.reading import Run, chosen_recipe, export_recipe, open_run
from evomerge.build.commands.runs import config_on_resume, default_run_directory, resume_search, start_search
from evomerge.build.commands.scoring import Scored, evaluate_model
from evomerge.build.loading import load_config
from evomerge.build.problem import Problem, make_problem
from evomerge.config import parse_config

__all__ = [
    "AlignedModels",
    "Problem",
    "Run",
    "Scored",
    "align_models",
    "chosen_recipe",
    "config_on_resume",
    "default_run_directory",
    "describe",
    "evaluate_model",
    "export_recipe",
    "load_config",
    "make_problem",
    "merge_recipe",
    "open_run",
    "parse_config",
    "resume_search",
    "start_search",
]
