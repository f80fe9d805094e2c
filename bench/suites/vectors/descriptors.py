"""SIFT-like descriptors of pictures: histograms of gradients in 4 x 4 cells, on a grid over three photographs."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bench.places import SHARED
from bench.suites.pictures.cases import FILES
from tersor import images

CELLS, ANGLES, SIZE, STEP = 4, 8, 4, 3  # of a descriptor: cells a side, bins; pixels of a cell; of the grid
CLIP, FLAT = 0.2, 8.0  # as Lowe (IJCV 60, 2004) clips; gradients below which there is nothing to describe
COUNT = 100_000


def described(picture: np.ndarray) -> np.ndarray:
    """Return the descriptors of a grey picture, float32 (n, 128), of length 1."""
    down, across = np.gradient(picture)
    turn = np.arctan2(down, across) % (2 * np.pi) * (ANGLES / (2 * np.pi))
    near = [np.clip(1 - np.abs((turn - angle + ANGLES / 2) % ANGLES - ANGLES / 2), 0, None) for angle in range(ANGLES)]
    planes = np.stack(near, 2) * np.hypot(down, across)[..., None]
    sums = np.pad(planes.cumsum(0).cumsum(1), ((1, 0), (1, 0), (0, 0)))
    cells = sums[SIZE:, SIZE:] - sums[:-SIZE, SIZE:] - sums[SIZE:, :-SIZE] + sums[:-SIZE, :-SIZE]
    reach = SIZE * (CELLS - 1)
    rows, columns = cells.shape[0] - reach, cells.shape[1] - reach
    parts = [cells[i : rows + i : STEP, j : columns + j : STEP]
             for i in range(0, reach + 1, SIZE) for j in range(0, reach + 1, SIZE)]
    found = np.concatenate(parts, 2).reshape(-1, CELLS * CELLS * ANGLES)
    length = np.linalg.norm(found, axis=1, keepdims=True)
    sharp = length[:, 0] > FLAT
    found = np.clip(found[sharp] / length[sharp], 0, CLIP)
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


def sift(queries: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return at most 100,000 descriptors, and others as queries."""
    pictures = [images.read(SHARED / "images" / f"{name}.png").samples.astype(np.float64) for name in FILES]
    rows = torch.from_numpy(np.concatenate([described(one.mean(2)) for one in pictures]))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return rows[order[queries : queries + COUNT].sort().values], rows[order[:queries]]
