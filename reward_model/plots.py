"""Pictures of a reward model's evaluation: calibration, accuracy by margin, score against length, score histogram."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK = "#1f3a5f"
ACCENT = "#d1603d"
MUTED = "#8a94a0"
FILL = "#9db8d6"


def save_plots(
    out: Path,
    evaluation: Mapping[str, Any],
    scores: Sequence[float],
    lengths: Sequence[int],
    policy_scores: Sequence[float],
) -> list[Path]:
    """Write the four PNG files of an evaluation into `out` and return their paths.

    Args:
        evaluation: the dictionary of `reward_model.evaluate.evaluate_rankings`.
        scores, lengths: score and response tokens of every held-out answer.
        policy_scores: scores of the SFT samples that the normalisation is taken from.
    """
    drawings: dict[str, Callable[[Axes], None]] = {
        "calibration.png": lambda axes: _calibration(axes, evaluation),
        "accuracy_by_margin.png": lambda axes: _accuracy_by_margin(axes, evaluation),
        "score_vs_length.png": lambda axes: _score_vs_length(axes, evaluation, scores, lengths),
        "score_hist.png": lambda axes: _score_hist(axes, scores, policy_scores),
    }
    return [_save(out / name, draw) for name, draw in drawings.items()]


def _save(path: Path, draw: Callable[[Axes], None]) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e9ed", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9)
    draw(axes)
    axes.title.set_fontsize(11)
    FigureCanvasAgg(figure).print_png(str(path))
    return path


def _calibration(axes: Axes, evaluation: Mapping[str, Any]) -> None:
    bins = evaluation["calibration"]["bins"]
    predicted = [b["predicted"] for b in bins]
    observed = [b["observed"] for b in bins]
    largest = max(b["pairs"] for b in bins)
    axes.plot([0.5, 1], [0.5, 1], color=MUTED, linestyle="--", linewidth=1, label="perfect")
    axes.plot(predicted, observed, color=INK, linewidth=1.4, zorder=2)
    sizes = [30 + 170 * b["pairs"] / largest for b in bins]
    axes.scatter(predicted, observed, s=sizes, color=INK, zorder=3, label="pairs (area: how many)")
    axes.set_xlim(0.49, 1.01)
    axes.set_ylim(min(0.4, *observed) - 0.03, 1.03)
    axes.set_xlabel("predicted probability of the higher-scored answer")
    axes.set_ylabel("share in which it is the better one")
    axes.set_title(f"Calibration on held-out pairs (ECE {evaluation['calibration']['ece']:.3f})")
    axes.legend(frameon=False, fontsize=9, loc="upper left")


def _accuracy_by_margin(axes: Axes, evaluation: Mapping[str, Any]) -> None:
    buckets = evaluation["buckets"]
    rows = [("all", evaluation)]
    rows += [(f"gap $\\geq$ {row['gap']:g}", row) for row in buckets["at_least"]]
    rows += [(f"{row['from']:.2g}\nto {row['to']:.2g}", row) for row in buckets["quantiles"]]
    cumulative = 1 + len(buckets["at_least"])
    for place, (_, row) in enumerate(rows):
        middle = row["accuracy"]
        low = middle if row["accuracy_low"] is None else row["accuracy_low"]
        high = middle if row["accuracy_high"] is None else row["accuracy_high"]
        colour = INK if place < cumulative else ACCENT
        axes.plot([place, place], [low, high], color=colour, linewidth=2)
        axes.plot(place, middle, "o", color=colour, markersize=6)
        axes.annotate(f"{middle:.3f}", (place, middle), (7, 0), textcoords="offset points", va="center", size=8)
    axes.axhline(0.5, color=MUTED, linestyle="--", linewidth=1)
    if len(rows) > cumulative:
        axes.axvline(cumulative - 0.5, color=MUTED, linewidth=0.8)
    axes.set_xticks(range(len(rows)))
    axes.set_xticklabels([f"{name}\n({row['pairs']})" for name, row in rows], fontsize=8)
    axes.set_xlim(-0.5, len(rows) - 0.1)
    axes.set_xlabel("number of pairs in brackets")
    axes.set_ylim(top=1.02)
    axes.set_ylabel("accuracy, 95% interval")
    unit = "rating gap" if buckets["by"] == "rating_gap" else "predicted margin"
    axes.set_title(f"Accuracy on held-out pairs; right: equal groups by {unit}")


def _score_vs_length(
    axes: Axes, evaluation: Mapping[str, Any], scores: Sequence[float], lengths: Sequence[int]
) -> None:
    x = np.asarray(lengths, dtype=float)
    y = np.asarray(scores, dtype=float)
    jitter = np.random.default_rng(0).uniform(-0.35, 0.35, len(x))
    axes.scatter(x + jitter, y, s=9, color=INK, alpha=0.25, linewidths=0)
    places = sorted(set(x))
    groups = np.array_split(np.array(places), min(12, len(places)))
    middle = [x[np.isin(x, group)].mean() for group in groups]
    mean = [y[np.isin(x, group)].mean() for group in groups]
    axes.plot(middle, mean, color=ACCENT, linewidth=2, label="mean score")
    rho = evaluation["score_length"]["spearman"]
    shown = "undefined" if rho is None else f"{rho:+.2f}"
    axes.set_xlabel("response tokens, EOS included")
    axes.set_ylabel("raw score")
    axes.set_title(f"Score against length of held-out answers (Spearman {shown})")
    axes.legend(frameon=False, fontsize=9)


def _score_hist(axes: Axes, scores: Sequence[float], policy_scores: Sequence[float]) -> None:
    edges = np.histogram_bin_edges([*scores, *policy_scores], bins=40).tolist()
    axes.hist(scores, bins=edges, density=True, color=FILL, label=f"held-out answers ({len(scores)})")
    axes.hist(
        policy_scores,
        bins=edges,
        density=True,
        histtype="step",
        linewidth=1.8,
        color=ACCENT,
        label=f"SFT samples ({len(policy_scores)})",
    )
    mean, std = float(np.mean(policy_scores)), float(np.std(policy_scores))
    axes.axvline(mean, color=ACCENT, linestyle="--", linewidth=1)
    axes.set_xlabel("raw score")
    axes.set_ylabel("density")
    axes.set_title(f"Scores; normalised by the SFT samples' mean {mean:.2f} and std {std:.2f}")
    axes.legend(frameon=False, fontsize=9)
