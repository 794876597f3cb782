"""vLLM's kernel scan and numba in the same process: the patch is needed, and in effect."""

import pytest

from evomerge.engine import available_engines
from evomerge.engine.environment import vllm_targets_cpu

pytestmark = [
    pytest.mark.skipif("vllm" not in available_engines(), reason="vLLM is not installed"),
    pytest.mark.skipif(not vllm_targets_cpu(), reason="the patch concerns vLLM's CPU build"),
]


def test_objects_without_a_plain_dict_are_skipped(monkeypatch):
    import sys
    import types

    import vllm.triton_utils.dispatcher as upstream

    from evomerge.engine.patches import tolerant_kernel_scan

    class Foreign:
        """Like llvmlite's wrappers of foreign functions: `__dict__` returns whatever the library answers."""

        @property
        def __dict__(self):
            return object()

    module = types.ModuleType("foreign_functions")
    module.wrapper = Foreign()
    monkeypatch.setitem(sys.modules, module.__name__, module)
    kernel, override = object(), object()
    module.kernel = kernel
    with pytest.raises(AttributeError, match="has no attribute 'get'"):
        upstream._rebind_kernels([(kernel, override)])
    with tolerant_kernel_scan():
        upstream._rebind_kernels([(kernel, override)])
    assert module.kernel is override, "the scan must still rebind the kernel"
    assert not hasattr(upstream, "vars"), "the patch must leave nothing behind"
