"""`evomerge merge` and `evomerge align`: the commands that write models."""

from pathlib import Path
from typing import Annotated

import typer

from evomerge.cli.options import flag
from evomerge.core import ConfigError

MaxMemory = Annotated[
    str | None,
    typer.Option(
        help="Memory limit for tensors, e.g. 4GB, besides about 0.5 GB for the program. (default: a few tensors)",
    ),
]


def merge(
    recipe: Annotated[
        Path,
        typer.Argument(help="Recipe file (evomerge's or mergekit's YAML); - for standard input.", show_default=False),
    ],
    out: Annotated[Path, typer.Argument(help="Folder to write the merged model to.", show_default=False)],
    dtype: Annotated[
        str | None,
        typer.Option(help="dtype to write instead of the recipe's: bfloat16, float16 or float32.", show_default=False),
    ] = None,
    shard_size: Annotated[str, typer.Option("--out-shard-size", help="Maximum size of a weight file.")] = "5GB",
    max_memory: MaxMemory = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="Where to compute; auto uses a GPU if there is one. Only cpu uses the compiled kernels. (default: cpu)",
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option("--num-threads", "-j", min=1, help="Number of threads. (default: torch's)", show_default=False),
    ] = None,
    random_seed: Annotated[
        int | None, typer.Option(min=0, help="Seed of random masks instead of the recipe's.", show_default=False)
    ] = None,
    trust_remote_code: Annotated[
        bool, flag("--trust-remote-code", help="Accept models that include code, and copy it (it is not run).")
    ] = False,
    overwrite: Annotated[bool, flag("--overwrite", help="Replace OUT if it already holds a model.")] = False,
    cuda: Annotated[bool, flag("--cuda", "--gpu-rich", help="Same as --device cuda.")] = False,
    always_so: Annotated[
        bool, flag("--copy-tokenizer", "--safe-serialization", "--write-model-card", "-v", hidden=True)
    ] = False,
    not_needed: Annotated[
        bool,
        flag(
            "--lazy-unpickle/--no-lazy-unpickle",
            "--low-cpu-memory/--no-low-cpu-memory",
            "--allow-crimes/--no-allow-crimes",
            "--async-write/--no-async-write",
            "--clone-tensors/--no-clone-tensors",
            "--read-to-gpu/--no-read-to-gpu",
            "--multi-gpu/--no-multi-gpu",
            "--quiet/--no-quiet",
            hidden=True,
        ),
    ] = False,
    no_effect: Annotated[str | None, typer.Option("--lora-merge-cache", "--write-threads", hidden=True)] = None,
) -> None:
    """Merge a recipe into a Hugging Face checkpoint.

    Takes any mergekit YAML: models, slices, modules, several documents, adapters as MODEL+ADAPTER, tokenizer rules, chat templates.
    Weights are read, merged and written a few tensors at a time; OUT appears only when it is complete.
    Models are folders, or ORG/NAME from the local hub cache (`hf download` puts them there).

    These options of mergekit-yaml are accepted and have no effect: --copy-tokenizer, --lazy-unpickle, --low-cpu-memory,
    --safe-serialization, --write-model-card, --async-write, --write-threads N, --clone-tensors, --read-to-gpu, --multi-gpu, --quiet, -v,
    --lora-merge-cache DIR, --allow-crimes (models of different architectures are refused in any case).
    """
    from evomerge.build import merge_recipe

    if cuda and not (device or "cuda").startswith("cuda"):
        raise ConfigError(f"--cuda and --device {device}: give only one of them")
    if threads is not None:
        import torch

        torch.set_num_threads(threads)

    merged = merge_recipe(
        Path("/dev/stdin") if str(recipe) == "-" else recipe,
        out,
        dtype=dtype,
        shard_size=shard_size,
        max_memory=max_memory,
        device=device or ("cuda" if cuda else "cpu"),
        seed=random_seed,
        trust_remote_code=trust_remote_code,
        overwrite=overwrite,
    )
    print(merged)


def align(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL",
            show_default=False,
            help="Experts: FOLDER or NAME=FOLDER; FOLDER+ADAPTER for LoRA; or ORG/NAME from the local hub cache.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the copies.", show_default=False)],
    base: Annotated[Path | None, typer.Option(help="The model they were fine-tuned from.", show_default=False)] = None,
    tokenizer: Annotated[
        str,
        typer.Option(
            metavar="union|base|NAME|FOLDER",
            help="Vocabulary: of all models together, of the base (without one: the first model), of a model, or of a folder with a tokenizer.",
        ),
    ] = "union",
    pad_to_multiple_of: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Round the number of embedding rows up to a multiple of N. (default: as many as the base; for a union, as the largest model)",
            show_default=False,
        ),
    ] = None,
    max_memory: MaxMemory = None,
    overwrite: Annotated[bool, flag("--overwrite", help="Replace copies in the folder.")] = False,
) -> None:
    """Give models one vocabulary, so that a search can merge them.

    Writes a copy of each model with its embedding rows in the order of one
    tokenizer. A token that a model lacks gets the base's row, otherwise that of
    the only model that has it, or the mean of those that have it. Models that
    already have this vocabulary are not copied.
    """
    from evomerge.build.commands.aligning import align_models

    aligned = align_models(
        models,
        out,
        base=base,
        tokenizer=tokenizer,
        pad_to_multiple_of=pad_to_multiple_of,
        max_memory=max_memory,
        overwrite=overwrite,
    )
    for line in aligned.lines():
        print(line)
