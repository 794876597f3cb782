import os

from evomerge.engine import engine_environment

# Before torch and vLLM start, as a worker's launcher does it.
os.environ.update(engine_environment())
