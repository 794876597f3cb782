"""What a search configuration may say: the schema, its defaults, and nothing else.

Read only by the composition root (`evomerge.build`) and the CLI. Validated once, never changed.
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
    """One model. In YAML a plain path will do, `path+lora` for one with an adapter."""

    path: str
    """folder of a Hugging Face checkpoint, relative to the config file, or ORG/NAME of one in the hub's cache"""
    lora: str | None = None
    """folder of a PEFT LoRA adapter that is merged into it, relative to the config file"""

    @property
    def key(self) -> str:
        """What recipes call it."""
        return self.path if self.lora is None else f"{self.path}+{self.lora}"


_Model = Annotated[ModelConfig, BeforeValidator(path_and_lora)]


def check_expert_name(name: str) -> None:
    """Raises ValueError where an expert cannot be called so."""
    if name == "base" or not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(
            f"expert name {name!r} must be letters, digits, '_', '-' and '.', begin with none of the last two, and not be 'base'"
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
    """How one merge parameter is searched. What is left out follows from the method."""

    low: float | None = None
    high: float | None = None
    per: tuple[Axis, ...] | None = None
    """the axes it has separate values for, () = one value for all; default: every axis that the space declares"""

    @model_validator(mode="before")
    @classmethod
    def _bounds(cls, data: Any) -> Any:
        if isinstance(data, int | float | list) and not isinstance(data, bool):
            raise ValueError(
                "expected bounds, {low: 0, high: 1}; a parameter that is not searched belongs under space.fixed"
            )
        return data


class CrossoverConfig(_Strict):
    """How `m2n2` crosses models."""

    split: Literal["element", "tensor"] = "element"
    """where a split point may lie; tensor: at the ends of tensors, which mergekit can express too"""
    angle: Literal["global", "segment"] = "global"
    """the angle of the interpolation: that of the whole models (released code), or of each side of a split (paper)"""


class StackingConfig(_Strict):
    """Layers of several models stacked, repeated, skipped and scaled (docs/stacking.md)."""

    encoding: Literal["indicator", "categorical", "moves", "swap"] = "indicator"
    """how a path is searched; docs/stacking.md says which to pick"""
    models: dict[str, tuple[int, int] | None] | None = None
    """model name (of models.experts, "base", or "merged") -> [first, last) layers that may be used, null = all; default: every expert"""
    ends: str | None = None
    """the model that gives embeddings, head and the fixed layers; default: the first of `models`, or "merged" with `parameters`"""
    repeats: int = Field(default=1, ge=1, le=16)
    """indicator: how many times the row of layers stands in a path (published: 3)"""
    n_moves: int | None = Field(default=None, ge=1)
    """moves: length of the walk; default: twice the free layers"""
    fixed_first: int = Field(default=1, ge=0)
    """how many first layers of the ends model begin every path (published: 1)"""
    fixed_last: int = Field(default=1, ge=0)
    """how many last layers of the ends model end every path (published: 1)"""
    min_depth: int | None = Field(default=None, ge=1)
    """fewest layers; default: the fixed ones"""
    max_depth: int | None = Field(default=None, ge=1)
    """most layers, which the engine has memory for; default: one and a half times the ends model's"""
    scales: Literal["none", "slot", "matrix"] = "slot"
    """what multiplies the hidden state on entering a layer; matrix: by pair of layers (indicator only, as published)"""
    scale_low: float | None = Field(default=None, gt=0)
    scale_high: float | None = Field(default=None, gt=0)
    """scales are searched on a logarithmic axis between these, 1 included; default: 0.5 and 2, nearer to 1 where many layers could
    multiply up to more than the dtype holds"""
    parameters: bool = False
    """search the merge of space.method (linear or task_arithmetic) too: its layers are those of the model "merged" """

    @field_validator("models", mode="before")
    @classmethod
    def _names_only(cls, value: Any) -> Any:
        if isinstance(value, list | dict) and not value:
            raise ValueError(
                "is empty, so there is no layer to stack; name at least one model, or leave it out for every expert"
            )
        names = isinstance(value, list) and all(isinstance(name, str) for name in value)
        return dict.fromkeys(value) if names else value

    @model_validator(mode="after")
    def _fitting(self) -> "StackingConfig":
        for name, default, encoding in (("repeats", 1, "indicator"), ("n_moves", None, "moves")):
            if getattr(self, name) != default and self.encoding != encoding:
                raise ValueError(f"{name} belongs to the encoding {encoding}, not to {self.encoding}")
        if self.scales == "matrix" and self.encoding != "indicator":
            raise ValueError(f"scales: matrix belongs to the encoding indicator; {self.encoding} takes none or slot")
        if self.encoding == "swap" and (self.min_depth or self.max_depth):
            raise ValueError("the encoding swap keeps the depth of the ends model; leave min_depth and max_depth out")
        return self


class SpaceConfig(_Strict):
    """The search space."""

    method: _Method = "task_arithmetic"
    """a merge method (docs/merge-methods.md lists them), or a list of them among which the search chooses"""
    parameters: dict[str, ParameterConfig] | None = None
    """what is searched; default: the method's usual parameters"""
    fixed: dict[str, float | bool] = Field(default_factory=dict)
    """parameters with one value, e.g. {density: 0.5}; where weights of ties or della are searched, normalize is false unless it stands here"""
    layer_groups: int | tuple[tuple[int, int], ...] = 1
    """number of equal groups of consecutive layers, or explicit [first, last) ranges"""
    smooth: bool = False
    """layers interpolate between so many values, spread evenly over depth, instead of sharing one in each group (mergekit's gradients)"""
    module_groups: tuple[str, ...] = ()
    """some of attention, mlp, embeddings, norms, and last the rest; empty = all tensors of a layer share a value. For `m2n2`: groups with a split point each"""
    crossover: CrossoverConfig = CrossoverConfig()
    """for `m2n2`, which needs nothing else of the space"""
    out_dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """what merged weights are rounded to; default: the base model's dtype"""
    stacking: StackingConfig | None = None
    """search the order of layers; None: only the merge of models of one shape"""

    @property
    def methods(self) -> tuple[str, ...]:
        """The method, or those that the search chooses among."""
        return (self.method,) if isinstance(self.method, str) else self.method

    @property
    def searches_weights(self) -> bool:
        """Whether the parameter `weight` of methods that have it is searched."""
        return self.parameters is None or "weight" in self.parameters

    @property
    def merge_settings(self) -> list[str]:
        """Those settings of how models are merged that are not the defaults."""
        usual = SpaceConfig()
        names = ("method", "parameters", "fixed", "layer_groups", "smooth")
        return [name for name in names if getattr(self, name) != getattr(usual, name)]


class TaskConfig(_Strict):
    """One task, or a group of tasks with one score (docs/tasks.md). In YAML the path of its file or a name known to lm-eval will do."""

    task: str
    name: str | None = Field(default=None, min_length=1)
    """what its objective is called; default: the task's own name"""
    metric: str | None = None
    """default: the task's first metric"""
    splits: dict[Literal["search", "select", "report"], str] = Field(default_factory=dict)
    """our split -> the data set's split, or a part of it, e.g. train[:60%]; default: the same names"""
    limit: int | None = Field(default=None, ge=1)
    """use only the first so many items of every split"""
    num_fewshot: int | None = Field(default=None, ge=0)
    """solved examples before each item; default: as many as the task says"""
    drop_shared: bool = False
    """leave items out of search that stand in select or report too, and out of select those of report, instead of refusing the task"""
    search_on_test: bool = False
    """let the split that lm-eval scores a named benchmark on be searched on; its published scores then mean nothing for what is found"""


class ObjectiveConfig(_Strict):
    """One objective. In YAML the name will do."""

    name: str
    """a task's name or cost.<key>, e.g. cost.generated_tokens or cost.layers"""
    direction: Literal["maximize", "minimize"] | None = None
    """default: minimize for costs, maximize for tasks; a task of whose metric lower is better needs one"""
    weight: float | None = Field(default=None, ge=0.0)
    """what it counts in the mean of all, by which the best is chosen and strategies of one objective search; default 1, of a cost beside scores 0"""
    reference: float | None = None
    """the worst score that still counts in the hypervolume; default 0 for a task that is maximised, else the worst baseline"""


class StrategyConfig(_Strict):
    """The search strategy; every other key is an option of that strategy (checked by it)."""

    model_config = ConfigDict(extra="allow")

    name: str = "cma_es"
    """a strategy (docs/strategies.md), or auto: what that page advises for the objectives and the space"""

    @property
    def options(self) -> dict[str, Any]:
        """The keys besides `name`."""
        return dict(self.model_extra or {})


class LmEvalConfig(_Strict):
    """Scores candidates on lm-eval tasks with a running engine."""

    kind: Literal["lm_eval"] = "lm_eval"
    search_items: int | None = Field(default=None, ge=2)
    """score every candidate on so many items of each task's search split, drawn at random once by the seed; of a group, in all; default: all"""
    apply_chat_template: bool = False
    """put every item as a conversation, in the form of the tokenizer's chat template: for models that are tuned to chat"""
    system_instruction: str | None = None
    """stands before every task's own description"""
    fewshot_as_multiturn: bool = True
    """with a chat template: solved examples are earlier turns of the conversation; false: part of one question"""
    trust_task_code: bool = False
    """allow task files that name Python code (`!function`) and tasks that run what the model writes, in a sandbox"""
    task_code_timeout_s: float = Field(default=300.0, gt=0)
    """of scoring a candidate's answers to one such task"""


class SyntheticConfig(_Strict):
    """Scores candidates with a test function instead of models: to test and plan runs."""

    kind: Literal["synthetic"] = "synthetic"
    function: str = "sphere"
    dimension: int = Field(default=4, ge=1, le=1_000_000)
    n_items: int = Field(default=100, ge=2, le=1_000_000)
    item_noise: float = Field(default=0.0, ge=0)
    delay_s: float = Field(default=0.0, ge=0)
    failure_rate: float = Field(default=0.0, ge=0, le=1)


class EngineConfig(_Strict):
    """The inference engine of a worker. In YAML its kind will do."""

    kind: Literal["auto", "vllm", "transformers"] = "auto"
    """auto: vllm where it is installed"""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """what the engine computes in; auto: float32 on CPU, the model's own on a GPU"""
    tensor_parallel: int = Field(default=1, ge=1)
    """processes (on GPUs: one GPU each) that one vLLM engine is spread over"""
    max_model_len: int | None = Field(default=None, ge=8)
    """longest sequence in tokens; default: the model's"""
    options: dict[str, Any] = Field(default_factory=dict)
    """handed to the engine as they are"""

    @field_validator("options")
    @classmethod
    def _plain(cls, value: dict[str, Any]) -> dict[str, Any]:
        try:
            canonical_json(value)
        except (TypeError, ValueError) as problem:
            raise ValueError(
                f"only texts, finite numbers, true, false, null, lists and mappings of them ({problem})"
            ) from None
        return value

    @model_validator(mode="after")
    def _parallel(self) -> "EngineConfig":
        if self.tensor_parallel > 1 and self.kind == "transformers":
            raise ValueError("tensor_parallel needs kind: vllm; the transformers engine is one process")
        if "tensor_parallel_size" in self.options:
            raise ValueError("give tensor_parallel instead of options.tensor_parallel_size")
        return self


class ClusterConfig(_Strict):
    """Where candidates are evaluated."""

    kind: Literal["ray", "local"] = "ray"
    """local: inside this process, one thread a worker, without time limits and further attempts"""
    workers: int | Literal["auto"] = "auto"
    """auto: one per GPU, else one per CPU core; with kind local one"""
    gpus_per_worker: float | None = Field(default=None, ge=0)
    """default: one for each process of the engine (engine.tensor_parallel); ignored where the cluster has no GPU"""
    cpus_per_worker: float | None = Field(default=None, gt=0)
    """cores of its own; default: 1, but with GPUs it computes with as many as every node has for so many"""
    address: str | None = None
    """a running Ray cluster ("auto", "ray://host:10001"); default: start a local one"""
    max_attempts: int = Field(default=2, ge=1)
    """tries of an evaluation whose worker dies or hangs before it counts as failed"""
    evaluation_timeout_s: float = Field(default=3600, gt=0)
    startup_timeout_s: float = Field(default=1800, gt=0)
    on_interrupt: Literal["finish", "abandon"] = "finish"
    """what the first Ctrl-C does to evaluations that are running; a resumed run starts abandoned ones again"""

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
                f"address: {self.address} would not be used by kind: local; set kind to ray, or leave it out"
            )
        return self


class BudgetConfig(_Strict):
    """When to stop asking; whatever is reached first."""

    evaluations: int | None = Field(default=None, ge=1)
    """candidates scored on the search split, baselines included"""
    items: int | None = Field(default=None, ge=1)
    """items scored on the search split"""
    hours: float | None = Field(default=None, gt=0)
    """wall time, all sessions of the run together"""

    @model_validator(mode="after")
    def _something(self) -> "BudgetConfig":
        if self.evaluations is None and self.items is None and self.hours is None:
            raise ValueError("give at least one of evaluations, items, hours")
        return self


class BaselinesConfig(_Strict):
    """What every search is compared with, evaluated first."""

    sources: bool = True
    uniform: bool = True
    task_arithmetic: tuple[float, ...] = (0.3, 0.5, 0.8, 1.0)
    """weights of the task vectors; needs a base"""
    recipes: Annotated[
        tuple[str, ...], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
    ] = ()
    """recipe files (evomerge's or mergekit's) of these models, relative to the config file; a search starts from those that lie in its space"""


class FinalsConfig(_Strict):
    """What happens after the search: finalists are ranked on `select`, the best is scored on `report`."""

    finalists: int = Field(default=8, ge=0)
    """how many of the search's best candidates (mean of the objectives, and the front) are ranked on `select`, with all baselines; 0 = no finals"""


class SearchConfig(_Strict):
    """A search."""

    name: str | None = None
    """names the run directory; default: the config file's name"""
    needs: str | None = None
    """where the models and tasks come from: what the user is told where one is missing"""
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
    """results are applied in the order of submission: the same front on every run with as many workers, at the price of some waiting"""

    @property
    def base_key(self) -> str | None:
        """What recipes call the base; None without one."""
        return self.models.base.key if self.models and self.models.base else None

    @property
    def expert_keys(self) -> dict[str, str]:
        """The name of every expert -> what recipes call it; empty for the synthetic evaluation."""
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
                "the synthetic evaluation takes no models and no tasks, and has no recipes to compare with"
            )
        if self.method is not None and "method" in self.space.model_fields_set and self.method != self.space.method:
            one, other = ([*text] if isinstance(text, tuple) else text for text in (self.method, self.space.method))
            raise ValueError(f"method is {one!r} but space.method is {other!r}; give one")
        return self
