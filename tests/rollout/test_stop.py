"""Stop texts: where a completion is cut, which are stop tokens, and that every engine of a recipe obeys them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.recipe import ModelSection, Recipe
from pipeline.records import Prompt
from pipeline.tokens import Encoder, load_tokenizer
from rollout.batch import Completion
from rollout.engine import RolloutEngine, SamplingOptions
from rollout.open import open_engine
from rollout.stop import cut_at_stop, stop_tokens
from tests.tiny_stage import save_tiny_policy

PIECES = ["a", "b", "ab", "\n", "\n\n", "User", ":", " "]
SAMPLING = SamplingOptions(12, 1.0)


def decode(ids: Sequence[int]) -> str:
    return "".join(PIECES[token] for token in ids)


def sampled(*pieces: str, finished: bool = False) -> Completion:
    ids = tuple(PIECES.index(piece) for piece in pieces)
    return Completion(ids, tuple(-0.5 - n for n in range(len(ids))), finished, policy_version=4)


@pytest.mark.parametrize(
    ("pieces", "kept"),
    [
        (("a", "\n", "User", ":", "b"), 4),  # "\nUser:" over three tokens
        (("User", ":", "\n", "\n", "User", ":"), 4),  # "\n\n" as two tokens, and first
        (("a", "\n\n", "User", ":"), 2),  # as one
        (("a", " ", "ab", "ab", "\n\n"), 5),  # at the very end
        (("\n\n",), 1),
    ],
)
def test_a_completion_ends_with_the_token_that_completes_a_stop(pieces: tuple[str, ...], kept: int) -> None:
    whole = sampled(*pieces)
    cut = cut_at_stop(whole, decode, ["\nUser:", "\n\n"])
    assert cut == Completion(whole.token_ids[:kept], whole.logprobs[:kept], finished=True, policy_version=4)


def test_a_completion_without_a_stop_is_left_alone() -> None:
    for finished in (True, False):
        whole = sampled("a", "\n", "User", "b", ":", finished=finished)
        assert cut_at_stop(whole, decode, ["\nUser:", "\n\n"]) is whole
    empty = Completion((), (), finished=False)
    assert cut_at_stop(empty, decode, ["\n"]) is empty


@given(
    st.lists(st.sampled_from(PIECES), max_size=12),
    st.lists(st.text("ab\n:", min_size=1, max_size=3), min_size=1, max_size=3),
)
def test_the_cut_is_where_reading_token_by_token_stops(pieces: list[str], stops: list[str]) -> None:
    whole = sampled(*pieces)
    read = ""
    for size, piece in enumerate(pieces, 1):
        read += piece
        if any(read.find(stop) >= 0 for stop in stops):
            cut = Completion(whole.token_ids[:size], whole.logprobs[:size], True, policy_version=4)
            assert cut_at_stop(whole, decode, stops) == cut
            return
    assert cut_at_stop(whole, decode, stops) is whole


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def encoder(policy: Path) -> Encoder:
    return Encoder(load_tokenizer(policy, ModelSection(name_or_path=str(policy))), 16, 12)


def test_one_token_that_decodes_back_is_a_stop_token_and_the_eos_is_refused(encoder: Encoder) -> None:
    vocabulary = encoder.tokenizer.get_vocab()
    stops = ["\n", "\n\n", "<unused0>", "quiet wonder", " the"]
    wanted = (vocabulary["\u010a"], vocabulary["<unused0>"], vocabulary["\u0120the"])
    assert stop_tokens(stops, encoder) == wanted
    assert stop_tokens((), encoder) == ()
    with pytest.raises(UserError, match=r"rollout\.stop: '</s>' is the tokenizer's EOS"):
        stop_tokens(["\n", "</s>"], encoder)


def opened(policy: Path, *stops: str) -> RolloutEngine:
    recipe = {
        "name": "x",
        "model": {"name_or_path": str(policy)},
        "data": {"max_prompt_tokens": 16, "max_response_tokens": 12},
        "rollout": {"engine": "transformers", "stop": stops},
    }
    return open_engine(Recipe.model_validate(recipe), policy, print)


def test_the_engine_of_a_recipe_samples_the_same_tokens_up_to_the_stop(policy: Path, encoder: Encoder) -> None:
    """`t` is a token and inside of others, `<unused0>` special, and the fourth takes two tokens."""
    prompts = [encoder.prompt_ids(Prompt("the plot"))] * 256
    free = opened(policy).generate(prompts, SAMPLING, range(256))
    pair = encoder.decode(free[7].token_ids[2:4])
    stops = ("t", "<unused0>", "zz", pair)
    assert len(stop_tokens(stops, encoder)) == 2
    engine = opened(policy, *stops)
    assert (engine.name, engine.version, engine.policy_version) == ("transformers", opened(policy).version, 0)
    ended = set()
    for whole, cut in zip(free, engine.generate(prompts, SAMPLING, range(256)), strict=True):
        size = len(cut.token_ids)
        assert cut.token_ids == whole.token_ids[:size]
        assert cut.logprobs == pytest.approx(whole.logprobs[:size], abs=1e-6)
        before, text = (encoder.decode(cut.token_ids[:n], special=True) for n in (size - 1, size))
        assert not any(stop in before for stop in stops)
        at = [stop for stop in stops if stop in text]
        assert cut.finished == (whole.finished or bool(at))
        assert at or size == len(whole.token_ids)
        ended.update((stop, len(encoder.decode(cut.token_ids[-1:], special=True)) > len(stop)) for stop in at)
    assert {("t", False), ("t", True), ("<unused0>", False), (pair, False)} <= ended
    assert len(engine.generate(prompts[:8], SAMPLING, range(8))[7].token_ids) <= 4


def test_an_eos_among_the_stops_is_refused_at_set_up(policy: Path) -> None:
    with pytest.raises(UserError, match=r"rollout\.stop"):
        opened(policy, "</s>")


def test_weights_and_close_reach_the_engine_inside(policy: Path) -> None:
    from transformers import AutoModelForCausalLM

    engine = opened(policy, "t")
    model = AutoModelForCausalLM.from_pretrained(policy)
    engine.load_weights(model.state_dict().items(), version=3)
    engine.rest()
    assert engine.policy_version == 3
    assert engine.generate([[1, 5]], SAMPLING, [0])[0].policy_version == 3
    engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        engine.generate([[1, 5]], SAMPLING, [0])
