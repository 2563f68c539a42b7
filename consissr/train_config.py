"""Configuration of training runs: data, optimisers, and what each stage adds. See config.py for the rules."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from consissr.config import ModelConfig, SamplerConfig, check_word
from consissr.errors import UserError


@dataclass(kw_only=True)
class DataConfig:
    """Training images and how their low-quality partners are made."""

    paths: list[str] = field(default_factory=list)
    """Folders (recursive), text lists of files, or tar shards."""
    probabilities: list[float] = field(default_factory=list)
    """How often each entry of `paths` is drawn; empty: in proportion to its image count."""
    lq_paths: list[str] = field(default_factory=list)
    """For each entry of `paths`, the folder of low-quality partners (a quarter the side, by name); empty: degrade."""
    cache_mb: int = 1024
    """Memory for decoded photographs, MiB."""
    crop: int = 512
    """Side of a training crop in pixels (512 in both papers)."""
    crop_rule: str = "random"
    """'random' (CCSR) or 'center' (ConsisSR: short side resized to the crop, centre)."""
    flips: str = "horizontal"
    """Random flips: 'none', 'horizontal' or 'both' (Sec. 4.1, ConsisSR)."""
    shrink: float = 1.0
    """Random crops come from photographs shrunk by a factor drawn evenly from [shrink, 1], which removes grain and
    compression from small sources (`nano`); 1: never (both papers)."""
    degradation: str = "ccsr"
    """Preset of the two-stage Real-ESRGAN degradation: 'ccsr' or 'consissr'."""
    enlarge: list[str] = field(default_factory=list)
    """Filters that bring LQ crops back to full size, one drawn per image; empty: the preset's. Use is 'bicubic'."""
    draws: str = "per_image"
    """What the images of a micro-batch share of the degradation: nothing ('per_image') or all but blur kernels and
    strengths ('per_batch', ConsisSR as released)."""
    pair_pool: int = 0
    """Pairs that Real-ESRGAN's pool holds per process, to mix what shares its draws (ConsisSR as released: 192, in
    stage 1 256); 0: no pool. A run with a pool cannot be resumed."""
    validation: str = ""
    """Folder of photographs for the fixed validation set; empty: no validation."""
    validation_count: int = 8
    """Images of the fixed validation set."""

    def __post_init__(self) -> None:
        check_word(self.draws, ("per_image", "per_batch"), "data.draws")


@dataclass(kw_only=True)
class OptimizerConfig:
    """One optimiser's settings; a stage with two players has two of them."""

    kind: str = "adamw"
    """'adamw' (fused) or 'adamw8bit': its two moments in 8 bits, which needs the package bitsandbytes."""
    lr: float = 5e-5
    """Learning rate after warm-up."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """Adam's decay rates."""
    weight_decay: float = 0.01
    """Decoupled weight decay (AdamW)."""
    warmup: int = 0
    """Optimiser steps of linear warm-up."""
    decay: str = "constant"
    """After warm-up: 'constant' or 'cosine' to `final` at the last step."""
    final: float = 0.01
    """Learning rate at the end of a cosine decay, and at the start of a warm-up, relative to `lr`."""
    clip: float = 1.0
    """Largest gradient norm; 0 turns clipping off."""

    def __post_init__(self) -> None:
        check_word(self.kind, ("adamw", "adamw8bit"), "optimizer.kind")
        check_word(self.decay, ("constant", "cosine"), "optimizer.decay")


@dataclass(kw_only=True)
class AutoencoderConfig:
    """Stage 'autoencoder': a KL autoencoder from scratch (for `nano`)."""

    patch: int = 2
    """Space-to-depth factor before the encoder and after the decoder."""
    widths: list[int] = field(default_factory=lambda: [32, 64, 128])
    """Channels per resolution; each further entry halves the side."""
    layers: int = 1
    """Residual blocks per resolution."""
    latent_channels: int = 16
    """Channels of the latent."""
    linear_path: bool = True
    """Add a linear code of pixel blocks, started at their principal components, beside the networks."""
    whitening: float = 0.75
    """How far the linear code's channels are brought to equal variance: 0 not at all, 1 fully."""
    kl_weight: float = 1e-4
    """Weight of the Kullback-Leibler term (mean over latent elements)."""
    gradient_weight: float = 1.0
    """Weight of the L1 loss on image differences, which keeps edges sharp."""


@dataclass(kw_only=True)
class ClipConfig:
    """Stage 'clip': a small text/image encoder pair from scratch (for `nano`)."""

    image_size: int = 128
    """Side of the image tower's input in pixels."""
    patch_size: int = 16
    """Side of its patches in pixels."""
    width: int = 96
    """Width of the image tower."""
    layers: int = 3
    """Transformer blocks of the image tower."""
    head_width: int = 32
    """Width of one attention head of the image tower."""
    embed_dim: int = 64
    """Width of the shared embedding."""
    text_width: int = 64
    """Width of the text encoder, which the prior's `context_dim` must equal."""
    text_layers: int = 2
    """Transformer blocks of the text encoder."""
    text_heads: int = 4
    """Attention heads of the text encoder."""
    text_length: int = 24
    """Tokens of a prompt, both ends included; longer prompts are cut."""
    smallest: float = 0.4
    """Least side of the windows that are shown, relative to `data.crop`; the greatest is 1."""
    held_out: int = 400
    """Crops of `data.validation` on which the result's retrieval is measured."""


@dataclass(kw_only=True)
class PriorConfig:
    """Stage 'prior': an unconditional diffusion UNet on latents (for `nano`)."""

    widths: list[int] = field(default_factory=lambda: [64, 128, 192])
    """Channels per resolution."""
    layers: int = 1
    """Residual blocks per resolution."""
    heads: int = 4
    """Attention heads at every resolution that has attention."""
    attention: list[bool] = field(default_factory=lambda: [False, True, True])
    """Which resolutions have transformer blocks."""
    context_dim: int = 64
    """Width of prompt embeddings."""
    text: str = ""
    """output_dir of a clip run: train with its text encoder on the crops' captions; empty: a text-free prior."""
    caption_dropout: float = 0.15
    """Share of the captions that are replaced by the empty prompt."""


@dataclass(kw_only=True)
class RclipConfig:
    """Stage 'rclip' (Eq. 3, ConsisSR): the image tower made robust to degradation."""

    patch_weight: float = 1.0
    """Weight of the patch tokens' error beside the pooled one's; read where `model.image_tokens` is 'patches'."""


@dataclass(kw_only=True)
class TalaConfig:
    """Stage 'tala' (Algorithm 1, ConsisSR), and time-aware latent augmentation in other stages."""

    probability: str = "default"
    """p(t): 'power' ((t+1)/T)^gamma, 'as_released' (t/T)^gamma, 'linear' or 'off' (Table 4, ConsisSR); 'default' is
    'power' in stage 'tala' and 'off' in stage 'nuts', where it acts on l_diff."""
    gamma: float = 10.0
    """Exponent of p(t) (Table 4, ConsisSR: 5, 10 or 20)."""
    shared_draw: bool = False
    """One r for all images of a micro-batch (as released) in place of one each (Algorithm 1)."""
    encoder_gradients: bool = True
    """Stage 'tala': train what is added to the UNet's encoder and middle, too (the release does not)."""
    posterior: str = "mode"
    """Stage 'tala': z_hq and z_lq are the 'mode' or a 'sample' (as released) of the VAE posterior; the hint is the
    mode."""
    weighting: str = "eps"
    """Stage 'tala': squared error of the noise ('eps', Eq. 4) or of v ('v': divided by alpha_bar, so that errors of x0
    count at noisy timesteps, too)."""
    metric: str = "latents"
    """Stage 'tala': as `nuts.metric`."""

    def __post_init__(self) -> None:
        if self.probability == "False":  # what YAML makes of a bare off
            self.probability = "off"
        check_word(self.probability, ("default", "power", "as_released", "linear", "off"), "tala.probability")
        check_word(self.posterior, ("mode", "sample"), "tala.posterior")
        check_word(self.weighting, ("eps", "v"), "tala.weighting")
        check_word(self.metric, ("latents", "pixels"), "tala.metric")
        if not self.gamma > 0:
            raise UserError(f"tala.gamma is {self.gamma}: use a number above 0 (10 in the paper)")


@dataclass(kw_only=True)
class NutsConfig:
    """Stage 'nuts' (Sec. III-B, CCSR)."""

    t_max: float = 2 / 3
    """Fraction of T where uniform steps begin; the same as in sampling."""
    t_max_step: int = 0
    """Timestep that x0_from_T is re-noised to in training; 0: that of `t_max` on the sampler's grid (CCSR v2 as
    released: 667, while its sampler's `t_max` of 2/3 is 499)."""
    start: str = "lq"
    """Latent noised to T for the extra losses: 'lq' (as sampled) or 'hq' (CCSR v2 stage 1 as released)."""
    losses: list[str] = field(default_factory=lambda: ["l_diff", "l_T", "l_tmax"])
    """Losses summed with weight 1 (Eq. 2 and 3, CCSR); l_diff alone is ControlNet pre-training."""
    posterior: str = "mode"
    """z_lq: 'mode' or 'sample' of the VAE posterior (sample as released)."""
    metric: str = "latents"
    """Squared errors weigh all latent channels alike ('latents', the paper) or by what they change in 'pixels', for
    autoencoders with a linear path, whose channels were brought to similar variances (`nano`)."""

    def __post_init__(self) -> None:
        check_word(self.start, ("lq", "hq"), "nuts.start")
        check_word(self.posterior, ("mode", "sample"), "nuts.posterior")
        check_word(self.metric, ("latents", "pixels"), "nuts.metric")
        for name in self.losses:
            check_word(name, ("l_diff", "l_T", "l_tmax"), "nuts.losses")


@dataclass(kw_only=True)
class DeftConfig:
    """Stage 'deft' (Sec. III-C, CCSR): the decoder tuned adversarially on stage-1 outputs."""

    reconstruction: str = "l1"
    """Pixel loss: 'l1' (paper: "the same as that of VAE") or 'l2' (as released)."""
    clamp: bool = False
    """Clamp decoded images to [-1, 1] before the losses: what lies outside has no gradient (as released)."""
    perceptual: str = "features"
    """'lpips' (on VGG features; paper: "the same as that of VAE"), 'features' (matching in the discriminator's
    features, which needs no weights) or 'none' (as released)."""
    perceptual_weight: float = 1.0
    """Weight of the perceptual loss."""
    weights: str = ""
    """Folder with LPIPS's weight files; empty: the folders where torchvision and pyiqa keep theirs."""
    discriminator: str = "patchgan"
    """'patchgan' (paper: "the same as that of VAE") or 'dino' (heads on a frozen DINO, as released)."""
    dino: str = "timm/vit_small_patch16_224.dino"
    """DINO ViT-S/16 that the discriminator judges by: a file (dino_deitsmall16_pretrain.pth) or timm's hub id."""
    dino_v2: str = "timm/vit_small_patch14_dinov2.lvd142m"
    """DINOv2 ViT-S/14 whose summary of the LQ image is its condition: a file (dinov2_vits14_pretrain.pth) or hub id."""
    decoder_width: float = 1.0
    """Below 1, tune a narrower decoder: the full one's strongest channels, this share of each width. A different model,
    for the same latents (our own)."""
    post_quant_conv: bool = False
    """Tune the convolution before the decoder, too (CCSR v1 as released)."""
    adversarial_weight: float = 0.5
    """Weight of the generator's adversarial loss, before the adaptive factor."""
    adaptive: bool = True
    """Scale the adversarial loss by the ratio of gradient norms at the last layer (LDM's VAE training)."""
    adversarial_start: int = 0
    """Optimiser step after which the generator sees the adversarial loss."""
    discriminator_start: int = 0
    """Optimiser step from which the discriminator learns; before it, its gradients are zero."""
    discriminator_width: int = 32
    """Channels of the first layer of the PatchGAN (the paper's kind of discriminator)."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The discriminator's optimiser."""

    def __post_init__(self) -> None:
        check_word(self.reconstruction, ("l1", "l2"), "deft.reconstruction")
        check_word(self.perceptual, ("lpips", "features", "none"), "deft.perceptual")
        check_word(self.discriminator, ("patchgan", "dino"), "deft.discriminator")
        if self.discriminator_width < 4 or self.discriminator_width % 4:
            raise UserError(f"deft.discriminator_width is {self.discriminator_width}: use a multiple of 4, such as 32")


@dataclass(kw_only=True)
class TrainConfig:
    """A whole training run: one YAML file plus key=value overrides."""

    stage: str = "nuts"
    """Which stage runs; the table of stages stands in scripts/train.py."""
    output_dir: str = "runs/default"
    """Folder of checkpoints, logs, validation images and the final model."""
    init: str = ""
    """Model folder, or earlier run's output_dir, whose weights the stage starts from; empty: the base's."""
    seed: int = 0
    """Seed of data order, degradation, noise and initial weights."""
    steps: int = 20000
    """Optimiser steps."""
    batch: int = 96
    """Global batch: images per optimiser step over all processes (96 for NUTS, 64 for DeFT: Sec. IV-A, CCSR)."""
    micro_batch: int = 4
    """Images per process and forward pass; accumulation = batch / (micro_batch * processes)."""
    processes: int = 0
    """Expected number of processes; another world size is an error. 0: take what was launched."""
    precision: str = "auto"
    """Autocast: 'bf16', 'fp32' or 'auto' (bf16 where the device computes it fast, else fp32)."""
    frozen_precision: str = "auto"
    """Storage of frozen matrices where autocast is bf16, which rounds them anyway: 'bf16', 'fp32' or 'auto' (bf16 on
    GPUs). The results are the same."""
    export_precision: str = "fp32"
    """Storage of the exported result's weights: 'fp32' or 'fp16'. Checkpoints are always fp32."""
    ema: float = 0.0
    """Decay of an exponential moving average of the trained weights; 0: none."""
    gradient_checkpointing: bool = False
    """Trade time for memory in the UNet and the ControlNet."""
    compile: bool = False
    """torch.compile the stage's networks: minutes at the start, faster steps after; validation stays uncompiled."""
    workers: int = 1
    """Threads that prepare batches ahead of the step."""
    log_every: int = 50
    """Optimiser steps between log lines."""
    checkpoint_every: int = 1000
    """Optimiser steps between checkpoints."""
    checkpoint_limit: int = 2
    """Newest checkpoints kept."""
    validate_every: int = 1000
    """Optimiser steps between validations; 0: only at the end."""
    tracker: str = "tensorboard"
    """'tensorboard', 'wandb' or 'none'."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The generator's (or only) optimiser."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """What is trained, and on which base."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """Default sampler of the resulting model; validation runs it."""
    data: DataConfig = field(default_factory=DataConfig)
    """Training and validation images."""
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    """Read by stage 'autoencoder'."""
    clip: ClipConfig = field(default_factory=ClipConfig)
    """Read by stage 'clip'."""
    prior: PriorConfig = field(default_factory=PriorConfig)
    """Read by stage 'prior'."""
    rclip: RclipConfig = field(default_factory=RclipConfig)
    """Read by stage 'rclip'."""
    tala: TalaConfig = field(default_factory=TalaConfig)
    """Read by stage 'tala'; `probability`, `gamma` and `shared_draw` also by stage 'nuts'."""
    nuts: NutsConfig = field(default_factory=NutsConfig)
    """Read by stage 'nuts'."""
    deft: DeftConfig = field(default_factory=DeftConfig)
    """Read by stage 'deft'."""

    def __post_init__(self) -> None:
        check_word(self.precision, ("auto", "bf16", "fp32"), "precision")
        check_word(self.frozen_precision, ("auto", "bf16", "fp32"), "frozen_precision")
        check_word(self.export_precision, ("fp32", "fp16"), "export_precision")
        check_word(self.tracker, ("tensorboard", "wandb", "none"), "tracker")
        homes = [(self, "output_dir"), (self, "init"), (self.model, "base"), (self.model, "image_encoder")]
        homes += [(self.prior, "text"), *((self.deft, name) for name in ("weights", "dino", "dino_v2"))]
        for part, name in homes:
            setattr(part, name, os.path.expanduser(getattr(part, name)))  # only a leading ~ is a home folder
        if self.micro_batch < 1:
            raise UserError(f"micro_batch is {self.micro_batch}: use at least 1")
        if self.data.pair_pool % self.micro_batch:
            raise UserError(f"data.pair_pool is {self.data.pair_pool}: use 0 or a multiple of micro_batch")
