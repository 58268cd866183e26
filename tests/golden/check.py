"""Compares the project with a golden file: `python -m tests.golden.check FILE`.

A golden file is {"cases": [{name, fn, inputs, params, expected, grad?}]}. The relative error of an
array is max |ours - expected| / max |expected|, the error of a case the largest over its results
and its gradients of `loss`. Gradients in the file are central differences, exact to about 1e-9,
hence the floor under the scale.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.golden.adapter import ADAPTERS, AS_GIVEN, UNBOUND

TOLERANCE = 1e-6
SMALLEST_SCALE = 1e-2
Case = Mapping[str, Any]


def read_cases(path: Path) -> list[Case]:
    """The cases of a golden file."""
    return json.loads(path.read_text(encoding="utf-8"))["cases"]


def bound(case: Case) -> bool:
    """Whether the project has what the case is about."""
    return case["fn"] in ADAPTERS and case["name"] not in UNBOUND


def _tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().to(torch.float64)
    if isinstance(value, list | tuple):
        return torch.stack([_tensor(item) for item in value]) if value else torch.zeros(0)
    return torch.tensor(value, dtype=torch.float64)


def relative_error(ours: Any, expected: Any) -> float:
    """max |ours - expected| / max |expected|; infinite when the shapes differ, on NaN, and for another text."""
    if isinstance(expected, str):
        return 0.0 if ours == expected else math.inf
    a, b = _tensor(ours), _tensor(expected).to(torch.float64)
    if a.shape != b.shape:
        return math.inf
    if a.numel() == 0:
        return 0.0
    error = ((a - b).abs().max() / b.abs().max().clamp(min=SMALLEST_SCALE)).item()
    return math.inf if math.isnan(error) else error


def case_errors(case: Case) -> dict[str, float]:
    """The error of every expected result of a case and of every gradient (`grad.<input>`).

    Raises KeyError when the adapter does not know the function or does not return a result.
    """
    given = AS_GIVEN.get(case["fn"], set())
    inputs: dict[str, Any] = {
        name: _tensor(value) if isinstance(value, list) and name not in given else value
        for name, value in case["inputs"].items()
    }
    gradients = case.get("grad") or {}
    for name in gradients:
        inputs[name] = inputs[name].clone().requires_grad_()
    results = ADAPTERS[case["fn"]](**inputs, **case["params"])
    errors = {key: relative_error(results[key], want) for key, want in case["expected"].items()}
    if gradients:
        results["loss"].backward()
        for name, want in gradients.items():
            errors[f"grad.{name}"] = relative_error(inputs[name].grad, want)
    return errors


def main(arguments: list[str] | None = None) -> int:
    """Prints the largest error per function; 1 when any exceeds the tolerance, else 0."""
    parser = argparse.ArgumentParser(description="Compare the project with a golden file.")
    parser.add_argument("file", type=Path)
    path = parser.parse_args(arguments).file
    errors: dict[str, list[tuple[float, str]]] = defaultdict(list)
    missing: dict[str, int] = defaultdict(int)
    for case in read_cases(path):
        if not bound(case):
            missing[case["fn"]] += 1
            continue
        found = case_errors(case)
        key = max(found, key=lambda name: found[name])
        errors[case["fn"]].append((found[key], f"{case['name']}: {key}"))
    failed = 0
    for fn in sorted(errors):
        worst, where = max(errors[fn])
        failed += worst > TOLERANCE
        verdict = "ok" if worst <= TOLERANCE else "WRONG"
        print(f"{fn:20} {len(errors[fn]):3} cases  {worst:9.2e}  {verdict:5}  {where}")
    for fn in sorted(missing):
        print(f"{fn:20} {missing[fn]:3} cases    missing")
    print(f"{len(errors)} functions compared, {failed} wrong, {len(missing)} missing")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
