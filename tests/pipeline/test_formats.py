"""Files, folders, saved data sets and hub ids: the same rows from each, places in every error."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.data import load_prompts, load_rankings, load_sft, source_fingerprint
from pipeline.errors import UserError
from pipeline.formats import ReadTally, Row
from pipeline.preferences import load_preferences
from pipeline.recipe import DataSection, DataSource
from pipeline.records import LabelledResponse, Prompt
from pipeline.sources import Location, locate, read_rows

ROWS = [
    {
        "prompt": f"question {i}, with 'é'\nand \"two\" lines",
        "chosen": f" yes {i}",
        "rejected": " no",
    }
    for i in range(40)
]
RANKINGS = [{"prompt": f"p{i}", "responses": ["a", "b, c"], "ranks": [0, 1], "scores": [1.5, 0]} for i in range(40)]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        for row in rows:
            cells = {k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()}
            writer.writerow(cells)
    return path


def write(form: str, folder: Path, rows: list[dict[str, Any]]) -> str:
    if form == "jsonl":
        return str(write_jsonl(folder / "rows.jsonl", rows))
    if form == "csv":
        return str(write_csv(folder / "rows.csv", rows))
    if form in ("json", "json-data"):
        path = folder / "rows.json"
        path.write_text(json.dumps(rows if form == "json" else {"data": rows}), encoding="utf-8")
        return str(path)
    if form == "jsonl-as-json":
        return str(write_jsonl(folder / "rows.json", rows))
    if form == "folder":
        (folder / "parts").mkdir()
        write_jsonl(folder / "parts" / "a.jsonl", rows[:10])
        write_jsonl(folder / "parts" / "b.jsonl", rows[10:])
        (folder / "parts" / "README.md").write_text("not data")
        return str(folder / "parts")
    import datasets

    data = datasets.Dataset.from_list(rows)
    if form == "parquet":
        data.to_parquet(folder / "rows.parquet")
        return str(folder / "rows.parquet")
    if form == "saved":
        data.save_to_disk(folder / "saved")
        return str(folder / "saved")
    other = datasets.Dataset.from_list([{**rows[0], "prompt": "other split"}])
    datasets.DatasetDict({"test": other, "train": data}).save_to_disk(folder / "saved")
    return str(folder / "saved")


RATED = [
    {"prompt": f"p{i}", "chosen": "c", "rejected": "r", "score_chosen": 8.5, "score_rejected": 6} for i in range(40)
]
LABELLED = [{"prompt": f"p{i}", "completion": "r", "label": i % 3 == 0} for i in range(40)]
FORMATS = ["jsonl", "csv", "json", "json-data", "jsonl-as-json", "folder"]
FORMATS += ["parquet", "saved", "saved-dict"]


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_gives_the_same_records(form: str, tmp_path: Path) -> None:
    (tmp_path / "reference").mkdir()
    expected = load_rankings(DataSection(preferences=write("jsonl", tmp_path / "reference", ROWS)))
    assert len(expected.train) + len(expected.eval) == 40
    assert expected.train[0].prompt.content == ROWS[0]["prompt"]
    split = load_rankings(DataSection(preferences=write(form, tmp_path, ROWS)))
    assert split.train == expected.train
    assert split.eval == expected.eval


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
def test_rankings_in_every_kind_of_file(form: str, tmp_path: Path) -> None:
    split = load_rankings(DataSection(preferences=write(form, tmp_path, RANKINGS)))
    first = next(r for r in split.train + split.eval if r.prompt.content == "p0")
    assert first.responses == ("a", "b, c")
    assert first.ranks == (0.0, 1.0)
    assert first.ratings == (1.5, 0.0)


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
def test_rated_pairs_in_every_kind_of_file(form: str, tmp_path: Path) -> None:
    split = load_rankings(DataSection(preferences=write(form, tmp_path, RATED)))
    assert {r.ratings for r in split.train + split.eval} == {(8.5, 6.0)}


@pytest.mark.parametrize("form", ["jsonl", "parquet", "saved", "saved-dict"])
def test_labels_in_every_kind_of_file_that_has_truth_values(form: str, tmp_path: Path) -> None:
    split = load_preferences(DataSection(preferences=write(form, tmp_path, LABELLED)))
    read = sorted(split.train + split.eval, key=lambda row: int(row.prompt.key[1:]))
    assert read == [LabelledResponse(Prompt(f"p{i}"), "r", i % 3 == 0) for i in range(40)]


@pytest.fixture
def hub_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as the hub's loader takes it in place of an id, and a cache of its own."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    write_jsonl(tmp_path / "set" / "train.jsonl", ROWS)
    return tmp_path / "set"


def test_a_hub_data_set_is_read_through_load_dataset(hub_folder: Path) -> None:
    location = Location("hub", DataSource(path=str(hub_folder), split="train[:5]"), hub_folder)
    rows = list(read_rows(location, ReadTally()))
    assert rows == [Row(f"{hub_folder}:row {i + 1}", ROWS[i]) for i in range(5)]


def test_a_hub_data_set_without_the_split(hub_folder: Path) -> None:
    location = Location("hub", DataSource(path=str(hub_folder), split="gold"), hub_folder)
    with pytest.raises(UserError, match=r"data\.sft: .* could not be loaded as a hub data set"):
        list(read_rows(location, ReadTally(), "data.sft"))


def test_hub_ids_are_told_from_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert locate("trl-lib/ultrafeedback_binarized").kind == "hub"
    assert locate("imdb").kind == "hub"
    (tmp_path / "data").mkdir()
    for path in ("data/missing", "missing.jsonl", "a/b/c", "./x", "/nowhere/x"):
        with pytest.raises(UserError, match="does not exist"):
            locate(path)


def test_a_folder_gives_only_the_files_of_its_split(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train-00000-of-00002.jsonl", ROWS[:20])
    write_jsonl(tmp_path / "train-00001-of-00002.jsonl", ROWS[20:30])
    write_jsonl(tmp_path / "validation.jsonl", ROWS[30:])
    train = locate(str(tmp_path)).files
    assert [path.name for path in train] == [
        "train-00000-of-00002.jsonl",
        "train-00001-of-00002.jsonl",
    ]
    held_out = locate(DataSource(path=str(tmp_path), split="test")).files
    assert [path.name for path in held_out] == ["validation.jsonl"]
    with pytest.raises(UserError, match="no file of the split 'gold'"):
        locate(DataSource(path=str(tmp_path), split="gold"))


GOOD = b'{"text": "fine"}\n'
BAD_FILES: list[tuple[str, bytes, list[str]]] = [
    ("a.jsonl", GOOD + b'{"text": "x}\n' + GOOD, ["a.jsonl:2: not JSON at column 13"]),
    ("a.jsonl", GOOD + b'\n{"text": "cut o', ["a.jsonl:3: the last line stops", "cut o"]),
    ("a.jsonl", GOOD * 3 + b'{"text": "na\xefve"}\n', ["a.jsonl:4: byte 13 is not UTF-8", "na"]),
    ("a.jsonl", GOOD + b"[1, 2]\n", ["a.jsonl:2: a row must be an object", "[1, 2]"]),
    ("a.jsonl", GOOD + b'{"text": ""}\n', ["a.jsonl:2: `text` is empty"]),
    ("a.json", b'[{"text": "x"}, {"text": 3}]', ["a.json:row 2: `text` must be text, not '3'"]),
    ("a.json", b'[{"text": "x"}, 3]', ["a.json:row 2: a row must be an object"]),
    ("a.json", b'[{"text": "x"},\n {"text": ', ["a.json:2: not JSON at column 11"]),
    ("a.json", b'{"text": "x"}', ["a.json: must hold a list of rows"]),
    ("a.json", b'["\xff"]', ["a.json: byte 3 is not UTF-8"]),
    ("a.csv", b'text,n\n"two\nlines",1\n,2\n', ["a.csv:4: `text` is empty"]),
    ("a.csv", b"text,n\nx\n", ["a.csv:2: has 1 cells, but the header names 2"]),
    ("a.csv", b'text,n\nx,1\n"never closed,1\n', ["a.csv:3: not CSV"]),
    ("a.csv", b"text,n\nx,1\nna\xefve,1\n", ["a.csv:3: `text` is not UTF-8"]),
    ("a.csv", b"text,text\nx,1\n", ["a.csv:1: the header line"]),
    ("a.csv", b"", ["a.csv:1: the header line"]),
    ("a.csv", b"messages\nhello\n", ["a.csv:2: `messages` must hold JSON in a CSV file", "hello"]),
    ("a.parquet", b"PAR1 but not really", ["a.parquet is not a whole Parquet file"]),
    ("a.jsonl", b"", ["data.sft: the source holds no rows"]),
    ("a.txt", b"hello", ["a.txt is no kind of data file", ".parquet"]),
]


@pytest.mark.parametrize(("name", "content", "parts"), BAD_FILES)
def test_bad_files(name: str, content: bytes, parts: list[str], tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_sft(DataSection(sft=str(tmp_path / name)))
    assert caught.value.mend
    for part in parts:
        assert part in str(caught.value)


def test_parquet_rows_are_numbered(tmp_path: Path) -> None:
    import datasets

    texts = [f"t{i}" for i in range(1500)] + [" "]
    datasets.Dataset.from_dict({"text": texts}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet:row 1501: `text` is empty"):
        load_sft(DataSection(sft=str(tmp_path / "a.parquet")))


def test_bom_and_empty_lines_are_tolerated_and_counted(tmp_path: Path) -> None:
    body = "\n\n".join(json.dumps({"text": f"é {i}"}) for i in range(60)) + "\n"
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + body.encode("utf-8"))
    split = load_sft(DataSection(sft=str(tmp_path / "a.jsonl")))
    assert split.report["rows"] == 60
    assert split.report["counts"]["empty lines"] == 59
    assert "é 0" in {example.response for example in split.train + split.eval}
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbftext\n" + b"".join(b"w%d\n\n" % i for i in range(60)))
    assert load_sft(DataSection(sft=str(tmp_path / "a.csv"))).report["rows"] == 60


def test_missing_things_name_the_key_and_a_neighbour(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "prefs.jsonl", ROWS)
    with pytest.raises(UserError, match=r"data\.preferences: .*pref\.jsonl does not exist.*prefs\.jsonl\?"):
        load_rankings(DataSection(preferences=str(tmp_path / "pref.jsonl")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"data\.prompts: .* holds no data file"):
        load_prompts(DataSection(prompts=str(tmp_path / "empty")))
    with pytest.raises(UserError, match=r"data\.sft is not set"):
        load_sft(DataSection())


def test_a_saved_data_set_without_the_split(tmp_path: Path) -> None:
    source = write("saved-dict", tmp_path, ROWS)
    with pytest.raises(UserError, match=r"has no split 'validation'; it has test, train"):
        load_rankings(DataSection(preferences=DataSource(path=source, split="validation")))


def test_a_broken_saved_data_set(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(UserError, match="could not be loaded as a saved data set"):
        load_sft(DataSection(sft=str(tmp_path)))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_an_unreadable_file(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    path.chmod(0)
    with pytest.raises(UserError, match="cannot be read"):
        load_rankings(DataSection(preferences=str(path)))


def test_fingerprints_follow_the_content(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"one")
    first = source_fingerprint(str(path))
    assert first["sha256"] == hashlib.sha256(b"one").hexdigest()
    assert first["files"] == {"a.jsonl": first["sha256"]}
    path.write_bytes(b"two")
    assert source_fingerprint(str(path))["sha256"] == hashlib.sha256(b"two").hexdigest()
    folder = source_fingerprint(str(tmp_path))
    (tmp_path / "b.jsonl").write_bytes(b"more")
    assert source_fingerprint(str(tmp_path))["sha256"] != folder["sha256"]
    (tmp_path / "README.md").write_bytes(b"words")
    assert set(source_fingerprint(str(tmp_path))["files"]) == {"a.jsonl", "b.jsonl"}


def test_a_saved_data_set_s_fingerprint_knows_its_split(tmp_path: Path) -> None:
    source = write("saved-dict", tmp_path, ROWS)
    train = source_fingerprint(DataSource(path=source))
    test = source_fingerprint(DataSource(path=source, split="test"))
    assert train != test
    assert train["sha256"] == test["sha256"]


def test_hub_fingerprint_fetches_nothing() -> None:
    source = DataSource(path="someone/something", split="train[:9]", config="c")
    assert source_fingerprint(source) == {
        "hub": "someone/something",
        "config": "c",
        "split": "train[:9]",
    }


def test_local_files_need_no_heavy_import(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    code = (
        "import sys; from pipeline import data, tokens, recipe; "
        f"section = recipe.DataSection(preferences={str(path)!r}); "
        "data.source_fingerprint(section.preferences); data.load_rankings(section); "
        "print([m for m in ('torch', 'transformers', 'datasets', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_gzipped_jsonl_is_read_and_a_cut_one_refused(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{n}", "response": "r", "split": "eval" if n == 0 else "train"} for n in range(2000)]
    packed = gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())
    file = tmp_path / "train.jsonl.gz"
    file.write_bytes(packed)
    split = load_sft(DataSection(sft=str(tmp_path)))
    assert (len(split.train), split.train[-1].source) == (1999, f"{file}:2000")
    file.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(UserError, match=r"train\.jsonl\.gz is not a whole gzip file"):
        load_sft(DataSection(sft=str(file)))
    file.write_bytes(b"{}")
    with pytest.raises(UserError, match=r"train\.jsonl\.gz is not a whole gzip file"):
        load_sft(DataSection(sft=str(file)))
