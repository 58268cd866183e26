"""`tristage`: the command line. Nothing here imports torch or trl until a stage or a chat starts."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from rich.console import Console
from rich.table import Table

from pipeline.errors import UserError, disk_message, is_disk_error
from pipeline.exits import EXIT_USER_ERROR, print_error
from pipeline.load import dump_recipe, load_recipe
from pipeline.recipe_direct import DIRECT
from pipeline.runner import plan, prepare, run_process, run_stage, run_stages, show_start
from pipeline.stages import ORDER, run_directory

_OVERRIDES = "Any recipe key can be set as `--section.key value`; the command line beats the file."
_OPTIONS = {"--overwrite", "--prepare", "--dry-run", "--help", "-h"}
METHOD_TITLES = {
    "dpo": "Direct preference optimisation",
    "ipo": "Identity preference optimisation",
    "kto": "Kahneman-Tversky optimisation on answers labelled good or bad",
    "simpo": "SimPO: length-normalised and without a reference",
    "orpo": "ORPO: language-model loss and odds ratio",
    "ift": "Intuitive fine-tuning on good answers alone",
    "contrast": "SFT on texts that show a worse answer before the better one",
}
_OPTIONS_WITH_VALUE = {
    "--stages",
    "--policy",
    "--temperature",
    "--max-new-tokens",
    "--methods",
    "--seeds",
    "--budget",
    "--lm-eval",
    "--vs",
    "--gpus",
    "--gpu-memory",
    "--budget-hours",
    "--results",
    "--port",
    "--host",
    "--launcher",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `tristage` command. Exit code 2 and one paragraph for anything the user can mend."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    ours, overrides = _split(words)
    options = _parser().parse_args(ours)
    options.overrides = overrides
    options.command = ["tristage", *words]
    try:
        options.act(options)
        sys.stdout.flush()
    except UserError as error:
        print_error(str(error))
        sys.exit(EXIT_USER_ERROR)
    except BrokenPipeError:  # `tristage show | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if not is_disk_error(error):
            raise
        print_error(disk_message(error, Path.cwd()))
        sys.exit(EXIT_USER_ERROR)
    except KeyboardInterrupt:
        sys.exit(130)


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Parts the command's own words from recipe overrides (`--key value`, `--key=value`), wherever they stand."""
    ours: list[str] = []
    overrides: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name = word.partition("=")[0]
        if not word.startswith("-") or name in _OPTIONS:
            ours.append(word)
            continue
        target = ours if name in _OPTIONS_WITH_VALUE else overrides
        target.append(word)
        if "=" not in word and rest:
            target.append(rest.pop(0))
    return ours, overrides


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tristage",
        description="RLHF in three stages: sft, rm, ppo. A stage reads artifact directories and writes one.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, text: str, act: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=f"{text} {_OVERRIDES}", allow_abbrev=False)
        added.set_defaults(act=act)
        return added

    def with_recipe(added: argparse.ArgumentParser) -> argparse.ArgumentParser:
        added.add_argument("recipe", help="recipe file, such as recipes/demo.yaml")
        return added

    with_recipe(command("show", "Print the resolved recipe.", _show))
    with_recipe(command("plan", "Say what would run, be skipped or be refused.", _plan))
    texts = {
        "sft": "Supervised fine-tuning on demonstrations.",
        "rm": "Train the reward model on ranked answers.",
        "ppo": "PPO against the reward model with a KL penalty.",
    }
    texts |= {name: f"{what}, in place of rm and ppo." for name, what in METHOD_TITLES.items()}
    for name in (*ORDER, *DIRECT):
        added = with_recipe(command(name, texts[name], _stage(name)))
        added.add_argument("--overwrite", action="store_true", help="replace a stage made from something else")
        added.add_argument("--prepare", action="store_true", help="start nothing; say how to start the ranks by hand")
    added = with_recipe(command("run", "Run the stages in order.", _run))
    added.add_argument("--stages", default=",".join(ORDER), help="comma-separated, in order (default: %(default)s)")
    added.add_argument("--overwrite", action="store_true", help="replace stages made from something else")
    _compare_command(with_recipe(command("compare", "Train several methods and seeds; one report.", _compare)))
    added = with_recipe(command("generate", "Sample responses to the held-out prompts.", _generate))
    added.add_argument("--policy", default="", help="checkpoint to sample from (default: the PPO stage's)")
    added.add_argument("--overwrite", action="store_true", help="replace samples made from something else")
    added = with_recipe(command("evaluate", "Measure a policy on the held-out prompts.", _evaluate))
    added.add_argument("--policy", default="", help="checkpoint to measure (default: the PPO stage's)")
    added.add_argument("--overwrite", action="store_true", help="replace an evaluation of something else")
    _serve_command(with_recipe(command("serve", "Serve a policy with vLLM for `rollout.mode: server`.", _serve)))
    _launch_command(with_recipe(command("launch", "Submit the stages to a Slurm cluster, one job each.", _launch)))
    added = command("status", "Say how the stages of a run are, in jobs or not.", _status)
    added.add_argument("run", metavar="RUN", help="a run directory, such as runs/demo, or its recipe")
    _advise_command(with_recipe(command("advise", "Recommend a method for this data, with reasons.", _advise)))
    added = command("chat", "Talk to a policy in the terminal, or to two side by side.", _chat)
    added.add_argument("policy", help="a stage's directory, such as runs/demo/ppo, or a hub id")
    added.add_argument("--vs", metavar="POLICY", help="another one that answers the same, beside it")
    added.add_argument("--temperature", type=float, default=1.0)
    added.add_argument("--max-new-tokens", type=int, default=128)
    command("doctor", "Check versions, devices and engines; say what is wrong and how to mend it.", _doctor)
    return parser


def _compare_command(added: argparse.ArgumentParser) -> None:
    """Options that stand for keys of the recipe's section `compare`, and its own."""
    added.add_argument("--methods", help="comma-separated, such as sft,ppo,dpo (compare.methods)")
    added.add_argument("--seeds", help="number of training seeds (compare.seeds)")
    added.add_argument("--budget", help="held equal: steps=N, tokens=N or seconds=N; recipe (compare.budget)")
    added.add_argument("--lm-eval", action="append", default=[], metavar="METHOD=FILE", help="lm-eval results to show")
    added.add_argument("--overwrite", action="store_true", help="replace stages made from something else")


def _serve_command(added: argparse.ArgumentParser) -> None:
    added.add_argument(
        "--policy", default="", help="checkpoint of the model (default: ppo.policy, else the SFT stage's)"
    )
    added.add_argument("--port", type=int, help="port (default: that of rollout.server.url)")
    added.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")


def _launch_command(added: argparse.ArgumentParser) -> None:
    added.add_argument("--stages", default=",".join(ORDER), help="comma-separated, in order (default: %(default)s)")
    added.add_argument("--launcher", default="slurm", help="slurm, or jobset: a Kubernetes YAML, only written")
    added.add_argument("--dry-run", action="store_true", help="write the job scripts and submit nothing")


def _advise_command(added: argparse.ArgumentParser) -> None:
    added.add_argument("--gpus", type=int, metavar="N", help="GPUs to train on (default: those of this machine)")
    added.add_argument("--gpu-memory", type=float, metavar="GIB", help="memory of one GPU (default: as it says itself)")
    added.add_argument("--budget-hours", type=float, metavar="H", help="hours that one method's training may take")
    added.add_argument("--results", metavar="FILE", help="results.json of a comparison on this data")


def _show(options: argparse.Namespace) -> None:
    print(dump_recipe(load_recipe(options.recipe, options.overrides)), end="")  # noqa: T201


def _plan(options: argparse.Namespace) -> None:
    recipe = load_recipe(options.recipe, options.overrides)
    table = Table("stage", "reads", "writes", "now", title=f"{recipe.name}: {options.recipe}")
    words = {
        "done": "done, will be skipped",
        "stale": "needs --overwrite",
        "stale partial": "needs --overwrite",
        "later": "depends on its inputs",
    }
    planned = plan(recipe)
    for stage in planned:
        reads = "\n".join(f"{role}: {path}" for role, path in stage.inputs.items())
        table.add_row(stage.name, reads, str(stage.out), words.get(stage.state, stage.state))
    console = Console(highlight=False)
    console.print(table)
    for stage in planned:
        if stage.note:
            console.print(f"{stage.name}: {stage.note}", markup=False, soft_wrap=True)
    ppo = recipe.ppo
    console.print(
        f"ppo: {ppo.updates} updates of {ppo.rollout_batch_size} sequences; each {ppo.num_ppo_epochs} epochs x "
        f"{ppo.num_minibatches} minibatches = {ppo.num_ppo_epochs * ppo.num_minibatches} optimiser steps of "
        f"{ppo.rollout_batch_size // ppo.num_minibatches} sequences",
        soft_wrap=True,
    )


def _stage(name: str) -> Callable[[argparse.Namespace], None]:
    def act(options: argparse.Namespace) -> None:
        recipe = load_recipe(options.recipe, options.overrides)
        start = show_start if options.prepare else run_process
        run_stage(recipe, name, overwrite=options.overwrite, command=options.command, inputs={}, start=start)

    return act


def _run(options: argparse.Namespace) -> None:
    recipe = load_recipe(options.recipe, options.overrides)
    stages = options.stages.split(",")
    unknown = [name for name in stages if name not in (*ORDER, *DIRECT)]
    if unknown:
        raise UserError(f"--stages: unknown stage '{unknown[0]}'.", mend=f"Stages are {', '.join((*ORDER, *DIRECT))}.")
    run_stages(recipe, stages, overwrite=options.overwrite, command=options.command)


def _launch(options: argparse.Namespace) -> None:
    from pipeline.launch.submit import Request, launch

    recipe = load_recipe(options.recipe, options.overrides)
    stages = options.stages.split(",")
    launch(recipe, Request(options.recipe, options.overrides, stages, options.launcher, options.dry_run))


def _status(options: argparse.Namespace) -> None:
    from pipeline.launch.status import status

    run = Path(options.run)
    if run.suffix in (".yaml", ".yml") and not run.is_dir():
        status(run_directory(load_recipe(run, options.overrides)))
    else:
        _no_overrides(options)
        status(run)


def _compare(options: argparse.Namespace) -> None:
    keys = []
    for name, value in (("methods", options.methods), ("seeds", options.seeds), ("budget", options.budget)):
        if value is not None:
            keys += [f"--compare.{name}", f"[{value}]" if name == "methods" else value]
    lm_eval = {}
    for entry in options.lm_eval:
        method, sign, file = entry.partition("=")
        if not sign:
            raise UserError(f"--lm-eval {entry}: write METHOD=FILE, such as ppo=results.json.")
        lm_eval[method] = file
    from pipeline.compare.run import Options, compare

    recipe = load_recipe(options.recipe, [*options.overrides, *keys])
    compare(recipe, Options(options.command, overwrite=options.overwrite, lm_eval=lm_eval))


def _generate(options: argparse.Namespace) -> None:
    _of_policy("generate", options)


def _serve(options: argparse.Namespace) -> None:
    from rollout.serve import serve

    recipe = load_recipe(options.recipe, options.overrides)
    policy = options.policy or recipe.ppo.policy or str(run_directory(recipe) / "sft")
    port = options.port or urlsplit(recipe.rollout.server.url).port or 80
    serve(recipe, policy, options.host, port, lambda line: print(line, flush=True))  # noqa: T201


def _evaluate(options: argparse.Namespace) -> None:
    _of_policy("evaluate", options)


def _of_policy(name: str, options: argparse.Namespace) -> None:
    recipe = load_recipe(options.recipe, options.overrides)
    chosen = {"policy": options.policy} if options.policy else {}
    run_stage(recipe, name, overwrite=options.overwrite, command=options.command, inputs=chosen)


def _chat(options: argparse.Namespace) -> None:
    _no_overrides(options)
    from pipeline.chat import chat

    chat(options.policy, against=options.vs, temperature=options.temperature, max_new_tokens=options.max_new_tokens)


def _advise(options: argparse.Namespace) -> None:
    from pipeline.advise import advise_on, data_paths
    from pipeline.advise_facts import find_machine

    recipe = load_recipe(options.recipe, options.overrides)
    console = Console(highlight=False)
    machine = find_machine(options.gpus, options.gpu_memory, options.budget_hours)
    prepare(recipe, data_paths(recipe), console)
    advise_on(recipe, machine, options.results, console)


def _doctor(options: argparse.Namespace) -> None:
    _no_overrides(options)
    from pipeline.doctor import doctor

    sys.exit(doctor())


def _no_overrides(options: argparse.Namespace) -> None:
    if options.overrides:
        raise UserError(f"unknown argument '{shlex.join(options.overrides)}'.", mend="See --help.")


if __name__ == "__main__":
    main()
