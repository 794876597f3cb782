"""The transformers engine: plain PyTorch forward passes over padded batches; the lightweight default if vLLM is not installed.

Knows nothing of tasks or merging.
"""

import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from evomerge.core import EngineError, FilePath, Json, loading_errors
from evomerge.engine.answers import AnswerDecoder
from evomerge.engine.base import GenerateRequest, Generation, LogLikelihood, LogLikelihoodRequest
from evomerge.engine.batching import batches
from evomerge.engine.checkpoint import CheckpointFolder
from evomerge.engine.greedy import cache_argument, decode_batch
from evomerge.engine.layout import EngineLayout
from evomerge.engine.requests import PromptGroup, check_generate, check_loglikelihood, group_by_prompt
from evomerge.engine.transformers_layout import live_layout
from evomerge.engine.usable import Usable
from evomerge.plan import WeightTarget
from evomerge.plan.model_header import is_derived

BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
"""Maximum number of padded tokens per forward pass, which bounds its memory. On a CPU larger batches no longer fit in the caches: a
0.8M-parameter model took 1.5 times as long at 8192."""

_POSITIONS_AT_ONCE = 2048
"""Number of positions whose log-probabilities are computed at a time. For long texts, a float32 copy of all logits would take gigabytes."""


class TransformersEngine:
    """A transformers causal language model in this process, on the GPU if there is one.

    Args:
        model: Hugging Face folder (safetensors, tokenizer). The engine serves its weights until the first `update`.
        dtype: of weights and activations; "auto" = float32 on a CPU, the checkpoint's on an accelerator.
        max_model_len: longest sequence in tokens; None = the config's `max_position_embeddings` or `max_seq_len`.
        options: further keyword arguments of `AutoModelForCausalLM.from_pretrained`, passed on unchanged.

    Raises:
        EngineError: transformers cannot load the folder, or the model's parameters are not the checkpoint's tensors.
    """

    def __init__(
        self,
        model: FilePath,
        *,
        dtype: str = "auto",
        max_model_len: int | None = None,
        options: Mapping[str, Json] | None = None,
    ) -> None:
        self._usable = Usable(f"transformers engine of {model}")
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if dtype == "auto" and self._device.type == "cpu":
            dtype = "float32"
        folder = Path(model)
        with CheckpointFolder(folder) as checkpoint:
            self._model, tokenizer = _load(folder, dtype, self._device, options or {})
            self._layout = live_layout(self._model, checkpoint, self._load_another)
        config = self._model.config.get_text_config()
        self._max_length = _max_length(max_model_len, config)
        self._vocab_size = int(config.vocab_size)
        self._batch_tokens = BATCH_TOKENS[self._device.type]
        self._decoder = AnswerDecoder(tokenizer, self._vocab_size)
        self._end_tokens = _end_tokens(self._model, tokenizer)

    def _load_another(self, tensors: Mapping[str, torch.Tensor]) -> Any:
        """A model of the same class and configuration with other weights, on the CPU."""
        with _quiet_transformers():
            return type(self._model).from_pretrained(
                None, config=self._model.config, state_dict=dict(tensors), dtype=self._model.dtype
            )

    @property
    def max_length(self) -> int:
        """Longest sequence (prompt + continuation) in tokens."""
        return self._max_length

    @property
    def is_sharded(self) -> bool:
        """Always False: the model is in this process."""
        return False

    def update(self, write: Callable[[WeightTarget], None]) -> None:
        """Replace the weights in place; see `Engine.update`. Nothing is cached between calls, so there is no cache to clear.

        Exceptions from `write` propagate, and the engine is unusable until an update succeeds.
        """
        with self._usable.updating(), torch.no_grad():
            write(self._layout)

    def loglikelihood(self, requests: Sequence[LogLikelihoodRequest]) -> list[LogLikelihood]:
        """Log-probabilities of continuations; see `Engine.loglikelihood`. Computed in float32 from the model's logits.

        Continuations that differ only in their last token share one pass.
        """
        check_loglikelihood(requests, max_length=self._max_length, vocab_size=self._vocab_size)
        self._usable.check()
        answers: dict[int, LogLikelihood] = {}
        groups = sorted(group_by_prompt(requests), key=lambda group: -len(group.prompt))
        for batch in batches(groups, lambda group: len(group.prompt), self._batch_tokens):
            answers |= self._score(batch)
        return [answers[index] for index in range(len(requests))]

    @torch.inference_mode()
    def _score(self, batch: Sequence[PromptGroup]) -> dict[int, LogLikelihood]:
        """Request index -> answer, for one batch."""
        scored = _ScoredPositions(batch)
        # Padded on the right: under a causal mask no real token sees the padding, so no attention mask is needed.
        tokens = torch.tensor([[*group.prompt, *[0] * (scored.width - len(group.prompt))] for group in batch])
        places = torch.tensor(scored.places, device=self._device)

        def keep_scored(head: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            hidden, *rest = arguments
            return (hidden.flatten(0, 1)[places][None], *rest)

        # The output layer is the most expensive one, and only continuations need it: apply it to the scored positions alone.
        hook = self._model.get_output_embeddings().register_forward_pre_hook(keep_scored)
        try:
            logits = self._model(input_ids=tokens.to(self._device), use_cache=False).logits[0]
        finally:
            hook.remove()
        rows = torch.tensor(scored.rows, device=self._device)
        targets = torch.tensor(scored.targets, device=self._device)
        log_probabilities = logits.new_empty(len(rows), dtype=torch.float32)
        for first, piece in enumerate(logits.split(_POSITIONS_AT_ONCE)):
            inside = rows // _POSITIONS_AT_ONCE == first
            found = torch.log_softmax(piece.float(), dim=-1)[rows[inside] % _POSITIONS_AT_ONCE, targets[inside]]
            log_probabilities[inside] = found
        chosen = log_probabilities.tolist()
        greedy = (logits.argmax(dim=-1)[rows] == targets).tolist()
        answers: dict[int, LogLikelihood] = {}
        first = 0
        for index, length in scored.members:
            last = first + length
            total = math.fsum(chosen[first:last])
            if math.isnan(total):
                raise EngineError(
                    f"transformers engine: NaN log-probability in the answer to log-likelihood request {index}"
                )
            answers[index] = LogLikelihood(total, all(greedy[first:last]))
            first = last
        return answers

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Generation]:
        """Greedy continuations; see `Engine.generate`. A text also ends where `max_length` is reached."""
        check_generate(requests, max_length=self._max_length, vocab_size=self._vocab_size)
        self._usable.check()
        order = sorted(range(len(requests)), key=lambda index: -len(requests[index].prompt))
        answers: dict[int, Generation] = {}

        def room(index: int) -> int:
            return min(len(requests[index].prompt) + requests[index].max_tokens, self._max_length)

        for batch in batches(order, room, self._batch_tokens):
            generations = decode_batch(
                self._model,
                self._decoder,
                [requests[index] for index in batch],
                end_tokens=self._end_tokens,
                max_length=self._max_length,
                device=self._device,
            )
            answers.update(zip(batch, generations, strict=True))
        return [answers[index] for index in range(len(requests))]

    def close(self) -> None:
        """Drop the model and free its memory."""
        if self._usable.close():
            self._model = None
            self._layout = EngineLayout({}, ())
            gc.collect()
            if self._device.type == "cuda":
                torch.cuda.empty_cache()


def _load(folder: Path, dtype: str, device: torch.device, options: Mapping[str, Json]) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoTokenizer

    ours = {"dtype": dtype, "local_files_only": True, "output_loading_info": True, "trust_remote_code": False}
    try:
        with _quiet_transformers():  # hides its report on keys; relevant problems are raised below
            trusted = bool(options.get("trust_remote_code", False))
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trusted)
            if getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None:
                # the default in transformers, torch's fused attention, silently ignores the cap (Gemma 2)
                ours["attn_implementation"] = "eager"
            model, info = _class_for(config).from_pretrained(folder, **(ours | dict(options)))
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except loading_errors() as error:
        raise EngineError(f"transformers cannot load {folder}: {error}") from error
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    keys = {kind: sorted(key for key in info.get(kind, ()) if not is_derived(str(key))) for kind in kinds}
    wrong = {kind: found for kind, found in keys.items() if found}
    if wrong:
        raise EngineError(f"{folder}: tensors do not fit the architecture in config.json: {wrong}")
    if cache_argument(model) is None:
        raise EngineError(
            f"{folder}: {type(model).__name__} keeps its state in its own kind of cache, which the transformers engine does not support; "
            "use engine.kind: vllm"
        )
    model = model.eval().requires_grad_(False).to(device)
    if not _is_causal(model):
        raise EngineError(
            f"{folder}: {type(model).__name__} is not causal (a token attends to later tokens), so the transformers engine cannot score it"
        )
    return model, tokenizer


def _class_for(config: Any) -> Any:
    """The auto class for the model in config.json: image-text models are not registered as causal language models."""
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        with_images = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
        if with_images.__name__ in (config.architectures or ()):
            return AutoModelForImageTextToText
    return AutoModelForCausalLM


@torch.inference_mode()
def _is_causal(model: Any) -> bool:
    """Whether changing the last of three tokens leaves the logits of the others unchanged. PaliGemma's prompts attend to themselves in both directions."""
    last = int(model.config.get_text_config().vocab_size) - 1
    tokens = torch.tensor([[0, 1, 0], [0, 1, last]], device=model.device)
    one, other = model(input_ids=tokens, use_cache=False).logits[:, :2].float()
    return not bool((one - other).abs().max() > 0.01 * one.std())


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars and all log messages below errors."""
    from transformers.utils import logging

    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _max_length(asked: int | None, config: Any) -> int:
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
    if asked is None:
        if limit is None:
            raise EngineError(
                "transformers engine: config.json has no max_position_embeddings; set engine.max_model_len"
            )
        return int(limit)
    if limit is not None and asked > limit:
        raise EngineError(
            f"transformers engine: max_model_len {asked} exceeds the model's max_position_embeddings {limit}"
        )
    return asked


def _end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """End-of-text tokens: the tokenizer's and the generation config's."""
    found = getattr(model.generation_config, "eos_token_id", None)
    ends = set(found) if isinstance(found, (list, tuple)) else {found}
    return frozenset(int(end) for end in ends | {tokenizer.eos_token_id} if end is not None)


class _ScoredPositions:
    """Which positions of a padded batch need logits, and which tokens each request needs there.

    Attributes:
        width: number of tokens in a padded row.
        places: positions that need logits, as indices into the flattened batch, each once.
        members: (request index, number of its continuation tokens).
        rows, targets: for each continuation token of each member in turn, the index into `places` that predicts it, and the token.
    """

    def __init__(self, batch: Sequence[PromptGroup]) -> None:
        self.width = max(len(group.prompt) for group in batch)
        self.places: list[int] = []
        self.members: list[tuple[int, int]] = []
        self.rows: list[int] = []
        self.targets: list[int] = []
        for row, group in enumerate(batch):
            # The token at position p is predicted at p - 1; the last token of a continuation follows the prompt.
            offset = len(self.places) - (group.start - 1)
            self.places += range(row * self.width + group.start - 1, row * self.width + len(group.prompt))
            for index, start, last in group.members:
                self.members.append((index, len(group.prompt) - start + 1))
                self.rows += range(offset + start - 1, offset + len(group.prompt))
                self.targets += (*group.prompt[start:], last)
