"""What the advice rests on: facts about the data of a recipe, its model and the machine, each counted and none judged.

Imports neither torch nor transformers: lengths are in characters, and weights are counted from the files' headers.
"""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from pipeline.data import Split, has_labels, load_prompts, load_sft
from pipeline.errors import UserError
from pipeline.preferences import Pair, label_pairs, load_preferences, ranking_pairs
from pipeline.recipe import TRAINED, Recipe
from pipeline.recipe_direct import DIRECT
from pipeline.records import LabelledResponse, Ranking

Feedback = Literal["pairs", "rankings", "labels", "demonstrations"]
Start = Literal["base", "instruct", "unknown"]

SMALL_MODEL = 50_000_000
"""Parameters up to which every method trains in minutes to hours on a CPU."""
SMALL_BUDGET_GPU_HOURS = 8.0
USABLE_MEMORY = 0.8
"""Share of a GPU's memory for weights, gradients and optimiser; activations and the sampling cache need the rest."""
NOISY_SHARE = 0.05
"""Share of comparisons that contradict others, or their own scores, from which on the labels count as noisy."""
LONGER_SHARE, LONGER_BY = 0.6, 0.1
"""Length bias: so many of the better answers are the longer ones, and their mean is longer by this much."""
HEAVY_IMBALANCE = 4.0
"""Ratio of the two labels from which on their balance counts as heavily uneven."""
_INSTRUCT = re.compile(r"instruct|chat|(?:^|[-_])it(?:$|[-_])", re.IGNORECASE)
_SIZE = re.compile(r"(\d+(?:\.\d+)?)([bm])(?:$|[^a-z0-9])", re.IGNORECASE)
_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class Machine:
    """What there is to train on; None where it is not known.

    Attributes:
        gpu_memory_gib: GiB of one GPU.
        budget_hours: hours of wall time that one training may take.
    """

    gpus: int | None = None
    gpu_memory_gib: float | None = None
    budget_hours: float | None = None


@dataclass(frozen=True)
class Facts:
    """Counts over all rows, training and held-out. Comparisons are pairs of answers to one prompt of different rank."""

    feedback: Feedback
    demonstrations: int = 0
    rows: int = 0
    """Rankings, pairs or labels."""
    prompts: int = 0
    """Different prompts with feedback; those of the demonstrations where there is no other feedback."""
    rollout_prompts: int = 0
    """Prompts to sample from in training (`data.prompts`, else those with feedback)."""
    own_rollout_prompts: bool = False
    """Whether `data.prompts` is set, so that PPO may sample for prompts which nobody gave feedback on."""
    most_answers: int = 0
    mean_answers: float = 0.0
    comparisons: int = 0
    tied_pairs: int = 0
    rated_comparisons: int = 0
    """Comparisons whose two answers have ratings (scores, margins)."""
    scores_against_ranks: int = 0
    repeated: int = 0
    """Comparisons of the same two answers, or labels of one answer, that were given more than once; each set once."""
    contradicting: int = 0
    """Those of them that were decided both ways."""
    desirable: int = 0
    undesirable: int = 0
    label_pairs: int = 0
    """Pairs that can be made of labels: prompts with an answer of each kind."""
    chosen_length: float = 0.0
    """Mean characters of better (or desirable) answers."""
    rejected_length: float = 0.0
    longer_chosen_share: float = 0.5
    """Share of comparisons with unequal lengths whose better answer is the longer one."""
    start: Start = "unknown"
    parameters: int | None = None
    weight_bytes: int = 4
    """Bytes of one parameter in `model.dtype`, that of a base which all roles of PPO share; all else is float32."""
    lora: tuple[str, ...] = ()
    """Direct methods that the recipe trains as an adapter."""
    ppo_copies: int = 10
    """Copies of the model that PPO keeps, counted as `weights_gib` does."""
    reward_sources: int = 1
    reward_functions: int = 0
    needs_reward_model: bool = True
    gpus: int | None = None
    gpu_memory_gib: float | None = None
    budget_hours: float | None = None

    @property
    def tied_share(self) -> float:
        """Share of answer pairs of the rankings that are tied."""
        return _share(self.tied_pairs, self.tied_pairs + self.comparisons)

    @property
    def rated_share(self) -> float:
        return _share(self.rated_comparisons, self.comparisons)

    @property
    def contradicting_share(self) -> float:
        """Of the comparisons or labels that were given more than once, those decided both ways."""
        return _share(self.contradicting, self.repeated)

    @property
    def noise_share(self) -> float:
        """Contradicting sets and comparisons against their own scores, of all comparisons (or labels)."""
        return _share(self.contradicting + self.scores_against_ranks, self.comparisons or self.rows)

    @property
    def flip_rate(self) -> float:
        """Share e of flipped verdicts that explains the contradictions: two verdicts differ with 2 e (1 - e).

        Without repeats it is `noise_share`. At most 0.4.
        """
        differ = min(self.contradicting_share, 0.48) if self.repeated >= 10 else 0.0
        return min(max((1 - (1 - 2 * differ) ** 0.5) / 2, self.noise_share), 0.4)

    @property
    def noisy(self) -> bool:
        return self.noise_share >= NOISY_SHARE or (self.repeated >= 10 and self.contradicting_share >= 2 * NOISY_SHARE)

    @property
    def length_gap(self) -> float:
        """How much longer better answers are, relative to worse ones."""
        return self.chosen_length / self.rejected_length - 1.0 if self.rejected_length else 0.0

    @property
    def length_biased(self) -> bool:
        return self.longer_chosen_share >= LONGER_SHARE and self.length_gap >= LONGER_BY

    @property
    def label_ratio(self) -> float:
        """The commoner label over the rarer one; infinite where one is missing."""
        few, many = sorted((self.desirable, self.undesirable))
        return many / few if few else float("inf")

    @property
    def small_model(self) -> bool:
        return self.parameters is not None and self.parameters <= SMALL_MODEL

    @property
    def small_budget(self) -> bool:
        """No GPU, or few GPU-hours, for a model that is not small."""
        hours = None if self.budget_hours is None else self.budget_hours * max(self.gpus or 1, 1)
        few = hours is not None and hours <= SMALL_BUDGET_GPU_HOURS
        return not self.small_model and (self.gpus == 0 or few)

    def weights_gib(self, method: str) -> float | None:
        """GiB of weights, gradients and two Adam moments; None for a model of unknown size.

        A trained model counts four times, a frozen one once, an adapter nothing.
        """
        if self.parameters is None:
            return None
        copies = self.ppo_copies if method == "ppo" else 1 if method in self.lora else COPIES[method]
        shared_base = method == "ppo" and copies == PPO_COPIES["lora"]
        return self.parameters * (self.weight_bytes if shared_base else FLOAT32) * copies / 2**30

    def fits(self, method: str) -> bool:
        """Whether `weights_gib` leaves room on the GPUs; True where that is not known."""
        wanted = self.weights_gib(method)
        if wanted is None or self.gpu_memory_gib is None:
            return True
        return wanted <= USABLE_MEMORY * self.gpu_memory_gib * max(self.gpus or 1, 1)

    def as_dict(self) -> dict[str, Any]:
        """Every fact, and the signals derived from them, for results.json."""
        derived = ("tied_share", "contradicting_share", "noise_share", "noisy", "length_gap", "length_biased")
        given = {item.name: getattr(self, item.name) for item in fields(self)}
        signals = {name: getattr(self, name) for name in derived}
        return {**given, "lora": list(self.lora), **signals}


FLOAT32 = 4
COPIES = {"sft": 4, "contrast": 4, "ift": 4, "simpo": 4, "orpo": 4, "dpo": 5, "ipo": 5, "kto": 5}
"""Weights in memory, in copies of the model: 4 for one in training, 1 for a frozen one."""
PPO_COPIES = {"full": 10, "lora_policy": 6, "lora": 1}
"""By `ppo.sharing`: policy and critic train beside a frozen reference and reward model, unless they share a base."""


def read_facts(recipe: Recipe, machine: Machine | None = None) -> Facts:
    """The facts of `recipe`, whose data is read as the stages read it.

    Raises UserError for missing or unreadable data, and when the recipe names none to learn from.
    """
    data = recipe.data
    if data.preferences is None and data.sft is None:
        raise UserError(
            "data.sft and data.preferences are not set: there is nothing to advise on.",
            mend="Set data.preferences to pairs, rankings or labels, or data.sft to demonstrations.",
        )
    found: dict[str, Any] = {"feedback": "demonstrations"}
    if data.sft is not None:
        shown = load_sft(data)
        found |= {"demonstrations": shown.report["train"] + shown.report["eval"], "prompts": shown.report["prompts"]}
    if data.preferences is not None:
        found |= _preference_facts(load_preferences(data))
    found |= {"rollout_prompts": found["prompts"], "own_rollout_prompts": data.prompts is not None}
    if data.prompts is not None:
        found["rollout_prompts"] = len(load_prompts(data).train)
    return Facts(**found, **_model_facts(recipe), **_machine_facts(machine or Machine()))


def _preference_facts(split: Split[Ranking] | Split[LabelledResponse]) -> dict[str, Any]:
    if has_labels(split):
        return _label_facts([*split.train, *split.eval], split.report["prompts"])
    rankings: list[Any] = [*split.train, *split.eval]
    pairs, _ = ranking_pairs(rankings, "all")
    verdicts: dict[Any, list[str]] = defaultdict(list)
    for pair in pairs:
        verdicts[pair.prompt.key, frozenset((pair.chosen, pair.rejected))].append(pair.chosen)
    sizes = [len(ranking.responses) for ranking in rankings]
    margins = [pair.margin for pair in pairs if pair.margin is not None]
    return {
        "feedback": "pairs" if max(sizes) == 2 else "rankings",
        "rows": len(rankings),
        "prompts": split.report["prompts"],
        "most_answers": max(sizes),
        "mean_answers": fmean(sizes),
        "comparisons": len(pairs),
        "tied_pairs": sum(ranking.tied_pairs() for ranking in rankings),
        "rated_comparisons": len(margins),
        "scores_against_ranks": sum(margin < 0 for margin in margins),
        **_repeats(list(verdicts.values())),
        **_lengths(pairs),
    }


def _label_facts(labels: Sequence[LabelledResponse], prompts: int) -> dict[str, Any]:
    pairs, _ = label_pairs(labels)
    verdicts: dict[Any, list[bool]] = defaultdict(list)
    for row in labels:
        verdicts[row.prompt.key, row.response].append(row.desirable)
    good = [len(row.response) for row in labels if row.desirable]
    bad = [len(row.response) for row in labels if not row.desirable]
    return {
        "feedback": "labels",
        "rows": len(labels),
        "prompts": prompts,
        "desirable": len(good),
        "undesirable": len(bad),
        "label_pairs": len(pairs),
        **_repeats(list(verdicts.values())),
        **_lengths(pairs),
        "chosen_length": fmean(good) if good else 0.0,
        "rejected_length": fmean(bad) if bad else 0.0,
    }


def _repeats(verdicts: Sequence[Sequence[Any]]) -> dict[str, int]:
    repeated = [given for given in verdicts if len(given) > 1]
    return {"repeated": len(repeated), "contradicting": sum(len(set(given)) > 1 for given in repeated)}


def _lengths(pairs: Sequence[Pair]) -> dict[str, float]:
    if not pairs:
        return {}
    unequal = [(len(p.chosen), len(p.rejected)) for p in pairs if len(p.chosen) != len(p.rejected)]
    return {
        "chosen_length": fmean(len(p.chosen) for p in pairs),
        "rejected_length": fmean(len(p.rejected) for p in pairs),
        "longer_chosen_share": fmean(better > worse for better, worse in unequal) if unequal else 0.5,
    }


def _model_facts(recipe: Recipe) -> dict[str, Any]:
    name = recipe.sft.init_from or recipe.model.name_or_path
    rewards = recipe.ppo.rewards.values()
    dumped = recipe.model_dump()
    return {
        "start": _start(name),
        "parameters": _parameters(name),
        "weight_bytes": _BYTES[recipe.model.dtype],
        "lora": tuple(method for method in DIRECT if dumped[method]["lora"]),
        "ppo_copies": PPO_COPIES[recipe.ppo.sharing],
        "reward_sources": len(rewards),
        "reward_functions": sum(source.function is not None for source in rewards),
        "needs_reward_model": any(source.model == TRAINED for source in rewards) and recipe.ppo.reward_model is None,
    }


def _machine_facts(machine: Machine) -> dict[str, Any]:
    return {item.name: getattr(machine, item.name) for item in fields(machine)}


def _start(name: str) -> Start:
    """Whether a model is tuned to follow instructions, by its chat template or its name."""
    directory = Path(name)
    if not directory.is_dir():
        return "instruct" if _INSTRUCT.search(name) else "unknown"
    if (directory / "chat_template.jinja").is_file():
        return "instruct"
    settings = directory / "tokenizer_config.json"
    has_template = settings.is_file() and "chat_template" in _read_json(settings)
    return "instruct" if has_template else "base"


def _parameters(name: str) -> int | None:
    """Parameters of a model: counted in its safetensors files, or told by a hub name such as `Qwen2.5-0.5B`."""
    files = sorted(Path(name).glob("*.safetensors"))
    if files:
        return sum(_parameters_in(file) for file in files)
    told = _SIZE.findall(name.rpartition("/")[2])
    if Path(name).exists() or not told:
        return None
    number, unit = told[-1]
    return round(float(number) * (1e9 if unit.lower() == "b" else 1e6))


def _parameters_in(file: Path) -> int:
    """Elements of all tensors, from the header: 8 bytes of its length, then JSON with a `shape` per tensor."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    total = 0
    for name, tensor in header.items():
        if name != "__metadata__":
            count = 1
            for size in tensor["shape"]:
                count *= size
            total += count
    return total


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON: {error}.", mend="Fetch the model again.") from error


def find_machine(gpus: int | None, gpu_memory_gib: float | None, budget_hours: float | None) -> Machine:
    """The machine as told; what was not told about its GPUs is asked of their driver (nvidia-smi).

    Raises UserError for numbers that no machine has.
    """
    told = {"--gpu-memory": gpu_memory_gib, "--budget-hours": budget_hours}
    wrong = [option for option, value in told.items() if value is not None and not 0 < value < float("inf")]
    if gpus is not None and gpus < 0:
        wrong.append("--gpus")
    if wrong:
        raise UserError(f"{wrong[0]} is no number that a machine can have.", mend="Give one above 0 (0 for no GPU).")
    memories = [] if gpus is not None and gpu_memory_gib is not None else _gpu_memories()
    count = len(memories) if gpus is None else gpus
    memory = gpu_memory_gib if gpu_memory_gib is not None or not count else min(memories, default=None)
    return Machine(count, memory, budget_hours)


def _gpu_memories() -> list[float]:
    """GiB of every GPU that the driver knows; none where there is no driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = done.stdout.split() if done.returncode == 0 else []
    return [float(line) / 1024 for line in lines if line.isdigit()]


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
