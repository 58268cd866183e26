"""The PPO benchmark: its arithmetic against hand counts and torch's counter, its models, and real runs on `tiny`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from pipeline.errors import UserError
from pipeline.recipe import ModelSection
from pipeline.tokens import load_tokenizer
from rollout.engine import EngineOptions, SamplingOptions, make_engine
from scripts.bench_ppo import CACHE, ROOT, main, peer_python
from scripts.bench_ppo_models import (
    EOS,
    FIRST_WORD,
    PAD,
    WORKLOADS,
    Flops,
    Shape,
    Workload,
    forward_flops,
    make,
    make_eos_prone,
    random_model,
    update_flops,
)
from scripts.bench_ppo_report import PEER, Rounds, Spread, Turn, Update, markdown, phase_rates, ratios, update_rates

PEER_PYTHON = CACHE / "trl-venv" / "bin" / "python"
SMALL = Shape(
    "llama",
    vocab_size=10,
    hidden_size=4,
    intermediate_size=8,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
)
"""A layer: query and output 4 x 4, key and value 4 x 2, feed-forward 3 times 4 x 8: 144 weights; 432 in all."""
WORK = Workload(SMALL, batch=2, prompt_tokens=3, response_tokens=9, mean_length=2, micro_batch_tokens=64)


def test_flops_of_a_pass_counted_by_hand() -> None:
    """5 tokens: 2 * 432 * 5. 7 pairs: 4 * 3 layers * 4 channels * 7. 2 projected tokens: 2 * 4 * 10 * 2."""
    assert forward_flops(SMALL, tokens=5, pairs=7, projected=2) == Flops(4320, 336, 160)


def test_flops_of_an_update_counted_by_hand() -> None:
    """2 sequences of 3 + 2 tokens: 10 tokens and 2 * 15 pairs, 4 response tokens.

    Once: trunk 8640, attention 1440, projection 320. Full: 3 * 8640 + 3 * 1440 = 30240 for policy and for critic, and
    3 (4 with the second forward) * 320. Frozen: 2 * 8640 + 3 * 1440 = 21600, and 2 (3) * 320.
    """
    assert update_flops(WORK, 2.0, 4, recompute=False) == 4 * (2 * 30240 + 3 * 320)
    assert update_flops(WORK, 2.0, 4, recompute=True) == 4 * (2 * 30240 + 4 * 320)
    assert update_flops(WORK, 2.0, 1, "lora", recompute=False) == 2 * 21600 + 2 * 320
    assert update_flops(WORK, 2.0, 1, "lora", recompute=True) == 2 * 21600 + 3 * 320
    assert update_flops(WORK, 2.0, 1, "lora-shared", recompute=True) == 21600 + 3 * 320


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_flops_are_those_that_torch_counts(family: str) -> None:
    """Forward, and forward + backward = 3 forwards, of a whole model that looks at all pairs."""
    shape = Shape(family, 50, 16, 40, 2, 4, 2)  # pyright: ignore[reportArgumentType]
    model = random_model(shape, "causal", "cpu")
    model.set_attn_implementation("eager")
    ids = torch.randint(FIRST_WORD, 50, (3, 7))
    wanted = forward_flops(shape, tokens=21, pairs=3 * 7 * 7, projected=21)
    once = wanted.trunk + wanted.attention + wanted.projection
    with FlopCounterMode(display=False) as forward:
        logits = model(input_ids=ids).logits
    assert forward.get_total_flops() == once
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    assert backward.get_total_flops() == 2 * once


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("a", 4_606_208), ("b", 134_515_008), ("qwen2.5-0.5b", 494_032_768), ("qwen2.5-1.5b", 1_543_714_304)],
)
def test_the_shapes_have_the_public_sizes(name: str, wanted: int) -> None:
    """The models' cards on the hub; `a` is 4096 * 256 + 4 * (4 * 256^2 + 3 * 256 * 816) and 9 norms of 256."""
    shape = WORKLOADS[name].shape
    parameters = dict(random_model(shape, "causal", "meta").named_parameters())
    assert sum(parameter.numel() for parameter in parameters.values()) == wanted
    assert shape.parameters == sum(parameter.numel() for parameter in parameters.values() if parameter.ndim == 2)


@pytest.fixture(scope="module")
def policy() -> PreTrainedModel:
    """The model of workload `tiny`."""
    torch.manual_seed(0)
    model = random_model(WORKLOADS["tiny"].shape, "causal", "cpu")
    make_eos_prone(model, 6)
    return model


def test_the_policy_ends_its_answers_with_the_wanted_probability(policy: PreTrainedModel) -> None:
    """1/6 on average over texts that calibration did not see, everywhere within a factor of two, and never padding."""
    ids = torch.randint(FIRST_WORD, 512, (64, 24), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        probabilities = policy(input_ids=ids).logits.double().softmax(-1)
    assert probabilities[..., EOS].mean().item() == pytest.approx(1 / 6, rel=0.05)
    assert probabilities[..., EOS].min() > 1 / 12
    assert probabilities[..., EOS].max() < 1 / 3
    assert probabilities[..., PAD].max() < 1e-6


def test_sampled_answers_are_geometric(policy: PreTrainedModel, tmp_path: Path) -> None:
    """P(length > n) = (5/6)^n by our engine: mean 6 (1 - (5/6)^16) = 5.675 under the cut, standard error 0.2."""
    policy.save_pretrained(tmp_path)
    engine = make_engine("transformers", tmp_path, EngineOptions(24, 256, stop_token_ids=(EOS,)))
    prompts = torch.randint(FIRST_WORD, 512, (512, 8), generator=torch.Generator().manual_seed(6)).tolist()
    lengths = [len(one.token_ids) for one in engine.generate(prompts, SamplingOptions(16), range(512))]
    engine.close()
    assert sum(lengths) / 512 == pytest.approx(5.675, abs=0.6)
    assert sum(length > 3 for length in lengths) / 512 == pytest.approx((5 / 6) ** 3, abs=0.07)


def test_text_and_token_prompts_are_the_same(tmp_path: Path) -> None:
    make(WORKLOADS["tiny"], tmp_path, 5, "cpu")
    tokenizer = load_tokenizer(tmp_path / "policy", ModelSection(name_or_path="policy"))
    rows = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    train = [tokenizer(row["prompt"])["input_ids"] for row in rows if row["split"] == "train"]
    assert train == json.loads((tmp_path / "prompts.json").read_text())
    assert [len(prompt) for prompt in train] == [8] * 5
    assert sum(row["split"] == "eval" for row in rows) == 2


def _turn(number: int, side: str, cpu: float, wall: float, *, length: float = 2.0, memory: float = 1.0) -> Turn:
    """Two updates around the given means; ours spend a tenth, a fifth, two thirds and the rest in the phases."""
    shares = {} if side == PEER else {"rollout": 0.1, "experience": 0.2, "update": 0.6, "sync": 0.1}
    updates = [
        Update(cpu + d, wall + d, length + d, {k: v * (wall + d) for k, v in shares.items()}, 4.0) for d in (-0.5, 0.5)
    ]
    return Turn(number, side, updates, memory, None)


ROUNDS = Rounds(
    WORK,
    [
        _turn(0, PEER, 10.0, 6.0, length=2.0, memory=2.0),
        _turn(0, "full", 4.0, 3.0, length=1.0, memory=1.0),
        _turn(2, PEER, 12.0, 6.0, length=2.0, memory=2.0),
        _turn(2, "full", 3.0, 4.0, length=2.0, memory=1.5),
        _turn(1, PEER, 9.0, 8.0, length=1.0, memory=4.0),
        _turn(1, "full", 3.0, 2.0, length=3.0, memory=1.0),
    ],
    [{"flops": 2e5, "device": "NVIDIA H200"}, {"flops": 1e6, "device": ""}, {"flops": 1e5, "device": ""}],
)
"""Rounds out of order, so that a ratio across rounds shows."""


def test_ratios_are_taken_within_a_round() -> None:
    found = ratios(ROUNDS, "full")
    assert found["cpu_seconds"] == Spread(3.0, 2.5, 4.0)
    assert found["wall_seconds"] == Spread(2.0, 1.5, 4.0)
    assert found["peak_memory"] == Spread(0.5, 0.25, 0.75)
    # tokens 2 * (3 + length): (10 / 10) / (4 / 8) = 2; (9 / 8) / (3 / 12) = 4.5; (12 / 10) / (3 / 10) = 4
    assert found["cpu_seconds_per_token"] == pytest.approx(Spread(4.0, 2.0, 4.5))


def test_phases_and_their_rates() -> None:
    """Wall seconds 3, 2 and 4; lengths 1, 3 and 2: the update processes 4 epochs of 8, 12 and 10 tokens."""
    found = phase_rates(ROUNDS, "full")
    assert found["update"] == pytest.approx({"seconds": 1.8, "share": 0.6, "tokens_per_second": 32 / 1.8})
    assert found["rollout"] == pytest.approx({"seconds": 0.3, "share": 0.1, "tokens_per_second": 4 / 0.4})
    assert found["experience"]["tokens_per_second"] == pytest.approx(8 / 0.6)
    assert found["sync"]["tokens_per_second"] is None


def test_rates_are_over_the_median_product_and_the_data_sheet() -> None:
    """One turn of one update of 2 seconds and length 2: see `test_flops_of_an_update_counted_by_hand`."""
    phases = {"rollout": 1.0, "experience": 1.0, "update": 2.0, "sync": 1.0}
    rounds = Rounds(WORK, [Turn(0, "full", [Update(9.0, 5.0, 2.0, phases, 4.0)], 1.0, None)], ROUNDS.gemms)
    found = update_rates(rounds, "full")
    assert found["model_flops"] == 2 * (2 * 30240 + 3 * 320)
    assert found["achieved_flops"] == 2 * (2 * 30240 + 4 * 320)
    assert found["gemm_flops"] == 2e5
    assert found["gemm_share"] == pytest.approx(123520 / 2e5)
    assert found["mfu"] == pytest.approx(122880 / 2e5)
    assert found["data_sheet_mfu"] == pytest.approx(122880 / 989e12)
    assert "| TRL " not in markdown(rounds, "alone")
    assert "| tristage, sharing full | 3.00 [2.50 to 4.00] | 2.00 [1.50 to 4.00] |" in markdown(ROUNDS, "both")


def test_another_trl_is_refused() -> None:
    with pytest.raises(UserError, match=r"holds trl 1\.1[3-9].*, wanted 1\.12\.0"):
        peer_python(Path(sys.executable))


def test_the_benchmark_itself_imports_no_torch() -> None:
    """The peak memory of a child begins at its parent's."""
    program = "import sys, scripts.bench_ppo; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0


def _report(out: Path) -> dict[str, Any]:
    text = (out / "bench_ppo_tiny_cpu.json").read_text()
    assert str(ROOT) not in text
    assert os.uname().nodename not in text
    assert (out / "bench_ppo_tiny_cpu.md").read_text().startswith("# PPO, workload tiny: 0.1M parameters")
    return json.loads(text)


@pytest.mark.slow
def test_our_side_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--workload", "tiny", "--no-peer", "--engine", "transformers", "--threads", "1", "--pairs", "1"]
    assert main([*words, "--updates", "3", "--set", "ppo.num_ppo_epochs=2", "--out", str(tmp_path)]) == 0
    report = _report(tmp_path)
    (turn,) = report["rounds"]
    assert len(turn["updates"]) == 2
    for update in turn["updates"]:
        assert update["epochs"] == 2.0
        assert update["cpu_seconds"] > 0
        assert update["wall_seconds"] == pytest.approx(sum(update["phases"].values()))
    ours = report["settings"]["full"]
    assert (ours["ppo"]["learning_rate"], ours["ppo"]["num_ppo_epochs"], ours["ppo"]["updates"]) == (1e-7, 2, 3)
    assert "1 threads" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.skipif(not PEER_PYTHON.exists(), reason="`make bench-ppo` has not made TRL's environment")
def test_beside_trl(tmp_path: Path) -> None:
    words = ["--workload", "tiny", "--engine", "transformers", "--threads", "1", "--pairs", "1"]
    assert main([*words, "--out", str(tmp_path)]) == 0
    report = _report(tmp_path)
    assert [turn["side"] for turn in report["rounds"]] == [PEER, "full"]
    peer = report["settings"][PEER]
    assert (peer["packages"]["trl"], peer["threads"], peer["config"]["num_ppo_epochs"]) == ("1.12.0", 1, 4)
    assert report["summary"]["full"]["against_trl"]["cpu_seconds"]["median"] > 0
