"""What JPEG does to a data set: `python benchmarks/reencode.py IN.npz QUALITY OUT.npz` re-encodes all its images.

Prints how far that changes them. A study of OUT.npz beside one of IN.npz shows what the loss of detail costs.
"""

import io
import sys

import numpy as np
from PIL import Image


def reencode(image: np.ndarray, quality: int) -> np.ndarray:
    """One image, uint8 (H, W, 3), through JPEG."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file).convert("RGB"))


if __name__ == "__main__":
    source, quality, target = sys.argv[1:]
    arrays = dict(np.load(source))
    for name in ("x_train", "x_test"):
        images = np.stack([reencode(image, int(quality)) for image in arrays[name]])
        print(f"{name}: mean absolute change {np.abs(images.astype(int) - arrays[name]).mean():.2f} of 255")
        arrays[name] = images
    np.savez(target, **arrays)
