"""Settings that were renamed: their former names are read wherever settings stand, and identify the same runs."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quality.arms import ALL
from benchmarks.small_models.learn import _parser
from benchmarks.small_models.learning import LearnConfig
from far_train.cli.main import PROGRAM
from far_train.data.dataset import DatasetFolder, write_dataset
from far_train.data.settings import ExtractConfig, FusionConfig
from far_train.models.settings import SampleConfig
from far_train.training.run_folder import FORMERLY_IDENTIFYING, find_run, open_run, run_identity
from far_train.training.settings import TrainConfig
from far_train.utils.errors import CheckpointError, ConfigError

from .command_line import refused

TRAINING = {
    "steps": 7,
    "trainable": "attention",
    "low_rank": 4,
    "low_rank_lr": 1e-3,
    "grad_clip": 0.5,
    "prior_weight": 0.25,
    "prior_pictures": 3,
    "prior_steps": 9,
    "prior_cache": "x",
}
TRAINED = TrainConfig(
    steps=7,
    trainable="lora",
    lora_rank=4,
    lora_lr=1e-3,
    max_grad_norm=0.5,
    prior_loss_weight=0.25,
    num_class_images=3,
    class_image_steps=9,
    class_image_cache="x",
)
FUSING = {
    "recipe_weights": {"solo": 1, "pair": 2},
    "height_drift": 0.2,
    "pair_fill": 0.5,
    "row": 0.25,
    "collage_words": 0.75,
    "prior_collages": 0.125,
}
FUSED = FusionConfig(
    layout_weights={"solo": 1, "pair": 2},
    vertical_jitter=0.2,
    pair_scale_min=0.5,
    row_probability=0.25,
    collage_caption_probability=0.75,
    prior_composites=0.125,
)


def digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


# ---- identities

EARLIER = {"output_preservation": False, "background_weight": 0.3}  # as all earlier runs learned
IMAGES_ALONE = TrainConfig(**EARLIER)


@pytest.mark.parametrize(
    ("config", "recorded"),
    [  # recorded when all settings had their first names: a change means that finished runs aren't found again
        (IMAGES_ALONE, "6c2febcaec71a96b"),
        (TRAINED.replace(**EARLIER), "1254b9d1699b2c19"),
        (IMAGES_ALONE.replace(trainable="kv", kv_lr=2e-5), "0b54881f8f50dfa9"),
        (FusionConfig(), "7333d309bd4ca261"),
        (FUSED, "db9bcf6bbc69f07c"),
        (LearnConfig(), "784db4d0a98b3f4c"),
    ],
)
def test_settings_identify_the_runs_that_they_always_did(config, recorded):
    formerly = {name: getattr(config, name) for name in FORMERLY_IDENTIFYING if hasattr(config, name)}
    assert digest(config.result_shaping() | formerly) == recorded


def test_a_setting_that_came_later_identifies_runs_only_where_they_differ_from_earlier_ones():
    without = TrainConfig(output_preservation=False).result_shaping()
    assert "output_preservation" not in without and without.items() < TrainConfig().result_shaping().items()
    assert TrainConfig().result_shaping()["output_preservation"] is True


def test_the_benchs_arms_are_known_by_the_first_names():
    arms = {arm.name: arm for arm in ALL}
    assert TrainConfig.first_names(arms["textual-inversion"].training)["low_rank_lr"] == 0
    assert TrainConfig.first_names({"trainable": "lora"}) == {"trainable": "attention"}
    assert FusionConfig.first_names(arms["refinement"].fusion) == {"recipe_weights": {"original": 1.0}}


class Base:
    fingerprint, prediction_type, zero_terminal_snr = "ab", "v_prediction", False


def test_a_run_from_before_the_names_is_found_and_resumed(fusion, tmp_path: Path):
    identity = run_identity(Base(), fusion, TRAINED)
    assert (
        identity["config"].items()
        >= {k: v for k, v in TRAINING.items() if k not in ("prior_cache", *FORMERLY_IDENTIFYING)}.items()
    )
    open_run(tmp_path / "run", identity, resume=False)
    assert find_run(tmp_path, "run", run_identity(Base(), fusion, TRAINED))[0] == tmp_path / "run"
    open_run(tmp_path / "run", identity, resume=True)


@pytest.mark.parametrize("recorded", [None, 1])
def test_a_run_from_when_the_micro_batch_identified_it_is_found_and_resumed(fusion, tmp_path: Path, recorded):
    identity = run_identity(Base(), fusion, TRAINED)
    begun = identity | {"config": identity["config"] | {"micro_batch": recorded}}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps(begun))
    assert find_run(tmp_path, "run", identity)[0] == tmp_path / "run"
    open_run(tmp_path / "run", identity, resume=True)


def test_what_differs_is_told_in_todays_names(fusion, tmp_path: Path):
    open_run(tmp_path / "run", run_identity(Base(), fusion, TRAINED), resume=False)
    other = run_identity(Base(), fusion, TRAINED.replace(lora_rank=8, trainable="kv"))
    with pytest.raises(CheckpointError, match=r"lora_rank \(4 then, 8 now\)") as error:
        open_run(tmp_path / "run", other, resume=True)
    assert "trainable ('lora' then, 'kv' now)" in str(error.value)


# ---- reading


@pytest.mark.parametrize(("former", "config"), [(TRAINING, TRAINED), (FUSING, FUSED)])
def test_former_names_are_read_and_told_of(former, config, caplog):
    with caplog.at_level(logging.INFO):
        assert type(config).from_dict(former) == config
    renamed = {f.metadata["was"][0] for f in config.__dataclass_fields__.values() if f.metadata["was"]}
    assert renamed == {message.split(" is now called ")[0] for message in caplog.messages}
    assert type(config).from_dict(config.to_dict()) == config


def test_a_setting_given_by_both_names_is_refused(capsys, tmp_path: Path):
    with pytest.raises(ConfigError, match="^lora_lr: is given twice"):
        TrainConfig.from_dict({"low_rank_lr": 1e-3, "lora_lr": 1e-3})
    refused(capsys, ["train", "--lora-lr", "1e-3", "--low-rank-lr", "1e-3"], "lora_lr: is given twice")


TRAIN = ["train", "--base", "b", "--dataset", "d", "--out", "o"]


def test_former_flags_work_and_are_not_shown(caplog, capsys):
    flags = ["--low-rank", "4", "--trainable", "attention", "--prior-cache", "none"]
    with caplog.at_level(logging.INFO):
        settings = PROGRAM.parse([*TRAIN, *flags]).settings
    assert settings == TrainConfig(lora_rank=4) and "--low-rank is now called --lora-rank" in caplog.text
    fuse = ["fuse", "--concept", "<a>", "dog", "A", "--out", "o", "--recipe-weights", "solo=1", "pair=2"]
    assert PROGRAM.parse(fuse).settings == FusionConfig(layout_weights={"solo": 1, "pair": 2})
    refused(capsys, [*TRAIN, "--low-rank", "x"], "lora_rank: expected int, got 'x'")
    with pytest.raises(SystemExit):
        PROGRAM.run(["train", "--help"])
    shown = capsys.readouterr().out
    assert "--lora-rank" in shown and "--low-rank" not in shown and "attention|" not in shown
    assert _parser().parse_args(["sam", "--out", "o", "--grad-clip", "2"]).max_grad_norm == 2


@pytest.mark.parametrize("text", ["low_rank: 4\n", "train: {low_rank: 4}\nfuse: {row: 1}\n", "low_rank: 4\nfuse:\n"])
def test_a_flag_overrides_a_file_that_has_the_former_name(caplog, tmp_path: Path, text: str):
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    with caplog.at_level(logging.INFO):
        assert PROGRAM.parse([*TRAIN, "--config", str(path)]).settings.lora_rank == 4
    assert caplog.text.count("low_rank is now called lora_rank") == 1
    assert PROGRAM.parse([*TRAIN, "--config", str(path), "--lora-rank", "8"]).settings.lora_rank == 8


def test_a_dataset_that_calls_layouts_recipes_is_read(fusion, tmp_path: Path):
    written = write_dataset(fusion, tmp_path / "dataset")
    index = tmp_path / "dataset" / "dataset.json"
    about = json.loads(index.read_text())
    layouts = [entry.pop("layout") for entry in about["composites"]]
    about["composites"] = [entry | {"recipe": layout} for entry, layout in zip(about["composites"], layouts)]
    index.write_text(json.dumps(about))
    former = DatasetFolder(tmp_path / "dataset")
    assert [former.composite(i).layout for i in range(former.composite_count())] == layouts
    assert former.digest() == written.digest()


def test_no_name_of_today_is_a_former_one():
    kinds = (ExtractConfig, FusionConfig, TrainConfig, SampleConfig)
    today = {name for kind in kinds for name in kind.kinds()}
    former = [old for kind in kinds for f in kind.__dataclass_fields__.values() for old in f.metadata["was"]]
    assert len(former) == len(set(former)) and not today & set(former)
