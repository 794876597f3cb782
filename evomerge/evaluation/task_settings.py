"""The settings of an lm-eval task, from a local file or from lm-eval's own collection. Refuses everything that runs untrusted code.

A local task file may come from an untrusted source. Unless its code is trusted, it must not name Python functions or
classes, metrics that are downloaded as code, pickled data, or templates that reach outside the sandbox.
"""

from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import jinja2.exceptions
import jinja2.sandbox

from evomerge.core import EvaluationError, did_you_mean
from evomerge.evaluation.task_files import data_files, is_task_file, named_task_file, named_tasks, read_task_file
from evomerge.evaluation.task_keys import BELONGS_TO
from evomerge.evaluation.task_spec import TaskSpec

_TEMPLATES = ("doc_to_text", "doc_to_target", "doc_to_choice", "description", "gen_prefix")
_CODE_KEYS = ("class", "use_prompt", "custom_dataset", "process_docs", "process_results")
"""Keys whose value is code, or names code that lm-eval would import."""
_PICKLED_DATA = ("pandas",)
"""Loaders of the `datasets` package that unpickle files."""


def task_settings(task: str, *, trust_code: bool) -> dict[str, Any]:
    """The settings of a task in the form of lm-eval's `TaskConfig`; data files of a local task become absolute paths.

    Args:
        task: path of a YAML file, or the name of one of lm-eval's tasks (whose files are trusted; the first look-up takes half a second).
        trust_code: allow settings in a local file that run code.

    Raises:
        EvaluationError: the file or task does not exist, or its code is not trusted.
    """
    if not is_task_file(task):
        return _named_settings(task, trust_code=trust_code)
    path = Path(task)
    if trust_code:
        from lm_eval.tasks._yaml_loader import load_yaml

        settings = dict(load_yaml(path))
    else:
        settings = read_task_file(path)
        _refuse_code(path, settings)
    for key in BELONGS_TO:
        settings.pop(key, None)
    kwargs = settings.get("dataset_kwargs") or {}
    if kwargs.get("data_files"):
        files = {split: [str(name.resolve()) for name in names] for split, names in data_files(path).items()}
        settings["dataset_kwargs"] = kwargs | {"data_files": files}
    return settings


def settings_as_text(task: str) -> Mapping[str, Any]:
    """The settings of a task with functions given as their names, so that none of its code is imported.

    Raises:
        EvaluationError: the file or task does not exist.
    """
    if is_task_file(task):
        return read_task_file(Path(task), functions_as_text=True)
    return _named_as_text(task)


@cache
def _named_as_text(task: str) -> Mapping[str, Any]:
    from lm_eval.tasks._yaml_loader import load_yaml

    settings: Mapping[str, Any] = load_yaml(named_task_file(task), resolve_func=False)
    return settings


def check_runs_nothing(spec: TaskSpec) -> None:
    """Check, without loading it, that a task does not run code.

    Raises:
        EvaluationError: it does; says what, and how to allow it.
    """
    if is_task_file(spec.task):
        _refuse_code_keys(Path(spec.task), read_task_file(Path(spec.task)))
    else:
        _refuse_unsafe(spec.task)


def runs_code(task: str) -> bool:
    """Whether a task may run code that is not lm-eval's own: any local file may, and so may tasks that lm-eval marks `unsafe_code`.

    Imports none of the task's code.
    """
    return is_task_file(task) or (task in named_tasks().tasks and bool(_named_as_text(task).get("unsafe_code")))


def _named_settings(task: str, *, trust_code: bool) -> dict[str, Any]:
    if not trust_code:
        _refuse_unsafe(task)
    settings = settings_with_functions(task)
    for key in BELONGS_TO:
        settings.pop(key, None)
    settings["metadata"] = settings.get("metadata") if isinstance(settings.get("metadata"), dict) else {}
    return settings


def settings_with_functions(task: str) -> dict[str, Any]:
    """The settings of one of lm-eval's tasks, with its functions imported; these are lm-eval's own code.

    Raises:
        EvaluationError: a package that this code imports is not installed, or importing it fails.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        return dict(load_yaml(named_task_file(task)))
    except ImportError as error:
        hint = "" if "install" in str(error) or error.name is None else f"; pip install {error.name.partition('.')[0]}"
        raise EvaluationError(f"lm-eval task {task!r} needs a package that is not installed: {error}{hint}") from error
    except (
        SystemExit,
        AttributeError,
        OSError,
        RuntimeError,
        ValueError,
    ) as error:  # missing programs or files
        raise EvaluationError(f"the code of lm-eval task {task!r} cannot be loaded: {error}") from error


def _refuse_unsafe(task: str) -> None:
    """Refuse one of lm-eval's tasks if it runs code written by the model."""
    if runs_code(task):
        raise EvaluationError(
            f"lm-eval task {task!r} runs code that the model writes; set evaluation.trust_task_code: true to run it in a sandbox"
        )


_WHY = "runs code; set evaluation.trust_task_code: true if you trust this file"


def _refuse_code(path: Path, settings: Mapping[str, Any]) -> None:
    """Refuse settings that would run code other than lm-eval's own."""
    _refuse_code_keys(path, settings)
    import lm_eval.api.metrics  # noqa: F401  (fills the registry)
    from lm_eval.api.registry import METRIC_REGISTRY

    for entry in settings.get("metric_list") or []:
        name = entry["metric"]
        if name not in METRIC_REGISTRY:
            hint = did_you_mean(name, METRIC_REGISTRY)
            raise EvaluationError(
                f"{path}: metric_list: unknown metric {name!r}{hint} Known: {', '.join(sorted(METRIC_REGISTRY))}"
            )


def _refuse_code_keys(path: Path, settings: Mapping[str, Any]) -> None:
    """The part of `_refuse_code` that does not need lm-eval."""
    for key in _CODE_KEYS:
        if settings.get(key) is not None:
            raise EvaluationError(f"{path}: {key}: {_WHY}")
    if settings.get("unsafe_code"):
        raise EvaluationError(f"{path}: unsafe_code: {_WHY}")
    if settings.get("dataset_path") in _PICKLED_DATA:
        raise EvaluationError(f"{path}: dataset_path: {settings['dataset_path']} unpickles files, which {_WHY}")
    for entry in settings.get("metric_list") or []:
        if entry.get("hf_evaluate"):
            raise EvaluationError(f"{path}: metric_list: {entry['metric']}: hf_evaluate downloads code and {_WHY}")


def check_templates(path: str, settings: Mapping[str, Any], documents: Iterable[Mapping[str, Any]]) -> None:
    """Render every template of an untrusted task file for every document in Jinja's sandbox.

    lm-eval renders without a sandbox. Rendering depends only on the template and the document, so whatever passes the sandbox is
    safe there too.

    Raises:
        EvaluationError: a template fails or accesses Python internals.
    """
    from lm_eval.utils import env

    sandbox = jinja2.sandbox.ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    sandbox.filters["regex_replace"] = env.filters["regex_replace"]
    fewshot = settings.get("fewshot_config") or {}
    templates = [
        (where, source[key])
        for where, source in (("", settings), ("fewshot_config.", fewshot))
        for key in _TEMPLATES
        if isinstance(source.get(key), str)
    ]
    documents = list(documents)
    for where, text in templates:
        try:
            template = sandbox.from_string(text)
        except jinja2.TemplateSyntaxError:
            continue  # the name of a column, or an error that lm-eval reports itself
        for document in documents:
            _render(f"{path}: {where}{text!r}", template, document)


def _render(where: str, template: jinja2.Template, document: Mapping[str, Any]) -> None:
    try:
        template.render(**document)
    except jinja2.UndefinedError:
        return  # also fails without a sandbox; lm-eval reports it
    except jinja2.exceptions.SecurityError as error:
        raise EvaluationError(f"{where}: the template leaves the sandbox: {error}") from error
    except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise EvaluationError(f"{where}: the template fails: {error!r}") from error
