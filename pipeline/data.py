"""What the stages read: demonstrations, preferences and prompts, checked, in train and eval splits.

Local JSONL, JSON and CSV files need the standard library only; `datasets` and `pyarrow` are
imported for Parquet, saved data sets and hub ids. No function here imports torch or transformers.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Generic, TypeGuard, TypeVar

from pipeline.errors import UserError
from pipeline.formats import ReadTally, Row
from pipeline.recipe import DataSection, DataSource
from pipeline.records import LabelledResponse, Prompt, Ranking, RowError, SftExample
from pipeline.rows import FORMS, RowParser
from pipeline.sources import Location, fingerprint, locate, read_rows

T = TypeVar("T")
Record = SftExample | Ranking | LabelledResponse | Prompt

LISTED_REASONS = 20
SPLIT_NAMES = {"train": "train", "eval": "eval", "validation": "eval", "test": "eval"}


@dataclass(frozen=True, slots=True)
class Split(Generic[T]):
    """The records of one data set, held-out ones apart, and a JSON-able report of what was read."""

    train: list[T]
    eval: list[T]
    report: dict[str, Any] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """The report in a few lines for people."""
        report = self.report
        source = report["source"]
        name = source.get("path", source.get("hub"))
        lines = [
            f"{report['key']}: {name}: {report['rows']} {report['form']} rows -> "
            f"{report['train']} train, {report['eval']} eval (split by {report['split_by']})"
        ]
        lines += [f"  {name}: {count}" for name, count in report["counts"].items() if count]
        if "conversion" in report:
            made = report["conversion"]
            counts = ", ".join(f"{count} {name}" for name, count in made["counts"].items())
            lines.append(f"  {made['from']} -> {made['to']}: {made['train']} train, {made['eval']} eval ({counts})")
        if report["unused_columns"]:
            lines.append(f"  other columns: {', '.join(report['unused_columns'])}")
        if report["skipped"]["count"]:
            lines.append(f"  skipped rows: {report['skipped']['count']}")
            lines += [f"    {reason}" for reason in report["skipped"]["reasons"]]
        return lines


def load_sft(data: DataSection) -> Split[SftExample]:
    """Demonstrations of `data.sft`; a conversation gives one example per answer.

    Raises UserError for an unset or missing source, a bad row (with `data.on_error: raise`) or an
    empty split.
    """
    return load_records("sft", data.sft, data)


def load_rankings(data: DataSection) -> Split[Ranking]:
    """Ranked answers of `data.preferences`; a pair is a ranking of two.

    Rankings whose answers are all tied are kept and counted: they hold no pair to learn from.
    Raises UserError as `load_sft` and `check_rankings`, and for labels, which rank nothing.
    """
    split = load_records("preferences", data.preferences, data)
    if has_labels(split):
        raise UserError(
            f"data.preferences: its {split.report['form']} rows are labels, which say whether one answer is good and "
            "do not rank answers: no reward model can be trained on them.",
            mend="Give pairs or rankings; or train with kto, which learns from labels, with dpo, ipo, simpo, orpo or "
            "contrast on the pairs made of them, or with ift on the desirable answers.",
        )
    return check_rankings(split)


def has_labels(split: Split[Any]) -> TypeGuard[Split[LabelledResponse]]:
    """Whether the preferences are labelled answers; else they are rankings. A source never mixes the two."""
    return isinstance(split.train[0], LabelledResponse)


def check_rankings(split: Split[Ranking]) -> Split[Ranking]:
    """The same rankings with their pairs counted in the report.

    Raises UserError when no training ranking holds a pair, and when most `scores` contradict the
    `ranks`, which means that the ranks run upwards.
    """
    rankings = split.train + split.eval
    agree, contradict = _scores_against_ranks(rankings)
    if contradict > agree:
        raise UserError(
            f"data.preferences: in {contradict} of {agree + contradict} answer pairs the answer of "
            "better (lower) rank has the lower score: the ranks look reversed.",
            mend="Rank the best answer 0, or take the `scores` column out.",
        )
    if not any(r.ordered_pairs() for r in split.train):
        raise UserError(
            "data.preferences: in every training row all answers are tied: no pair to learn from.",
            mend="Give better answers a lower rank.",
        )
    split.report["counts"] |= {
        "ordered pairs": sum(r.ordered_pairs() for r in rankings),
        "tied pairs": sum(r.tied_pairs() for r in rankings),
        "rankings without any ordered pair": sum(r.ordered_pairs() == 0 for r in rankings),
        "pairs whose scores contradict their ranks": contradict,
    }
    sizes = Counter(len(r.responses) for r in rankings)
    split.report["answers_per_prompt"] = {str(k): n for k, n in sorted(sizes.items())}
    return split


def load_prompts(data: DataSection) -> Split[Prompt]:
    """Unique prompts for rollouts and evaluation, in the order of their first row.

    They come from `data.prompts`; when that is unset from `data.preferences`, and without that from
    `data.sft` (rows without a prompt left out). Held-out prompts that `data.sft` or
    `data.preferences` trains on are left out and counted. Raises UserError as `load_sft`, and when
    no held-out prompt remains.
    """
    kind, source = prompts_source(data)
    split = load_records(kind, source, data)
    train, held_out = _prompts(split.train), _prompts(split.eval)
    if not train or not held_out:
        raise UserError(
            "data.prompts is not set and the rows of data.sft have no prompts.",
            mend="Set data.prompts to a file of rows with a `prompt` column.",
        )
    total = len(train) + len(held_out)
    train, held_out = list(dict.fromkeys(train)), list(dict.fromkeys(held_out))
    repeated = total - len(train) - len(held_out)
    unseen = _without_trained_on(held_out, data)
    counts = {
        **split.report["counts"],
        "repeated prompts left out": repeated,
        "held-out prompts left out because a stage trains on them": len(held_out) - len(unseen),
    }
    held_out = unseen
    sizes = {"train": len(train), "eval": len(held_out), "counts": counts}
    return Split(train, held_out, {**split.report, **sizes})


def prompts_source(data: DataSection) -> tuple[str, str | DataSource | None]:
    """Which of `prompts`, `preferences` and `sft` gives the prompts: the first that is set; and that source."""
    kinds = {"prompts": data.prompts, "preferences": data.preferences, "sft": data.sft}
    return next(((kind, source) for kind, source in kinds.items() if source is not None), ("sft", None))


def source_fingerprint(source: str | DataSource) -> dict[str, Any]:
    """Identity of a source, cheap enough for every plan.

    Local files: `path`, `sha256` of the whole and `files` with each one's sha256. Hub: `hub`,
    `config`, `split`; nothing is fetched. Raises UserError for a missing or unreadable source.
    """
    return fingerprint(locate(source))


def _prompts(records: list[Any]) -> list[Prompt]:
    """The records' prompts; a plain text row has none."""
    found = (record if isinstance(record, Prompt) else record.prompt for record in records)
    return [prompt for prompt in found if prompt is not None]


def _without_trained_on(held_out: list[Prompt], data: DataSection) -> list[Prompt]:
    """The held-out prompts that no training row of `data.sft` and `data.preferences` has."""
    sources = {"sft": data.sft, "preferences": data.preferences}
    trained_on: dict[Prompt | None, str] = {}
    for kind, source in sources.items():
        if source is not None:
            trained_on |= {record.prompt: record.source for record in load_records(kind, source, data).train}
    unseen = [prompt for prompt in held_out if prompt not in trained_on]
    if not unseen:
        raise UserError(
            f"every held-out prompt is also trained on; the first is {held_out[0].source}, a training prompt at "
            f"{trained_on[held_out[0]]}.",
            mend="Set data.prompts to prompts of their own, or mend the `split` columns.",
        )
    return unseen


def _scores_against_ranks(rankings: list[Ranking]) -> tuple[int, int]:
    """Answer pairs whose scores agree with their ranks, and pairs whose scores contradict them."""
    agree = contradict = 0
    for ranking in rankings:
        if ranking.ratings is None:
            continue
        for (rank_a, score_a), (rank_b, score_b) in combinations(zip(ranking.ranks, ranking.ratings, strict=True), 2):
            direction = (rank_a - rank_b) * (score_a - score_b)
            agree += direction < 0
            contradict += direction > 0
    return agree, contradict


def load_records(kind: str, source: str | DataSource | None, data: DataSection) -> Split[Any]:
    """Records of `source` in any form that `data.<kind>` may have; raises UserError as `load_sft`."""
    key = f"data.{kind}"
    if source is None:
        raise UserError(
            f"{key} is not set in the recipe.",
            mend=f"Set it to a data file, a data set directory or a hub id, e.g. --{key} FILE.",
        )
    location = locate(source, key)
    reading: _Reading[Any] = _Reading(key, RowParser(kind, FORMS[kind]), data.on_error == "skip")
    for row in read_rows(location, reading.tally, key):
        reading.take(row)
    reading.refuse_empty()
    splitter = _Splitter(key, data)
    for record, explicit in reading.records:
        splitter.place(record, explicit)
    splitter.refuse_empty()
    report = {**reading.report(location), **splitter.report()}
    report["counts"]["duplicate rows"] = splitter.duplicates
    return Split(splitter.train, splitter.eval, report)


@dataclass(slots=True)
class _Reading(Generic[T]):
    """Records of one source with the split their rows ask for, and the rows that were skipped."""

    key: str
    parser: RowParser[T]
    skip: bool
    tally: ReadTally = field(default_factory=ReadTally)
    records: list[tuple[T, str | None]] = field(default_factory=list)
    rows: int = 0
    skipped: int = 0
    reasons: list[str] = field(default_factory=list)

    def take(self, row: Row | RowError) -> None:
        self.rows += 1
        try:
            if isinstance(row, RowError):
                raise row
            explicit = _explicit_split(row)
            self.records += [(record, explicit) for record in self.parser.parse(row)]
        except RowError as error:
            if not self.skip:
                raise UserError(
                    f"{self.key}: {error}",
                    mend=f"{error.mend} `data.on_error: skip` leaves such rows out.".strip(),
                ) from error
            self.skipped += 1
            if self.skipped <= LISTED_REASONS:
                self.reasons.append(str(error))

    def refuse_empty(self) -> None:
        if self.rows == 0:
            raise UserError(f"{self.key}: the source holds no rows.", mend="Give it some.")
        if not self.records:
            raise UserError(
                f"{self.key}: all {self.rows} rows were skipped; the first: {self.reasons[0]}",
                mend="Mend the rows or point the key at another file.",
            )

    def report(self, location: Location) -> dict[str, Any]:
        tally = self.parser.tally
        counts = {name.replace("_", " "): count for name, count in tally.items()}
        return {
            "key": self.key,
            "source": fingerprint(location) | self.tally.hub,
            "form": self.parser.form.name if self.parser.form else "",
            "rows": self.rows,
            "skipped": {"count": self.skipped, "reasons": list(self.reasons)},
            "unused_columns": sorted(self.parser.unused),
            "counts": {"empty lines": self.tally.empty_lines, **counts},
        }


def _explicit_split(row: Row) -> str | None:
    name = row.values.get("split")
    if name is None or name == "":
        return None
    if isinstance(name, str) and name in SPLIT_NAMES:
        return SPLIT_NAMES[name]
    raise RowError(
        row.where,
        f"`split` is {name!r}.",
        f"Use one of {', '.join(SPLIT_NAMES)}, or rename the column if it means something else.",
    )


class _Splitter:
    """Puts each record on the side its row asks for, else on the side the prompt's hash says."""

    def __init__(self, key: str, data: DataSection) -> None:
        self.key = key
        self.data = data
        self.train: list[Any] = []
        self.eval: list[Any] = []
        self.explicit = 0
        self.duplicates = 0
        self._seen: dict[str, tuple[str, str]] = {}
        self._records: set[Any] = set()

    def place(self, record: Record, explicit: str | None) -> None:
        prompt = _split_prompt(record)
        side = explicit or self._side(prompt.split_key)
        known_side, known_source = self._seen.setdefault(prompt.key, (side, record.source))
        if known_side != side:
            raise UserError(
                f"{self.key}: {record.source}: this prompt is in the {side} split, but also in the "
                f"{known_side} split at {known_source}.",
                mend="Give all rows of a prompt the same `split`, or leave the column out.",
            )
        self.explicit += explicit is not None
        self.duplicates += record in self._records
        self._records.add(record)
        (self.train if side == "train" else self.eval).append(record)

    def _side(self, split_key: str) -> str:
        held_out = hash_fraction(split_key, self.data.split_seed) < self.data.eval_fraction
        return "eval" if held_out else "train"

    def refuse_empty(self) -> None:
        for side, records in (("train", self.train), ("eval", self.eval)):
            if not records:
                raise UserError(
                    f"{self.key}: the {side} split is empty: none of the {len(self._seen)} "
                    f"prompts fell into it (data.eval_fraction {self.data.eval_fraction:g}).",
                    mend=f"{'Raise' if side == 'eval' else 'Lower'} data.eval_fraction, change "
                    f'data.split_seed, add rows, or give some rows `split: "{side}"`.',
                )

    def report(self) -> dict[str, Any]:
        records = len(self.train) + len(self.eval)
        by = {0: "hash of the prompt", records: "`split` column"}
        return {
            "split_by": by.get(self.explicit, "`split` column, else hash of the prompt"),
            "split_seed": self.data.split_seed,
            "eval_fraction": self.data.eval_fraction,
            "train": len(self.train),
            "eval": len(self.eval),
            "prompts": len(self._seen),
        }


def hash_fraction(split_key: str, split_seed: int) -> float:
    """Fraction in [0, 1) that decides a prompt's side: the first 8 bytes of sha256 over 2^64.

    The hashed text is `f"{split_seed}:{split_key}"` in UTF-8; below `data.eval_fraction` is eval.
    """
    digest = hashlib.sha256(f"{split_seed}:{split_key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _split_prompt(record: Record) -> Prompt:
    if isinstance(record, Prompt):
        return record
    return record.prompt if record.prompt is not None else Prompt(record.response)
