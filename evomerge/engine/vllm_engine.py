"""The vLLM engine: an in-process `LLM` whose parameters are overwritten for every candidate.

Knows nothing of tasks, text (beyond decoding what was generated) or merging. Import it only in a process that may import torch;
`evomerge.engine.engine_environment` gives the environment variables that this process needs.
"""

import gc
import math
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from evomerge.core import EngineError, FilePath, Json
from evomerge.engine.answers import AnswerDecoder
from evomerge.engine.base import GenerateRequest, Generation, LogLikelihood, LogLikelihoodRequest
from evomerge.engine.checkpoint import CheckpointFolder
from evomerge.engine.environment import apply_engine_environment, vllm_targets_cpu
from evomerge.engine.patches import DISTRIBUTED_STATE, leave_log_probabilities_without_text
from evomerge.engine.requests import PromptGroup, check_generate, check_loglikelihood, group_by_prompt
from evomerge.engine.segments import SegmentKeeper, mapped_segments
from evomerge.engine.usable import Usable
from evomerge.engine.vllm_options import vllm_options_refused
from evomerge.engine.vllm_start import VLLM_ERRORS, check_served_as_meant, start_vllm
from evomerge.engine.vllm_weights import LiveWeights, ModelWeights, ShardedWeights
from evomerge.plan import WeightTarget

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput, SamplingParams

CPU_KV_CACHE_BYTES = 256 << 20
"""Size of the key-value cache of a CPU engine unless `kv_cache_memory_bytes` is set; vLLM's own default takes most of the memory."""
_MAX_TARGETS = 16
"""Maximum number of last tokens scored in one pass; vLLM allows 20 log-probabilities per token (`max_logprobs`) by default."""
_SHARDED = {"worker_extension_cls": "evomerge.engine.vllm_shard.Shard", "distributed_executor_backend": "mp"}
"""The workers of a tensor-parallel engine are child processes of this one, even in a Ray actor, where vLLM would ask Ray for more workers."""


class VllmEngine:
    """A vLLM engine in this process.

    Args:
        model: Hugging Face folder (safetensors, tokenizer). The engine serves its weights until the first `update`.
        dtype: of weights and activations; "auto" = float32 on a CPU, the checkpoint's on an accelerator.
        max_model_len: longest sequence in tokens; None = the model's own limit.
        options: further keyword arguments of `vllm.LLM`, passed on unchanged; they override evomerge's choices.

    Starting it seeds the process's global random generators (vLLM does this) and, on a CPU, disables torch.compile in the process.

    Raises:
        EngineError: vLLM is missing or its version is not supported, it cannot serve the model, or it keeps the weights in a form that cannot be
            replaced in place (such as quantised or permuted).
    """

    def __init__(
        self,
        model: FilePath,
        *,
        dtype: str = "auto",
        max_model_len: int | None = None,
        options: Mapping[str, Json] | None = None,
    ) -> None:
        self._usable = Usable(f"vLLM engine of {model}")
        if dtype == "auto" and vllm_targets_cpu():
            dtype = "float32"
        arguments = self._arguments(dtype=dtype, max_model_len=max_model_len) | dict(options or {})
        refused = vllm_options_refused(arguments)
        if refused:
            raise EngineError(f"vLLM engine: {'; '.join(refused)}")
        if arguments.get("tensor_parallel_size", 1) != 1:
            arguments |= _SHARDED
        apply_engine_environment()
        folder = Path(model)
        with CheckpointFolder(folder) as checkpoint:
            segments_before, processes_before = mapped_segments(os.getpid()), _children()
            self._llm: LLM | None = start_vllm(folder, arguments)
            DISTRIBUTED_STATE.acquire()
            self._poisoned = False
            self._segments: SegmentKeeper | None = None
            self._weights: LiveWeights | None = None
            try:
                processes = _children() - processes_before
                self._segments = SegmentKeeper(segments_before, processes) if processes else None
                self._weights = _weights(self._llm, folder, checkpoint)
            except BaseException:
                self.close()
                raise
        model_config = self._llm.model_config
        self._max_length = int(model_config.max_model_len)
        self._vocab_size = int(model_config.get_vocab_size())

    @cached_property
    def _decoder(self) -> AnswerDecoder:
        # Lazy: with `skip_tokenizer_init` there is no tokenizer, and log-likelihoods do not need one.
        return AnswerDecoder(self.llm.get_tokenizer(), self._vocab_size)

    @staticmethod
    def _arguments(**common: Json) -> dict[str, Any]:
        arguments: dict[str, Any] = common | {"use_tqdm_on_load": False}
        if vllm_targets_cpu():
            arguments |= {"enforce_eager": True, "kv_cache_memory_bytes": CPU_KV_CACHE_BYTES}
        else:
            # the default of some GPUs (FlashInfer on Blackwell) swaps or shuffles the weights of experts after loading
            arguments["moe_backend"] = "triton"
        return arguments

    @property
    def max_length(self) -> int:
        """Longest sequence (prompt + continuation) in tokens."""
        return self._max_length

    @property
    def is_sharded(self) -> bool:
        """Whether `tensor_parallel_size` is above 1."""
        return isinstance(self._weights, ShardedWeights)

    @property
    def llm(self) -> "LLM":
        """The `vllm.LLM` inside. Raises EngineError when closed."""
        self._usable.check_open()
        if self._llm is None:
            raise EngineError("vLLM engine: not started")
        return self._llm

    def update(self, write: Callable[[WeightTarget], None]) -> None:
        """Replace the weights in place; see `Engine.update`.

        Raises:
            EngineError: the engine is closed. Exceptions from `write` propagate, and the engine is unusable until an update succeeds.
        """
        with self._usable.updating():
            weights = self._clean_up()
            weights.write(write)

    def _clean_up(self) -> LiveWeights:
        """Clean up after a failed batch or NaN weights, and return the weights.

        Unfinished requests hold blocks of the prefix cache. NaN keys and values stay in freed blocks, and attention kernels
        multiply the unused end of a block by zero instead of skipping it, so later sequences become NaN too
        (vllm-project/vllm#641 and pull request 50283; Dao-AILab/flash-attention#2374 for the kernels of Hopper GPUs).
        """
        engine = self.llm.llm_engine
        if engine.has_unfinished_requests():
            engine.abort_request(list(engine.output_processor.request_states), internal=True)
        if self._weights is None:
            raise EngineError("vLLM engine: not started")
        if self._poisoned:
            self._weights.clear_caches()
            self._poisoned = False
        return self._weights

    def loglikelihood(self, requests: Sequence[LogLikelihoodRequest]) -> list[LogLikelihood]:
        """Log-probabilities of continuations; see `Engine.loglikelihood`.

        Each sequence is run without its last token, whose log-probability is requested as that of the next token. Continuations
        that differ only there therefore share one pass, and sequences may be `max_length` long. A common beginning, such as the
        context of several continuations, is computed once, through vLLM's prefix cache.

        A tie for the largest probability counts as not greedy, except at the last token, where vLLM's choice decides.
        """
        check_loglikelihood(requests, max_length=self._max_length, vocab_size=self._vocab_size)
        jobs = [
            (group, group.last_tokens[first : first + _MAX_TARGETS])
            for group in group_by_prompt(requests)
            for first in range(0, len(group.last_tokens), _MAX_TARGETS)
        ]
        outputs = list(self._run([group.prompt for group, _ in jobs], [self._scoring(*job) for job in jobs]))
        cut = [number for number, (group, _) in enumerate(jobs) if _lacks_scores(group, outputs[number])]
        parameters = [self._scoring(*jobs[number], read_cache=False) for number in cut]
        for number, output in zip(cut, self._run([jobs[number][0].prompt for number in cut], parameters), strict=True):
            outputs[number] = output
        answers: dict[int, LogLikelihood] = {}
        for (group, targets), output in zip(jobs, outputs, strict=True):
            for index, answer in _answers(group, targets, output):
                if math.isnan(answer.log_probability):
                    raise self._nan(f"log-likelihood request {index}")
                answers[index] = answer
        return [answers[index] for index in range(len(requests))]

    def _scoring(self, group: PromptGroup, targets: Sequence[int], *, read_cache: bool = True) -> "SamplingParams":
        from vllm.sampling_params import SamplingParams

        return SamplingParams(
            temperature=0.0,
            max_tokens=1,
            prompt_logprobs=0 if group.start < len(group.prompt) else None,
            # By default vLLM does not read the cache here, because tokens read from it get no log-probability.
            skip_reading_prefix_cache=not read_cache,
            logprob_token_ids=list(targets),
            flat_logprobs=True,
            detokenize=False,
            skip_clone=True,
        )

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Generation]:
        """Greedy continuations; see `Engine.generate`. A text also ends where `max_length` is reached."""
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        check_generate(requests, max_length=self._max_length, vocab_size=self._vocab_size)
        parameters = [
            SamplingParams(
                temperature=0.0,
                max_tokens=request.max_tokens,
                stop=list(request.stop),
                stop_token_ids=self._decoder.stop_tokens(request.stop),
                skip_special_tokens=not self._decoder.spans_special_tokens(request.stop),
                # Requested only to detect NaN: the arg max of NaN logits is a token like any other.
                logprobs=0,
                flat_logprobs=True,
                output_kind=RequestOutputKind.FINAL_ONLY,
                skip_clone=True,
            )
            for request in requests
        ]
        generations = []
        for index, output in enumerate(self._run([request.prompt for request in requests], parameters)):
            completion = output.outputs[0]
            if completion.cumulative_logprob is None or math.isnan(completion.cumulative_logprob):
                raise self._nan(f"generation request {index}")
            request, tokens = requests[index], list(completion.token_ids)
            has_end_token = completion.finish_reason == "stop" and not isinstance(completion.stop_reason, str)
            # not vLLM's own text, which is cut at whichever stop string is completed first
            text = self._decoder.answer(request.prompt, tokens[:-1] if has_end_token else tokens, request.stop)
            generations.append(Generation(text, len(tokens)))
        return generations

    def _nan(self, where: str) -> EngineError:
        self._poisoned = True
        return EngineError(
            f"vLLM engine: NaN log-probability in the answer to {where}; the weights contain or produce NaN"
        )

    def _run(
        self, prompts: Sequence[tuple[int, ...]], parameters: Sequence["SamplingParams"]
    ) -> Sequence["RequestOutput"]:
        """Answers in the order of the prompts. Empties the prefix cache first, so that answers depend on the weights and prompts only."""
        self._usable.check()
        if not prompts:
            return []
        if not self.llm.reset_prefix_cache():
            raise EngineError("vLLM engine: the prefix cache could not be reset, so answers would use stale states")
        inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        with self._usable.running():
            try:
                self.llm.enqueue(inputs, list(parameters), use_tqdm=False)
                leave_log_probabilities_without_text(self.llm)
                outputs: Sequence[RequestOutput] = self.llm.wait_for_completion(use_tqdm=False)
            except VLLM_ERRORS as error:
                self._poisoned = True
                raise EngineError(f"vLLM engine: a batch of {len(prompts)} requests failed ({error!r})") from error
            if len(outputs) != len(prompts):
                raise EngineError(f"vLLM engine: {len(prompts)} requests got {len(outputs)} answers")
        return outputs

    def close(self) -> None:
        """Stop vLLM and free its memory; other engines in the process keep running."""
        if self._usable.close() and self._llm is not None:
            engine = self._llm.llm_engine
            self._llm = None
            self._weights = None
            try:
                DISTRIBUTED_STATE.release(engine.engine_core.shutdown)
            finally:
                if self._segments is not None:
                    self._segments.close()
            del engine
            gc.collect()


def _children() -> set[int]:
    """Ids of all descendants of this process."""
    return {child.pid for child in psutil.Process().children(recursive=True)}


def _weights(llm: "LLM", model: Path, checkpoint: CheckpointFolder) -> LiveWeights:
    """The engine's live weights, in this process or its workers. Raises EngineError if they cannot be replaced in place."""
    check_served_as_meant(llm)
    if llm.llm_engine.vllm_config.parallel_config.tensor_parallel_size > 1:
        return ShardedWeights(llm, model, checkpoint.shapes)
    return ModelWeights(llm.apply_model(lambda module: module)[0], checkpoint, whole=True)


def _lacks_scores(group: PromptGroup, output: "RequestOutput") -> bool:
    """Whether tokens that need a log-probability were read from the prefix cache, because another sequence began with them too."""
    return group.start < len(group.prompt) and (output.num_cached_tokens or 0) >= group.start


def _answers(group: PromptGroup, targets: Sequence[int], output: "RequestOutput") -> list[tuple[int, LogLikelihood]]:
    """(request index, answer) for the members of `group` whose last token is in `targets`."""
    completion = output.outputs[0]
    next_token = completion.token_ids[0]
    scored = completion.logprobs
    # vLLM puts the sampled token first, then the targets in the requested order.
    last = dict(zip(targets, scored.logprobs[1 : 1 + len(targets)], strict=True))
    # With flat_logprobs and prompt_logprobs=0 there is one entry per token, for that token itself, up to the prompt's last. The first entry
    # varies: some of vLLM's model runners omit tokens read from the prefix cache, others have unusable entries there.
    flat = output.prompt_logprobs
    answers = []
    for index, start, token in group.members:
        if token not in last:
            continue
        total, greedy = last[token], token == next_token
        if start < len(group.prompt):
            n_scored = len(group.prompt) - start
            total += math.fsum(flat.logprobs[-n_scored:])
            greedy = greedy and all(rank == 1 for rank in flat.ranks[-n_scored:])
        answers.append((index, LogLikelihood(total, greedy)))
    return answers
