import pytest

from evomerge.engine import available_engines, make_engine
from evomerge.testing.engine_suite import CHECKS, EngineSuite


@pytest.fixture(scope="module", params=["transformers-tied", "transformers-untied", "vllm-tied", "vllm-untied"])
def suite(request, tmp_path_factory):
    kind, tied = request.param.split("-")
    if kind not in available_engines():
        pytest.skip(f"{kind} is not installed")
    suite = EngineSuite(
        lambda model, **settings: make_engine(kind, model, **settings),
        tmp_path_factory.mktemp("models"),
        tied=tied == "tied",
    )
    yield suite
    suite.close()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_conformance(suite, check):
    check(suite)
