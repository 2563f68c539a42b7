"""Stage 'tala': Algorithm 1 of ConsisSR, time-aware latent augmentation (Sec. 3.4).

In its early timesteps a sampler's latents are closer to the low-quality image than DDPM's training on noised
high-quality latents assumes. TALA therefore starts some training inputs from z_lq, the more often the noisier the
timestep, and asks for the noise that leads to z_hq from there.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from consissr.config.training import TrainConfig
from consissr.diffusion.augmentation import probability
from consissr.diffusion.plans import check_plan, ddpm_plan
from consissr.errors import UserError
from consissr.models.denoiser import SoftPrompt
from consissr.training.restoration import Restoration
from consissr.training.stage import Batch
from consissr.weights.model import Model


class Tala(Restoration):
    """ControlNet, what is added to both networks, and the image tokens' adapter, under Algorithm 1.

    soft_prompt: tokens appended to the text's, from an encoder of one's own (Table 3, ConsisSR: DAPE).
    """

    def __init__(self, config: TrainConfig, model: Model | None = None, soft_prompt: SoftPrompt | None = None) -> None:
        s = config.sampler
        if s.plan == "nuts" and not s.timesteps:
            raise UserError("stage 'tala' trains for sampler.plan=ddpm (or explicit sampler.timesteps), not nuts")
        super().__init__(config, model, soft_prompt, config.tala.posterior)
        if not config.tala.encoder_gradients:
            self.cut_encoder()
        self.plan = check_plan(s.timesteps or ddpm_plan(s.steps, len(self.schedule)), len(self.schedule))

    def loss(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Lines 2 to 10 of Algorithm 1, in latents; t counts 0..T-1.

        Training takes the empty prompt, as the release does (Algorithm 1 has a text prompt `Text`, and the paper does
        not say which).
        """
        c = self.config.tala
        z_hq, z_lq = batch.cache["z_hq"], batch.cache["z_lq"]  # line 2, (B, C, h, w)
        t = self.timesteps(batch)  # line 3: uniform, (B,)
        eps = batch.randn(*z_hq.shape[1:])  # line 4
        condition = self.condition(batch)  # lines 5 and 6: c_img (RCLIP ran in `prepare`) and c_txt; with them the hint
        r = batch.rand()  # line 7, (B,)
        r = r[:1] if c.shared_draw else r  # as released: one for all images
        p = probability(t, self.form("power"), c.gamma, len(self.schedule))
        from_lq = (r < p).view(-1, 1, 1, 1)
        z_t = self.schedule.add_noise(torch.where(from_lq, z_lq, z_hq), eps, t)  # line 8
        eps_hat = self.denoiser(z_t, t, condition)  # line 9
        target = self.schedule.eps_from_x0(z_t, z_hq, t)  # (z_t - sqrt(a) z_hq) / sqrt(1 - a)  (Eq. 4, ConsisSR)
        return {"loss": self.error(eps_hat, target, t)}  # line 10

    def timesteps(self, batch: Batch) -> Tensor:
        """Uniform over all, (B,)."""
        return batch.randint(len(self.schedule))

    def error(self, eps_hat: Tensor, target: Tensor, t: Tensor) -> Tensor:
        """Squared error of predicted noise (B, C, h, w): the paper's squared norm as a mean, as the release takes it.

        t (B,) is for subclasses that weigh timesteps.
        """
        return F.mse_loss(eps_hat, target)  # (Eq. 2, ConsisSR)

    @torch.no_grad()
    def restore(self, batch: Batch) -> Tensor:
        """The sampler's result without guidance, at noise that depends on the image alone."""
        return self.latents.decode(self.sampled(batch, self.plan))

    def cut_encoder(self) -> None:
        """Let no gradient reach the UNet's encoder and middle, or pass through them, as ConsisSR's release trains."""
        unet, (phase,) = self.denoiser.unet, self.phases
        names = ("time_embedding", "conv_in", "down_blocks", "mid_block")
        encoder = tuple(f"unet.{name}." for name in names)
        phase.parameters = {name: p for name, p in phase.parameters.items() if not name.startswith(encoder)}
        for module in (unet.time_embedding, unet.conv_in, *unet.down_blocks, unet.mid_block):
            module.register_forward_hook(lambda module, given, output: detached(output))


def detached(value: Tensor | tuple) -> Tensor | tuple:
    """A tensor, or a tuple of tensors and tuples, cut off from its history."""
    return value.detach() if isinstance(value, Tensor) else tuple(detached(inner) for inner in value)
