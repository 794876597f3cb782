import os
import sys

from evomerge.engine import engine_environment

# Before torch and vLLM start, as a worker's launcher does it.
os.environ.update(engine_environment())
if "torch" in sys.modules:
    # More threads than free cores make tiny models ten times slower.
    sys.modules["torch"].set_num_threads(1)
