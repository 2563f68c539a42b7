"""Stage 'clip': a small text/image encoder pair from scratch, contrasting photographs with their captions (for `nano`).

Captions are measured (captions.py), so the pair knows colours, light, contrast, texture and direction, not objects.
"""

import json
import logging
import math
import tempfile
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from consissr.models.image_prompt import build_tower, clip_input
from consissr.nano.captions import WORDS, caption
from consissr.nano.config import ClipConfig, NanoConfig
from consissr.training.precision import without_autocast
from consissr.training.stage import EXPORT, Batch, Phase, Stage, held_out, seed_of
from consissr.weights.image_encoder import save_tower

log = logging.getLogger(__name__)

START, END = "<|startoftext|>", "<|endoftext|>"
RETRIEVAL = "retrieval.json"
HELD_OUT_SEED = 2025


def word_merges() -> list[tuple[str, str]]:
    """Byte-pair merges that make each caption word one token, in CLIP's order of application.

    The frequent pair is merged first, of equals the first in the alphabet: `tokenizers`' own trainer breaks ties at
    random, and a run that goes on from a checkpoint must number its tokens as before.
    """
    split = {word: [*word[:-1], word[-1] + "</w>"] for word in WORDS}
    merges = []
    while pairs := Counter(pair for parts in split.values() for pair in pairwise(parts)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for parts in split.values():
            for i in range(len(parts) - 2, -1, -1):
                if tuple(parts[i : i + 2]) == best:
                    parts[i : i + 2] = ["".join(best)]
    return merges


def write_tokenizer(folder: Path, length: int) -> None:
    """CLIP's kind of byte-pair tokenizer: each caption word one token, any other text in bytes; `length` tokens."""
    from tokenizers import pre_tokenizers

    letters, merges = sorted(pre_tokenizers.ByteLevel.alphabet()), word_merges()
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges), START, END]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=1))


def build_text(c: ClipConfig, tokenizer: Any) -> nn.Module:
    """An untrained transformers CLIPTextModel for the tokenizer's vocabulary."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=c.text_width,
            intermediate_size=4 * c.text_width,
            num_hidden_layers=c.text_layers,
            num_attention_heads=c.text_heads,
            max_position_embeddings=c.text_length,
            projection_dim=c.embed_dim,
            hidden_act="gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def random_windows(batch: Batch, smallest: float, size: int) -> Tensor:
    """Square windows of `smallest` to 1 times the crops' side, brought to (B, 3, size, size): scale varies."""
    side = batch.hq.shape[-1]
    low = max(1, round(smallest * side))
    windows = []
    for image, part, x, y in zip(batch.hq, batch.rand(), batch.rand(), batch.rand(), strict=True):
        edge = low + int(part * (side - low + 1))
        top, left = int(y * (side - edge + 1)), int(x * (side - edge + 1))
        window = image[None, :, top : top + edge, left : left + edge]
        windows.append(F.interpolate(window, size=(size, size), mode="bicubic", antialias=True))
    return torch.cat(windows).clamp(-1, 1)


class Contrast(nn.Module):
    """What training needs beside the two encoders: the projection of the text feature, and the temperature."""

    def __init__(self, text_width: int, embed_dim: int) -> None:
        super().__init__()
        self.projection = nn.Linear(text_width, embed_dim, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """Scaled cosines (N, M) of image features (N, E) and pooled text features (M, W)."""
        text = self.projection(text)
        with without_autocast(text.device):  # it would round cosines, times up to 100, to 3 digits
            scale = self.log_scale.clamp(max=math.log(100)).exp()
            return scale * F.normalize(image.float(), dim=-1) @ F.normalize(text.float(), dim=-1).T


class Clip(Stage):
    """Symmetric InfoNCE within a micro-batch; images whose captions agree are each other's positives, all equally."""

    needs_lq = False

    def __init__(self, config: NanoConfig) -> None:
        from transformers import CLIPTokenizer

        c = self.config = config.clip
        self.data, self.export_dtype = config.data, EXPORT[config.export_precision]
        with tempfile.TemporaryDirectory() as folder:
            write_tokenizer(Path(folder), c.text_length)
            self.tokenizer = CLIPTokenizer.from_pretrained(folder)
        vision = {"image_size": c.image_size, "patch_size": c.patch_size}
        vision |= {"width": c.width, "layers": c.layers, "head_width": c.head_width}
        self.tower = build_tower(c.embed_dim, vision)
        self.text = build_text(c, self.tokenizer)
        self.contrast = Contrast(c.text_width, c.embed_dim)
        self.networks = nn.ModuleDict({"tower": self.tower, "text": self.text, "contrast": self.contrast})
        self.compile_modules = [self.tower]
        # A key's bias adds the same to all of a query's logits: the softmax ignores it, so it has no gradient.
        trained = {n: p for n, p in self.networks.named_parameters() if not n.endswith("k_proj.bias")}
        self.phases = [Phase("clip", trained, self.loss, config.optimizer)]

    def tokens(self, captions: list[str]) -> Tensor:
        """Token numbers (B, L)."""
        length = self.config.text_length
        asked = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
        return self.tokenizer(captions, **asked).input_ids

    def prepare(self, batch: Batch) -> None:
        """Images at random scales, and their captions' token numbers."""
        images = random_windows(batch, self.config.smallest, self.config.image_size)
        batch.cache["images"] = images  # (B, 3, S, S)
        batch.cache["tokens"] = self.tokens([caption(image) for image in images.cpu()]).to(images.device)  # (B, L)

    def logits(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Scaled similarities (N, M) of images (N, 3, S, S) and captions (M, L)."""
        image = self.tower(clip_input(images, self.config.image_size))
        return self.contrast(image, self.text(tokens).pooler_output)

    def loss(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Cross-entropy of images over captions and of captions over images."""
        tokens = batch.cache["tokens"]
        logits = self.logits(batch.cache["images"], tokens)  # (B, B)
        same = (tokens[:, None] == tokens[None]).all(-1)
        target = same / same.sum(1, keepdim=True)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        right = same.gather(1, logits.argmax(1, keepdim=True))
        return {"loss": loss, "accuracy": right.float().mean(), "scale": self.contrast.log_scale.exp()}

    @torch.no_grad()
    def retrieval(self) -> dict[str, float]:
        """Among the distinct captions of held-out crops: how often an image's own is the nearest, or in the first 5."""
        dataset = held_out(self.data, HELD_OUT_SEED)
        device = self.contrast.log_scale.device
        images, captions = [], []
        for n in range(self.config.held_out):
            sample = dataset[n]
            seeded = [torch.Generator().manual_seed(seed_of(sample["seed"], "loss"))]
            batch = Batch(hq=sample["hq"][None], names=[sample["name"]], generators=seeded)
            images.append(random_windows(batch, self.config.smallest, self.config.image_size))
            captions.append(caption(images[-1][0]))
        known = sorted(set(captions))
        own = torch.tensor([known.index(words) for words in captions], device=device)
        tokens = self.tokens(known).to(device)
        logits = torch.cat([self.logits(part.to(device), tokens) for part in torch.cat(images).split(64)])
        place = (logits > logits.gather(1, own[:, None])).sum(1)  # captions that come before the image's own
        scores = {"top1": float((place == 0).float().mean()), "top5": float((place < 5).float().mean())}
        return scores | {"crops": len(captions), "captions": len(known)}

    def export(self, folder: Path) -> None:
        """text_encoder/, tokenizer/ and image_encoder/ as a base holds them, and the retrieval on held-out crops."""
        if self.data.validation:
            scores = self.retrieval()
            log.info("held-out retrieval: %s", scores)
            (folder / RETRIEVAL).write_text(json.dumps(scores, indent=1))
        write_tokenizer(folder / "tokenizer", self.config.text_length)
        save_tower(folder, self.tower, self.export_dtype)
        state = {name: value.to(self.export_dtype).contiguous() for name, value in self.text.state_dict().items()}
        self.text.save_pretrained(folder / "text_encoder", state_dict=state)
