"""Train, measure and export the small models: ``python -m benchmarks.small_models.learn STAGE --out FOLDER``.

Stages, in order: ``pool`` renders the scenes (other stages do it too where they are missing), ``autoencoder``,
``diffusion``, ``sam``, ``oracle`` train, ``gates`` measures all, ``export`` writes what is shipped. Every stage resumes
where it stopped, at Ctrl-C or after ``--pause-after``. With ``--workers`` and CUDA, ``diffusion`` begins with the first
scenes while the others are being rendered.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from far_train.cli.parsing import flag_of
from far_train.data.sam import load_sam
from far_train.mini.oracle import CONFUSION_FILE, load_oracle
from far_train.mini.oracle import FILE as ORACLE_FILE
from far_train.mini.shipped import DRAWING
from far_train.models.loading import load_base, read_configs
from far_train.utils.config import Config
from far_train.utils.devices import choose_device
from far_train.utils.errors import CheckpointError, FarError, Interrupted, OutputError
from far_train.utils.files import write_json, write_text
from far_train.utils.terminal import progress_bars, stop_on_interrupt

from .autoencoder import learn_autoencoder, load_autoencoder, measure_autoencoder
from .diffusion import learn_diffusion, write_base
from .gates import measure_base, measure_oracle
from .learning import SESSIONS_FILE, LearnConfig
from .oracle_training import learn_oracle, write_oracle
from .scene_pool import PoolConfig, ScenePool, fill_pool, rendering
from .small_sam import FILE as SAM_FILE
from .small_sam import SPEC, learn_sam, measure_sam, write_sam

STAGES = ("pool", "autoencoder", "diffusion", "sam", "oracle", "gates", "export")
TRAININGS = STAGES[1:5]
# Where a stage does better with other settings than LearnConfig's own; flags override them.
DEFAULTS: dict[str, dict[str, Any]] = {
    "autoencoder": {"steps": 20_000, "batch_size": 64, "lr": 1e-3, "ema_decay": 0.999},
    "diffusion": {"steps": 5000, "batch_size": 1024, "lr": 1e-3, "warmup": 300, "ema_decay": 0.9995},
    "sam": {"steps": 12_000, "batch_size": 128, "lr": 8e-4, "weight_decay": 0.1},
    "oracle": {"steps": 12_000, "batch_size": 128, "lr": 1e-3},
}
# The oracle knows every identity: its verdict must not depend on which ones the base never saw.
ORACLE_POOL_SEED = 2
MOST_BYTES = 30_000_000
LICENCE = "MIT, as the rest of this repository. Trained only on pictures that the repository draws itself."
TITLES = {
    "autoencoder": "The small autoencoder (vae/)",
    "diffusion": "The small base model (unet/, text_encoder/)",
    "sam": "The small SAM",
    "oracle": "The oracle, for measurement only",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one stage; returns the exit status: 0, 2 for a user error, 130 when stopped (it can go on)."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s", stream=sys.stderr)
    flags = vars(_parser().parse_args(argv))
    try:
        run_stage(flags.pop("stage"), flags)
    except Interrupted as e:
        print(f"learn: {e}", file=sys.stderr)
        return 130
    except FarError as e:
        print(f"learn: error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("learn: interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.small_models.learn", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--out", type=Path, required=True, help="folder of the pool, the runs and the export")
    parser.add_argument("--workers", type=int, default=0, help="processes that render scenes; 0: none beside this one")
    parser.add_argument("--start", type=Path, help="begin with the weights of this export instead of random ones")
    parser.add_argument("--crop", type=int, default=0, help="autoencoder: train on windows of this many pixels")
    parser.add_argument("--decoder-only", action="store_true", help="autoencoder: keep --start's encoder, and latents")
    parser.add_argument("--compile", action="store_true", help="autoencoder: through torch.compile (a C++ compiler)")
    parser.add_argument("--pictures", type=int, default=512, help="gates: pictures of the base for each gate")
    parser.add_argument("--only", choices=TRAININGS, help="gates: measure this model alone")
    for config in (LearnConfig, PoolConfig):
        kinds = config.kinds()
        for field in dataclasses.fields(config):
            kind = kinds[field.name].type
            options: dict[str, Any] = {"dest": field.name, "default": None}
            options |= {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
            text = f"{field.metadata['help']} (default {field.default})"
            parser.add_argument(flag_of(field.name), help=text, **options)
            for former in field.metadata["was"]:
                parser.add_argument(flag_of(former), help=argparse.SUPPRESS, **options)
    return parser


def _config(kind: type[Config], flags: dict[str, Any], defaults: dict[str, Any]) -> Any:
    names = [f.name for f in dataclasses.fields(kind)]
    return kind(**{**defaults, **{n: flags[n] for n in names if flags.get(n) is not None}})


def run_stage(stage: str, flags: dict[str, Any]) -> None:
    """One stage with the command line's flags. Raises FarError."""
    out = Path(flags["out"])
    if stage == "gates":
        measure(out, flags)
    elif stage == "export":
        print(export(out))
    else:
        with progress_bars() as bars, stop_on_interrupt() as should_stop:
            if stage == "diffusion" and flags["workers"]:
                config = _config(PoolConfig, flags, {})
                with rendering(out / "pool", config, flags["workers"]) as coming:
                    train(stage, out, flags, ScenePool(out / "pool", config, coming), bars, should_stop)
                return
            pools = [_pool(out, flags, of_oracle, bars, should_stop) for of_oracle in _pools_of(stage)]
            if stage != "pool":
                train(stage, out, flags, pools[0], bars, should_stop)


def _pools_of(stage: str) -> tuple[bool, ...]:
    return {"pool": (False, True), "oracle": (True,)}.get(stage, (False,))


def _pool(out: Path, flags: dict[str, Any], of_oracle: bool, bars: Any, should_stop: Any) -> ScenePool:
    config = _config(PoolConfig, flags, {})
    if of_oracle:
        config = config.replace(pool_seed=ORACLE_POOL_SEED, hold_out=False)
    folder = out / ("pool-oracle" if of_oracle else "pool")
    return fill_pool(folder, config, flags["workers"], on_progress=bars.phase("rendering"), should_stop=should_stop)


def train(stage: str, out: Path, flags: dict[str, Any], pool: ScenePool, bars: Any, should_stop: Any) -> None:
    """Train one model, or go on with it."""
    config = _config(LearnConfig, flags, DEFAULTS[stage])

    def on_step(step: int, metrics: dict[str, float]) -> None:
        if config.minutes is None:
            bars(stage, step, config.steps)
        else:
            total = round(60 * config.minutes)
            bars(f"{stage} (seconds)", min(round(metrics["seconds"]), total), total)
        bars.note(loss=f"{metrics['loss']:.4f}", per_second=f"{metrics['samples_per_second']:.0f}", scenes=len(pool))

    options: dict[str, Any] = {"on_step": on_step, "should_stop": should_stop}
    start = flags.get("start")
    if stage == "autoencoder":
        options |= {"start": start and start / "base" / "vae", "decoder_only": flags["decoder_only"]}
        options |= {"crop": flags["crop"], "compiled": flags["compile"]}
        learn_autoencoder(pool, out / stage, config, **options)
    elif stage == "diffusion":
        options |= {"start": start and start / "base", "on_scenes": bars.phase("encoding scenes")}
        learn_diffusion(out / "autoencoder", pool, out / stage, config, **options)
    elif stage == "sam":
        learn_sam(pool, out / stage, config, start=start and start / "sam" / SAM_FILE, **options)
    else:
        vae = load_autoencoder(out / "autoencoder")[0] if (out / "autoencoder" / "vae").is_dir() else None
        if vae is None:
            logging.warning("There is no finished autoencoder: the oracle won't see round trips.")
        options |= {"start": start and start / "oracle" / ORACLE_FILE, "autoencoder": vae}
        learn_oracle(pool, out / stage, config, **options)


# ---- measure


def measure(out: Path, flags: dict[str, Any]) -> dict[str, Any]:
    """Measure every finished model against its gate; writes gates.json and each model's figures.json."""
    device, _ = choose_device(flags.get("device") or "auto")
    wanted = (flags["only"],) if flags.get("only") else TRAININGS
    ready = {
        "autoencoder": (out / "autoencoder" / "vae" / "config.json").exists(),
        "diffusion": (out / "diffusion" / "base" / "unet" / "config.json").exists(),
        "sam": (out / "sam" / SAM_FILE).exists(),
        "oracle": (out / "oracle" / ORACLE_FILE).exists(),
    }
    vae, shape = load_autoencoder(out / "autoencoder", device) if ready["autoencoder"] else (None, {})
    oracle = load_oracle(out / "oracle" / ORACLE_FILE, device) if ready["oracle"] else None
    path = out / "gates.json"
    figures: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    with progress_bars() as bars:
        for stage in wanted:
            if not ready[stage] or (stage == "diffusion" and oracle is None):
                logging.warning("%s: not measured, it or the oracle isn't finished.", stage)
                continue
            began, folder, progress = time.monotonic(), out / stage, bars.phase(f"measuring {stage}")
            if stage == "autoencoder":
                figures[stage] = measure_autoencoder(vae, folder, shape["sample_size"])
            elif stage == "sam":
                figures[stage] = measure_sam(load_sam(folder / SAM_FILE, device), folder)
            elif stage == "oracle":
                figures[stage] = measure_oracle(oracle, vae, folder, on_progress=progress)
            else:
                base = load_base(folder / "base").to(device)
                settings = DRAWING.replace(sample_batch=64 if device.type == "cuda" else 8)
                figures[stage] = measure_base(
                    base, oracle, folder, count=flags["pictures"], config=settings, on_progress=progress
                )
            figures[stage]["measured_in_seconds"] = round(time.monotonic() - began, 1)
    short = {k: {n: v for n, v in f.items() if n != "confusion"} for k, f in figures.items()}
    write_json(path, short)
    print(json.dumps(short, indent=2))
    return short


# ---- export


def export(out: Path) -> Path:
    """Assemble ``out``/weights: base/, sam/, oracle/, in fp16, each with a card.md. Raises OutputError over 30 MB,
    CheckpointError where a model isn't finished."""
    target = out / "weights"
    shutil.rmtree(target, ignore_errors=True)
    base = out / "diffusion" / "base"
    needed = (base / "unet" / "config.json", out / "sam" / SAM_FILE, out / "oracle" / ORACLE_FILE)
    missing = [path.relative_to(out).parts[0] for path in needed if not path.exists()]
    if missing:
        raise CheckpointError(f"{out}: {', '.join(missing)} isn't finished; train it first")
    loaded = load_base(base)
    states = {part: module.state_dict() for part, module in loaded.parts.items()}
    write_base(target / "base", read_configs(base), states, half=True)
    write_sam(target / "sam" / SAM_FILE, load_sam(out / "sam" / SAM_FILE), SPEC, half=True)
    write_oracle(target / "oracle" / ORACLE_FILE, load_oracle(out / "oracle" / ORACLE_FILE), half=True)
    write_json(target / "oracle" / CONFUSION_FILE, _figures(out / "oracle").get("confusion", {}))
    for folder, stages in {"base": ("autoencoder", "diffusion"), "sam": ("sam",), "oracle": ("oracle",)}.items():
        write_text(target / folder / "card.md", "\n".join(model_card(stage, out / stage) for stage in stages))
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    if size > MOST_BYTES:
        shutil.rmtree(target)
        raise OutputError(f"export: the weights take {size / 1e6:.1f} MB, 30 MB are allowed; train smaller models")
    logging.info("%s: %.1f MB", target, size / 1e6)
    return target


def model_card(stage: str, folder: Path) -> str:
    """A model's card: how it was trained, on what, for how long, and what was measured."""
    sessions = [json.loads(line) for line in _lines(folder / SESSIONS_FILE)]
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    figures = _figures(folder)
    confusion = figures.pop("confusion", None)
    seconds = sum(s["seconds"] for s in sessions)
    lines = [f"# {TITLES[stage]}", "", f"Seed {run['config']['learn_seed']}, {seconds / 60:.1f} minutes in all.", ""]
    for s in sessions:
        span = f"steps {s['from_step']} to {s['to_step']}, {s['seconds'] / 60:.1f} minutes"
        lines.append(f"* `{s['command']}`: {span}, {s['machine']}, torch {s['torch']}")
    lines += ["", "## Measured", "", "```json", json.dumps(figures, indent=2), "```", ""]
    if confusion:
        lines += ["## Confusion (true → read)", ""]
        for field, rows in confusion.items():
            lines += [f"* {field}: " + "; ".join(f"{t} → {_counts(row)}" for t, row in sorted(rows.items()))]
        lines.append("")
    lines += ["## Settings", "", "```json", json.dumps(run, indent=2), "```", "", f"Licence: {LICENCE}", ""]
    return "\n".join(lines)


def _figures(folder: Path) -> dict[str, Any]:
    path = folder / "figures.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _counts(row: dict[str, int]) -> str:
    return ", ".join(f"{said} {n}" for said, n in sorted(row.items(), key=lambda item: -item[1]))


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    sys.exit(main())
