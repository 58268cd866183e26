"""Which engine a recipe opens: in this process or a server's, alone or on several ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from pipeline.errors import UserError
from pipeline.ranks import ALONE, Ranks
from pipeline.recipe import DataSection, Recipe
from pipeline.tokens import load_tokenizer
from rollout.engine import SamplingOptions
from rollout.hf_engine import TransformersEngine
from rollout.open import open_engine
from rollout.split import SharedEngine, SplitEngine
from rollout.stop import StoppingEngine
from tests.rollout.fake_server import FakeServer, serving, tokens_for
from tests.tiny_stage import save_tiny_policy


@pytest.fixture(scope="module")
def policy_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_policy(tmp_path_factory.mktemp("policy"))


def recipe(policy_dir: Path, **rollout: object) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "opened",
            "output_dir": str(policy_dir.parent / "runs"),
            "model": {"name_or_path": str(policy_dir)},
            "data": {"max_prompt_tokens": 16, "max_response_tokens": 12},
            "rollout": {"engine": "transformers", **rollout},
        }
    )


class Pair(Ranks):
    """The first of two ranks, where the second says the same."""

    def gather(self, value: Any) -> list[Any]:
        return [value, value]

    def broadcast(self, value: Any) -> Any:
        return value


PAIR = Pair(0, 2)


def test_colocated_alone_and_on_several_ranks(policy_dir: Path) -> None:
    alone = open_engine(recipe(policy_dir), policy_dir, print)
    assert isinstance(alone, TransformersEngine)
    split = open_engine(recipe(policy_dir), policy_dir, print, ranks=PAIR)
    assert isinstance(split, SplitEngine)
    assert isinstance(split.engine, TransformersEngine)
    assert (split.name, split.version, split.policy_version) == (alone.name, alone.version, 0)
    long = recipe(policy_dir).model_copy(update={"data": DataSection(max_prompt_tokens=120, max_response_tokens=12)})
    with pytest.raises(UserError, match=r"rank 0: .*128 positions"):
        open_engine(long, policy_dir, print, ranks=PAIR)


def test_a_server_s_engine_cuts_at_stops_and_an_explicit_kind_stays_here(policy_dir: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(policy_dir)
    fake = FakeServer({name: list(parameter.shape) for name, parameter in model.named_parameters()})
    fake.model |= {"vocab_size": 300}
    with serving(fake):
        served = recipe(policy_dir, mode="server", server={"url": fake.url, "weights_dir": str(tmp_path)})
        quick = open_engine(served, policy_dir, print, kind="transformers")
        assert isinstance(quick, TransformersEngine)
        assert fake.calls == []
        ids = tokens_for([5, 6], 3, 12)
        stop = load_tokenizer(policy_dir, served.model).decode(ids[2:4])
        served = served.model_copy(update={"rollout": served.rollout.model_copy(update={"stop": (stop,)})})
        for ranks in (ALONE, PAIR):
            engine = open_engine(served, policy_dir, print, ranks=ranks)
            assert isinstance(engine, SharedEngine)
            assert isinstance(engine.engine, StoppingEngine)
            assert engine.name == "vllm server"
            (completion,) = engine.generate([[5, 6]], SamplingOptions(12), [3])
            assert list(completion.token_ids) == ids[:4]
            assert completion.finished
            engine.load_weights(model.state_dict().items(), version=6)
            assert engine.generate([[5, 6]], SamplingOptions(12), [3])[0].policy_version == 6
            own, version = Path(fake.loaded[-1]).parent, Path(fake.loaded[-1]).name
            assert (own.parent, version) == (tmp_path / "opened" / "rollout_weights", "version-6")
            engine.close()
            assert not (tmp_path / "opened" / "rollout_weights").exists()
