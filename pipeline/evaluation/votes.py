"""People's votes on a blind ballot, read into decisions with the agreement of the raters.

A file of votes has one row per vote, either JSON lines

    {"id": "3f0c9a5be1d24c77", "vote": "left", "rater": "ann"}

or comma-separated values (`.csv`) under a header with these names:

    id,vote,rater
    3f0c9a5be1d24c77,left,ann

`id` is an item of the ballot (`pipeline.evaluation.ballot`), `vote` is left, right or tie, and `rater` is whatever
tells the people who vote apart; it may be left out where one person votes. Several people may vote on an item, and
nobody has to vote on all of them. Further columns are ignored, and so are empty lines.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import UserError
from pipeline.evaluation.ballot import KEY, PAGE, write_ballot
from pipeline.evaluation.contests import EQUAL, Contest, Decision, Selection

CHOICES = ("left", "right", "tie")
BALLOT_SEED = 0
NOT_VOTED = "nobody voted on it"


class Agreement(NamedTuple):
    """How far raters agree on the items that at least two of them voted on.

    Attributes:
        items: their number.
        raw: share of the pairs of raters that agree, averaged over items; None without such items.
        kappa: Fleiss' kappa; None without such items, or where all votes are the same.
    """

    items: int
    raw: float | None
    kappa: float | None


@dataclass(frozen=True)
class Votes:
    """The votes of a file.

    Attributes:
        choices: item id -> its votes, "left", "right" or "tie".
        left: item id -> the method whose answer is on the left.
        raters: how many people voted.
    """

    choices: Mapping[str, Sequence[str]]
    left: Mapping[str, str]
    raters: int

    def outcome(self, contest: Contest) -> float | None:
        """Share of the votes on a contest that its method `a` won, ties half; None where there are none."""
        choices = self.choices.get(contest.id, ())
        if not choices:
            return None
        points = sum({"left": 1.0, "right": 0.0, "tie": 0.5}[choice] for choice in choices) / len(choices)
        return points if self.left[contest.id] == contest.a else 1.0 - points

    def agreement(self) -> Agreement:
        """Of the raters, on left, right and tie as they saw them: the sides are random."""
        return fleiss_kappa([[list(given).count(choice) for choice in CHOICES] for given in self.choices.values()])


def read_votes(file: Path, key_file: Path) -> Votes:
    """Reads the votes in `file` on the ballot that `key_file` belongs to.

    Errors:
        UserError: naming file and line: an id that the ballot does not have, a vote that is none, a second vote of one
            rater on an item, a row that cannot be read.
    """
    items = json.loads(key_file.read_text(encoding="utf-8"))["items"]
    seen: dict[tuple[str, str], int] = {}
    choices: dict[str, list[str]] = {}
    for line, row in _rows(file):
        name, vote, rater = row["id"], row["vote"].lower(), row["rater"]
        if name not in items:
            raise UserError(
                f"{file}:{line}: the ballot has no item {name!r}; it is mistyped, or of another ballot.",
                mend=f"Correct the id, or vote on the ballot beside {key_file}, which changes with the answers.",
            )
        if vote not in CHOICES:
            raise UserError(f"{file}:{line}: vote {vote!r} is none.", mend="Write left, right or tie.")
        if (name, rater) in seen:
            who = f"rater {rater!r}" if rater else "a rater without a name"
            raise UserError(
                f"{file}:{line}: {who} has voted on {name} before, at line {seen[name, rater]}.",
                mend="Keep one of the two, or give different people different names under `rater`.",
            )
        seen[name, rater] = line
        choices.setdefault(name, []).append(vote)
    return Votes(choices, {name: item["left"] for name, item in items.items()}, len({rater for _, rater in seen}))


def fleiss_kappa(counts: Sequence[Sequence[int]]) -> Agreement:
    """Fleiss' kappa (1971, "Measuring nominal scale agreement among many raters", eq. 2 to 7).

    kappa = (P - P_e) / (1 - P_e), where P is the mean over items of the share of agreeing pairs of raters,
    sum_j n_ij (n_ij - 1) / (n_i (n_i - 1)), and P_e = sum_j p_j^2 with p_j the share of category j in all votes. Items
    may have different numbers of raters n_i; those with fewer than two are left out.

    Args:
        counts: [items, categories] n_ij, how many raters put item i into category j.
    """
    rows = [row for row in counts if sum(row) >= 2]
    if not rows:
        return Agreement(0, None, None)
    agreeing = [sum(n * (n - 1) for n in row) / (sum(row) * (sum(row) - 1)) for row in rows]
    raw = sum(agreeing) / len(rows)
    votes = sum(map(sum, rows))
    by_chance = sum((sum(column) / votes) ** 2 for column in zip(*rows, strict=True))
    return Agreement(len(rows), raw, None if by_chance == 1.0 else (raw - by_chance) / (1.0 - by_chance))


class VotesJudge:
    """Judge `eval.judges.<name>.votes`: writes the ballot, and reads the votes once they are there.

    Args:
        name: key of `eval.judges`.
        file: the votes.
        folder: of ballot and key.
        say: shows a line to the person at the terminal.
    """

    kind = "votes"

    def __init__(self, name: str, file: Path, folder: Path, say: Callable[[str], None]) -> None:
        self.name = name
        self.about = "people's votes on a blind ballot, a first sample of each prompt"
        self.selection = Selection("baseline")
        self._file = file
        self._folder = folder
        self._say = say
        self._items = 0
        self._retired = 0
        self._votes = Votes({}, {}, 0)
        self._decisions: list[Decision] = []

    def decide(self, contests: Sequence[Contest]) -> list[Decision]:
        """One decision per contest; no outcome where nobody has voted yet.

        Errors:
            UserError: see `read_votes`.
        """
        self._items = write_ballot(contests, self._folder, BALLOT_SEED)
        if self._file.is_file():
            self._read({contest.id for contest in contests})
        left = self._items - len(self._votes.choices)
        if left:
            self._say(
                f"judge {self.name}: {left} of {self._items} items have no votes. Vote in {self._folder / PAGE}, "
                f"save as {self._file} (of several people, all in one file), and run the same command again."
            )
        self._decisions = [self._decide(contest) for contest in contests]
        return self._decisions

    def _read(self, asked: Set[str]) -> None:
        """Takes the votes on the contests `asked`; those on answers that are no longer compared are counted."""
        found = read_votes(self._file, self._folder / KEY)
        kept = {name: cast for name, cast in found.choices.items() if name in asked}
        self._retired = sum(map(len, found.choices.values())) - sum(map(len, kept.values()))
        self._votes = replace(found, choices=kept)
        if self._retired:
            self._say(f"judge {self.name}: {self._retired} votes are on answers that are not compared now.")

    def _decide(self, contest: Contest) -> Decision:
        if contest.response_a == contest.response_b:
            return Decision(contest, 0.5, reason=EQUAL)
        outcome = self._votes.outcome(contest)
        return Decision(contest, outcome, reason=NOT_VOTED if outcome is None else "")

    def details(self) -> dict[str, Any]:
        """Counts of items, votes and raters, and how far the raters agree."""
        cast = Counter(choice for choices in self._votes.choices.values() for choice in choices)
        return {
            "file": str(self._file),
            **vars(self.selection),
            "contests": len(self._decisions),
            "equal_answers": sum(decision.reason == EQUAL for decision in self._decisions),
            "undecided": sum(decision.outcome is None for decision in self._decisions),
            "ballot_items": self._items,
            "items_voted_on": len(self._votes.choices),
            "votes_on_other_answers": self._retired,
            "votes": {choice: cast[choice] for choice in CHOICES},
            "raters": self._votes.raters,
            "agreement": self._votes.agreement()._asdict(),
        }

    def costs(self) -> dict[str, Any]:
        """Votes cast."""
        return {"votes": sum(map(len, self._votes.choices.values()))}


def _rows(file: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and the fields id, vote and rater of every vote, without blanks around them."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text: {error}.", mend="Save it as UTF-8.") from error
    read = _csv_rows if file.suffix.lower() == ".csv" else _json_rows
    for line, row in read(file, text):
        fields = {key: "" if row.get(key) is None else str(row[key]).strip() for key in ("id", "vote", "rater")}
        missing = [key for key in ("id", "vote") if not fields[key]]
        if missing:
            raise UserError(f"{file}:{line}: this row has no {missing[0]!r}.", mend="Write id, vote and rater.")
        yield line, fields


def _csv_rows(file: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text), skipinitialspace=True)
    missing = [key for key in ("id", "vote") if key not in (reader.fieldnames or ())]
    if missing:
        raise UserError(
            f"{file}:1: the header has no column {missing[0]!r}.",
            mend="Begin with a line `id,vote,rater`, with commas.",
        )
    for row in reader:
        yield reader.line_num, row


def _json_rows(file: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for line, content in enumerate(text.split("\n"), 1):
        if not content.strip():
            continue
        try:
            row = json.loads(content)
        except ValueError as error:
            raise UserError(
                f"{file}:{line} is no JSON: {error}.",
                mend="Write one JSON object per line, or name the file .csv where it is a table.",
            ) from error
        if not isinstance(row, dict):
            raise UserError(f"{file}:{line} is no JSON object.", mend='Write {"id": ..., "vote": ..., "rater": ...}.')
        yield line, row
