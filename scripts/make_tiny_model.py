"""Write a seeded tiny model as a Hugging Face folder: `python -m scripts.make_tiny_model FOLDER`."""

import argparse
from pathlib import Path

from tests.models import FAMILIES, make_source


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--family", choices=sorted(FAMILIES), default="llama")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder = make_source(arguments.folder, arguments.family, arguments.dtype, arguments.seed)
    print(f"{arguments.family} with seed {arguments.seed} in {folder}")


if __name__ == "__main__":
    main()
