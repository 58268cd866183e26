"""What PPO carries from update to update besides its models: the KL coefficient and the scale of the scores."""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor


class FixedKLController:
    """A KL coefficient that never changes."""

    def __init__(self, kl_coef: float) -> None:
        _check_kl_coef(kl_coef)
        self._kl_coef = kl_coef

    @property
    def kl_coef(self) -> float:
        """The weight of the KL penalty in the token rewards."""
        return self._kl_coef

    def update(self, kl_per_sequence: float, n_sequences: int) -> None:
        """Takes what `AdaptiveKLController.update` takes and keeps the coefficient."""

    def state_dict(self) -> dict[str, float]:
        """What a resumed run needs."""
        return {"kl_coef": self._kl_coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Takes back what `state_dict` gave."""
        _check_kl_coef(state["kl_coef"])
        self._kl_coef = state["kl_coef"]


class AdaptiveKLController(FixedKLController):
    """A KL coefficient that holds the KL per sequence near a target.

    kl_coef *= 1 + clip(KL / target - 1, -0.2, 0.2) * n_sequences / horizon. `target` is in nats
    per sequence (the sum over its tokens, mean over sequences), `horizon` in sequences. Source:
    Ziegler et al. 2019, section 2.2; openai/lm-human-preferences `AdaptiveKLController`.
    """

    def __init__(self, kl_coef: float, target: float, horizon: float) -> None:
        super().__init__(kl_coef)
        if not (target > 0 and horizon > 0):
            raise ValueError(f"target and horizon must be > 0, got {target} and {horizon}")
        self.target = target
        self.horizon = horizon

    def update(self, kl_per_sequence: float, n_sequences: int) -> None:
        """Moves the coefficient after `n_sequences` with mean KL `kl_per_sequence` (nats).

        Raises ValueError when the KL is not finite.
        """
        if not math.isfinite(kl_per_sequence):
            raise ValueError(f"the KL per sequence is {kl_per_sequence}")
        error = max(-0.2, min(0.2, kl_per_sequence / self.target - 1))
        self._kl_coef *= 1 + error * n_sequences / self.horizon


def _check_kl_coef(kl_coef: float) -> None:
    if not (kl_coef >= 0 and math.isfinite(kl_coef)):
        raise ValueError(f"kl_coef must be a finite number >= 0, got {kl_coef}")


class RunningScale:
    """Standard deviation of all scores seen so far, to divide new ones by.

    The mean is not moved, so the sign of a score keeps its meaning. Count, mean and sum of squared
    deviations are combined batch by batch (Chan, Golub and LeVeque 1979, eq. 2.1). Source: trlx
    `scale_reward: running`.
    """

    def __init__(self) -> None:
        self._count, self._mean, self._squares = 0, 0.0, 0.0

    @property
    def std(self) -> float:
        """Population standard deviation; 1 before there are two different scores."""
        return math.sqrt(self._squares / self._count) if self._squares > 0 else 1.0

    def scale(self, scores: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Take these scores [B] in and return them divided by the standard deviation of all so far.

        Scores that are not finite are returned as they are and not taken in.
        """
        new = scores.double()[scores.isfinite()]
        if not len(new):
            return scores
        count, shift = len(new), float(new.mean()) - self._mean
        total = self._count + count
        self._squares += float((new - new.mean()).square().sum()) + shift**2 * self._count * count / total
        self._mean += shift * count / total
        self._count = total
        return scores / self.std

    def state_dict(self) -> dict[str, float]:
        """What a resumed run needs."""
        return {"count": self._count, "mean": self._mean, "squares": self._squares}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Takes back what `state_dict` gave."""
        self._count, self._mean, self._squares = int(state["count"]), state["mean"], state["squares"]
