"""Reward sources: models with either tokenizer, functions of the user's own, weighted sums; where critics start."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaModel,
)

from pipeline.artifacts import finish
from pipeline.errors import UserError
from pipeline.functions import load_function
from pipeline.recipe import ModelSection
from pipeline.records import Prompt
from pipeline.stage import Stage
from pipeline.tokens import EncodedPrompt, Encoder, chat_template_sha256, load_tokenizer, tokenizer_sha256
from policy.models import save_model
from policy.ppo.critic import load_critic
from policy.ppo.order import pass_indices
from policy.ppo.rewards import FunctionReward, ModelReward, Retokeniser, Rewards, load_rewards
from policy.ppo.stage import run
from reward_model.score import Normalisation, backbone_and_head, load_reward_model
from rollout.batch import Completion, RolloutBatch
from tests.pipeline.conftest import CORPUS, save_other_tokenizer, save_tiny_tokenizer
from tests.policy.conftest import no_policy
from tests.tiny_stage import VOCABULARY, prepare_stage, save_tiny_policy, write_rows

FUNCTIONS = """
def characters(prompts, responses, columns):
    return [len(r) for r in responses]

SEEN = []

def target(prompts, responses, columns, scale=1.0):
    SEEN.append(prompts)
    return [scale * c["target"] + len(p) for p, c in zip(prompts, columns)]

def spoils(prompts, responses, columns):
    for row in columns:
        row.clear()
    prompts.clear()
    return [0.0 for _ in responses]

def nan(prompts, responses, columns):
    return [float("nan") if "dull" in p else 1.0 for p in prompts]

def infinite(prompts, responses, columns):
    return [float("inf") if "dull" in p else 1.0 for p in prompts]

def text(prompts, responses, columns):
    return ["1" if "dull" in p else 1.0 for p in prompts]

def short(prompts, responses, columns):
    return [1.0 for p in prompts if "dull" not in p]

def long(prompts, responses, columns):
    return [1.0 for p in prompts for _ in range(1 + ("dull" in p))]

def nothing(prompts, responses, columns):
    if all("dull" not in p for p in prompts):
        return [1.0 for _ in prompts]

def raises(prompts, responses, columns):
    return [1.0 / ("dull" not in p) for p in prompts]

def forgets_one(prompts, responses, columns):
    return [1.0] if len(prompts) == 1 else [1.0] * (len(prompts) - 1)
"""
PROMPTS = [
    Prompt("this film is", "prompts.jsonl:3", {"target": 2.0}),
    Prompt("the dull plot", "prompts.jsonl:7", {"target": -1.0}),
]
RESPONSES = ((" a quiet wonder", True), (" old", False))
MODEL = ModelSection(name_or_path="m")

TEMPLATE = "{% for message in messages %}({{ message['content'] }}){% endfor %}"


@pytest.fixture
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of reward functions in the working directory; its name."""
    name = f"rewards_of_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)
    return name


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    return save_tiny_policy(tmp_path / "policy", chat_template=TEMPLATE)


def encoder_of(directory: Path) -> Encoder:
    return Encoder(load_tokenizer(directory, MODEL), 24, 8)


def save_policy_tokenizer(directory: Path) -> Path:
    return save_tiny_tokenizer(directory, chat_template=TEMPLATE)


def save_reward_model(directory: Path, save_tokenizer: Any = save_policy_tokenizer, **manifest: Any) -> Path:
    """A random reward model as its stage leaves it: tokenizer, manifest, mean 0.5 and std 2."""
    partial = directory.with_name(f"{directory.name}.partial")
    save_tokenizer(partial)
    torch.manual_seed(len(directory.name))
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=128,
        initializer_range=0.4,
        pad_token_id=0,
    )
    config.num_labels = 1
    LlamaForSequenceClassification(config).save_pretrained(partial)
    tokenizer = load_tokenizer(partial, MODEL)
    own = {"tokenizer_sha256": tokenizer_sha256(tokenizer), "chat_template_sha256": chat_template_sha256(tokenizer)}
    accuracy = {"eval/accuracy": 0.8, "eval/accuracy_low": 0.7, "eval/accuracy_high": 0.9, "eval/pairs": 40}
    written = {"kind": "rm", "fingerprint": {"sha256": "x"}, "metrics": accuracy}
    written["normalisation"] = {"mean": 0.5, "std": 2.0}
    finish(partial, directory, {**written, **own, **manifest})
    return directory


def raw_score(directory: Path, ids: Sequence[int], last: int = -1) -> float:
    """The head on the hidden state at one token, by a plain forward."""
    model: Any = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    with torch.no_grad():
        return model.score(model.model(torch.tensor([list(ids)])).last_hidden_state[0, last]).item()


def make_batch(encoder: Encoder, prompts: Sequence[Prompt], responses: Sequence[tuple[str, bool]]) -> RolloutBatch:
    completions = []
    for text, finished in responses:
        ids = encoder.whole_responses_ids([text])[0]
        ids = ids if finished else ids[:-1]
        completions.append(Completion(tuple(ids), tuple(-1.0 for _ in ids), finished))
    return RolloutBatch.from_completions(encoder.prompts_ids(prompts), completions, encoder.pad_token_id)


def function_reward(encoder: Encoder, module: str, function: str, **kwargs: Any) -> FunctionReward:
    takes = ("prompts", "responses", "columns")
    loaded = load_function("ppo.rewards.mine", "reward function mine", f"{module}:{function}", kwargs, takes)
    return FunctionReward(loaded, encoder)


def make_stage(out: Path, policy: Path, ppo: Mapping[str, Any], **inputs: Path) -> Stage:
    recipe = {"name": "x", "model": {"name_or_path": str(policy)}, "ppo": ppo}
    roles = {"policy": policy} | {role.replace("rewards_", "rewards."): path for role, path in inputs.items()}
    return Stage(prepare_stage(out, recipe, "ppo", roles))


def test_the_score_is_the_weighted_sum_of_functions(policy: Path, functions: str) -> None:
    encoder = encoder_of(policy)
    sources = {
        "characters": function_reward(encoder, functions, "characters"),
        "target": function_reward(encoder, functions, "target", scale=10.0),
    }
    rewards = Rewards(sources, {"characters": 2.0, "target": -0.5})
    total, each = rewards.scores(make_batch(encoder, PROMPTS, RESPONSES), PROMPTS)
    assert each["characters"].tolist() == [15.0, 4.0]
    assert each["target"].tolist() == [10 * 2 + 12, 10 * -1 + 13]
    assert total.tolist() == [2 * 15 - 0.5 * 32, 2 * 4 - 0.5 * 3]


def test_a_model_is_normalised_a_function_is_not(policy: Path, functions: str, tmp_path: Path) -> None:
    encoder, trained = encoder_of(policy), save_reward_model(tmp_path / "rm")
    model = load_reward_model(trained, torch.float32, "cpu")
    sources = {
        "model": ModelReward("rm", model, Normalisation(0.5, 2.0), 16, nullcontext),
        "characters": function_reward(encoder, functions, "characters"),
    }
    batch = make_batch(encoder, PROMPTS, RESPONSES)
    total, _ = Rewards(sources, {"model": 3.0, "characters": 0.1}).scores(batch, PROMPTS)
    for row, (prompt, (text, finished)) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        ids = [*encoder.prompt_ids(prompt), *encoder.whole_responses_ids([text])[0]]
        raw = raw_score(trained, ids if finished else ids[:-1])
        assert total[row].item() == pytest.approx(3.0 * (raw - 0.5) / 2.0 + 0.1 * len(text), abs=1e-5)


def test_a_function_cannot_spoil_the_prompts(policy: Path, functions: str) -> None:
    encoder = encoder_of(policy)
    batch = make_batch(encoder, PROMPTS, RESPONSES)
    assert function_reward(encoder, functions, "spoils").scores(batch, PROMPTS).tolist() == [0.0, 0.0]
    assert PROMPTS[0].columns == {"target": 2.0}


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        ("nan", "returned nan"),
        ("infinite", "returned inf"),
        ("text", "returned '1', which is not a finite number"),
        ("short", "returned 0 values for 1 responses"),
        ("long", "returned 2 values for 1 responses"),
        ("nothing", "returned NoneType"),
        ("raises", "ZeroDivisionError"),
    ],
)
def test_a_bad_function_stops_with_the_row_that_did_it(
    policy: Path, functions: str, function: str, problem: str
) -> None:
    encoder = encoder_of(policy)
    source = function_reward(encoder, functions, function)
    row = r"reward function mine: prompts\.jsonl:7: prompt 'the dull plot', response ' old': "
    with pytest.raises(UserError, match=row + problem):
        source.scores(make_batch(encoder, PROMPTS, RESPONSES), PROMPTS)


def test_a_function_that_fails_on_batches_only_names_no_row(policy: Path, functions: str) -> None:
    encoder = encoder_of(policy)
    source = function_reward(encoder, functions, "forgets_one")
    with pytest.raises(UserError, match="mine: the whole batch: returned 1 values for 2 responses"):
        source.scores(make_batch(encoder, PROMPTS, RESPONSES), PROMPTS)


def test_missing_records_of_the_prompts_are_no_guess(policy: Path, functions: str) -> None:
    encoder = encoder_of(policy)
    with pytest.raises(ValueError, match=r"columns of \[1, 2, 1\] rows"):
        function_reward(encoder, functions, "characters").scores(make_batch(encoder, PROMPTS, RESPONSES), PROMPTS[:1])


def test_another_tokenizer_reads_the_same_text_in_its_own_tokens(policy: Path, tmp_path: Path) -> None:
    encoder, foreign = encoder_of(policy), save_reward_model(tmp_path / "foreign", save_other_tokenizer)
    own: Any = AutoTokenizer.from_pretrained(foreign)
    prompts = [*PROMPTS, Prompt(({"role": "user", "content": "two plus two"},)), PROMPTS[0]]
    batch = make_batch(encoder, prompts, [*RESPONSES, (" four", True), ("<unused0>", False)])
    assert encoder.decode(batch.response_ids[3].tolist()) == ""
    texts = ["this film is", "the dull plot", "[user] two plus two\n[assistant]", "this film is"]
    answers = [[*own(" a quiet wonder").input_ids, 1], own(" old").input_ids, [*own(" four").input_ids, 1], [1]]
    assert own(" a quiet wonder").input_ids != encoder.whole_responses_ids([" a quiet wonder"])[0][:-1]
    retokenise = Retokeniser(encoder, encoder_of(foreign))
    model = load_reward_model(foreign, torch.float32, "cpu")
    got = ModelReward("f", model, Normalisation(0.5, 2.0), 64, nullcontext, retokenise).scores(batch, prompts)
    for row, (text, answer) in enumerate(zip(texts, answers, strict=True)):
        expected = (raw_score(foreign, own(text).input_ids + answer) - 0.5) / 2.0
        assert got[row].item() == pytest.approx(expected, abs=1e-5), row


def test_a_stage_s_sources_are_loaded_in_the_recipe_s_order_and_foreign_tokenizers_announced(
    policy: Path, functions: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ppo = {
        "rewards": {
            "foreign": {"model": "foreign", "weight": 0.25},
            "brevity": {"function": f"{functions}:characters", "weight": -0.5},
            "trained": {"model": "rm"},
        }
    }
    foreign, trained = save_reward_model(tmp_path / "foreign", save_other_tokenizer), save_reward_model(tmp_path / "rm")
    stage = make_stage(tmp_path / "out", policy, ppo, reward_model=trained, rewards_foreign=foreign)
    encoder = encoder_of(policy)
    prompts = [EncodedPrompt(prompt, encoder.prompt_ids(prompt)) for prompt in PROMPTS]
    rewards = load_rewards(stage, encoder, prompts, torch.device("cpu"), nullcontext)
    said = capsys.readouterr().out
    assert "foreign has a tokenizer of its own" in said
    assert "tried on 2 prompts; its EOS is <end>, its padding <fill>" in said
    assert said.count("tokenizer of its own") == 1
    total, each = rewards.scores(make_batch(encoder, PROMPTS, RESPONSES), PROMPTS)
    assert list(each) == ["foreign", "brevity", "trained"]
    expected = 0.25 * each["foreign"] - 0.5 * each["brevity"] + each["trained"]
    torch.testing.assert_close(total, expected)

    critic = load_critic(stage, rewards, encoder, no_policy)
    assert "critic starts from the reward model, its head kept" in capsys.readouterr().out
    own = rewards.sources["trained"]
    assert isinstance(own, ModelReward)
    torch.testing.assert_close(critic.head.weight, backbone_and_head(own.model)[1].weight)


def _refused(stage: Stage, encoder: Encoder, prompts: Sequence[Prompt] = PROMPTS) -> str:
    encoded = [EncodedPrompt(prompt, encoder.prompt_ids(prompt)) for prompt in prompts]
    with pytest.raises(UserError) as caught:
        load_rewards(stage, encoder, encoded, torch.device("cpu"), nullcontext)
    return str(caught.value)


def test_tokenizers_that_lose_text_and_manifests_that_do_not_fit_are_refused(policy: Path, tmp_path: Path) -> None:
    def lossy(directory: Path) -> Path:
        return save_other_tokenizer(directory, words=["this", "film", "is"])

    encoder = encoder_of(policy)
    model = save_reward_model(tmp_path / "lossy", lossy)
    stage = make_stage(tmp_path / "a", policy, {"rewards": {"f": {"model": "x"}}}, rewards_f=model)
    text = _refused(stage, encoder)
    assert "ppo.rewards.f: prompts.jsonl:7: the reward model's tokenizer turns 'the dull plot' into ''" in text
    turned_round = Retokeniser(encoder_of(model), encoder)
    with pytest.raises(UserError, match="the policy's tokenizer turns 'the dull plot' into ''"):
        turned_round.check("ppo.rewards.f", [EncodedPrompt(prompt, [1]) for prompt in PROMPTS])

    model = save_reward_model(tmp_path / "swapped", save_other_tokenizer, tokenizer_sha256="0" * 64)
    stage = make_stage(tmp_path / "b", policy, {"rewards": {"f": {"model": "x"}}}, rewards_f=model)
    assert "trained with another tokenizer than the one in its directory" in _refused(stage, encoder)

    model = save_reward_model(tmp_path / "unscaled", normalisation=None)
    stage = make_stage(tmp_path / "c", policy, {}, reward_model=model)
    assert "no score normalisation" in _refused(stage, encoder)


def test_a_critic_from_a_weighted_reward_model_predicts_its_term(policy: Path, tmp_path: Path) -> None:
    trained, encoder = save_reward_model(tmp_path / "rm"), encoder_of(policy)
    ppo = {"rewards": {"trained": {"model": "rm", "weight": -3.0}}}
    stage = make_stage(tmp_path / "out", policy, ppo, reward_model=trained)
    prompts = [EncodedPrompt(prompt, encoder.prompt_ids(prompt)) for prompt in PROMPTS]
    rewards = load_rewards(stage, encoder, prompts, torch.device("cpu"), nullcontext)
    critic = load_critic(stage, rewards, encoder, no_policy)
    with torch.no_grad():
        values = critic(make_batch(encoder, PROMPTS, RESPONSES))
    for row, prompt in enumerate(PROMPTS):
        raw = raw_score(trained, encoder.prompt_ids(prompt))
        assert values[row, 0].item() == pytest.approx(-3.0 * (raw - 0.5) / 2.0, abs=1e-5)

    save_model(critic.classifier(), encoder.tokenizer, tmp_path / "critic")
    stage = make_stage(tmp_path / "again", policy, {"critic": "critic"}, critic=tmp_path / "critic")
    with torch.no_grad():
        again = load_critic(stage, Rewards({}, {}), encoder, no_policy)(make_batch(encoder, PROMPTS, RESPONSES))
    torch.testing.assert_close(again, values)


@pytest.mark.parametrize("ppo", [{"critic": "policy"}, {"rewards": {"f": {"function": "a:b"}}}])
def test_a_critic_from_the_policy_has_its_trunk_and_a_zero_head(
    policy: Path, tmp_path: Path, ppo: Mapping[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = encoder_of(policy)
    stage = make_stage(tmp_path / "out", policy, ppo)
    critic = load_critic(stage, Rewards({}, {}), encoder, no_policy)
    assert "critic starts from the policy, its head zero" in capsys.readouterr().out
    values = critic(make_batch(encoder, PROMPTS, RESPONSES))
    assert (values == 0).all()
    trunk, wanted = dict(critic.trunk.base_model.named_parameters()), LlamaModel.from_pretrained(policy)
    assert trunk.keys() == dict(wanted.named_parameters()).keys()
    assert all(torch.equal(trunk[name], parameter) for name, parameter in wanted.named_parameters())
    values.sum().backward()
    gradient = critic.head.weight.grad
    assert gradient is not None
    assert gradient.abs().sum() > 0


def test_a_critic_of_another_tokenizer_is_refused(policy: Path, tmp_path: Path) -> None:
    foreign = save_reward_model(tmp_path / "foreign", save_other_tokenizer)
    stage = make_stage(tmp_path / "out", policy, {"critic": "foreign"}, critic=foreign)
    with pytest.raises(UserError, match=r"ppo\.critic: .*foreign has another tokenizer than the policy"):
        load_critic(stage, Rewards({}, {}), encoder_of(policy), no_policy)


def test_ppo_runs_on_a_function_alone(policy: Path, functions: str, tmp_path: Path) -> None:
    words = " ".join(CORPUS).split()
    rows: list[dict[str, Any]] = [
        {"prompt": f"{n} {words[n]}", "target": float(n), "split": "train" if n % 4 else "eval"} for n in range(24)
    ]
    steps = {"updates": 2, "rollout_batch_size": 4, "num_ppo_epochs": 1, "score_clip": None, "missing_eos_penalty": 0.0}
    recipe = {
        "name": "x",
        "model": {"name_or_path": str(policy)},
        "data": {
            "prompts": str(write_rows(tmp_path / "prompts.jsonl", rows)),
            "max_prompt_tokens": 16,
            "max_response_tokens": 6,
        },
        "ppo": {
            **steps,
            "rewards": {
                "size": {"function": f"{functions}:characters", "weight": 0.5},
                "target": {"function": f"{functions}:target", "kwargs": {"scale": 2.0}, "weight": -1.0},
            },
        },
        "rollout": {"engine": "transformers"},
        "eval": {"prompts": 2, "samples_per_prompt": 2},
    }
    stage = Stage(prepare_stage(tmp_path / "ppo.partial", recipe, "ppo", {"policy": policy}))
    run(stage)
    logged = [json.loads(line) for line in (stage.out / "metrics.jsonl").read_text().splitlines()]
    updates = [row for row in logged if "objective/scores" in row]
    assert len(updates) == 2
    for row in updates:
        by_hand = 0.5 * row["objective/scores/size"] - row["objective/scores/target"]
        assert row["objective/scores"] == pytest.approx(by_hand, abs=1e-4)
    train = [row["prompt"] for row in rows if row["split"] == "train"]
    seen = importlib.import_module(functions).SEEN
    assert seen[1:3] == [[train[i] for i in pass_indices(len(train), 4, update, seed=0)] for update in (1, 2)]
    held_out = json.loads((stage.out / "evaluation" / "update_000002.json").read_text())["rows"]
    assert len(held_out) == 4
    targets = {row["prompt"]: row["target"] for row in rows}
    for row in held_out:
        wanted = 0.5 * len(row["response"]) - (2.0 * targets[row["prompt"]] + len(row["prompt"]))
        assert row["score"] == pytest.approx(wanted, abs=1e-4)
