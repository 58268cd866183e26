"""Blind ballots: which of two answers is better, with nothing on the page that says whose they are.

`write_ballot` writes, for the people who vote,

    ballot/ballot.jsonl   {"id", "prompt", "left", "right"} per item
    ballot/ballot.html    the same to vote on in a browser; it saves a file of votes

and beside the folder, for `pipeline.evaluation.votes` alone, `ballot_key.json`: which method's answer is on which side.
Sides and the order of the items come from a hash of the ballot's seed and the item's id, so that the first items of a
ballot are a fair sample of all of them, and the same contests make the same ballot.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from pipeline.artifacts import write_text
from pipeline.evaluation.contests import Contest

BALLOT = "ballot/ballot.jsonl"
PAGE = "ballot/ballot.html"
KEY = "ballot_key.json"


def write_ballot(contests: Sequence[Contest], folder: Path, seed: int) -> int:
    """Writes ballot, page and key of the contests, and returns the number of items.

    Contests with two equal answers are left out; those with the same texts by the same methods are one item. The key
    keeps the items of earlier ballots in the folder, so that votes on them are known for what they are.

    Args:
        seed: of sides and order.
    """
    items: dict[str, list[Contest]] = {}
    for contest in contests:
        if contest.response_a != contest.response_b:
            items.setdefault(contest.id, []).append(contest)
    rows, key = [], {}
    for name in sorted(items, key=lambda name: _digest(seed, "order", name)):
        first = items[name][0]
        sides = sorted([(first.a, first.response_a), (first.b, first.response_b)])
        left, right = sides if int(_digest(seed, "side", name), 16) % 2 else sides[::-1]
        rows.append({"id": name, "prompt": first.prompt, "left": left[1], "right": right[1]})
        places = [{"prompt_index": c.prompt_index, "sample": c.sample, "seed": c.seed} for c in items[name]]
        key[name] = {"left": left[0], "right": right[0], "contests": places}
    earlier = json.loads((folder / KEY).read_text(encoding="utf-8"))["items"] if (folder / KEY).exists() else {}
    (folder / BALLOT).parent.mkdir(parents=True, exist_ok=True)
    write_text(folder / BALLOT, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    # "<" would let an answer end the script that it stands in
    write_text(folder / PAGE, _PAGE.replace("ITEMS", json.dumps(rows).replace("<", "\\u003c")))
    write_text(folder / KEY, json.dumps({"seed": seed, "items": {**earlier, **key}}, indent=1) + "\n")
    return len(rows)


def _digest(seed: int, use: str, name: str) -> str:
    return hashlib.sha256(f"{seed}:{use}:{name}".encode()).hexdigest()


_PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Ballot</title>
<style>
  :root { color-scheme: light dark }
  body { font: 1rem/1.5 system-ui, sans-serif; max-width: 70rem; margin: 0 auto; padding: 1rem }
  .sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); column-gap: 1rem }
  section { margin-bottom: 1rem; border: 1px solid GrayText; border-radius: .4rem; padding: 0 1rem }
  p.text { white-space: pre-wrap; overflow-wrap: anywhere }
  h2 { font-size: 1rem }
  button, input { font: inherit; padding: .4rem .8rem; margin: .5rem .3rem .5rem 0 }
  [aria-pressed=true] { outline: 3px solid Highlight }
</style>
<h1>Which answer is better?</h1>
<label>Your name or a number: <input id="rater"></label>
<p id="place" role="status"></p>
<section><h2>Prompt</h2><p class="text" id="prompt"></p></section>
<div class="sides">
  <section><h2>Left</h2><p class="text" id="left"></p></section>
  <section><h2>Right</h2><p class="text" id="right"></p></section>
</div>
<p>
  <button data-vote="left">Left is better (1)</button>
  <button data-vote="tie">Tie (2)</button>
  <button data-vote="right">Right is better (3)</button>
</p>
<p><button id="back">Back</button> <button id="next">Next</button> <button id="save">Save votes</button></p>
<script>
const items = ITEMS;
const votes = {};
let at = 0, saved = true;
const find = name => document.getElementById(name);
const buttons = [...document.querySelectorAll("[data-vote]")];
function show() {
  const item = items[at] || {};
  for (const part of ["prompt", "left", "right"]) find(part).textContent = item[part] || "";
  for (const button of buttons) button.setAttribute("aria-pressed", votes[item.id] === button.dataset.vote);
  const place = `Item ${items.length && at + 1} of ${items.length}`;
  find("place").textContent = `${place}, ${Object.keys(votes).length} voted on`;
}
function go(step) { at = Math.min(Math.max(at + step, 0), Math.max(items.length - 1, 0)); show(); }
function vote(choice) { if (items[at]) { votes[items[at].id] = choice; saved = false; go(1); } }
for (const button of buttons) button.onclick = () => vote(button.dataset.vote);
find("back").onclick = () => go(-1);
find("next").onclick = () => go(1);
find("save").onclick = () => {
  const rater = find("rater").value.trim();
  const voted = items.filter(item => votes[item.id]);
  const rows = voted.map(item => JSON.stringify({id: item.id, vote: votes[item.id], rater}));
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob(rows.map(row => row + "\\n"), {type: "application/jsonl"}));
  link.download = "votes.jsonl";
  link.click();
  saved = true;
};
document.onkeydown = event => {
  const choice = {1: "left", 2: "tie", 3: "right"}[event.key];
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (choice && event.target !== find("rater")) vote(choice);
};
window.onbeforeunload = event => { if (!saved) event.preventDefault(); };
show();
</script>
</html>
"""
