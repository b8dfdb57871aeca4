"""Settings: every bad value is refused with its field's name, and what is written is read back."""

from __future__ import annotations

import dataclasses
import json

import pytest

from far_train.data.settings import BACKGROUND_SHARES, LAYOUT_SHARES, MANY_CONCEPTS, ExtractConfig, FusionConfig
from far_train.models.settings import SampleConfig
from far_train.training.settings import TrainConfig
from far_train.utils.config import Config, read_settings, setting
from far_train.utils.errors import ConfigError

SHARED = ("min_area", "max_area")  # the same masks are judged when they are extracted and when they are fused
ALL = (ExtractConfig, FusionConfig, TrainConfig, SampleConfig)


@pytest.mark.parametrize("kind", ALL)
def test_defaults_travel_as_json(kind):
    values = json.loads(json.dumps(kind().to_dict()))
    assert kind.from_dict(values) == kind()


@pytest.mark.parametrize("kind", ALL)
def test_every_setting_has_a_name_of_its_own_and_a_help_line(kind):
    for field in dataclasses.fields(kind):
        assert field.metadata["help"], field.name
        others = [k for k in ALL if k is not kind and field.name in {f.name for f in dataclasses.fields(k)}]
        assert not others or field.name in SHARED, field.name  # a settings file without sections would be ambiguous


@pytest.mark.parametrize("kind", ALL)
def test_ranges_hold_at_both_ends(kind):
    for field in dataclasses.fields(kind):
        for bound, step in ((field.metadata["low"], -1), (field.metadata["high"], 1)):
            if bound is not None:
                with pytest.raises(ConfigError, match=f"^{field.name}: .*out of range.*{bound:g}".replace("+", r"\+")):
                    kind(**{field.name: bound + step})


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (FusionConfig, {"size": "large"}, "size: expected int, got 'large'"),
        (FusionConfig, {"size": 512.5}, "size: expected int, got 512.5"),
        (FusionConfig, {"size": True}, "size: expected int, got True"),
        (FusionConfig, {"size": None}, "size: expected int, got None"),
        (FusionConfig, {"size": 500}, "size: 500 is not a multiple of 64; try 512"),
        (FusionConfig, {"flip": "yes"}, "flip: expected float, got 'yes'"),
        (FusionConfig, {"flip": float("nan")}, "flip: nan is not a finite number"),
        (FusionConfig, {"rotation": float("inf")}, "rotation: inf is not a finite number"),
        (FusionConfig, {"layout_weights": [1, 2]}, "layout_weights: expected dict or nothing"),
        (FusionConfig, {"layout_weights": {"solo": "many"}}, "layout_weights: expected float, got 'many'"),
        (FusionConfig, {"layout_weights": {"solo": -1}}, "layout_weights: the share of 'solo' is -1.0"),
        (FusionConfig, {"layout_weights": {"solo": float("nan")}}, "layout_weights: the share of 'solo' is nan"),
        (FusionConfig, {"background_weights": {"plain": 0}}, "background_weights: all shares are 0"),
        (FusionConfig, {"background_weights": {}}, "background_weights: all shares are 0"),
        (FusionConfig, {"background_weights": {"sea": 1}}, "background_weights: unknown kind 'sea'; known: scene"),
        (ExtractConfig, {"min_area": 0.9, "max_area": 0.5}, "min_area: 0.9 must be smaller than max_area"),
        (TrainConfig, {"steps": 0}, "steps: 0 is out of range; it must be between 1"),
        (TrainConfig, {"steps": "none"}, "steps: expected int or nothing, got 'none'"),
        (TrainConfig, {"localization": "iou"}, "localization: 'iou' is not one of mse, none"),
        (TrainConfig, {"gradient_checkpointing": 1}, "gradient_checkpointing: expected bool, got 1"),
        (TrainConfig, {"sample_prompts": "a dog"}, "sample_prompts: expected tuple, got 'a dog'"),
        (TrainConfig, {"sample_prompts": [1]}, "sample_prompts: expected str, got 1"),
        (TrainConfig, {"embedding_lr": 0, "lora_lr": 0}, "embedding_lr: both learning rates are 0"),
        (SampleConfig, {"concept_strength": {"<a>": float("nan")}}, "concept_strength: nan for <a> is out of range"),
        (SampleConfig, {"concept_strength": {"<a>": 9}}, "concept_strength: 9.0 for <a> is out of range"),
    ],
)
def test_bad_values_are_named(kind, values, message):
    with pytest.raises(ConfigError) as error:
        kind.from_dict(values)
    assert message in str(error.value)


def test_unknown_settings_are_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match="stpes: unknown setting in here; did you mean 'steps'?"):
        TrainConfig.from_dict({"stpes": 5}, "here")
    with pytest.raises(ConfigError, match="zzz: unknown setting in settings; known settings: min_area, max_area"):
        ExtractConfig.from_dict({"zzz": 5})


def test_values_are_brought_to_their_type():
    config = TrainConfig.from_dict({"steps": 5.0, "kv_lr": 1, "sample_prompts": ["a dog"], "min_snr_gamma": None})
    assert (config.steps, config.kv_lr, config.sample_prompts) == (5, 1.0, ("a dog",))
    assert type(config.steps) is int and type(config.kv_lr) is float and config.min_snr_gamma is None
    assert TrainConfig.from_dict({"kv_lr": "5e-6"}).kv_lr == 5e-6


def test_a_config_can_not_be_changed_only_replaced():
    config = FusionConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.size = 64
    assert config.replace(size=64).size == 64 and config.size == 768
    with pytest.raises(ConfigError):
        config.replace(size=65)


def test_shares_of_the_layouts_sum_to_one():
    for shares in (*LAYOUT_SHARES.values(), MANY_CONCEPTS, BACKGROUND_SHARES):
        assert sum(shares.values()) == pytest.approx(1)


def test_steps_are_500_per_concept_up_to_2500():
    assert [TrainConfig().steps_for(n) for n in (1, 2, 5, 6)] == [500, 1000, 2500, 2500]
    assert TrainConfig(steps=7).steps_for(3) == 7


def test_only_what_shapes_the_result_identifies_a_run():
    base = TrainConfig()
    for same in ({"device": "cpu"}, {"save_every": 7}, {"sample_prompts": ("x",)}, {"micro_batch": 1}):
        assert base.replace(**same).result_shaping() == base.result_shaping()
    for change in ({"steps": 7}, {"kv_lr": 2e-5}, {"precision": "fp32"}, {"train_seed": 1}, {"num_class_images": 3}):
        assert base.replace(**change).result_shaping() != base.result_shaping()


# ---- files


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", '{"steps": 5, "kv_lr": 5e-6}'),
        ("a.yaml", "steps: 5\nkv_lr: 5e-6\n"),
        ("a.yml", "\ufeffsteps: 5  # few\nkv_lr: 0.000005\n"),
        ("a.txt", "{steps: 5, kv_lr: 5.0e-6}"),
    ],
)
def test_settings_files(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    config = TrainConfig.from_dict(read_settings(tmp_path / name))
    assert (config.steps, config.kv_lr) == (5, 5e-6)


def test_an_empty_file_sets_nothing(tmp_path):
    (tmp_path / "a.yaml").write_text("# nothing yet\n")
    assert read_settings(tmp_path / "a.yaml") == {}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"{steps: 5}", "is not valid JSON"),
        ("a.json", b"", "is not valid JSON"),
        ("a.json", b"[" * 100_000, "is not valid JSON"),
        ("a.yaml", b"steps: [5", "is not valid YAML"),
        ("a.yaml", b"a: b: c", "is not valid YAML"),
        ("a.yaml", b"day: 2024-13-45", "is not valid YAML"),
        ("a.yaml", b"!!python/object/apply:os.getcwd []", "is not valid YAML"),
        ("a.yaml", b"- steps", "must hold a mapping of settings, not a list"),
        ("a.json", b"5", "must hold a mapping of settings, not a int"),
        ("a.json", b"\xff\xfe", "can't be read as UTF-8"),
    ],
)
def test_files_that_hold_no_settings_are_named_in_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as error:
        read_settings(tmp_path / name)
    assert str(error.value).startswith("config: ") and name in str(error.value) and message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="config: .*none.yaml: can't be read"):
        read_settings(tmp_path / "none.yaml")


def test_nan_in_a_json_file_is_refused(tmp_path):
    (tmp_path / "a.json").write_text('{"kv_lr": NaN}')
    with pytest.raises(ConfigError, match="kv_lr: nan is not a finite number"):
        TrainConfig.from_dict(read_settings(tmp_path / "a.json"))


def test_a_field_of_a_new_config_is_checked_as_well():
    @dataclasses.dataclass(frozen=True)
    class Mine(Config):
        share: float = setting(0.5, "a share", low=0, high=1)

    assert Mine(share=1).share == 1.0
    with pytest.raises(ConfigError, match="share: 2.0 is out of range; it must be between 0 and 1"):
        Mine(share=2)
