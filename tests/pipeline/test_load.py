from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.load import dump_recipe, load_recipe, recipe_sha256
from pipeline.recipe import Recipe

BASE = "name: tiny\nmodel:\n  name_or_path: model\n"


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str) -> Path:
        file = tmp_path / "recipe.yaml"
        file.write_text(text, encoding="utf-8")
        return file

    return write


def refusal(file: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(file, overrides)
    return str(caught.value)


def test_values_come_from_the_file_and_defaults_from_the_model(write) -> None:
    recipe = load_recipe(write(BASE + "ppo: {kl_coef: 0.2, learning_rate: 1e-5}\ndata: {sft: {path: a, split: b}}\n"))
    assert (recipe.ppo.kl_coef, recipe.ppo.learning_rate, recipe.ppo.updates) == (0.2, 1e-5, 100)
    assert recipe.data.sft is not None
    assert not isinstance(recipe.data.sft, str)
    assert (recipe.data.sft.path, recipe.data.sft.split) == ("a", "b")


def test_the_command_line_beats_the_file(write) -> None:
    file = write(BASE + "ppo: {kl_coef: 0.2}\nseed: 1\n")
    overrides = ["--ppo.kl_coef", "0.3", "--seed=7", "--eval.judges.v.function", "a:b", "--ppo.cliprange_value=null"]
    recipe = load_recipe(file, overrides)
    assert (recipe.ppo.kl_coef, recipe.seed, recipe.ppo.cliprange_value) == (0.3, 7, None)
    assert recipe.eval.judges["v"].function == "a:b"
    assert load_recipe(file, ["--seed", "1", "--seed", "2"]).seed == 2


def test_an_empty_section_has_its_defaults(write) -> None:
    assert load_recipe(write(BASE + "ppo:\n  # kl_coef: 0.1\n")).ppo.kl_coef == 0.05


def test_merge_keys_and_aliases_are_yaml_as_usual(write) -> None:
    recipe = load_recipe(write(BASE + "sft:\n  trainer: &t {max_steps: 3}\nrm:\n  trainer: *t\n"))
    assert recipe.sft.trainer == recipe.rm.trainer == {"max_steps": 3}


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("ppo:\n  kl_coeff: 1\n", [":5: ppo.kl_coeff: unknown key", "'kl_coef'?"]),
        ("pp: {}\n", [":4: pp: unknown key", "'ppo'?"]),
        (
            "eval: {judges: {Vader: {function: a, functon: b}}}\n",
            ["eval.judges.Vader.functon: unknown key", "'function'?"],
        ),
        ("data: {sft: {path: a, pth: b}}\n", ["data.sft.pth: unknown key. Did you mean 'path'?"]),
        ("data: {sft: 3}\n", [":4: data.sft: ", "(got 3)"]),
        ("ppo: {updates: ten}\n", [":4: ppo.updates: ", "integer", "'ten'"]),
        ("ppo: {updates: true}\n", [":4: ppo.updates: a number is wanted"]),
        ("ppo: {gamma: 1.5}\n", [":4: ppo.gamma: ", "less than or equal to 1"]),
        ("ppo: {learning_rate: .inf}\n", ["ppo.learning_rate: ", "finite"]),
        ("ppo: 3\n", [":4: ppo: a section of keys and values is wanted"]),
        ("ppo: {rollout_batch_size: 10, num_minibatches: 4}\n", [":4: ppo: ", "(10)", "(4)", "make it one"]),
        ("name: b\n", [":4: key 'name' is written twice (first at line 1)"]),
        ("ppo:\n  seed: 1\n  lam: 1\n  lam: 1\n", [":7: key 'ppo.lam' is written twice (first at line 6)"]),
        ("sft: {trainer: {learning_rte: 1}}\n", [":4: sft.trainer.learning_rte: SFTConfig has no", "'learning_rate'?"]),
        ("rm: {trainer: {bath_size: 1}}\n", [":4: rm.trainer.bath_size: RewardConfig has no"]),
        ("prepare: [{makes: a, command: b}]\n", ["prepare.0: ", "{out}"]),
        ("eval: {judges: {score: {function: a}}}\n", ["eval: ", "'score'", "rename it"]),
        ("ppo: {rewards: {a: {}}}\n", [":4: ppo.rewards.a: give exactly one of `model` and `function`"]),
        ("ppo: {rewards: {a: {model: x, function: 'm:f'}}}\n", ["ppo.rewards.a: give exactly one"]),
        ("ppo: {rewards: {a: {model: x, kwargs: {k: 1}}}}\n", ["ppo.rewards.a: ", "this is a model"]),
        ("ppo: {rewards: {a: {model: x, weight: 0}}}\n", ["ppo.rewards.a: a weight of 0", "remove it"]),
        ("ppo: {rewards: {a: {model: x, weight: .nan}}}\n", ["ppo.rewards.a.weight: ", "finite"]),
        ("ppo: {rewards: {a: {model: x, weight: true}}}\n", ["ppo.rewards.a.weight: a number is wanted"]),
        ("ppo: {rewards: {a: {modle: x}}}\n", ["ppo.rewards.a.modle: unknown key. Did you mean 'model'?"]),
        ("ppo: {rewards: {a/b: {model: x}}}\n", ["ppo.rewards.a/b", "pattern"]),
        ("ppo: {rewards: {}}\n", [":4: ppo.rewards: ", "at least 1 item"]),
        ("ppo: {reward_model: x, rewards: {a: {model: y}}}\n", [":4: ppo: `reward_model` is set", "`model: rm`"]),
        (
            "rollout:\n  top_p: 0.9\n",
            [":5: rollout.top_p: ", "every importance ratio would be biased", "trl issue 6789"],
        ),
        ("ppo: {ptx_coef: 0.5}\n", [": ppo.ptx_coef (0.5)", "data.sft, which is not set; set data.sft"]),
        ("ppo: {ptx_coef: -1}\ndata: {sft: a}\n", [":4: ppo.ptx_coef: ", "greater than or equal to 0"]),
        ("rollout: {top_k: 50}\n", [":4: rollout.top_k: ", "rollout.temperature is the only"]),
        ("rollout: {top_n: 50}\n", [":4: rollout.top_n: unknown key"]),
        ("rollout: {stop: ['a', '']}\n", [":4: rollout.stop.1: ", "at least 1 character"]),
        ("rollout: {stop: a}\n", [":4: rollout.stop: ", "valid tuple"]),
        ("a: b: c\n", [":4 is not valid YAML"]),
        ("a: !foo 1\n", [":4 is not valid YAML"]),
        ("? {a: b}\n: 1\n", ["is not valid YAML"]),
        ("a: \x01\n", ["is not valid YAML"]),
        ("a: &a {b: *a}\n", ["nested without end"]),
    ],
)
def test_bad_recipes_are_refused_with_line_key_and_mend(write, text: str, parts: list[str]) -> None:
    message = refusal(write(BASE + text))
    for part in parts:
        assert part in message
    assert "\n" not in message


def test_several_mistakes_are_listed_together(write) -> None:
    lines = refusal(write("name: a b\nmodel: {dtype: int8}\n")).splitlines()
    assert [line.split(": ")[1] for line in lines] == ["name", "model.name_or_path", "model.dtype"]


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["--ppo.updaets", "3"], "command line --ppo.updaets: ppo.updaets: unknown key. Did you mean 'updates'?"),
        (["--ppo.updates"], "option --ppo.updates has no value"),
        (["--overwite"], "Did you mean --overwrite?"),
        (["--ppo.updates", "[3"], "value '[3' cannot be read"),
        (["--model.name_or_path.x", "3"], "'name_or_path' is not a section"),
        (["stray"], "unexpected argument 'stray'"),
    ],
)
def test_bad_overrides_are_refused(write, overrides: list[str], part: str) -> None:
    assert part in refusal(write(BASE), *overrides)


def test_files_that_are_no_recipe_are_refused(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "absent.yaml")
    (tmp_path / "a.yaml").write_bytes(b"name: \xff\xfe")
    assert "not UTF-8" in refusal(tmp_path / "a.yaml")
    for text in ("", "[]", "- a\n", "text"):
        (tmp_path / "a.yaml").write_text(text)
        assert "empty or not a mapping" in refusal(tmp_path / "a.yaml")


names = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=12)


@given(
    st.fixed_dictionaries(
        {
            "seed": st.integers(0, 2**31),
            "ppo": st.fixed_dictionaries(
                {
                    "kl_coef": st.floats(0, 1e3),
                    "learning_rate": st.floats(1e-12, 1.0),
                    "cliprange_value": st.none() | st.floats(1e-6, 10),
                }
            ),
            "data": st.fixed_dictionaries({"sft": st.none() | names}),
            "model": st.fixed_dictionaries({"name_or_path": names, "chat_template": st.none() | names}),
            "eval": st.fixed_dictionaries(
                {"judges": st.just({}) | st.just({"v": {"function": "a:b", "kwargs": {"x": [1, "on", None]}}})}
            ),
        }
    )
)
@example({"model": {"name_or_path": "a\x85b\u2028c\u2029"}})
def test_a_dumped_recipe_loads_back_equal(tmp_path_factory: pytest.TempPathFactory, values: dict) -> None:
    recipe = Recipe.model_validate({"name": "tiny", **values})
    file = tmp_path_factory.mktemp("dump") / "recipe.yaml"
    file.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(file) == recipe
    assert recipe_sha256(load_recipe(file)) == recipe_sha256(recipe)
