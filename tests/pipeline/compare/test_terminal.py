from __future__ import annotations

import io

from rich.console import Console

from pipeline.compare.terminal import say_results
from tests.pipeline.report.fixture import results


def test_every_method_has_its_row_and_the_reading_follows() -> None:
    found = results()
    found["cost"]["reading"] = ["PPO took 4 times the CPU time of DPO."]
    out = io.StringIO()
    say_results(found, Console(file=out, width=120))
    text = out.getvalue()
    lines = text.splitlines()[1 : 1 + len(found["methods"])]
    rows = {line.split()[0]: line for line in lines}
    assert list(rows) == found["methods"]
    assert f"{found['measures']['ppo']['vader']['mean']:.3f} [" in rows["ppo"]
    assert f"{found['win_rates']['vader']['ppo']['sft']['mean']:.1%}" in rows["ppo"]
    assert " - " in rows["sft"]
    assert "score" not in text.splitlines()[0]
    said = [text.index(sentence) for sentence in (found["reading"][0], "PPO took 4 times", found["reading"][1])]
    assert said == sorted(said)
