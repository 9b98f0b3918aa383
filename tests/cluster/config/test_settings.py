"""Configuration: TOML under command-line flags, and one line that names what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tomli_w

from cluster.config.errors import UserError
from cluster.config.settings import RunSettings
from cluster.config.sources import parse_overrides, read_toml, resolve, to_toml


def from_flags(*flags: str, source: str = "shapes") -> RunSettings:
    return resolve(source, parse_overrides(list(flags), "prog"))


def refusal(*flags: str, source: str = "shapes") -> str:
    with pytest.raises(UserError) as caught:
        from_flags(*flags, source=source)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_flags_override_single_keys_of_nested_sections() -> None:
    settings = from_flags("--steps", "7", "--selection.keep", "4", "--rollout.dynamics", "cps")
    plain = resolve("shapes", {})
    assert (settings.steps, settings.selection.keep, settings.rollout.dynamics) == (7, 4, "cps")
    assert settings.selection.candidates == plain.selection.candidates
    assert settings.rollout.width == plain.rollout.width
    assert settings.learner == plain.learner


def test_flags_take_lists_paths_numbers_and_nothing() -> None:
    settings = from_flags(
        "--rewards", '[{"name": "jpeg", "weight": 0.5}]', "--learner.learning_rate", "3e-5",
        "--prompts.train", "some.txt", "--learner.betas", "[0.8, 0.9]", "--rollout.window_stop", "none",
    )  # fmt: skip
    assert [(reward.name, reward.weight) for reward in settings.rewards] == [("jpeg", 0.5)]
    assert settings.learner.learning_rate == 3e-5
    assert settings.prompts.train == Path("some.txt")
    assert settings.prompts.eval == resolve("shapes", {}).prompts.eval
    assert settings.learner.betas == (0.8, 0.9)
    assert settings.rollout.window_stop is None


@pytest.mark.parametrize(
    "flags", [("--learner.clip", "2e-3", "--learner.kl=flow_grpo"), ("--learner.objective.clip", "2e-3",
              "--learner.objective.kl", "flow_grpo")],
)  # fmt: skip
def test_the_objectives_keys_have_flags_also_by_their_older_names(flags: tuple[str, ...]) -> None:
    objective: Any = from_flags(*flags).learner.objective
    assert (objective.name, objective.clip, objective.kl) == ("flow_grpo", 2e-3, "flow_grpo")


@pytest.mark.parametrize("flag", ["--learner.clip", "--learner.objective.clip"])
def test_a_flag_wins_over_a_file_of_an_older_version(tmp_path: Path, flag: str) -> None:
    path = tmp_path / "older.toml"
    text = to_toml(from_flags()).replace('[learner.objective]\nname = "flow_grpo"\n', "")
    path.write_text(text.replace("clip = 0.001\n", "").replace('old_log_probs = "sampler"\n', ""))
    older = read_toml(str(path))
    older["learner"] = {**older["learner"], "clip": 1e-4, "beta": 0.5}
    path.write_text(tomli_w.dumps(older))
    objective: Any = from_flags(flag, "3e-3", source=str(path)).learner.objective
    assert (objective.clip, objective.beta) == (3e-3, 0.5)


@pytest.mark.parametrize("form", ["flag", "json"])
def test_another_objective_starts_from_its_own_defaults(form: str) -> None:
    """The preset's clip range is not a key of the objective that replaces it."""
    name = "somewhere:Mine"
    flags = {
        "flag": ("--learner.objective.name", name),
        "json": ("--learner.objective", f'{{"name": "{name}"}}'),
    }
    assert from_flags(*flags[form]).learner.objective.model_dump() == {"name": name}
    kept: Any = from_flags("--learner.objective.name", "flow_grpo").learner.objective
    assert kept.clip == 1e-3


def test_help_lists_the_objectives_keys(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_overrides(["--help"], "prog")
    shown = capsys.readouterr().out
    for key in ("name", "clip", "ratio", "advantage_clip", "beta", "kl"):
        assert f"--learner.objective.{key} " in shown
        assert f"--learner.{key} " not in shown


@pytest.mark.parametrize("value", ['[{name="jpeg"}]', '[{"name": "jpeg"', '[{"name": jpeg}]'])
def test_a_value_that_is_not_json_is_one_line(value: str) -> None:
    with pytest.raises(UserError, match=r'rewards.*expected JSON, such as --rewards .\[\{"name"') as refusal:
        from_flags("--rewards", value)
    assert "\n" not in str(refusal.value)


def test_a_toml_file_of_ones_own_works_like_a_preset(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(to_toml(from_flags("--steps", "9")), encoding="utf-8-sig")  # as Windows editors save it
    settings = from_flags("--seed", "3", source=str(path))
    assert (settings.steps, settings.seed, settings.preset) == (9, 3, "shapes")


@pytest.mark.parametrize("name", ["preference", "shapes", "words", "sd35-ocr"])
def test_toml_reads_back_as_the_same_configuration(name: str, tmp_path: Path) -> None:
    flags = ["--seed", "5", "--rollout.window_size", "2", "--folder", "runs/a b", "--cluster.deadline", "1.5"]
    settings = from_flags(*flags, source=name)
    path = tmp_path / "config.toml"
    path.write_text(to_toml(settings), encoding="utf-8")
    assert resolve(str(path), {}) == settings


def test_evaluation_rewards_default_to_the_training_rewards() -> None:
    assert [reward.name for reward in resolve("shapes", {}).eval_rewards_used] == ["shapes"]
    assert [reward.name for reward in resolve("preference", {}).eval_rewards_used] == ["pickscore", "shapes"]


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--steps", "abc"], ["steps", "integer", "'abc'"]),
        (["--steps", "0"], ["steps", "greater than or equal to 1", "'0'"]),
        (["--rollout.dynamics", "pde"], ["rollout.dynamics", "'sde', 'cps' or 'ode'", "'pde'"]),
        (["--rollout.steps", "1"], ["rollout.steps", "'1'"]),
        (["--rollout.window_start", "5"], ["rollout", "window [5, 5)", "step 5"]),
        (["--rollout.dynamics", "cps", "--rollout.noise_level", "1.2"], ["noise_level", "1.2", "cps"]),
        (
            ["--selection.previews", "32", "--rollout.preview_steps", "6"],
            ["draft_steps", "steps (6)", "got 6"],
        ),
        (
            [
                *["--rollout.dynamics", "ode", "--rollout.solver", "dpm2", "--rollout.draft", "path"],
                *["--selection.drafts", "32", "--learner.objective.name", "nft"],
            ],
            ["rollout.draft", "'path'", "dpm2", "euler"],
        ),
        (["--selection.keep", "7"], ["selection.keep", "even", "noise_margin", "7"]),
        (["--selection.keep", "32"], ["selection.keep", "selection.candidates (16)", "32"]),
        (["--selection.margin", "each", "--selection.strategy", "all"], ["'each'", "noise_margin", "all"]),
        (["--combine", "sum"], ["combine", "'raw' or 'standardised'", "'sum'"]),
        (
            ["--combine", "standardised", "--selection.adaptive", "12"],
            ["combine", "'standardised'", "selection.adaptive"],
        ),
        (["--guard.action", "stop"], ["guard.action", "'pause'", "'stop'"]),
        (["--rewards", '[{"name": "jpeg", "batch": 0}]'], ["rewards.0.batch", "greater than or equal to 1"]),
        (
            ["--selection.strategy", "best"],
            ["selection.strategy", "'all'", "module:function", "'best'"],
        ),
        (["--learner.offload", "parameters"], ["learner", "needs zero_stage 3, got 1"]),
        (["--learner.objective.kl", "other"], ["learner.objective.kl", "'flow_grpo'", "'other'"]),
        (
            ["--learner.objective.name", "ppo"],
            ["learner.objective.name", "flow_grpo", "module:Class", "'ppo'"],
        ),
        (["--rewards", "[]"], ["rewards", "at least 1", "[]"]),
        (["--rewards", '[{"name": "jpeg"}, {"name": "jpeg"}]'], ["listed once", "jpeg, jpeg"]),
        (["--rewards", '[{"name": "jpeg", "weight": 0}]'], ["weight other than 0"]),
        (["--rewards", '[{"name": "jpeg", "wieght": 1}]'], ["unknown key", "wieght"]),
        (["--cluster.dashboard_port", "99999"], ["cluster.dashboard_port", "65535", "'99999'"]),
        (["--nonesuch", "3"], ["--nonesuch", "prog --help-all"]),
        (["--selection.nonesuch", "3"], ["--selection.nonesuch"]),
        (["--sele.keep", "3"], ["--sele.keep"]),
        (["--steps"], ["--steps", "expected one argument"]),
    ],
)
def test_a_wrong_flag_is_named_with_its_value(flags: list[str], parts: list[str]) -> None:
    message = refusal(*flags)
    assert not [part for part in parts if part not in message], message


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"stesp": 3}, ["unknown key stesp"]),
        ({"rollout": {"widht": 3}}, ["unknown key rollout.widht"]),
        ({"selection": {"kep": 3}}, ["unknown key selection.kep"]),
        ({"steps": "many"}, ["steps", "'many'"]),
        ({"rewards": [{}]}, ["rewards.0.name is missing"]),
        ({"rollout": 3}, ["rollout", "got 3"]),
    ],
)
def test_a_wrong_key_of_a_file_is_named_with_its_value(change: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        resolve("shapes", change)
    assert not [part for part in parts if part not in str(caught.value)], str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_wrong_key_is_named_at_once() -> None:
    message = refusal("--steps", "0", "--learner.objective.clip", "0", "--rollout.width", "x")
    assert all(key in message for key in ("steps", "learner.objective.clip", "rollout.width"))


def test_an_unknown_preset_is_answered_with_the_known_ones() -> None:
    assert refusal(source="shape") == (
        "no preset or TOML file 'shape'; presets are flux-pickscore, klein-ocr-24gb, preference, "
        "sd35-geneval, sd35-geneval-fast, sd35-geneval-nft, sd35-ocr, sd35-ocr-24gb, sd35-ocr-nft, "
        "sd35-pickscore, sd35-pickscore-80gb, sd35-pickscore-fast, sd35-pickscore-nft, shapes, shapes-nft, "
        "wan-ocr, words"
    )


def test_a_file_that_is_no_toml_is_named_with_the_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.toml"
    path.write_text("steps = 3\nseed =\n")
    with pytest.raises(UserError, match=r"broken\.toml.*line 2"):
        read_toml(str(path))


@pytest.mark.parametrize("content", [b"\xff\xfe", None])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "odd.toml"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match=r"odd\.toml"):
        read_toml(str(path))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("steps = 3".encode("utf-16"), "odd.toml: is UTF-16; save it as UTF-8"),
        ("steps = 3\n# K\u00e4fer".encode("latin-1"), "odd.toml:2: the byte at offset 13 is 0xe4, not UTF-8"),
    ],
)
def test_a_file_that_is_not_utf8_says_what_it_is(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "odd.toml").write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_toml(str(tmp_path / "odd.toml"))
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("reward", "refused"),
    [
        ({"name": "shapes"}, False),
        ({"name": "quality", "scorer": "jpeg"}, False),
        ({"name": "shapes", "scorer": "jpeg"}, True),
        ({"name": "shapes", "options": {"strict": True}}, True),
    ],
)
def test_an_evaluation_reward_is_the_training_one_or_has_a_name_of_its_own(
    configure: Any, reward: dict[str, Any], refused: bool
) -> None:
    if refused:
        with pytest.raises(UserError, match="give it a name of its own, and scorer = '"):
            configure(eval_rewards=[reward])
        return
    (used,) = configure(eval_rewards=[reward]).eval_rewards_used
    assert used.target == reward.get("scorer", reward["name"])


def test_an_evaluation_has_a_reward_that_counts(configure: Any) -> None:
    with pytest.raises(UserError, match="at least one of eval_rewards needs a weight other than 0"):
        configure(eval_rewards=[{"name": "jpeg", "weight": 0}])


def test_actors_can_be_placed_by_the_names_of_their_roles(configure: Any) -> None:
    nodes = {"rollout": "sampler", "learner": "learner", "selector": "learner", "shapes": "learner"}
    assert configure(cluster={"nodes": nodes}).cluster.nodes == nodes
    with pytest.raises(UserError, match=r"cluster\.nodes: got sampler, expected some of rollout, learner"):
        configure(cluster={"nodes": {"sampler": "spot"}})


def test_a_reward_only_watches_if_it_has_no_weight_anywhere() -> None:
    rewards = [{"name": "shapes"}, {"name": "jpeg", "weight": 0}, {"name": "ocr"}]
    listed = [{"name": "shapes", "weight": 0}, {"name": "clipscore", "weight": 0}, {"name": "hpsv2"}]
    assert resolve("shapes", {"rewards": rewards, "eval_rewards": listed}).watching == {"jpeg", "clipscore"}
    assert resolve("shapes", {"rewards": rewards}).watching == {"jpeg"}
    assert not resolve("shapes", {}).watching
