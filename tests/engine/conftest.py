import os
import sys

import pytest

from evomerge.engine import engine_environment, make_engine
from evomerge.testing.engines import cannot_start, options_beside_others

# Set before torch and vLLM start, as a worker's launcher does for either engine.
os.environ.update(engine_environment("transformers") | engine_environment())
if "torch" in sys.modules:
    # More threads than free cores make tiny models ten times slower.
    sys.modules["torch"].set_num_threads(1)


@pytest.fixture(scope="session")
def suite_of(tmp_path_factory):
    """suite_of("vllm-tied") or suite_of("vllm-tied-sharded") -> the conformance suite of that engine, started once for all test files."""
    from evomerge.testing.engine_suite import EngineSuite

    started = {}

    def suite_of(name):
        kind, tied, *sharded = name.split("-")
        problem = cannot_start(kind, 2 if sharded else 1)
        if problem:
            pytest.skip(problem)
        if name not in started:

            def start(model, **settings):
                options = {"tensor_parallel_size": 2} if sharded else {}
                return make_engine(kind, model, options=options | options_beside_others(kind), **settings)

            # two processes must give the same answers as one
            fresh = suite_of(f"{kind}-{tied}").fresh if sharded else None
            started[name] = EngineSuite(start, tmp_path_factory.mktemp(name), tied=tied == "tied", fresh=fresh)
        return started[name]

    yield suite_of
    for suite in started.values():
        suite.close()
