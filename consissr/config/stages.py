"""Configuration of the training stages: an optimiser, and what each stage adds. See config.py for the rules."""

from __future__ import annotations

from dataclasses import dataclass, field

from consissr.config.loading import check_word
from consissr.errors import UserError


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

    def __post_init__(self) -> None:
        if len(self.widths) != len(self.attention):
            counts = f"{len(self.widths)} resolutions, prior.attention {len(self.attention)}"
            raise UserError(f"prior.widths has {counts}: give one of each for every resolution")


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
    error: str = "squared"
    """Stage 'tala': 'squared' (Eq. 4, ConsisSR) or 'absolute' (our own), which counts small errors in smooth areas for
    more; with `metric: pixels`, of pixels."""
    plan_share: float = 0.0
    """Stage 'tala': share of images trained at one of the sampler's timesteps, for few steps (our own); the others'
    are uniform (Algorithm 1)."""
    hint_dropout: float = 0.0
    """Stage 'tala': share of images whose LQ latent the ControlNet does not see, so that the image tokens have to tell
    what it would (our own)."""

    def __post_init__(self) -> None:
        if self.probability == "False":  # what YAML makes of a bare off
            self.probability = "off"
        check_word(self.probability, ("default", "power", "as_released", "linear", "off"), "tala.probability")
        check_word(self.posterior, ("mode", "sample"), "tala.posterior")
        check_word(self.weighting, ("eps", "v"), "tala.weighting")
        check_word(self.metric, ("latents", "pixels"), "tala.metric")
        check_word(self.error, ("squared", "absolute"), "tala.error")
        for name in ("plan_share", "hint_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"tala.{name} is {getattr(self, name)}: use a share from 0 to 1")
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
    """z_hq and z_lq, the hint included: 'mode' or 'sample' of the VAE posterior (sample as released)."""
    l_diff_t: str = "released"
    """Timesteps of l_diff: 'released' (below t_max_step where l_T is trained, otherwise all: both releases), 'interval'
    (from the sampler's t_min to t_max: the paper) or 'all' (with l_T, too: latent augmentation is rare below t_max)."""
    metric: str = "latents"
    """Squared errors weigh all latent channels alike ('latents', the paper) or by what they change in 'pixels', for
    autoencoders with a linear path, whose channels were brought to similar variances (`nano`)."""

    def __post_init__(self) -> None:
        check_word(self.start, ("lq", "hq"), "nuts.start")
        check_word(self.posterior, ("mode", "sample"), "nuts.posterior")
        check_word(self.metric, ("latents", "pixels"), "nuts.metric")
        check_word(self.l_diff_t, ("released", "interval", "all"), "nuts.l_diff_t")
        if not self.losses:
            raise UserError("nuts.losses is empty: name at least one of l_diff, l_T, l_tmax")
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
    """'lpips' (on VGG features; paper: "the same as that of VAE"), 'vgg' (LPIPS without its learned weights of
    channels, for a VGG16 of any origin), 'features' (matching in the discriminator's features, which needs no weights)
    or 'none' (as released)."""
    perceptual_weight: float = 1.0
    """Weight of the perceptual loss."""
    weights: str = ""
    """'lpips': folder with its weight files; empty: the folders where torchvision and pyiqa keep theirs. 'vgg':
    safetensors file of VGG16's convolutions by torchvision's names (`python -m ccsr.vgg` converts one)."""
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
    discriminator_growth: int = 4
    """Its last layer's channels in multiples of the first's: 8 in LDM's VAE training, 4 for `nano`."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The discriminator's optimiser."""

    def __post_init__(self) -> None:
        check_word(self.reconstruction, ("l1", "l2"), "deft.reconstruction")
        check_word(self.perceptual, ("lpips", "vgg", "features", "none"), "deft.perceptual")
        check_word(self.discriminator, ("patchgan", "dino"), "deft.discriminator")
        if self.discriminator_width < 4 or self.discriminator_width % 4:
            raise UserError(f"deft.discriminator_width is {self.discriminator_width}: use a multiple of 4, such as 32")
        check_word(str(self.discriminator_growth), ("4", "8"), "deft.discriminator_growth")
