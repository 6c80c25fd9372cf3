"""Makes tests/fixtures/pictures with Pillow: what torchvision's Resize and CenterCrop give for a small picture.

    python tests/oracle/pictures.py

Written with Pillow 13.0.0. Resize(size) brings the shorter side to `size` and the longer to int(size * long / short);
CenterCrop begins at int(round(room / 2.0)).
"""

import sys
from pathlib import Path

from PIL import Image, ImageOps, ImageStat

FOLDER = Path(__file__).parent.parent / "fixtures" / "pictures"


def source(width, height):
    """Smooth areas, hard edges and noise, from integers only."""
    picture = Image.new("RGB", (width, height))
    state = 1
    for y in range(height):
        for x in range(width):
            state = (state * 1103515245 + 12345) % 2**31
            noise = state >> 16 & 255
            stripe = 255 if (x // 5 + y // 7) % 2 else 0
            picture.putpixel((x, y), (x * 255 // (width - 1), stripe, noise))
    return picture


def center(picture, size, resample):
    width, height = picture.size
    short, long = min(width, height), max(width, height)
    other = int(size * long / short)
    width, height = (size, other) if width <= height else (other, size)
    picture = picture.resize((width, height), resample)
    left, top = int(round((width - size) / 2.0)), int(round((height - size) / 2.0))
    return picture.crop((left, top, left + size, top + size))


FOLDER.mkdir(parents=True, exist_ok=True)
for name, picture in [("wide", source(53, 37)), ("tall", source(37, 64))]:
    picture.save(FOLDER / f"{name}.png")
    for size in [16, 24, 37, 48]:
        center(picture, size, Image.Resampling.BILINEAR).save(FOLDER / f"{name}_bilinear_{size}.png")
        center(picture, size, Image.Resampling.BICUBIC).save(FOLDER / f"{name}_bicubic_{size}.png")
        center(picture, size, Image.Resampling.LANCZOS).save(FOLDER / f"{name}_lanczos_{size}.png")

# With the folder of real edge cases as argument: the table in tests/data.rs (size and mean of each channel).
for path in sorted(Path(sys.argv[1]).glob("*.*") if len(sys.argv) > 1 else []):
    try:
        picture = ImageOps.exif_transpose(Image.open(path))
        if picture.mode == "RGBA":
            white = Image.new("RGBA", picture.size, "white")
            white.alpha_composite(picture)
            picture = white
        if picture.mode.startswith("I"):  # 16 bits
            picture = picture.point(lambda value: value / 257).convert("L")
        means = ImageStat.Stat(picture.convert("RGB")).mean
        print(path.name, picture.size, [round(mean, 1) for mean in means])
    except OSError as error:
        print(path.name, error)
