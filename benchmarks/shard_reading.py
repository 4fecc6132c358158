"""Peak memory of reading one of two ranks' shares of a safetensors file: by the engine's reader and by safe_open.

    python -m benchmarks.shard_reading

The file holds eight matrices of 4096 x 12288 in bfloat16; the share is half of the columns of each (row-parallel
linears) or half of the rows (column-parallel ones). Each case runs in a process of its own, with the file in the page
cache; memory is VmHWM, the peak of the resident set, less that of the libraries before.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from app.engine.checkpoint_files import SafetensorsFile
from benchmarks.loading import peak_mb

RESULTS = Path(__file__).parent / "results" / "shard_reading.json"
MATRICES, ROWS, COLUMNS = 8, 4096, 12288
READERS, SHARES = ("engine", "safe_open"), ("columns", "rows")


def read(path: Path, reader: str, share: str) -> list[torch.Tensor]:
    """The first half of each matrix along ``share``."""
    names = [f"matrix{number}" for number in range(MATRICES)]
    if reader == "engine":
        with SafetensorsFile(path) as file:
            dim, half = (1, COLUMNS // 2) if share == "columns" else (0, ROWS // 2)
            return [file.read(name, dim, [(0, half)]) for name in names]
    with safe_open(path, framework="pt") as file:
        slices = [file.get_slice(name) for name in names]
        return [one[:, : COLUMNS // 2].clone() if share == "columns" else one[: ROWS // 2].clone() for one in slices]


def measure(path: Path, reader: str, share: str) -> dict[str, Any]:
    """Read in this process: MB of the share, MB of peak memory that reading added, seconds."""
    before, started = peak_mb(), time.perf_counter()
    tensors = read(path, reader, share)
    seconds = time.perf_counter() - started
    return {
        "reader": reader,
        "share": share,
        "share_mb": round(sum(tensor.nbytes for tensor in tensors) / 1e6, 1),
        "added_peak_mb": round(peak_mb() - before, 1),
        "seconds": round(seconds, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--case", nargs=3, metavar=("FILE", "READER", "SHARE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        path, reader, share = args.case
        print(json.dumps(measure(Path(path), reader, share)))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "matrices.safetensors"
        save_file({f"matrix{n}": torch.zeros(ROWS, COLUMNS, dtype=torch.bfloat16) for n in range(MATRICES)}, path)
        command = [sys.executable, "-m", "benchmarks.shard_reading", "--case", str(path)]
        cases = [
            json.loads(subprocess.run([*command, reader, share], check=True, stdout=subprocess.PIPE).stdout)
            for share in SHARES
            for reader in READERS
        ]
    result = {
        "machine": f"{platform.machine()}, torch {torch.__version__}",
        "date": time.strftime("%Y-%m-%d"),
        "file_mb": round(MATRICES * ROWS * COLUMNS * 2 / 1e6, 1),
        "cases": cases,
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
