import pytest

from evomerge.engine.environment import vllm_targets_cpu
from evomerge.testing.engine_checks import CHECKS, check_engines_are_independent

pytestmark = [] if vllm_targets_cpu() else [pytest.mark.gpu]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("engine", ["transformers-tied", "transformers-untied", "vllm-tied", "vllm-untied"])
def test_conformance(suite_of, engine, check):
    check(suite_of(engine))


@pytest.mark.parametrize(
    "check", [check for check in CHECKS if check is not check_engines_are_independent], ids=lambda check: check.__name__
)
def test_conformance_over_two_processes(suite_of, check):
    """Tensor parallelism: two processes with one shard each must give the answers of one process."""
    check(suite_of("vllm-untied-sharded"))
