from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from rollout.engine import EngineOptions, RolloutEngine, make_engine
from tests.rollout.tiny import POSITIONS, STOP, load_llama, save_llama

OPTIONS = EngineOptions(max_model_len=POSITIONS, max_sequences=64, stop_token_ids=STOP, kv_cache_gib=0.05)


@pytest.fixture(scope="session")
def tied_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("tied"), tied=True)


@pytest.fixture(scope="session")
def untied_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("untied"), tied=False)


@pytest.fixture(scope="session")
def vllm_tied(tied_dir: Path) -> Iterator[RolloutEngine]:
    engine = make_engine("vllm", tied_dir, OPTIONS)
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def vllm_untied(untied_dir: Path) -> Iterator[RolloutEngine]:
    engine = make_engine("vllm", untied_dir, OPTIONS)
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def transformers_tied(tied_dir: Path) -> Iterator[RolloutEngine]:
    engine = make_engine("transformers", tied_dir, OPTIONS)
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def transformers_untied(untied_dir: Path) -> Iterator[RolloutEngine]:
    engine = make_engine("transformers", untied_dir, OPTIONS)
    yield engine
    engine.close()


@pytest.fixture
def policy(tied_dir: Path) -> LlamaForCausalLM:
    """The trainer's model at the checkpoint's weights."""
    return load_llama(tied_dir)


@pytest.fixture(params=["transformers", pytest.param("vllm", marks=pytest.mark.vllm)])
def engine(request: pytest.FixtureRequest, policy: LlamaForCausalLM) -> RolloutEngine:
    """Either engine, at the checkpoint's weights."""
    shared: RolloutEngine = request.getfixturevalue(f"{request.param}_tied")
    shared.load_weights(policy.state_dict().items())
    return shared


@pytest.fixture(
    params=[
        "transformers_tied",
        "transformers_untied",
        pytest.param("vllm_tied", marks=pytest.mark.vllm),
        pytest.param("vllm_untied", marks=pytest.mark.vllm),
    ]
)
def engine_and_policy(
    request: pytest.FixtureRequest, tied_dir: Path, untied_dir: Path
) -> tuple[RolloutEngine, LlamaForCausalLM]:
    """Either engine with a tied and with an untied head, and the trainer's model."""
    model = load_llama(untied_dir if "untied" in request.param else tied_dir)
    return request.getfixturevalue(request.param), model
