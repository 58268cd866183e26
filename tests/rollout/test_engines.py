from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

import rollout.vllm_engine
from pipeline.errors import UserError
from rollout.engine import (
    EngineOptions,
    RolloutEngine,
    SamplingOptions,
    engine_availability,
    make_engine,
)
from rollout.vllm_process import refuse_lone_rank
from tests.rollout.tiny import (
    MODEL_EOS,
    STOP,
    VOCABULARY,
    forward_logits,
    forward_logprobs,
    greedy,
    perturb,
    prompts_of,
)

GREEDY = SamplingOptions(max_new_tokens=24, temperature=0.0)
PARITY = 1e-4  # nats, float32; stale weights show 0.05 to 2
BLOCK = 128  # vLLM's on a CPU: shorter prompts are never cached


def worst_gap(engine: RolloutEngine, model: LlamaForCausalLM, prompts: list[list[int]]) -> tuple[float, int]:
    """Largest log-prob error of a greedy rollout, and in how many prompts its text differs."""
    completions = engine.generate(prompts, GREEDY, [0] * len(prompts))
    gap, different = 0.0, 0
    for prompt, completion in zip(prompts, completions, strict=True):
        expected = forward_logprobs(model, prompt, completion.token_ids)
        gap = max(gap, float((torch.tensor(completion.logprobs) - expected).abs().max()))
        different += list(completion.token_ids) != greedy(model, prompt, GREEDY.max_new_tokens)
    return gap, different


# Parity on live weights


def test_greedy_text_and_logprobs_follow_every_weight_update(
    engine_and_policy: tuple[RolloutEngine, LlamaForCausalLM],
) -> None:
    engine, model = engine_and_policy
    prompts = prompts_of([3, 1, 40, 17, 5, 9])
    texts = []
    for update in range(3):
        perturb(model, seed=update)
        version = engine.policy_version
        engine.load_weights(model.state_dict().items())
        assert engine.policy_version == version + 1
        assert engine.generate([[7]], GREEDY, [0])[0].policy_version == version + 1
        gap, different = worst_gap(engine, model, prompts)
        assert gap < PARITY
        assert different == 0
        texts.append([c.token_ids for c in engine.generate(prompts, GREEDY, [0] * len(prompts))])
    assert texts[0] != texts[1] != texts[2]


@pytest.mark.vllm
def test_vllm_and_transformers_engines_agree(
    vllm_tied: RolloutEngine, transformers_tied: RolloutEngine, policy: LlamaForCausalLM
) -> None:
    perturb(policy, seed=7)
    prompts = prompts_of([2, 30, 11, 150], seed=1)
    answers = []
    for engine in (vllm_tied, transformers_tied):
        engine.load_weights(policy.named_parameters())
        answers.append(engine.generate(prompts, GREEDY, [0] * 4))
    for ours, theirs in zip(*answers, strict=True):
        assert ours.token_ids == theirs.token_ids
        assert ours.finished == theirs.finished
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=PARITY)


@pytest.mark.vllm
@pytest.mark.parametrize("mended", [True, False])
def test_tied_head_is_renewed_with_the_embedding(
    vllm_tied: RolloutEngine,
    policy: LlamaForCausalLM,
    monkeypatch: pytest.MonkeyPatch,
    mended: bool,
) -> None:
    if not mended:
        monkeypatch.setattr(rollout.vllm_engine, "renew_packed_heads", lambda model: None)
    prompts = prompts_of([3, 12, 40])
    for seed in (20, 21) if mended else (22, 23):  # never back to weights that were seen before
        perturb(policy, seed)
        vllm_tied.load_weights(policy.named_parameters())  # a tied head comes without its own name
        gap, _ = worst_gap(vllm_tied, policy, prompts)
        assert (gap < PARITY) == mended


@pytest.mark.vllm
@pytest.mark.parametrize("mended", [True, False])
def test_cached_prefixes_are_forgotten_with_the_weights(
    vllm_tied: RolloutEngine,
    policy: LlamaForCausalLM,
    monkeypatch: pytest.MonkeyPatch,
    mended: bool,
) -> None:
    if not mended:
        llm = vars(vllm_tied)["_llm"]
        monkeypatch.setattr(llm, "reset_prefix_cache", lambda: True)
    shared = prompts_of([2 * BLOCK + 10], seed=int(mended))[0]
    prompts = [[*shared, extra] for extra in (9, 10, 11)]
    perturb(policy, seed=30)
    vllm_tied.load_weights(policy.state_dict().items())
    assert worst_gap(vllm_tied, policy, prompts)[0] < PARITY
    perturb(policy, seed=31)
    vllm_tied.load_weights(policy.state_dict().items())
    gap, _ = worst_gap(vllm_tied, policy, prompts)
    assert (gap < PARITY) == mended


@pytest.mark.vllm
def test_prefix_cache_that_cannot_be_emptied_is_an_error(
    vllm_tied: RolloutEngine, policy: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(vars(vllm_tied)["_llm"], "reset_prefix_cache", lambda: False)
        with pytest.raises(RuntimeError, match="prefix cache"):
            vllm_tied.load_weights(policy.state_dict().items())
    with pytest.raises(RuntimeError, match="cannot generate"):
        vllm_tied.generate([[7]], GREEDY, [0])
    vllm_tied.load_weights(policy.state_dict().items())
    assert worst_gap(vllm_tied, policy, [[7, 8]]) == pytest.approx((0.0, 0), abs=PARITY)


# Sampling


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.6])
def test_logprobs_are_those_of_the_sampling_distribution(
    engine: RolloutEngine, policy: LlamaForCausalLM, temperature: float
) -> None:
    prompts = prompts_of([4, 33, 8, 19])
    sampling = SamplingOptions(max_new_tokens=16, temperature=temperature)
    for prompt, completion in zip(prompts, engine.generate(prompts, sampling, [1, 2, 3, 4]), strict=True):
        expected = forward_logprobs(policy, prompt, completion.token_ids, temperature)
        assert completion.logprobs == pytest.approx(expected.tolist(), abs=PARITY)


@pytest.mark.parametrize("temperature", [1.0, 1.6])
def test_first_tokens_follow_the_whole_distribution(
    engine: RolloutEngine, policy: LlamaForCausalLM, temperature: float
) -> None:
    prompt, draws = prompts_of([6])[0], 3000
    sampling = SamplingOptions(max_new_tokens=1, temperature=temperature)
    completions = engine.generate([prompt] * draws, sampling, range(draws))
    seen = Counter(completion.token_ids[0] for completion in completions)
    expected = draws * (forward_logits(policy, prompt, [0])[-1] / temperature).softmax(-1).double()
    counts = torch.tensor([seen[token] for token in range(VOCABULARY)], dtype=torch.float64)
    rare = expected < 5
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    assert len(expected) > 15
    assert float(torch.special.gammaincc(freedom, statistic / 2)) > 1e-3


def test_seed_decides_the_completion_whatever_the_batch(engine: RolloutEngine) -> None:
    prompts = prompts_of([3, 25, 8, 14, 8, 60, 1, 2, *[401] * 11])  # more tokens than one forward of vLLM takes
    sampling = SamplingOptions(max_new_tokens=20)
    seeds = [11, 12, 13, 14, 15, 16, 17, 2**40, *range(11)]
    together = engine.generate(prompts, sampling, seeds)
    backwards = engine.generate(prompts[::-1], sampling, seeds[::-1])[::-1]
    alone = [engine.generate([prompt], sampling, [seed])[0] for prompt, seed in zip(prompts, seeds, strict=True)]
    for one, other, third in zip(together, backwards, alone, strict=True):
        assert one.token_ids == other.token_ids == third.token_ids
        assert one.logprobs == pytest.approx(third.logprobs, abs=PARITY)
    same_prompt = engine.generate([prompts[1]] * 5, sampling, range(5))
    assert len({completion.token_ids for completion in same_prompt}) == 5


def test_more_prompts_than_sequences_keep_their_order(engine: RolloutEngine, policy: LlamaForCausalLM) -> None:
    prompts = prompts_of([1 + index % 7 for index in range(150)], seed=3)  # 64 side by side
    completions = engine.generate(prompts, SamplingOptions(3, 0.0), [0] * 150)
    for prompt, completion in list(zip(prompts, completions, strict=True))[::10]:
        assert list(completion.token_ids) == greedy(policy, prompt, 3)


def test_only_the_given_stop_tokens_end_a_response(engine: RolloutEngine) -> None:
    prompts = prompts_of([5] * 64, seed=2)
    sampling = SamplingOptions(max_new_tokens=60, temperature=1.5)
    completions = engine.generate(prompts, sampling, range(64))
    ends = set()
    for completion in completions:
        assert len(completion.token_ids) == len(completion.logprobs)
        assert not set(completion.token_ids[:-1]) & set(STOP)
        assert completion.finished == (completion.token_ids[-1] in STOP)
        if completion.finished:
            ends.add(completion.token_ids[-1])
        else:
            assert len(completion.token_ids) == 60
    assert ends == set(STOP)
    assert {completion.finished for completion in completions} == {True, False}
    assert any(MODEL_EOS in completion.token_ids[:-1] for completion in completions)


def test_rollouts_leave_the_global_generators_alone(engine: RolloutEngine) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    engine.generate(prompts_of([3, 4]), SamplingOptions(4), [1, 2])
    assert torch.equal(torch.rand(3), expected)


# Refusals


@pytest.mark.parametrize(
    ("prompts", "seeds", "message"),
    [
        ([[7], [8] * 510], [0, 1], r"prompt 1 has 510 tokens.*room for 488"),
        ([[7], []], [0, 1], "prompt 1 is empty"),
        ([[7, VOCABULARY]], [0], "prompt 0 has token ids from 7 to 128.*0 to 127"),
        ([[-1]], [0], "prompt 0 has token ids from -1"),
        ([[7]], [], "1 prompts need as many seeds, not 0"),
        ([[7]], [-1], "seed 0 is -1"),
    ],
)
def test_requests_that_cannot_be_answered(
    engine: RolloutEngine, prompts: list[list[int]], seeds: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        engine.generate(prompts, GREEDY, seeds)


def test_longest_prompt_fits_and_no_prompts_are_no_completions(engine: RolloutEngine) -> None:
    assert engine.generate([], GREEDY, []) == []
    (completion,) = engine.generate(prompts_of([488]), SamplingOptions(24, 1.0), [3])
    assert 1 <= len(completion.token_ids) <= 24


def broken(model: LlamaForCausalLM, kind: str) -> Iterable[tuple[str, torch.Tensor]]:
    weights: dict[str, torch.Tensor] = dict(model.named_parameters())
    if kind == "missing":
        del weights["model.layers.1.self_attn.k_proj.weight"]
    elif kind == "unknown":
        weights["module.model.norm.weight"] = weights["model.norm.weight"]
    else:
        weights["model.norm.weight"] = weights["model.norm.weight"][:1]
    return weights.items()


@pytest.mark.parametrize("kind", ["missing", "unknown", "shape"])
def test_half_given_weights_are_refused_until_whole_ones_come(
    engine: RolloutEngine, policy: LlamaForCausalLM, kind: str
) -> None:
    version = engine.policy_version
    perturb(policy, seed=40)
    with pytest.raises(ValueError, match="k_proj" if kind == "missing" else r"model\.norm"):
        engine.load_weights(broken(policy, kind))
    with pytest.raises(RuntimeError, match="cannot generate"):
        engine.generate([[7]], GREEDY, [0])
    assert engine.policy_version == version
    engine.load_weights(policy.named_parameters())
    gap, different = worst_gap(engine, policy, prompts_of([4, 9]))
    assert gap < PARITY
    assert different == 0


@pytest.mark.parametrize("temperature", [-1.0, 0.001, float("nan")])
def test_temperatures_that_vllm_would_change_are_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature"):
        SamplingOptions(4, temperature)


@pytest.mark.parametrize(
    "change", [{"max_model_len": 0}, {"max_sequences": -1}, {"dtype": "auto"}, {"kv_cache_gib": 0}]
)
def test_engine_options_are_checked(change: dict[str, object]) -> None:
    sizes: dict[str, object] = {"max_model_len": 8, "max_sequences": 1, "stop_token_ids": ()}
    with pytest.raises(ValueError, match=next(iter(change))):
        EngineOptions(**(sizes | change))  # pyright: ignore[reportArgumentType]


def test_model_directories_that_do_not_fit(tied_dir: Path, tmp_path: Path) -> None:
    options = EngineOptions(max_model_len=513, max_sequences=1, stop_token_ids=STOP)
    with pytest.raises(UserError, match=r"512 positions.*513 tokens"):
        make_engine("transformers", tied_dir, options)
    with pytest.raises(UserError, match=r"has no config\.json"):
        make_engine("transformers", tmp_path, options)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        make_engine("transformers", tmp_path, options)


def test_truncated_weights_are_an_error_with_a_mend(tied_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tied_dir / "config.json").read_bytes())
    whole = (tied_dir / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    options = EngineOptions(max_model_len=64, max_sequences=1, stop_token_ids=STOP)
    with pytest.raises(UserError, match="cannot load the model"):
        make_engine("transformers", tmp_path, options)


@pytest.mark.vllm
def test_small_key_value_cache_is_announced_or_refused(tied_dir: Path) -> None:
    notices: list[str] = []
    tight = EngineOptions(512, 64, STOP, kv_cache_gib=0.003)
    engine = make_engine("vllm", tied_dir, tight, notices.append)
    engine.close()
    engine.close()
    (notice,) = notices
    assert "of 64 full-length sequences" in notice
    assert "rollout.kv_cache_gib" in notice
    with pytest.raises(RuntimeError, match="closed"):
        engine.generate([[7]], GREEDY, [0])
    with pytest.raises(UserError, match=r"vLLM refuses.*rollout\.kv_cache_gib"):
        make_engine("vllm", tied_dir, EngineOptions(512, 64, STOP, kv_cache_gib=1e-4))


def test_closed_transformers_engine_answers_no_more(tied_dir: Path) -> None:
    options = EngineOptions(max_model_len=64, max_sequences=1, stop_token_ids=STOP)
    engine = make_engine("transformers", tied_dir, options)
    engine.close()
    engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        engine.generate([[7]], SamplingOptions(4), [0])
    with pytest.raises(RuntimeError, match="closed"):
        engine.load_weights([])


# Which engine


def test_one_of_several_processes_without_a_group_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refuse_lone_rank()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(UserError, match=r"WORLD_SIZE=2, RANK=1.*Accelerator\(\)"):
        refuse_lone_rank()


def test_availability_names_both_engines() -> None:
    vllm, transformers = engine_availability()
    assert (vllm.name, transformers.name) == ("vllm", "transformers")
    assert transformers.version is not None
    assert transformers.reason is None
    assert (vllm.version is None) == (vllm.reason is not None)


WITHOUT_VLLM = """
import sys
from pathlib import Path

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "vllm":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
from pipeline.errors import UserError
from rollout.engine import EngineOptions, engine_availability, make_engine

options = EngineOptions(max_model_len=64, max_sequences=1, stop_token_ids=(2,))
engine = make_engine("auto", sys.argv[1], options)
assert engine.name == "transformers", engine.name
assert engine_availability()[0].reason == "No module named 'vllm'", engine_availability()
try:
    make_engine("vllm", sys.argv[1], options)
except UserError as error:
    print(error)
"""


def test_auto_without_vllm_is_transformers_with_one_line(tied_dir: Path) -> None:
    child = subprocess.run(
        [sys.executable, "-c", WITHOUT_VLLM, str(tied_dir)],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert child.stderr.splitlines() == [
        "vLLM cannot be imported (No module named 'vllm'): rollouts use the transformers engine."
    ]
    assert child.stdout.startswith("rollout.engine is vllm, but vLLM cannot be imported (No mod")
    assert "rollout.engine: transformers" in child.stdout
