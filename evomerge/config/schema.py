"""The schema of a search configuration and its defaults, and nothing else.

Used only by the composition root (`evomerge.build`) and the CLI. Configurations are validated once and never change.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, field_validator, model_validator

from evomerge.config.short_forms import one_or_several, path_and_lora, short_for, short_for_each, weights_of_objectives
from evomerge.core import canonical_json
from evomerge.core.settings import Settings


class _Strict(Settings):
    model_config = ConfigDict(allow_inf_nan=False)


class ModelConfig(_Strict):
    """One model. In YAML, just a path is enough, or `path+lora` for a model with an adapter."""

    path: str
    """folder of a Hugging Face checkpoint, relative to the config file, or ORG/NAME of a model in the hub cache"""
    lora: str | None = None
    """folder of a PEFT LoRA adapter that is merged into it, relative to the config file"""

    @property
    def key(self) -> str:
        """The model's name in recipes."""
        return self.path if self.lora is None else f"{self.path}+{self.lora}"


_Model = Annotated[ModelConfig, BeforeValidator(path_and_lora)]


def check_expert_name(name: str) -> None:
    """Raise ValueError if `name` is not a valid name for an expert."""
    if name == "base" or not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(
            f"expert name {name!r} must consist of letters, digits, '_', '-' and '.', not start with '-' or '.', and not be 'base'"
        )


class ModelsConfig(_Strict):
    """The models to be merged."""

    base: _Model | None = None
    """the common ancestor; task-vector methods and task-arithmetic baselines need it"""
    experts: dict[str, _Model] = Field(min_length=1)
    """name -> model; the names appear in parameters, tables and files"""

    @field_validator("experts")
    @classmethod
    def _names(cls, value: dict[str, ModelConfig]) -> dict[str, ModelConfig]:
        for name in value:
            check_expert_name(name)
        return value


Axis = Literal["expert", "layer_group", "module_group"]


_Method = Annotated[str | tuple[str, ...], BeforeValidator(one_or_several)]


class ParameterConfig(_Strict):
    """How one merge parameter is searched. The defaults depend on the method."""

    low: float | None = None
    high: float | None = None
    per: tuple[Axis, ...] | None = None
    """the axes along which it has separate values, () = one value for all; default: every axis that the space declares"""

    @model_validator(mode="before")
    @classmethod
    def _bounds(cls, data: Any) -> Any:
        if isinstance(data, int | float | list) and not isinstance(data, bool):
            raise ValueError(
                "expected bounds such as {low: 0, high: 1}; a parameter that is not searched belongs in space.fixed"
            )
        return data


class CrossoverConfig(_Strict):
    """How `m2n2` crosses models."""

    split: Literal["element", "tensor"] = "element"
    """where split points may lie; tensor: only between tensors, which mergekit can express too"""
    angle: Literal["global", "segment"] = "global"
    """the angle of the interpolation: between the whole models (released code), or between each side of a split (paper)"""


class StackingConfig(_Strict):
    """Stacking, repeating, skipping and scaling layers of several models (docs/stacking.md)."""

    encoding: Literal["indicator", "categorical", "moves", "swap"] = "indicator"
    """how a path through the layers is encoded; docs/stacking.md says which to pick"""
    models: dict[str, tuple[int, int] | None] | None = None
    """model name (of models.experts, "base", or "merged") -> [first, last) layers that may be used, null = all; default: every expert"""
    ends: str | None = None
    """the model that provides embeddings, head and the fixed layers; default: the first of `models`, or "merged" with `parameters`"""
    repeats: int = Field(default=1, ge=1, le=16)
    """indicator: how many times a path may go through the sequence of all layers (published: 3)"""
    n_moves: int | None = Field(default=None, ge=1)
    """moves: length of the walk; default: twice the number of free layers"""
    fixed_first: int = Field(default=1, ge=0)
    """every path starts with this many first layers of the ends model (published: 1)"""
    fixed_last: int = Field(default=1, ge=0)
    """every path ends with this many last layers of the ends model (published: 1)"""
    min_depth: int | None = Field(default=None, ge=1)
    """minimum number of layers; default: the number of fixed layers"""
    max_depth: int | None = Field(default=None, ge=1)
    """maximum number of layers, for which the engine reserves memory; default: 1.5 times the ends model's"""
    scales: Literal["none", "slot", "matrix"] = "slot"
    """factors on the hidden state at the input of each layer; matrix: one per pair of layers (indicator only, as published)"""
    scale_low: float | None = Field(default=None, gt=0)
    scale_high: float | None = Field(default=None, gt=0)
    """scales are searched on a logarithmic axis between these bounds, which must include 1; default: 0.5 and 2, closer to 1 if the
    product over many layers could overflow the dtype"""
    parameters: bool = False
    """also search a merge by space.method (linear or task_arithmetic), whose layers are those of the model "merged" """

    @field_validator("models", mode="before")
    @classmethod
    def _names_only(cls, value: Any) -> Any:
        if isinstance(value, list | dict) and not value:
            raise ValueError(
                "is empty, so there are no layers to stack; name at least one model, or leave it out to use every expert"
            )
        names = isinstance(value, list) and all(isinstance(name, str) for name in value)
        return dict.fromkeys(value) if names else value

    @model_validator(mode="after")
    def _fitting(self) -> "StackingConfig":
        for name, default, encoding in (("repeats", 1, "indicator"), ("n_moves", None, "moves")):
            if getattr(self, name) != default and self.encoding != encoding:
                raise ValueError(f"{name} is an option of encoding {encoding}, not {self.encoding}")
        if self.scales == "matrix" and self.encoding != "indicator":
            raise ValueError(f"scales: matrix needs encoding indicator; {self.encoding} takes none or slot")
        if self.encoding == "swap" and (self.min_depth or self.max_depth):
            raise ValueError("encoding swap keeps the depth of the ends model; leave out min_depth and max_depth")
        return self


class SpaceConfig(_Strict):
    """The search space."""

    method: _Method = "task_arithmetic"
    """a merge method (docs/merge-methods.md lists them), or a list of methods to choose from during the search"""
    parameters: dict[str, ParameterConfig] | None = None
    """what is searched; default: the method's usual parameters"""
    fixed: dict[str, float | bool] = Field(default_factory=dict)
    """parameters held at one value, e.g. {density: 0.5}; if weights of ties or della are searched, normalize is false unless given here"""
    layer_groups: int | tuple[tuple[int, int], ...] = 1
    """number of equal groups of consecutive layers, or explicit [first, last) ranges"""
    smooth: bool = False
    """layers interpolate between `layer_groups` values, spread evenly over depth, instead of sharing one per group (mergekit's gradients)"""
    module_groups: tuple[str, ...] = ()
    """any of attention, mlp, embeddings, norms, then rest; empty = all tensors of a layer share a value. For `m2n2`: groups with a split point each"""
    crossover: CrossoverConfig = CrossoverConfig()
    """for `m2n2`, which uses only this, `module_groups` and `out_dtype` of the space"""
    out_dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """the dtype that merged weights are rounded to; default: the base model's dtype"""
    stacking: StackingConfig | None = None
    """search the order of layers; None: search only merges of models of the same shape"""

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods to choose from; a tuple of one if there is no choice."""
        return (self.method,) if isinstance(self.method, str) else self.method

    @property
    def searches_weights(self) -> bool:
        """Whether the parameter `weight` is searched, for methods that have it."""
        return self.parameters is None or "weight" in self.parameters

    @property
    def merge_settings(self) -> list[str]:
        """The names of the merge settings that differ from their defaults."""
        defaults = SpaceConfig()
        names = ("method", "parameters", "fixed", "layer_groups", "smooth")
        return [name for name in names if getattr(self, name) != getattr(defaults, name)]


class TaskConfig(_Strict):
    """One task, or a group of tasks with one score (docs/tasks.md). In YAML, just the path of its file or its lm-eval name is enough."""

    task: str
    name: str | None = Field(default=None, min_length=1)
    """name of its objective; default: the task's own name"""
    metric: str | None = None
    """default: the task's first metric"""
    splits: dict[Literal["search", "select", "report"], str] = Field(default_factory=dict)
    """evomerge's split -> the data set's split, or a part of it, e.g. train[:60%]; default: the same names"""
    limit: int | None = Field(default=None, ge=1)
    """use only the first `limit` items of every split"""
    num_fewshot: int | None = Field(default=None, ge=0)
    """number of few-shot examples before each item; default: the task's own number"""
    drop_shared: bool = False
    """if splits share items, drop them from search (shared with select or report) and select (shared with report), instead of refusing the task"""
    search_on_test: bool = False
    """allow searching on the split that lm-eval scores a named benchmark on; the results are then not comparable with published scores"""


class ObjectiveConfig(_Strict):
    """One objective. In YAML, just its name is enough."""

    name: str
    """a task's name or cost.<key>, e.g. cost.generated_tokens or cost.layers"""
    direction: Literal["maximize", "minimize"] | None = None
    """default: maximize for tasks and cost.tokens_per_second, minimize for other costs; required for a task whose metric is better when lower"""
    weight: float | None = Field(default=None, ge=0.0)
    """weight in the mean of all objectives, which picks the best candidate and is what single-objective strategies optimise; default: 1, but 0 for
    a cost if there are also scores"""
    reference: float | None = None
    """coordinate of the hypervolume's reference point; default: 0 for a maximised task, otherwise the worst baseline"""


class StrategyConfig(_Strict):
    """The search strategy; every other key is an option, which the strategy checks."""

    model_config = ConfigDict(extra="allow")

    name: str = "cma_es"
    """a strategy (docs/strategies.md), or auto: the one recommended there for the objectives, the space and the budget"""

    @property
    def options(self) -> dict[str, Any]:
        """The keys besides `name`."""
        return dict(self.model_extra or {})


class LmEvalConfig(_Strict):
    """Scores candidates on lm-eval tasks with a running engine."""

    kind: Literal["lm_eval"] = "lm_eval"
    search_items: int | None = Field(default=None, ge=2)
    """score every candidate on this many items of each task's search split (for a group: in total), drawn once with the seed; default: all"""
    apply_chat_template: bool = False
    """format every item as a conversation with the tokenizer's chat template, for chat models"""
    system_instruction: str | None = None
    """goes before every task's own description"""
    fewshot_as_multiturn: bool = True
    """with a chat template: few-shot examples are earlier turns of the conversation; false: part of one question"""
    trust_task_code: bool = False
    """allow task files with Python code (`!function`) and tasks that run code written by the model, in a sandbox"""
    task_code_timeout_s: float = Field(default=300.0, gt=0)
    """time limit for scoring one candidate's answers to one such task"""


class SyntheticConfig(_Strict):
    """Scores candidates with a test function instead of models, to test and plan runs."""

    kind: Literal["synthetic"] = "synthetic"
    function: str = "sphere"
    dimension: int = Field(default=4, ge=1, le=1_000_000)
    n_items: int = Field(default=100, ge=2, le=1_000_000)
    item_noise: float = Field(default=0.0, ge=0)
    delay_s: float = Field(default=0.0, ge=0)
    failure_rate: float = Field(default=0.0, ge=0, le=1)


class EngineConfig(_Strict):
    """The inference engine of a worker. In YAML, just its kind is enough."""

    kind: Literal["auto", "vllm", "transformers"] = "auto"
    """auto: vllm if it is installed, otherwise transformers"""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """compute dtype; auto: float32 on CPU, the model's own on a GPU"""
    tensor_parallel: int = Field(default=1, ge=1)
    """number of processes (on GPUs: one GPU each) per vLLM engine"""
    max_model_len: int | None = Field(default=None, ge=8)
    """longest sequence in tokens; default: the model's"""
    options: dict[str, Any] = Field(default_factory=dict)
    """passed to the engine unchanged"""

    @field_validator("options")
    @classmethod
    def _plain(cls, value: dict[str, Any]) -> dict[str, Any]:
        try:
            canonical_json(value)
        except (TypeError, ValueError) as problem:
            raise ValueError(
                f"may contain only strings, finite numbers, true, false, null, and lists and mappings of these ({problem})"
            ) from None
        return value

    @model_validator(mode="after")
    def _parallel(self) -> "EngineConfig":
        if self.tensor_parallel > 1 and self.kind == "transformers":
            raise ValueError("tensor_parallel needs kind: vllm; the transformers engine runs in one process")
        if "tensor_parallel_size" in self.options:
            raise ValueError("use tensor_parallel instead of options.tensor_parallel_size")
        return self


class ClusterConfig(_Strict):
    """Where candidates are evaluated."""

    kind: Literal["ray", "local"] = "ray"
    """local: inside this process, one thread per worker, without timeouts and retries"""
    workers: int | Literal["auto"] = "auto"
    """auto: one per GPU, or without GPUs one per CPU core; with kind local one"""
    gpus_per_worker: float | None = Field(default=None, ge=0)
    """default: one per process of the engine (engine.tensor_parallel); ignored if the cluster has no GPU"""
    cpus_per_worker: float | None = Field(default=None, gt=0)
    """CPU cores per worker; default: 1, but with GPUs a worker computes with its share of the cores of its node"""
    address: str | None = None
    """a running Ray cluster ("auto", "ray://host:10001"); default: start a local one"""
    max_attempts: int = Field(default=2, ge=1)
    """how often an evaluation is tried whose worker dies or hangs, before it counts as failed"""
    evaluation_timeout_s: float = Field(default=3600, gt=0)
    startup_timeout_s: float = Field(default=1800, gt=0)
    on_interrupt: Literal["finish", "abandon"] = "finish"
    """whether the first Ctrl-C waits for running evaluations; a resumed run starts abandoned ones again"""

    @field_validator("workers")
    @classmethod
    def _positive(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError(f"must be at least 1 or 'auto' (got {value})")
        return value

    @model_validator(mode="after")
    def _used(self) -> "ClusterConfig":
        if self.kind == "local" and self.address is not None:
            raise ValueError(
                f"address: {self.address} has no effect with kind: local; set kind to ray, or leave address out"
            )
        return self


class BudgetConfig(_Strict):
    """When to stop searching: at whichever limit is reached first."""

    evaluations: int | None = Field(default=None, ge=1)
    """candidates scored on the search split, baselines included"""
    items: int | None = Field(default=None, ge=1)
    """items scored on the search split"""
    hours: float | None = Field(default=None, gt=0)
    """wall time over all sessions of the run"""

    @model_validator(mode="after")
    def _something(self) -> "BudgetConfig":
        if self.evaluations is None and self.items is None and self.hours is None:
            raise ValueError("give at least one of evaluations, items, hours")
        return self


class BaselinesConfig(_Strict):
    """What the search is compared with; baselines are evaluated first."""

    sources: bool = True
    uniform: bool = True
    task_arithmetic: tuple[float, ...] = (0.3, 0.5, 0.8, 1.0)
    """task arithmetic at each of these weights; needs a base"""
    recipes: Annotated[
        tuple[str, ...], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
    ] = ()
    """recipe files (evomerge's or mergekit's) over the same models, relative to the config file; the search starts from those that lie in its space"""


class FinalsConfig(_Strict):
    """What happens after the search: finalists are ranked on `select`, the best is scored on `report`."""

    finalists: int = Field(default=8, ge=0)
    """how many of the search's candidates (the best by mean, and of the front) are ranked on `select`, together with all baselines; 0 = no finals"""


class SearchConfig(_Strict):
    """A search."""

    name: str | None = None
    """names the run directory; default: the config file's name"""
    needs: str | None = None
    """a note on where to get the models and tasks, shown when one is missing"""
    seed: int = Field(default=0, ge=0, lt=2**63)
    models: ModelsConfig | None = None
    method: _Method | None = None
    """short for space.method"""
    space: SpaceConfig = SpaceConfig()
    tasks: Annotated[tuple[TaskConfig, ...], short_for_each("task")] = ()
    objectives: Annotated[tuple[ObjectiveConfig, ...], short_for_each("name")] = ()
    """default: every task"""
    strategy: Annotated[StrategyConfig, short_for("name")] = StrategyConfig()
    evaluation: Annotated[LmEvalConfig | SyntheticConfig, Field(discriminator="kind")] = LmEvalConfig()
    engine: Annotated[EngineConfig, short_for("kind")] = EngineConfig()
    cluster: ClusterConfig = ClusterConfig()
    budget: BudgetConfig
    baselines: BaselinesConfig = BaselinesConfig()
    finals: FinalsConfig = FinalsConfig()
    deterministic: bool = False
    """apply results in submission order: every run with the same number of workers finds the same front, at the cost of some waiting"""

    @property
    def base_key(self) -> str | None:
        """The base's name in recipes; None without a base."""
        return self.models.base.key if self.models and self.models.base else None

    @property
    def expert_keys(self) -> dict[str, str]:
        """Every expert's name -> its name in recipes; empty for the synthetic evaluation."""
        return {name: model.key for name, model in self.models.experts.items()} if self.models else {}

    @model_validator(mode="before")
    @classmethod
    def _weights(cls, data: Any) -> Any:
        return weights_of_objectives(data)

    @field_validator("evaluation", mode="before")
    @classmethod
    def _evaluation_kind(cls, value: Any) -> Any:
        return {"kind": "lm_eval", **value} if isinstance(value, dict) else value

    @field_validator("name")
    @classmethod
    def _plain_name(cls, value: str | None) -> str | None:
        if value is not None and (
            not value.strip() or value.startswith(".") or not value.isprintable() or "/" in value or "\\" in value
        ):
            raise ValueError(f"{value!r} must be printable, without path separators, and not start with a dot")
        return value

    @model_validator(mode="after")
    def _complete(self) -> "SearchConfig":
        if isinstance(self.evaluation, LmEvalConfig):
            if self.models is None:
                raise ValueError("models: is missing (what should be merged?)")
            if not self.tasks:
                raise ValueError("tasks: is missing (what should the merged model be good at?)")
            if self.cluster.kind == "local" and self.cluster.workers not in ("auto", 1):
                raise ValueError("cluster.kind local runs one engine; set cluster.workers to 1, or cluster.kind to ray")
        elif self.models is not None or self.tasks or self.baselines.recipes:
            raise ValueError(
                "the synthetic evaluation uses neither models, tasks nor baselines.recipes; leave them out"
            )
        if self.method is not None and "method" in self.space.model_fields_set and self.method != self.space.method:
            one, other = ([*text] if isinstance(text, tuple) else text for text in (self.method, self.space.method))
            raise ValueError(f"method is {one!r} but space.method is {other!r}; give only one of them")
        return self
