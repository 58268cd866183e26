"""Ballots and votes: blind, read with file and line, and the agreement of raters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.evaluation.ballot import BALLOT, KEY, PAGE, write_ballot
from pipeline.evaluation.contests import EQUAL, Contest
from pipeline.evaluation.votes import NOT_VOTED, VotesJudge, fleiss_kappa, read_votes

CONTESTS = [Contest(i, 0, 0, "dpo", "sft", f"prompt {i}", f"better {i}", f"worse {i}") for i in range(40)]
EQUALS = Contest(40, 0, 0, "dpo", "sft", "prompt 40", "same", "same")


def rows_of(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / BALLOT).read_text().splitlines()]


def side_of(row: dict[str, str], word: str) -> str:
    return "left" if row["left"].startswith(word) else "right"


def test_a_ballot_is_blind_and_the_same_each_time(tmp_path: Path) -> None:
    assert write_ballot([*CONTESTS, EQUALS, CONTESTS[0]], tmp_path, seed=1) == 40
    written = {name: (tmp_path / name).read_text() for name in (BALLOT, PAGE, KEY)}
    for name in (BALLOT, PAGE):
        assert "dpo" not in written[name]
        assert "sft" not in written[name]
    rows = rows_of(tmp_path)
    assert {tuple(sorted(row)) for row in rows} == {("id", "left", "prompt", "right")}
    assert [row["prompt"] for row in rows] != [contest.prompt for contest in CONTESTS]
    assert 10 <= sum(side_of(row, "better") == "left" for row in rows) <= 30
    items = json.loads(written[KEY])["items"]
    for row in rows:
        assert items[row["id"]][side_of(row, "better")] == "dpo"
        assert items[row["id"]][side_of(row, "worse")] == "sft"
    write_ballot([*CONTESTS[::-1], EQUALS], tmp_path, seed=1)
    assert (tmp_path / BALLOT).read_text() == written[BALLOT]
    write_ballot(CONTESTS, tmp_path, seed=2)
    assert (tmp_path / BALLOT).read_text() != written[BALLOT]


def test_no_answer_ends_the_page_s_script(tmp_path: Path) -> None:
    write_ballot([Contest(0, 0, 0, "a", "b", "p", "</script><script>alert(1)</script>", "b")], tmp_path, 0)
    assert (tmp_path / PAGE).read_text().count("</script>") == 1


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_votes_become_decisions(tmp_path: Path, suffix: str) -> None:
    """dpo wins item 0 twice of three with a tie, loses item 1; nobody votes on item 2; sides are the ballot's."""
    write_ballot(CONTESTS[:3], tmp_path, seed=0)
    row = {row["prompt"]: row for row in rows_of(tmp_path)}
    good, bad = side_of(row["prompt 0"], "better"), side_of(row["prompt 1"], "worse")
    ids = [row[f"prompt {i}"]["id"] for i in range(2)]
    votes = [(ids[0], good, "ann"), (ids[0], f" {good.upper()} ", "bob"), (ids[0], "tie", "eve"), (ids[1], bad, "ann")]
    file = tmp_path / f"votes.{suffix}"
    if suffix == "csv":
        file.write_text("\ufeffrater,id,note,vote\n" + "".join(f"{r},{i},,{v}\n\n" for i, v, r in votes))
    else:
        file.write_text("".join(json.dumps({"id": i, "vote": v, "rater": r}) + "\n\n" for i, v, r in votes))
    said: list[str] = []
    judge = VotesJudge("people", file, tmp_path / "people", said.append)
    decisions = judge.decide([*CONTESTS[:3], EQUALS])
    assert [(d.outcome, d.reason) for d in decisions] == [(2.5 / 3, ""), (0.0, ""), (None, NOT_VOTED), (0.5, EQUAL)]
    swapped = [Contest(c.prompt_index, 0, 0, "sft", "dpo", c.prompt, c.response_b, c.response_a) for c in CONTESTS[:2]]
    again = VotesJudge("people", file, tmp_path / "other", said.append).decide(swapped)
    assert [d.outcome for d in again] == [pytest.approx(0.5 / 3), 1.0]
    details = judge.details()
    assert (details["raters"], details["undecided"], details["items_voted_on"]) == (3, 1, 2)
    # of the three pairs of raters of item 0 one agrees: P = 1/3; shares 2/3 and 1/3: P_e = 5/9
    assert details["agreement"] == {
        "items": 1, "raw": pytest.approx(1 / 3), "kappa": pytest.approx((1 / 3 - 5 / 9) / (4 / 9))
    }  # fmt: skip
    assert judge.costs() == {"votes": 4}
    assert "1 of 3 items have no votes" in said[0]


def test_votes_on_answers_that_are_compared_no_more_are_counted_and_kept_out(tmp_path: Path) -> None:
    said: list[str] = []
    file, folder = tmp_path / "votes.jsonl", tmp_path / "people"
    write_ballot(CONTESTS[:3], folder, seed=0)
    votes = [{"id": row["id"], "vote": "left", "rater": 0} for row in rows_of(folder)]
    file.write_text("".join(json.dumps(vote) + "\n" for vote in votes))
    judge = VotesJudge("people", file, folder, said.append)
    assert [d.outcome is None for d in judge.decide(CONTESTS[1:5])] == [False, False, True, True]
    assert "1 votes are on answers that are not compared now" in said[0]
    assert (judge.details()["items_voted_on"], judge.details()["votes_on_other_answers"]) == (2, 1)
    assert judge.details()["raters"] == 1
    assert all(d.outcome is not None for d in VotesJudge("people", file, folder, said.append).decide(CONTESTS[:3]))


def test_without_a_file_the_ballot_is_written_and_nothing_decided(tmp_path: Path) -> None:
    said: list[str] = []
    judge = VotesJudge("people", tmp_path / "votes.jsonl", tmp_path / "people", said.append)
    assert [d.outcome for d in judge.decide(CONTESTS)] == [None] * 40
    assert len(rows_of(tmp_path / "people")) == 40
    assert "40 of 40 items have no votes" in said[0]
    assert "ballot.html" in said[0]


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("v.jsonl", '\n{"id": "beef", "vote": "left"}\n', r"v\.jsonl:2: the ballot has no item 'beef'.*Correct the id"),
        ("v.jsonl", '{"id": "ID", "vote": "a"}\n', r"v\.jsonl:1: vote 'a' is none\. Write left, right or tie"),
        (
            "v.jsonl",
            '{"id": "ID", "vote": "left"}\n' * 2,
            r"v\.jsonl:2: a rater without a name has .* at line 1\. Keep",
        ),
        ("v.csv", "id,vote,rater\nID,tie,x\nID,left,x\n", r"v\.csv:3: rater 'x' has voted on \w+ before, at line 2"),
        ("v.jsonl", '{"vote": "left"}\n', r"v\.jsonl:1: this row has no 'id'"),
        ("v.jsonl", '{"id": "ID", "vote": null}\n', r"v\.jsonl:1: this row has no 'vote'"),
        ("v.jsonl", "id,vote\n", r"v\.jsonl:1 is no JSON: .*name the file \.csv"),
        ("v.jsonl", "[1]\n", r"v\.jsonl:1 is no JSON object"),
        ("v.csv", "id;vote\nID;left\n", r"v\.csv:1: the header has no column 'id'.*with commas"),
        ("v.csv", "", r"v\.csv:1: the header has no column 'id'"),
        ("v.csv", "id,vote\nID\n", r"v\.csv:2: this row has no 'vote'"),
        ("v.csv", b"id,vote\nID,\xff\n", r"v\.csv is not UTF-8 text"),
    ],
)
def test_bad_votes_are_named_by_file_and_line(tmp_path: Path, name: str, text: str | bytes, problem: str) -> None:
    write_ballot(CONTESTS[:1], tmp_path, seed=0)
    content = text if isinstance(text, bytes) else text.encode()
    (tmp_path / name).write_bytes(content.replace(b"ID", CONTESTS[0].id.encode()))
    with pytest.raises(UserError, match=problem):
        read_votes(tmp_path / name, tmp_path / KEY)


def test_kappa_is_that_of_the_published_example() -> None:
    """Ten items, fourteen raters, five categories: P_e = 0.213, P = 0.378, kappa = 0.210 (Wikipedia, Fleiss' kappa)."""
    table = [
        [0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
        [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7],
    ]  # fmt: skip
    found = fleiss_kappa(table)
    assert found.items == 10
    assert found.raw == pytest.approx(0.378, abs=5e-4)
    assert found.kappa == pytest.approx(0.210, abs=5e-4)


def test_kappa_by_hand_with_different_numbers_of_raters() -> None:
    """Agreeing pairs 1, 0 and 1/3; votes 4, 2, 1 of 7; P = 4/9, P_e = 21/49; the single vote counts nowhere."""
    found = fleiss_kappa([[2, 0, 0], [1, 0, 1], [1, 2, 0], [0, 0, 1]])
    assert found.items == 3
    assert found.raw == pytest.approx(4 / 9)
    assert found.kappa == pytest.approx((4 / 9 - 3 / 7) / (1 - 3 / 7))


def test_kappa_that_does_not_exist() -> None:
    assert fleiss_kappa([[1, 0, 0]]) == (0, None, None)
    assert fleiss_kappa([[2, 0, 0], [3, 0, 0]]) == (2, 1.0, None)
