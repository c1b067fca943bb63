"""Which bounds and radii are proved of ordinary networks, beside what others publish and prove?

    python -m benchmarks.lipschitz [--quick] [--parts networks wide …] [--out FILE]
        [--networks FOLDER] [--root FOLDER]

Parts:

- networks: global bounds of the networks in FOLDER, beside the figures of its published.json;
- wide: a 784–256–10 network trained here;
- equilibria: monDEQs of others, globally and around images;
- images: networks trained here, around images, beside CROWN of auto_LiRPA and eclipse-nn;
- sll: what local proofs add to the global radii of SLL networks;
- attacks: attacked pairs and images, which must not violate what is proved;
- faults: mistakes planted in converters, which must be caught.

The last line is a JSON object. With --out the file also holds seed, commit and hardware.
"""

from __future__ import annotations

import importlib
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import finish, parser

PARTS = ("networks", "wide", "equilibria", "images", "sll", "attacks", "faults")
SEED = 0


def main() -> None:
    """Run the parts that are asked for, one after the other."""
    options = parser("proved Lipschitz bounds and radii of networks from elsewhere")
    options.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    options.add_argument(
        "--networks", type=Path, default=Path("data/networks"), help="networks of others"
    )
    options.add_argument(
        "--only", nargs="+", help="names of networks; all in the folder if omitted"
    )
    options.add_argument("--root", help="folder that holds MNIST/raw")
    options.add_argument("--count", type=int, default=100, help="images")
    arguments = options.parse_args()
    figures: dict[str, Any] = {}
    for part in arguments.parts:
        torch.manual_seed(SEED)
        start = time.perf_counter()
        print(f"\n== {part}", flush=True)
        figures[part] = importlib.import_module(f"benchmarks.lipschitz.{part}").run(arguments)
        print(f"{part}: {time.perf_counter() - start:.0f} s", flush=True)
    finish(figures, arguments.out, seed=SEED, threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
