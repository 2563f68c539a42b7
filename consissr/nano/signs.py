"""Drawn pictures for training beside photographs: signs, labels, maps, grids, which small photographs hardly show.

    python -m consissr.nano.signs FOLDER --count 300 --fonts FONT_FOLDER

Words of random letters in Pillow's own typeface and in those of a folder of TrueType files (matplotlib brings
DejaVu's), lines, circles, tiles and bars, in flat colours with smooth shading; drawn three times as large, then shrunk.
"""

import argparse
import math
import random
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIDE, FINE = 384, 3
"""Side of the pictures in pixels, and how many times as large they are drawn."""
LETTERS = "abcdefghijklmnopqrstuvwxyz"
CHARACTERS = LETTERS * 4 + LETTERS.upper() * 2 + "0123456789" * 2 + ".,:-+/&%()!?#"


class Painter:
    """One picture, drawn by a generator of its own."""

    def __init__(self, seed: int, fonts: list[Path]) -> None:
        self.rng, self.fonts, self.side = random.Random(seed), fonts, SIDE * FINE
        self.image = Image.new("RGB", (self.side, self.side), self.colour())
        self.draw = ImageDraw.Draw(self.image)

    def colour(self) -> tuple[int, int, int]:
        """Grey for two of five, white and black included; for the others any colour, more or less pale."""
        rng = self.rng
        grey, pale = rng.choice([0, 20, 60, 128, 190, 235, 255]), rng.uniform(0.1, 0.8)
        if rng.random() < 0.4:
            return (grey,) * 3
        return tuple(round(pale * grey + (1 - pale) * rng.randrange(256)) for _ in range(3))

    def picture(self) -> Image.Image:
        """Two to five panels over one another, shading, a slight turn; then shrunk."""
        for _ in range(self.rng.randint(2, 5)):
            self.panel()
        turned = self.image.rotate(self.rng.gauss(0, 4), Image.Resampling.BICUBIC, fillcolor=self.colour())
        small = turned.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        angle, strength = self.rng.uniform(0, 2 * math.pi), self.rng.uniform(0, 0.3)
        y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE - 0.5
        shade = 1 - strength * (0.5 + x * math.cos(angle) + y * math.sin(angle))
        return Image.fromarray((np.asarray(small) * shade[..., None]).clip(0, 255).astype(np.uint8))

    def panel(self) -> None:
        """A rectangle with something on it."""
        rng, side = self.rng, self.side
        width, height = (round(side * rng.uniform(0.3, 1.1)) for _ in range(2))
        left, top = rng.randint(-width // 4, side - width // 2), rng.randint(-height // 4, side - height // 2)
        box, ground, ink = (left, top, left + width, top + height), self.colour(), self.colour()
        while sum(abs(a - b) for a, b in zip(ground, ink, strict=True)) < 120:
            ink = self.colour()
        edge = rng.choice([0, 0, 2, 6, 15])
        self.draw.rounded_rectangle(box, rng.choice([0, 0, 30, 90]), ground, ink if edge else None, max(edge, 1))
        rng.choice([self.words, self.words, self.words, self.lines, self.tiles, self.rings, self.bars])(box, ink)

    def words(self, box: tuple[int, int, int, int], ink: tuple[int, int, int]) -> None:
        """Lines of words of random characters, 10 to 80 pixels high in the finished picture."""
        rng, size = self.rng, round(FINE * 10 * 8 ** self.rng.random())
        name = rng.choice([None, *self.fonts])
        font = ImageFont.load_default(size) if name is None else ImageFont.truetype(str(name), size)
        row = round(size * rng.uniform(1.05, 1.8))
        for y in range(box[1] + size // 3, box[3] - size, row):
            count = max(1, round((box[2] - box[0]) / size * rng.uniform(0.5, 2)))
            line = "".join(" " if rng.random() < 0.15 else rng.choice(CHARACTERS) for _ in range(count))
            self.draw.text((box[0] + size // 3, y), line.title() if rng.random() < 0.3 else line, ink, font)

    def lines(self, box: tuple[int, int, int, int], ink: tuple[int, int, int]) -> None:
        """A map's roads: broken lines of several widths."""
        rng = self.rng
        for _ in range(rng.randint(3, 15)):
            points = [(rng.randint(box[0], box[2]), rng.randint(box[1], box[3])) for _ in range(rng.randint(2, 5))]
            self.draw.line(points, rng.choice([ink, self.colour()]), rng.randint(3, 24), "curve")

    def tiles(self, box: tuple[int, int, int, int], ink: tuple[int, int, int]) -> None:
        """Bricks, a grid or the dots of a code."""
        rng = self.rng
        step, wide, gap = rng.randint(18, 120), rng.choice([1, 1, 2, 3]), rng.randint(3, 12)
        code, staggered = rng.random() < 0.3, rng.random() < 0.5
        for row, y in enumerate(range(box[1], box[3] - step, step)):
            shift = step * wide // 2 if staggered and row % 2 else 0
            for x in range(box[0] + shift, box[2] - step * wide, step * wide):
                if not code or rng.random() < 0.5:
                    end = (x + step * wide, y + step) if code else (x + step * wide - gap, y + step - gap)
                    self.draw.rectangle((x, y, *end), ink)

    def rings(self, box: tuple[int, int, int, int], ink: tuple[int, int, int]) -> None:
        """Circles, discs and polygons."""
        rng = self.rng
        for _ in range(rng.randint(1, 8)):
            x, y, radius = rng.randint(box[0], box[2]), rng.randint(box[1], box[3]), rng.randint(15, 250)
            colour, around = rng.choice([ink, self.colour()]), (x - radius, y - radius, x + radius, y + radius)
            if rng.random() < 0.3:
                self.draw.regular_polygon((x, y, radius), rng.randint(3, 8), rng.uniform(0, 90), colour)
            elif rng.random() < 0.5:
                self.draw.ellipse(around, None, colour, rng.randint(4, 40))
            else:
                self.draw.ellipse(around, colour)

    def bars(self, box: tuple[int, int, int, int], ink: tuple[int, int, int]) -> None:
        """Parallel bars: railings, shutters, stripes of cloth."""
        rng, upright = self.rng, self.rng.random() < 0.5
        step, thick = rng.randint(12, 90), rng.uniform(0.2, 0.7)
        first, last = (box[0], box[2]) if upright else (box[1], box[3])
        slant = rng.choice([0, 0, rng.randint(-200, 200)])
        for at in range(first, last - step, step):
            ends = [(at, box[1]), (at + slant, box[3])] if upright else [(box[0], at), (box[2], at + slant)]
            self.draw.line(ends, ink, max(2, round(step * thick)))


def main() -> None:
    """Write pictures 0000.png and so on; the same seed gives the same ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--fonts", type=Path, help="folder of .ttf files")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    fonts = sorted(args.fonts.glob("*.ttf")) if args.fonts else []
    args.folder.mkdir(parents=True, exist_ok=True)
    for n in range(args.count):
        Painter(args.seed * 1_000_003 + n, fonts).picture().save(args.folder / f"{n:04d}.png")


if __name__ == "__main__":
    main()
