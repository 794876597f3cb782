"""Reads the metadata of a PEFT adapter folder: which tensors of its model a LoRA changes, and how. Reads no weights.

The formulas are PEFT's: W + s B A with s = alpha / r, or alpha / sqrt(r) for rank-stabilised adapters (arXiv 2106.09685, 2312.03732); with
DoRA, the rows of the result are scaled to the learned magnitudes (arXiv 2402.09353). Adapters that change the model in another way are refused by name.
"""

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from evomerge.core import CheckpointError
from evomerge.plan.model_folder import file_inside, file_stamp, read_json_file, unreadable_as_error
from evomerge.plan.model_header import Adapter, LoraUpdate, ModelHeader, TensorHeader, is_head
from evomerge.plan.safetensors_header import read_safetensors_header

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"

_REFUSED = {
    "use_qalora": "QA-LoRA",
    "layer_replication": "layer replication",
    "alora_invocation_tokens": "activated LoRA",
    "target_parameters": "LoRA of bare parameters",
    "trainable_token_indices": "trained single tokens",
    "lora_bias": "biases inside the adapter",
    "megatron_config": "Megatron layers",
}
"""settings that change the meaning of the adapter's tensors -> their description"""

_TAKEN_OUT = ("corda", "loftq", "lora_ga", "olora", "pissa")
"""prefixes of `init_lora_weights` for which PEFT extracts the initial factors from the model's weights, and so changes these"""

_FACTOR = re.compile(r"^(.+)\.lora_(?:embedding_)?(A|B)(?:\.weight)?$")
_MAGNITUDE = re.compile(r"^(.+)\.lora_magnitude_vector(?:\.weight)?$")


def read_adapter(folder: Path | str, model: ModelHeader) -> Adapter:
    """The metadata of the LoRA adapter in `folder`, which changes `model`.

    Raises:
        CheckpointError: the folder is unreadable or contains no adapter (perhaps a model), or the adapter is damaged, pickled, of an unsupported kind, or
            does not fit the model.
    """
    with unreadable_as_error(Path(folder)):
        return _read(Path(folder), model)


def _read(folder: Path, model: ModelHeader) -> Adapter:
    config = _read_config(folder)
    if not (folder / WEIGHTS_NAME).exists():
        _refuse_missing_weights(folder)
    path = file_inside(folder, WEIGHTS_NAME)
    tensors = {_model_name(name): tensor for name, tensor in read_safetensors_header(path, WEIGHTS_NAME).items()}
    factors: dict[str, dict[str, TensorHeader]] = {}
    replaced: dict[str, TensorHeader] = {}
    for name, tensor in tensors.items():
        if match := _FACTOR.match(name):
            factors.setdefault(match[1], {})[match[2]] = tensor
        elif match := _MAGNITUDE.match(name):
            factors.setdefault(match[1], {})["magnitude"] = tensor
        else:
            _check_replacement(folder, name, tensor, model)
            replaced[name] = tensor
    updates = {f"{module}.weight": _update(folder, module, parts, config, model) for module, parts in factors.items()}
    if not updates and not replaced:
        raise CheckpointError(f"{path}: contains no tensors; the adapter is damaged, download it again")
    return Adapter(folder, config, updates, replaced, {WEIGHTS_NAME: file_stamp(path)})


def _read_config(folder: Path) -> Mapping[str, Any]:
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such adapter folder")
    if not (folder / CONFIG_NAME).exists():
        if (folder / "config.json").exists():
            raise CheckpointError(
                f"{folder}: is a model, not a LoRA adapter (it has a config.json and no {CONFIG_NAME}); list it as a separate model"
            )
        raise CheckpointError(f"{folder}: has no {CONFIG_NAME}; expected an adapter folder written by PEFT")
    where = folder / CONFIG_NAME
    config = read_json_file(where)
    if not isinstance(config, dict):
        raise CheckpointError(f"{where}: expected a JSON object")
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{where}: peft_type {config.get('peft_type')!r} is not supported; only LORA is")
    for key, meaning in _REFUSED.items():
        if config.get(key):
            raise CheckpointError(
                f"{where}: {key} ({meaning}) is not supported by evomerge; merge the adapter into its model with PEFT first"
            )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_TAKEN_OUT):
        raise CheckpointError(
            f"{where}: init_lora_weights {start!r} changed the model's weights before training, so the factors do not fit the original "
            "model; convert the adapter with PEFT (path_initial_model_for_weight_conversion of save_pretrained), or merge it with PEFT first"
        )
    return config


def _refuse_missing_weights(folder: Path) -> NoReturn:
    if (folder / "adapter_model.bin").exists():
        raise CheckpointError(
            f"{folder}: has only pickled weights (adapter_model.bin), which can run code when loaded; save the adapter with "
            f"safetensors in a sandbox you trust"
        )
    raise CheckpointError(f"{folder}: has no {WEIGHTS_NAME}; download it again")


def _model_name(name: str) -> str:
    """The name without the parts that PEFT adds."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".modules_to_save.", ".")


def _check_replacement(folder: Path, name: str, tensor: TensorHeader, model: ModelHeader) -> None:
    """Check a tensor that was trained in full (`modules_to_save`, biases)."""
    if name not in model.tensors:
        _refuse_tied_head(f"{folder}: its tensor {name!r}", name, model)
        raise CheckpointError(
            f"{folder}: its tensor {name!r} is neither a LoRA factor nor a tensor of {model.folder}; "
            "the adapter belongs to another model or is of a kind that evomerge does not support"
        )
    if tensor.shape != model.tensors[name].shape:
        raise CheckpointError(
            f"{folder}: tensor {name!r} has shape {list(tensor.shape)}, but {list(model.tensors[name].shape)} in {model.folder}; "
            "if the adapter adds tokens, merge it into its model with PEFT first"
        )


def _refuse_tied_head(where: str, name: str, model: ModelHeader) -> None:
    """Raise CheckpointError if `name` is the output layer of a model that ties it to the embedding."""
    if model.tied and is_head(name):
        raise CheckpointError(
            f"{where}: the output layer of {model.folder} is tied to its embedding, which the adapter does not change with it; "
            "merge the adapter with PEFT into a model with an untied output layer (tie_word_embeddings: false)"
        )


def _update(
    folder: Path, module: str, parts: Mapping[str, TensorHeader], config: Mapping[str, Any], model: ModelHeader
) -> LoraUpdate:
    where = f"{folder}: adapter of {module!r}"
    target = model.tensors.get(f"{module}.weight")
    if target is None:
        _refuse_tied_head(where, f"{module}.weight", model)
        raise CheckpointError(f"{where}: {model.folder} has no such layer; the adapter belongs to another model")
    if "A" not in parts or "B" not in parts:
        raise CheckpointError(
            f"{where}: lora_{'B' if 'A' in parts else 'A'} is missing; the adapter is damaged, download it again"
        )
    a, b = parts["A"], parts["B"]
    transposed = ".lora_embedding_" in a.name or bool(config.get("fan_in_fan_out"))
    rank = a.shape[0] if len(a.shape) == 2 else 0
    product = (b.shape[0], a.shape[1]) if len(a.shape) == len(b.shape) == 2 and b.shape[1] == rank > 0 else None
    if product is None or target.shape != (product[::-1] if transposed else product):
        raise CheckpointError(
            f"{where}: the product of factors A {list(a.shape)} and B {list(b.shape)} does not have the layer's shape {list(target.shape)}; "
            "only adapters of linear layers and embeddings are supported"
        )
    magnitude = parts.get("magnitude")
    if magnitude is not None and (transposed or magnitude.shape != target.shape[:1]):
        raise CheckpointError(
            f"{where}: DoRA of a transposed layer, or with a magnitude that is not one number per row, is not supported"
        )
    scale = _alpha(config, module, where) / (rank**0.5 if config.get("use_rslora") else rank)
    return LoraUpdate(a, b, scale, transposed, magnitude)


def _alpha(config: Mapping[str, Any], module: str, where: str) -> float:
    """The value of the first `alpha_pattern` that matches the end of the module's name, as in PEFT; without one, `lora_alpha`."""
    patterns, alpha = config.get("alpha_pattern") or {}, config.get("lora_alpha")
    if not isinstance(patterns, dict):
        raise CheckpointError(f"{where}: alpha_pattern in {CONFIG_NAME} is {patterns!r}; expected a mapping")
    for pattern, value in patterns.items():
        try:
            matches = re.match(rf"(.*\.)?({pattern})$", module)
        except re.error as problem:
            raise CheckpointError(
                f"{where}: the pattern {pattern!r} of alpha_pattern in {CONFIG_NAME} is not a valid regular expression ({problem})"
            ) from None
        if matches:
            alpha = value
            break
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) <= sys.float_info.max:
        raise CheckpointError(f"{where}: lora_alpha in {CONFIG_NAME} is {alpha!r}; expected a finite number")
    return alpha
