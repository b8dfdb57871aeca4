"""Setting up a run: check its inputs, encode the data, install what learns, restore a checkpoint, plan the memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path

from ..data.concepts import TrainingSet
from ..models.adapters import check_start, inject_adapter
from ..models.attention_maps import AttentionRecorder, layer_stride, supervised_layers
from ..models.base import BaseModel
from ..models.conditioning import TextConditioner
from ..models.families import Family
from ..models.fp8 import Fp8Layers
from ..models.layers import compiled, set_checkpointing
from ..models.sampling import check_size
from ..models.tokens import Vocabulary
from ..models.weights import FarWeights
from ..utils.devices import choose_device
from ..utils.errors import BaseModelError, ConfigError, DatasetError
from ..utils.files import check_space, make_folder
from ..utils.locks import locked
from .callbacks import Callbacks
from .checkpoints import checkpoint_bytes, load_checkpoint
from .class_images import with_class_images
from .distributed import World
from .encodings import Encodings
from .latent_cache import cache_latents
from .loss_scaler import LossScaler
from .memory_plan import MemoryPlan, plan_memory
from .oom_fallback import OomFallback
from .run_folder import ENCODINGS, LOCK_FILE, METRICS_FILE, cut_metrics, open_run, run_identity
from .settings import TrainConfig
from .state import RunState
from .step import accumulate_gradients, graph_passes, sample_batch
from .step_graph import uses_cuda_graph

MOST_PARAMETERS = 100_000_000  # that training all K and V may have; SD 1.5 and 2.1 have a quarter of it


def check_trainable(family: Family, config: TrainConfig) -> None:
    """Refuse to train all K and V of a family that has too many of them. Raises ConfigError."""
    count = family.kv_parameters
    if config.trainable == "kv" and count > MOST_PARAMETERS:
        raise ConfigError(
            f"trainable: kv are {count / 1e6:.0f} million parameters in {family.title}: {4 * count / 1e9:.1f} GB in "
            f"fp32 and {8 * count / 1e9:.1f} GB for AdamW's moments; use lora"
        )


def check_inputs(
    base: BaseModel,
    training_set: TrainingSet,
    config: TrainConfig,
    start: FarWeights | None,
    on_note: Callable[[str], None],
) -> None:
    """Refuse what can't be trained, and tell ``on_note`` what had better not be.

    Raises BaseModelError, DatasetError, ConfigError, WeightsError.
    """
    check_trainable(base.family, config)
    if TextConditioner(base).has_placeholders:
        raise BaseModelError(
            "base: FaR weights are applied to it; load it anew, or train outside of 'with applied_weights'. "
            "To train on from weights, give them as start (continue_from)"
        )
    if not training_set.composite_count():
        raise DatasetError("dataset: it holds no composites; fuse at least one")
    check_size(base, training_set.size, training_set.size, ("dataset: size",) * 2)
    if training_set.size != base.native_size:
        on_note(
            f"The dataset has {training_set.size} px, this base was made for {base.native_size} px, where it learns "
            "and draws best."
        )
    if start is not None:
        start.check_fits(base)
        check_start(start, config, [name.token for name in training_set.names])


def build_run(
    undo: ExitStack,
    base: BaseModel,
    training_set: TrainingSet,
    config: TrainConfig,
    folder: Path,
    *,
    start: FarWeights | None,
    resume: bool,
    keep_base: bool,
    keep_encodings: bool,
    callbacks: Callbacks,
) -> RunState:
    """Begin or resume the run in ``folder``; see :class:`recipe.TrainingRun` for the arguments.

    ``undo`` gets what leaves ``base`` as it was found, also if this raises. Nothing is written before the inputs are
    checked.
    """
    check_inputs(base, training_set, config, start, callbacks.on_note)
    vocabulary = Vocabulary(base.tokenizer, training_set.names, base.tokenizer_size, config.vectors_per_token)
    device, dtype = choose_device(config.device, config.precision)
    world = World.current()
    with_graph = uses_cuda_graph(config, device)
    if config.batch_size < world.size:
        raise ConfigError(f"batch_size: {config.batch_size} composites are too few for {world.size} processes")
    if world.is_main_process:
        busy = f"{folder}: another process is training this run; wait for it, or choose another folder"
        undo.enter_context(locked(make_folder(folder) / LOCK_FILE, busy))
        open_run(folder, run_identity(base, training_set, config, start), resume)
    world.barrier()

    # The data: draw what is missing, encode everything once.
    if config.fp8_base:
        fp8_layers = Fp8Layers(base.unet, device)
        if keep_base:
            undo.callback(fp8_layers.remove)
    if keep_base:
        undo.enter_context(base.placed(device, dtype))
    else:
        base.to(device, dtype)
    if config.prior_batch_size and not training_set.prior_count():
        report = callbacks.progress_of("regularization images")
        training_set = with_class_images(training_set, base, config, folder / "priors", report)
    side = training_set.size // base.downscale
    layers = supervised_layers(base.unet, side, side, config.attention_cells, base.family.supervised_modules)
    stride = layer_stride(layers[0], len(base.unet.config.block_out_channels))
    report = callbacks.progress_of("encoding")
    place = Path(config.encoding_cache or folder / ENCODINGS)
    with Encodings(place, base.vae) if keep_encodings else nullcontext() as known:
        latent_cache = cache_latents(
            training_set, base, vocabulary, stride, seed=config.train_seed, encodings=known, on_progress=report
        )
    conditioner = TextConditioner(base, latent_cache.prompts())
    if config.output_preservation:
        conditioner.prepare([conditioner.without_placeholders(p) for p in latent_cache.prompts()])

    # What learns, and what it learns by.
    undo.callback(set_checkpointing, base.unet, False)
    adapter = inject_adapter(base, vocabulary, config)
    undo.callback(adapter.remove)
    if start is not None:
        adapter.start_from(start)
    recorder = None
    if config.refinement_weight > 0:
        recorder = AttentionRecorder(base.unet, layers)
        undo.callback(recorder.remove)
    samples_per_step = config.batch_size + (config.prior_batch_size if latent_cache.class_images else 0)
    state = RunState(
        base=base,
        training_set=training_set,
        config=config,
        folder=folder,
        world=world,
        device=device,
        dtype=dtype,
        steps=config.steps_for(len(training_set.names)),
        step=0,
        vocabulary=vocabulary,
        latent_cache=latent_cache,
        conditioner=conditioner,
        alphas_cumprod=base.alphas_cumprod.to(device),
        adapter=adapter,
        recorder=recorder,
        optimizer=adapter.optimizer(config, samples_per_step),
        scaler=LossScaler(device, dtype),
        oom_fallback=OomFallback(base.unet, MemoryPlan(samples_per_step, checkpointing=False)),
    )

    check_space(folder, checkpoint_bytes(adapter.named_parameters()))
    restore(state)
    fit_memory(state, -(-samples_per_step // world.size))
    if with_graph:
        state.graphed_passes = graph_passes(state)
        state.oom_fallback.on_change = state.graphed_passes.release
        undo.callback(state.graphed_passes.release)
    if config.compile:  # after the trial of the memory plan, whose single sample would be compiled for, too
        undo.enter_context(compiled(base.unet))
    return state


def restore(state: RunState) -> None:
    """Go back to the newest checkpoint, if there is one. Raises CheckpointError."""
    saved = state.saved()
    state.step = load_checkpoint(state.checkpoints, saved, state.optimizer, state.dtype)
    state.scaler.restore(saved)
    if state.world.is_main_process:
        cut_metrics(state.folder / METRICS_FILE, state.step)


def fit_memory(state: RunState, samples: int) -> None:
    """Choose how many of this process's ``samples`` run at once, and whether the UNet is checkpointed."""

    def one_sample(checkpointing: bool) -> None:
        state.oom_fallback.use(MemoryPlan(1, checkpointing))
        accumulate_gradients(state, sample_batch(state)[:1], micro_batch=1)
        state.optimizer.zero_grad(set_to_none=True)

    state.oom_fallback.use(plan_memory(state.config, samples, state.device, one_sample))
