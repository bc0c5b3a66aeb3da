"""Write scikit-learn's 1,797 handwritten digits (8x8 grey) as PNG files: train/ and test/, one folder per class."""

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


def main(folder: Path) -> None:
    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    index = np.arange(len(pixels))
    parts = train_test_split(index, test_size=0.2, stratify=digits.target, random_state=0)
    for part, members in zip(("train", "test"), parts, strict=True):
        for i in members:
            path = folder / part / str(digits.target[i]) / f"{i:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[i]).save(path)
    print(f"{len(pixels)} digits in {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
