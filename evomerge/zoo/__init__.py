"""The demo models and tasks: one small base and three experts, trained locally on text that this package generates.

**What is trained.** A Llama of 0.76M parameters (4 layers, width 128, tied embeddings, one token per word) and three
fine-tuned copies of it, each good at one skill and poor at the others:

| expert | skill | task |
|---|---|---|
| `largest` | `largest nine or forty two or seven is` -> `forty two` | generation, exact match |
| `reverse` | `reverse k a t e is` -> `e t a k` | generation, exact match |
| `translate` | `translate red cat sees bird is` -> four words of an invented language, in its own order | four choices |

**Why.** Experts of this size can be merged only if their base has already seen every format, so the base is trained on a
mixture of all three and stopped while it is still poor at them: each format's share is reduced once its held-out accuracy
reaches a threshold, and training ends when all have reached theirs. An expert then learns its own skill, while a KL term keeps
its answers to the other skills' prompts close to the base's. The experts are unequal, like real ones: `largest` is trained
longer and at a higher rate than necessary, `reverse` gently, and `translate` must memorise a word list. A single coefficient
for all of them is therefore a poor compromise, and a search has to find the weight of each expert in each part of the network.

**Reproducibility.** All text, weights and the order of training come from one seed; every model is trained in a separate
process on one thread, so the same machine gives the same bits however busy it is. Training stops on accuracy instead of a step
count, so that another processor's rounding cannot leave a skill unlearnt. A prompt's split (training, held out, `search`,
`select`, `report`) is determined by a hash of its text, so no seed can mix the splits.

Importing this package imports neither torch nor transformers.
"""

from evomerge.zoo.build import ZooReport, build_zoo
from evomerge.zoo.settings import BaseSettings, ExpertSettings, ModelSettings, ZooSettings
from evomerge.zoo.skills import SKILLS
from evomerge.zoo.task_files import write_tasks

__all__ = [
    "SKILLS",
    "BaseSettings",
    "ExpertSettings",
    "ModelSettings",
    "ZooReport",
    "ZooSettings",
    "build_zoo",
    "write_tasks",
]
