"""The demo models and tasks: one small base and three experts, trained on the spot from text that this package makes.

**What is trained.** A Llama of 0.76M parameters (4 layers, width 128, tied embeddings, one token a word) and three
fine-tuned copies of it, each good at one skill and poor at the others':

| expert | skill | task |
|---|---|---|
| `largest` | `largest nine or forty two or seven is` -> `forty two` | generation, exact match |
| `reverse` | `reverse k a t e is` -> `e t a k` | generation, exact match |
| `translate` | `translate red cat sees bird is` -> four words of an invented language, in its own order | four choices |

**Why like this.** Experts of this size merge only if their base has already seen every format, so the base is trained on a
mixture of all three and stopped while it is still poor at them: each format's share falls once its held-out accuracy
reaches a threshold, and training ends when all have. An expert then learns its own skill and is held to the base's answers
on the other skills' prompts by a KL term. The experts are unequal, as experts found in the wild are: `largest` is trained
longer and at a higher rate than it needs, `reverse` gently, and `translate` must put a word list into its weights. One
coefficient for all of them is therefore a poor compromise, and what a search has to find is which expert counts how much in
which part of the network.

**Reproducible.** All text, weights and the order of training come from one seed; every model is trained by a process of its
own on one thread, so the same machine gives the same bits however busy it is. Training stops on accuracy, not on a step
count, so that another processor's rounding cannot leave a skill unlearnt. A prompt's split (training, held out, `search`,
`select`, `report`) is a hash of its text: no seed can mix them.

Importing this package loads neither torch nor transformers.
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
