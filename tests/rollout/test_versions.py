"""Which weights sampled what: versions go on over a resume, and responses of other weights are refused."""

from __future__ import annotations

import pytest
from transformers import LlamaForCausalLM

from rollout.batch import Completion, RolloutBatch, refuse_stale
from rollout.engine import RolloutEngine, SamplingOptions

GREEDY = SamplingOptions(4, 0.0)


def test_versions_go_on_where_a_resumed_run_was(engine: RolloutEngine, policy: LlamaForCausalLM) -> None:
    engine.load_weights(policy.state_dict().items(), version=41)
    engine.rest()  # nothing on a CPU
    assert [c.policy_version for c in engine.generate([[7], [8]], GREEDY, [0, 1])] == [41, 41]
    engine.load_weights(policy.state_dict().items())
    assert engine.policy_version == 42
    engine.load_weights(policy.state_dict().items(), version=5)
    assert engine.policy_version == 5


@pytest.mark.parametrize("lag", [0, 1, 2, 9])
@pytest.mark.parametrize("version", [0, 2, 3, 4])
def test_responses_of_other_weights_are_refused(version: int, lag: int) -> None:
    sampled_by = [3, 0, 2]
    completions = [Completion((7,), (-1.0,), finished=False, policy_version=each) for each in sampled_by]
    batch = RolloutBatch.from_completions([[8]] * 3, completions, 0)
    wrong = [row for row, each in enumerate(sampled_by) if not version - lag <= each <= version]
    if not wrong:
        refuse_stale(batch, version, lag=lag)
        return
    seen = ", ".join(str(each) for each in sorted(sampled_by[row] for row in wrong))
    wanted = f"version {version} of" if lag == 0 else f"versions {max(version - lag, 0)} to {version} of"
    said = f"{len(wrong)} of 3 responses, first row {wrong[0]}, were sampled by weights of version {seen}, but {wanted}"
    with pytest.raises(RuntimeError, match=said):
        refuse_stale(batch, version, lag=lag)
