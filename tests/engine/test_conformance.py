import pytest

from evomerge.testing.engine_suite import CHECKS


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("engine", ["transformers-tied", "transformers-untied", "vllm-tied", "vllm-untied"])
def test_conformance(suite_of, engine, check):
    check(suite_of(engine))
