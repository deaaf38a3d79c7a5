# ruff: noqa: UP045 - pyrallis 0.3.1 decodes Optional[X] but not X | None.
"""Every setting of a run: one frozen dataclass for each YAML section, a docstring under every field.

Names and defaults are the published ones; a default that differs says so. `sana/config/published.py` lists the
published keys that have no field here: the renamed ones and those without effect.
"""

from dataclasses import dataclass, field
from typing import Any, Optional

OPTIMIZER_ENTRIES: dict[str, Any] = {
    "type": str,
    "lr": float,
    "weight_decay": float,
    "betas": tuple[float, ...],
    "eps": float | tuple[float, ...],
    "block_size": int,
    "min_8bit_size": int,
    "clip_threshold": float,
    "momentum": float,
    "nesterov": bool,
    "amsgrad": bool,
    "fused": bool,
    "foreach": bool,
}
SCHEDULE_ENTRIES: dict[str, Any] = {"num_warmup_steps": int, "num_decay": float}
AUTO_LR_ENTRIES: dict[str, Any] = {"rule": str}
LORA_ENTRIES: dict[str, Any] = {"rank": int, "alpha": float, "target_modules": tuple[str, ...]}


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """What is trained on: images, captions, and which caption of an image is used."""

    type: str = "SanaWebDatasetMS"
    """Kind of dataset: `SanaWebDatasetMS` (tar shards; wids-meta.json is read where there is one), `SanaImgDataset` (a
    folder of pictures; meta_data.json likewise), `SanaHFDataset` (a folder of the Hugging Face datasets library) or
    `SanaShapes` (procedural scenes drawn on the fly, no files)."""
    data_dir: tuple[str, ...] = ()
    """Dataset folders, also when there is one: `[data/toy_data]`. Unused by `SanaShapes`."""
    image_size: Optional[int] = None
    """Nominal side of the training images, pixels. Empty: `model.image_size`; another value than that is an error."""
    num_scenes: int = 60000
    """Size of the procedural training set, scenes per epoch; only for `SanaShapes`. Scene i is the same in every run."""
    transform: str = "default_train"
    """Preprocessing; `default_train` (resize the shorter side, centre crop, scale to [-1, 1]) is the only one."""
    caption_selection_type: str = "clipscore"
    """How one of an image's captions is chosen: by the scores in `external_clipscore_suffixes`, as a power law
    (`clipscore`, what the published code does) or as `softmax` (what the paper writes), or by the weights in
    `caption_proportion` (`proportion`)."""
    caption_proportion: dict[str, int] = field(default_factory=lambda: {"prompt": 1})
    """Weight of each caption type; matters only with `caption_selection_type: proportion`."""
    external_caption_suffixes: tuple[str, ...] = ()
    """Suffixes of the caption files beside an image or shard: `_VILA1-5-13B` reads `<name>_VILA1-5-13B.json`,
    the empty suffix `<name>.json`."""
    external_clipscore_suffixes: tuple[str, ...] = ()
    """Suffixes of the CLIP-score files of those captions."""
    clip_thr: float = 0.0
    """Captions with a CLIP score (about 0 to 40) below this are not sampled; if none reaches it, the best is taken."""
    clip_thr_temperature: float = 1.0
    """T > 0 of the caption choice: probability proportional to score^(1/T), for `softmax` to exp(score/T); small values
    prefer the best caption. Below 0.01 it counts as 0.01."""
    del_img_clip_thr: float = 0.0
    """Images whose own caption (kind `prompt`, in the sidecar `_prompt_clip_score`) scores below this are left out; 0
    keeps all, as does an image without that score."""
    hq_only: bool = False
    """Keep only samples marked `high_quality`; for `SanaWebDatasetMS`."""
    sort_dataset: bool = False
    """Read the shards in the order of their numbers instead of the order of wids-meta.json."""
    load_text_feat: bool = False
    """Captions are stored text features (`.npz`). Not read here: `train.feature_cache_dir` keeps features."""
    load_vae_feat: bool = False
    """Images are stored latents (`.npy`). Not read here: `train.feature_cache_dir` keeps latents."""
    image_column: Optional[str] = None
    """Column of the pictures, for `SanaHFDataset`. Empty: the only column of pictures. Not a published key."""
    caption_column: Optional[str] = None
    """Column of the captions, for `SanaHFDataset`. Empty: `prompt`, `caption` or `text`. Not a published key."""
    bad_sample_limit: float = 0.01
    """Largest share, in [0, 1], of samples that may be unreadable; beyond it training stops. Above 0, one always may.
    Each is named in `work_dir/bad_samples.jsonl`, and the next of its size takes its place. Not a published key."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ResumeConfig:
    """Which training run to continue. A YAML may also write `resume_from: <path>` or leave it empty."""

    checkpoint: Optional[str] = None
    """A training checkpoint, or `latest` for the newest in the run's folder. Empty: start a run from
    `model.load_from`."""
    load_ema: bool = False
    """Start from the averaged weights instead of the trained ones."""
    resume_optimizer: bool = True
    """Restore the optimizer's state."""
    resume_lr_scheduler: bool = True
    """Restore the learning-rate schedule; false starts its warm-up anew."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The transformer, its weights, and guidance."""

    model: str = "SanaMS_600M_P1_D28"
    """Architecture, a name in `sana.models.zoo.TRANSFORMERS`; P is the patch size, D the depth."""
    image_size: int = 512
    """Nominal side of the images, pixels; a multiple of `vae.vae_downsample_rate`."""
    aspect_ratio_type: Optional[str] = None
    """Bucket table, a name in `sana.resolution.TABLES`. Empty: `ASPECT_RATIO_<image_size>` where that exists. A table of
    another size gives a warning."""
    multi_scale: bool = True
    """Train on the bucket sizes of the table, each batch of one ratio; false: squares of `image_size` only."""
    mixed_precision: str = "fp16"
    """`fp16`, `bf16` or `fp32`: dtype of the transformer in inference, of autocast in training (parameters stay fp32).
    With `fp16`, self-attention's output is clipped to fp16's range in whatever dtype it runs, as such weights expect."""
    fp32_attention: bool = True
    """Compute the linear attention's sums over tokens in float32. They overflow fp16 beyond a few thousand tokens."""
    load_from: Optional[str] = None
    """Weights to start from or to generate with: a path (also relative to the repository) or `hf://owner/repo/file`.
    In training, `resume_from.checkpoint` comes first."""
    resume_from: ResumeConfig = field(default_factory=ResumeConfig)
    """Which run to continue."""
    attn_type: str = "linear"
    """Self attention: `linear`, the ReLU linear attention of every released model; `triton_linear`, the same, computed by
    the Triton kernels or not at all."""
    kernels: Optional[str] = None
    """Who computes the fused operations: `auto` (Triton on CUDA, PyTorch elsewhere), `torch` or `triton`, which is an error
    where no kernel can run. Empty: by `attn_type`, `triton` for `triton_linear`, else `auto`. Not a published key."""
    linear_head_dim: int = 32
    """Channels of a linear-attention head; divides the model's width."""
    ffn_type: str = "glumbconv"
    """Feed-forward; `glumbconv` (Mix-FFN: 1x1, depthwise 3x3, gate, 1x1) is the only one, for the same reason."""
    mlp_ratio: float = 2.5
    """Inner width of the feed-forward over the model's width, > 0."""
    mlp_acts: tuple[Optional[str], ...] = ("silu", "silu", None)
    """Activations of the feed-forward: after its first convolution, of the gate, after the last. Fixed."""
    use_pe: bool = False
    """Add a sine-cosine position embedding; true for the 2048 and 4096 models, whose weights need it."""
    pe_interpolation: float = 1.0
    """Divides the positions, > 0; matters only with `use_pe`: 1 at 2048, 2 at 4096 (trained on from 2048)."""
    qk_norm: bool = False
    """RMS norm of queries and keys in self attention; true for SANA-1.5, must match the weights."""
    cross_norm: bool = False
    """The same in cross attention."""
    cfg_embed: bool = False
    """Take the guidance scale as an input of the network, embedded; true for Sprint, must match the weights."""
    cfg_embed_scale: float = 1.0
    """Multiplies the guidance scale before it is embedded, > 0; 0.1 in Sprint. Matters only with `cfg_embed`."""
    class_dropout_prob: float = 0.0
    """Probability in [0, 1] that a training caption is replaced by the null caption; guidance needs about 0.1.
    No effect in inference."""
    guidance_type: str = "classifier-free"
    """`classifier-free` or `classifier-free_PAG`; under both, a perturbed-attention (PAG) scale above 1 turns PAG on, as
    in the reference."""
    cfg_scale: float = 4.5
    """Guidance scale of validation images; 1 is off, 3 to 6 usual. Published default 4, which the reference does not
    read: it draws them at 4.5."""
    pag_applied_layers: tuple[int, ...] = (8,)
    """Indices of the blocks that perturbed-attention guidance perturbs; matters only with a PAG scale above 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VAEConfig:
    """The autoencoder between pixels and latents. Its scaling factor is part of its own files, not of the run."""

    vae_type: str = "AutoencoderDC"
    """Kind of autoencoder; only `AutoencoderDC`. The older name `dc-ae` is read as this."""
    vae_pretrained: str = "mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers"
    """Folder, hub name or `hf://` path, in diffusers' format or as the authors released it (`...-sana-1.0`)."""
    weight_dtype: str = "float32"
    """`float32` or `bfloat16`, which saves memory at large sizes. `float16`, which activations overflow, is read, and
    sampling takes float32 instead."""
    vae_latent_dim: int = 32
    """Latent channels; must match the autoencoder."""
    vae_downsample_rate: int = 32
    """Pixels of an image side for each latent; must match the autoencoder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextEncoderConfig:
    """The language model that reads the prompt, and how its features enter the transformer."""

    text_encoder_name: str = "gemma-2-2b-it"
    """A published name, or the folder or hub name of a transformers decoder. Must be the one of the weights."""
    caption_channels: int = 2304
    """Hidden size of the text encoder; must match it."""
    model_max_length: int = 300
    """Text tokens that the transformer sees, >= 2; must match the weights. Longer prompts are cut."""
    y_norm: bool = True
    """RMS norm of the projected caption; must match the weights."""
    y_norm_scale_factor: float = 1.0
    """Initial weight of that norm, 0.01 in every published run; matters only in training from scratch."""
    chi_prompt: tuple[str, ...] = ()
    """Instruction (CHI) put before every prompt, its lines joined by newlines; the last one ends in a space, because
    the prompt follows directly. Published weights need theirs verbatim. Empty: none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerConfig:
    """Flow matching: which times are trained, and how they are sampled."""

    train_sampling_steps: int = 1000
    """Discrete noise levels in training; 1000 in every published model, and the network's time unit, hence fixed."""
    predict_flow_v: bool = True
    """The network predicts the velocity noise - data; always true. Called `predict_v` in older files."""
    noise_schedule: str = "linear_flow"
    """Path between data and noise; only `linear_flow`, x_t = (1 - t) data + t noise."""
    pred_sigma: bool = False
    """Predict a variance as well; always false: the flow loss has no use for it."""
    flow_shift: float = 1.0
    """s > 0 of t' = s t / (1 + (s - 1) t): weight on noisy times, in training and sampling. More pixels want more:
    1 to 3 at 512, 3 to 4 at 1024, 6 at 4096."""
    inference_flow_shift: Optional[float] = None
    """Shift used in sampling only. Empty: `flow_shift`. Read both through `sampling_shift`."""
    weighting_scheme: Optional[str] = "logit_normal"
    """Density of training times: `logit_normal`, or `uniform` (also empty). `logit_normal_trigflow` is Sprint's."""
    logit_mean: float = 0.0
    """Mean of the logit-normal density; above 0 moves training to noisier times."""
    logit_std: float = 1.0
    """Its standard deviation, > 0; larger spreads to the ends."""
    vis_sampler: str = "flow_dpm-solver"
    """Sampler of SanaPipeline and of validation images: `flow_dpm-solver` or `flow_euler`; for Sprint `scm`."""
    timestep_norm_scale_factor: float = 1.0
    """Divides the network's time before it is embedded, > 0; 1000 for Sprint, must match the weights."""

    @property
    def sampling_shift(self) -> float:
        """The flow shift of sampling."""
        return self.flow_shift if self.inference_flow_shift is None else self.inference_flow_shift


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """The training loop: optimizer, schedule, logging, validation, checkpoints."""

    seed: int = 42
    """Seed of everything random in training; ranks and steps derive theirs from it."""
    num_workers: int = 4
    """Data-loader processes on each GPU; 0 loads in the main process."""
    train_batch_size: int = 32
    """Samples in a batch on each GPU."""
    gradient_accumulation_steps: int = 1
    """Batches in an optimizer step."""
    num_epochs: int = 100
    """Passes over the data, unless `max_steps` or `early_stop_hours` ends the run before."""
    max_steps: Optional[int] = None
    """Stop after this many optimizer steps. Empty: no limit. Not a published key."""
    early_stop_hours: float = 100.0
    """Save and stop after this many hours, > 0. Called `training_hours` in older files."""
    grad_checkpointing: bool = False
    """Recompute each block in the backward pass: much less memory, about a third more time."""
    grad_checkpointing_blocks: Optional[int] = None
    """With `grad_checkpointing`: recompute only so many blocks, the first ones; the fewer that fit, the faster. Empty: all.
    Not a published key."""
    compile: bool = False
    """Compile each block of the transformer with torch.compile; the first steps then take minutes. Not a published key."""
    gradient_clip: float = 1.0
    """Largest norm of the gradient, > 0; `.inf` is off. 0.1 in the published runs."""
    use_fsdp: bool = False
    """Shard parameters and optimizer state over the GPUs instead of copying them."""
    lora: Optional[dict[str, Any]] = field(default=None, metadata={"entries": LORA_ENTRIES})
    """Train a LoRA of the weights in `model.load_from`, which stay as they are: `rank`, `alpha` (the change is multiplied by
    alpha / rank; the rank if absent) and `target_modules`, ends of the matrices' names, by default those of both attentions:
    `[attn.qkv, attn.proj, cross_attn.q_linear, cross_attn.kv_linear, cross_attn.proj]`. Empty: train the weights. Not a
    published key."""
    optimizer: dict[str, Any] = field(
        default_factory=lambda: {"type": "AdamW", "lr": 1e-4, "weight_decay": 0.03, "eps": 1e-10},
        metadata={"entries": OPTIMIZER_ENTRIES},
    )
    """`type` (AdamW, Adam, SGD, AdamW8bit, CAMEWrapper, CAME8BitWrapper, Muon), `lr`, and that optimizer's own arguments. CAME takes three
    betas and two eps, Adam-like ones two and one. A file that sets it replaces it as a whole; an override such as
    `--train.optimizer.lr=1e-5` changes one entry. Weight decay acts on every parameter."""
    auto_lr: Optional[dict[str, str]] = field(
        default_factory=lambda: {"rule": "sqrt"}, metadata={"entries": AUTO_LR_ENTRIES}
    )
    """Scale `optimizer.lr` with the whole batch (all GPUs, accumulated): `{rule: sqrt}` by sqrt(batch / 256),
    `{rule: linear}` by batch / 256. On by default, as published; null uses the rate as it is written."""
    weight_decay_on: str = "all"
    """Which parameters `optimizer.weight_decay` acts on: `all`, as published, or `matrices`, which spares biases, norms and
    modulation tables. Not a published key."""
    lr_schedule: str = "constant"
    """After warm-up: `constant`, `cosine`, or `cosine_decay_to_constant`."""
    lr_schedule_args: dict[str, Any] = field(
        default_factory=lambda: {"num_warmup_steps": 500}, metadata={"entries": SCHEDULE_ENTRIES}
    )
    """`num_warmup_steps` (optimizer steps of linear warm-up), and for `cosine_decay_to_constant` `num_decay` (part of
    the run that decays, 0.667)."""
    ema_update: bool = False
    """Keep an exponential average of the weights; checkpoints hold both, and validation uses the average."""
    ema_rate: float = 0.9999
    """Its decay in a step, in [0, 1); matters only with `ema_update`."""
    load_from_optimizer: bool = False
    """When `resume_from.checkpoint: latest` finds no run and starts from `load_from`: take the optimizer state there."""
    load_from_lr_scheduler: bool = False
    """The same for the learning-rate schedule."""
    resume_lr_scheduler: bool = True
    """Continue the schedule when the command line's `--resume_from` names the run; false starts its warm-up anew."""
    skip_step: int = 0
    """Batches of the first epoch to skip when a run is continued, if more than it has done."""
    log_interval: int = 50
    """Optimizer steps between log lines."""
    visualize: bool = False
    """Draw validation images every `eval_sampling_steps`."""
    eval_sampling_steps: int = 250
    """Optimizer steps between validations: the held-out loss, and images with `visualize`."""
    eval_batch_size: int = 16
    """Validation images drawn at once."""
    validation_prompts: tuple[str, ...] = (
        "dog",
        "portrait photo of a girl, photograph, highly detailed face, depth of field",
        "Self-portrait oil painting, a beautiful cyborg with golden hair, 8k",
        "Astronaut in a jungle, cold color palette, muted colors, detailed, 8k",
        "A photo of beautiful mountain with realistic sunset and blue lake, highly detailed, masterpiece",
    )
    """Prompts of the validation images."""
    local_save_vis: bool = False
    """Save validation images under `work_dir/log_vis` as well as in the tracker."""
    deterministic_validation: bool = True
    """Draw validation images from the same noise each time, so that steps can be compared."""
    save_model_steps: int = 1000000
    """Optimizer steps between checkpoints."""
    save_model_epochs: int = 1
    """Epochs between checkpoints."""
    keep_checkpoints: Optional[int] = None
    """Keep this many of the newest checkpoints, at least 1. Empty: all. Not a published key."""
    nonfinite_limit: int = 20
    """Most steps in a row whose loss or gradient is not finite; they are left out, and one more stops the run. Not a
    published key."""
    hang_minutes: float = 30.0
    """A process in which nothing happens for so long (a step, a validation, a save) writes down where its threads are and
    ends; > 0, `.inf` is off. Not a published key."""
    heldout_samples: int = 32
    """Pictures kept out of training, at most one in a hundred, on which the loss is measured every `eval_sampling_steps`
    at fixed times with fixed noise; 0 is off. Not a published key."""
    online_metric: bool = False
    """Save and measure the model every `eval_metric_step` and at the end; not with `use_fsdp`."""
    eval_metric_step: int = 5000
    """Optimizer steps between these evaluations; matters only with `online_metric`."""
    online_metric_dir: str = "metric_helper"
    """Folder of their results under `work_dir`; matters only with `online_metric`."""
    online_metric_suites: tuple[str, ...] = ()
    """Suites of `scripts/evaluate.py`. Empty: shapes for `data.type: SanaShapes`, else geneval. Not a published key."""
    online_metric_prompts: Optional[int] = 10
    """Prompts of each suite, at least 1 (of GenEval: of each tag). Empty: all. Not a published key."""
    debug_nan: bool = False
    """Stop at the first module whose output is not finite and name it; slow."""
    feature_cache_dir: Optional[str] = None
    """Folder of latents and text features, as `scripts/extract_features.py` or the training itself makes it before the
    first step. Of a complete one no encoder is loaded. Empty: encode in each step. Not a published key."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SanaConfig:
    """A whole run. Sections may be left out of a YAML; every field has a default."""

    data: DataConfig = field(default_factory=DataConfig)
    """What is trained on."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The transformer, its weights, and guidance."""
    vae: VAEConfig = field(default_factory=VAEConfig)
    """The autoencoder."""
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    """The text encoder."""
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    """Flow matching and sampling."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The training loop."""
    work_dir: str = "output/"
    """Folder of the run: config.yaml, logs, checkpoints, images. Older files write it as `train.work_dir`."""
    name: str = "baseline"
    """Name of the run in the tracker."""
    debug: bool = False
    """Log every step, batches of at most 64, TensorBoard."""
    caching: bool = False
    """Only fill `train.feature_cache_dir`, train nothing."""
    report_to: str = "tensorboard"
    """Tracker: `tensorboard`, `wandb` or `none`. Published default `wandb`, which needs an account."""
    tracker_project_name: str = "sana"
    """Project in the tracker. The published default names another family."""
    loss_report_name: str = "loss"
    """Name of the loss in the tracker."""
