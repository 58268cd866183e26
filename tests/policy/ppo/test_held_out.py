"""Held-out evaluation and long texts: a reward model that cannot score a row stops the run and names the row."""

from __future__ import annotations

import re
from contextlib import closing, nullcontext
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from pipeline.errors import UserError
from pipeline.evaluation.saved import load_reports, save_report
from policy.ppo.rewards import ModelReward, Retokeniser
from policy.ppo.stage import set_up
from reward_model.score import Normalisation, load_reward_model
from tests.pipeline.conftest import save_other_tokenizer
from tests.policy.ppo.test_rewards import PROMPTS, RESPONSES, encoder_of, make_batch, save_reward_model
from tests.policy.ppo.test_stage import _reward_model, _stage
from tests.policy.ppo.test_update import _forget
from tests.tiny_stage import save_tiny_policy
from tests.workplace import make_workplace


def test_a_score_that_is_not_finite_stops_the_evaluation_with_source_and_row(tmp_path: Path) -> None:
    place = make_workplace(tmp_path / "work")
    training = set_up(_stage(place, _reward_model(place)))
    sound, spoilt = training.held_out.prompts
    source = training.roles.rewards.sources["rm"]
    assert isinstance(source, ModelReward)
    with closing(training.engine):
        before = training.held_out.evaluate(training.roles, training.engine)
        assert before is not None
        assert before.score is not None
        token = next(token for token in spoilt.ids if token not in sound.ids)
        _forget(source.model.get_input_embeddings(), token)
        place_of_row = re.escape(spoilt.prompt.source)
        row = rf"ppo\.rewards\.rm: {place_of_row}: held-out prompt '{spoilt.prompt.content}', response "
        assert re.search(r"prompts\.jsonl:\d+$", spoilt.prompt.source)
        with pytest.raises(UserError, match=row + ".*: the score is nan"):
            training.held_out.evaluate(training.roles, training.engine)


def test_more_tokens_than_the_reward_model_has_positions_are_refused(tmp_path: Path) -> None:
    """The second row has one token too many in the reward model's tokenizer; with one position more it fits."""
    encoder, foreign = encoder_of(save_tiny_policy(tmp_path / "policy")), tmp_path / "foreign"
    save_reward_model(foreign, save_other_tokenizer)
    own = AutoTokenizer.from_pretrained(foreign)
    prompts, responses = PROMPTS[::-1], RESPONSES[::-1]
    batch = make_batch(encoder, prompts, responses)
    asked, answered = len(own("this film is").input_ids), len(own(" a quiet wonder").input_ids) + 1
    assert asked + answered > len(own("the dull plot old").input_ids)
    model = load_reward_model(foreign, torch.float32, "cpu")
    source = ModelReward(
        "runs/f", model, Normalisation(0.0, 1.0), 64, nullcontext, Retokeniser(encoder, encoder_of(foreign))
    )
    model.config.max_position_embeddings = asked + answered - 1
    told = rf"ppo\.rewards: runs/f: prompts\.jsonl:3: .* {asked} \+ {answered} tokens .* reads {asked + answered - 1} "
    with pytest.raises(UserError, match=told):
        source.scores(batch, prompts)
    model.config.max_position_embeddings = asked + answered
    assert source.scores(batch, prompts).isfinite().all()


def test_reports_are_listed_by_update_whatever_order_they_were_saved_in(tmp_path: Path) -> None:
    place = make_workplace(tmp_path / "work")
    training = set_up(_stage(place, _reward_model(place)))
    with closing(training.engine):
        report = training.held_out.evaluate(training.roles, training.engine)
    assert report is not None
    for update in (1_000_000, 20, 0, 3):
        save_report(tmp_path, update, report)
    loaded = load_reports(tmp_path)
    assert list(loaded) == [0, 3, 20, 1_000_000]
    assert all(each == report for each in loaded.values())
    assert loaded[3].rows == report.rows
    assert load_reports(tmp_path / "work") == {}
