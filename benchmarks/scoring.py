"""How much an engine computes for multiple-choice items, compared with what lm-eval's own vLLM backend asks of the same engine.

    python benchmarks/scoring.py [--items 6] [--json FILE.json]

A random Llama of 110M parameters in one vLLM engine (float32, on a CPU with one thread). Each case is a batch of items with four choices; contexts
share the examples that precede all of them, if the case has examples. Both ways answer the same requests in turn, each with an empty
prefix cache: evomerge's `loglikelihood`, and one request per choice with `prompt_logprobs=1`, as
lm_eval/models/vllm_causallms.py does. Prints the tokens that go through the model (prompts minus what the prefix cache held),
processor seconds, the lowest of the rounds, and the largest difference between log-probabilities.
"""

import argparse
import datetime
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # so that no processor time is spent waiting for other threads

from evomerge.engine import engine_environment

os.environ.update(engine_environment())

import numpy as np

from evomerge.engine import LogLikelihoodRequest
from evomerge.engine.vllm_engine import VllmEngine
from evomerge.testing.tiny_models import write_tiny_llama

MAX_LENGTH = 1024
VOCAB = 32000
N_CHOICES = 4
N_ROUNDS = 2


@dataclass(frozen=True)
class Case:
    """Numbers of tokens in the items of one case.

    Attributes:
        examples: of the solved examples, which are the same before every item.
        question: of an item's own question.
        choice: of each of an item's choices.
    """

    examples: int
    question: int
    choice: int


CASES = {
    "one token a choice": Case(0, 300, 1),
    "twelve tokens a choice": Case(0, 300, 12),
    "one token, after examples": Case(640, 60, 1),
    "twelve tokens, after examples": Case(640, 60, 12),
}


def requests_of(case: Case, n_items: int) -> list[LogLikelihoodRequest]:
    """Requests with random tokens."""
    random = np.random.default_rng(0)

    def tokens(n: int) -> tuple[int, ...]:
        return tuple(random.integers(3, VOCAB, n).tolist())

    examples = tokens(case.examples)
    contexts = [examples + tokens(case.question) for _ in range(n_items)]
    return [LogLikelihoodRequest(context, tokens(case.choice)) for context in contexts for _ in range(N_CHOICES)]


def as_lm_eval(llm: Any, requests: list[LogLikelihoodRequest]) -> list[float]:
    """Log-probabilities of the continuations from `prompt_logprobs`."""
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=0.0, prompt_logprobs=1, max_tokens=1, detokenize=False)
    prompts = [request.context + request.continuation for request in requests]
    llm.reset_prefix_cache()
    outputs = llm.generate([{"prompt_token_ids": list(prompt)} for prompt in prompts], parameters, use_tqdm=False)
    return [
        sum(output.prompt_logprobs[place][prompt[place]].logprob for place in range(len(request.context), len(prompt)))
        for request, prompt, output in zip(requests, prompts, outputs, strict=True)
    ]


def measured(llm: Any, answer: Callable[[], list[float]]) -> tuple[list[float], int, float]:
    """Answers, tokens that went through the model, and the lowest processor seconds."""
    computed: list[int] = []
    run_engine = llm._run_engine

    def counting(*arguments: Any, **settings: Any) -> Any:
        outputs = run_engine(*arguments, **settings)
        computed.extend(len(output.prompt_token_ids) - (output.num_cached_tokens or 0) for output in outputs)
        return outputs

    llm._run_engine = counting
    try:
        seconds = []
        for _ in range(N_ROUNDS):
            computed.clear()
            started = time.process_time()
            answers = answer()
            seconds.append(time.process_time() - started)
    finally:
        llm._run_engine = run_engine
    return answers, sum(computed), min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=6, help="of each case")
    parser.add_argument("--json", type=Path, help="write the rows there too")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        shape = {"intermediate_size": 2048, "num_attention_heads": 12, "max_position_embeddings": MAX_LENGTH}
        model = write_tiny_llama(
            Path(folder) / "model", seed=0, n_layers=12, hidden=768, vocab=VOCAB, init_std=0.02, **shape
        )
        engine = VllmEngine(model, dtype="float32", max_model_len=MAX_LENGTH)
        print("| case | tokens | as lm-eval asks | seconds | as lm-eval asks | times | largest difference |")
        print("|---|---|---|---|---|---|---|")
        for name, case in CASES.items():
            requests = requests_of(case, options.items)
            ours, n_ours, seconds = measured(
                engine.llm, lambda r=requests: [answer.log_probability for answer in engine.loglikelihood(r)]
            )
            theirs, n_theirs, their_seconds = measured(engine.llm, lambda r=requests: as_lm_eval(engine.llm, r))
            apart = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
            print(
                f"| {name} | {n_ours} | {n_theirs} | {seconds:.2f} | {their_seconds:.2f} | {their_seconds / seconds:.1f} | {apart:.0e} |",
                flush=True,
            )
            rows.append(
                {"case": name, "tokens": n_ours, "seconds": seconds, "lm_eval_tokens": n_theirs,
                 "lm_eval_seconds": their_seconds, "difference": apart}
            )  # fmt: skip
        engine.close()
    if options.json:
        facts = {"date": datetime.date.today().isoformat(), "machine": platform.processor() or platform.machine()}
        options.json.write_text(json.dumps({**facts, "items": options.items, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
