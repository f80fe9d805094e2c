"""Bytes spent on the components of vectors by reverse water-filling, and the words that they choose from.

A byte names one of 256 words of 1 to 16 components. Who gets how much is a matter of variances alone: components that
vary most take a byte each, those that hardly vary share one or are dropped (Berger 1971; in transform coding Huang and
Schultheiss 1963). Knows nothing of codecs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tersor.numerics.kmeans import exponent_of, kmeans, times_power

WORDS = 256
# components of a byte, and the mean squared error of the best 256 words for as many unit normal numbers, a component
ERRORS = {1: 0.000043, 2: 0.0083, 3: 0.0449, 4: 0.1006, 6: 0.224, 8: 0.328, 12: 0.483, 16: 0.586}
COMPONENTS = tuple(ERRORS)
SAMPLES = 20000  # vectors that a codebook is fitted on
ITERATIONS = 15
OCTAVE, MIDDLE = 8, 128  # of the sizes of rows: steps an octave, and the step of size 1
METRIC_FLOOR = 1e-4  # of the largest eigenvalue: what no query asked for still counts so much


class Components:
    """Mean, basis and components of the rows of one head; the basis is orthonormal under the metric.

    Where rows are `sized`, each is divided by its size over the root mean square of all.
    """

    def __init__(self, rows: Tensor, weights: Tensor, metric: Tensor, *, sized: bool) -> None:
        width = rows.shape[1]
        total = float(weights.sum())
        self.weights = weights * (len(weights) / total) if total > 0 else torch.ones_like(weights)
        share = (self.weights / max(1, len(rows))).unsqueeze(1)
        self.mean = (rows * share).sum(0).to(torch.float32).to(torch.float64)
        values, vectors = torch.linalg.eigh((metric + metric.mT) / (2.0 * float(metric.diagonal().mean()) or 1.0))
        root = values.clamp_min(max(METRIC_FLOOR * float(values[-1]), 1e-300)).sqrt()
        exponent = exponent_of(rows) if rows.numel() else 0
        plain = times_power(rows - self.mean, -exponent) @ (vectors * root)
        if sized:
            mean = (plain.square().mean(1) * share.flatten()).sum().sqrt()
            plain = plain / sizes(steps_of(plain, mean)).unsqueeze(1)
        power, turn = torch.linalg.eigh(plain.mT @ (plain * share))
        power, turn = power.flip(0).clamp_min(0.0), turn.flip(1)
        dead = power <= width * torch.finfo(torch.float64).eps * power[0]
        power = torch.where(dead, 0.0, power)
        self.power = times_power(power, 2 * exponent)
        self.basis = turn.mT @ (vectors / root).mT
        self.components = plain @ turn * torch.where(dead, 0.0, power.clamp_min(1e-300).rsqrt())


def steps_of(rows: Tensor, size: Tensor) -> Tensor:
    """Return the size of every row (n, width) over `size`, in steps: uint8 (n,)."""
    tiny = torch.finfo(torch.float64).tiny
    relative = rows.square().mean(1).sqrt() / size.clamp_min(tiny)
    return (torch.log2(relative.clamp_min(tiny)) * OCTAVE + MIDDLE).round_().clamp_(0, 255).to(torch.uint8)


def sizes(steps: Tensor) -> Tensor:
    """Return the sizes of `steps_of`, float32 (n,)."""
    every = torch.exp2((torch.arange(256, dtype=torch.float32, device=steps.device) - MIDDLE) / OCTAVE)
    return every.index_select(0, steps.to(torch.int32))


def water_fill(power: Tensor, row_bytes: int) -> list[int]:
    """Return the components of each byte, one of `COMPONENTS` each, that leave the least expected error.

    Parameters
    ----------
    power : Tensor
        Variances of the components, descending, (width,).
    row_bytes : int
        At most the width.
    """
    total = [0.0, *(power.to(torch.float64) / max(float(power[0]), 1e-300)).cumsum(0).tolist()]
    width = len(total) - 1
    best: list[dict[int, tuple[float, int]]] = [{0: (0.0, 0)}]  # by components served: (error of those, last byte's)
    for _ in range(row_bytes):
        found: dict[int, tuple[float, int]] = {}
        for served, (error, _last) in best[-1].items():
            for count in COMPONENTS:
                reached = served + count
                if reached > width:
                    break
                value = error + (total[reached] - total[served]) * ERRORS[count]
                if reached not in found or value < found[reached][0]:
                    found[reached] = value, count
        best.append(found)
    served = min(best[-1], key=lambda reached: best[-1][reached][0] + total[-1] - total[reached])
    parts = []
    for table in reversed(best[1:]):
        parts.append(table[served][1])
        served -= parts[-1]
    return sorted(parts)  # as it is, but for ties


def words_of(heads: Sequence[Components], parts: Sequence[int], seed: int) -> Tensor:
    """Return the codebooks of all sizes in use side by side, (256, sum of sizes), zeros for the others."""
    device = heads[0].mean.device
    out = torch.zeros(WORDS, sum(COMPONENTS), dtype=torch.float32, device=device)
    for count in sorted(set(parts)):
        points, mass = [], []
        for head in heads:
            first = 0
            for part in parts:
                if part == count:
                    points.append(head.components[:, first : first + part])
                    mass.append(head.weights)
                first += part
        vectors, weights = torch.cat(points).to(torch.float32), torch.cat(mass).to(torch.float32)
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(vectors), generator=generator)[:SAMPLES].to(device)
        vectors, weights = vectors[chosen], weights[chosen]
        first = start_of(count)
        if len(vectors) > WORDS and count == 1:  # whose weights hardly matter
            out[:, first] = _companded(vectors.flatten())
        elif len(vectors) <= WORDS:
            out[: len(vectors), first : first + count] = vectors
        else:
            out[:, first : first + count] = kmeans(vectors.unsqueeze(0), WORDS, seed=seed, iterations=ITERATIONS,
                                                   init="kmeans++", weights=weights.reshape(1, -1, 1))[0]
    limit = torch.finfo(torch.float16).max
    return out.clamp_(-limit, limit)


def _companded(values: Tensor) -> Tensor:
    """Return 256 words of density as the cube root of that of values (n,): Panter and Dite 1951.

    Nearer to the best 256 than k-means comes in many rounds.
    """
    places = torch.linspace(0, len(values) - 1, WORDS + 1, device=values.device, dtype=torch.float64).round().long()
    edges = values.sort().values[places]
    width = edges.diff()
    mass = torch.nn.functional.pad(width.pow(2 / 3).cumsum(0), (1, 0))
    at = (torch.arange(WORDS, device=values.device, dtype=torch.float32) + 0.5) / WORDS * mass[-1]
    run = torch.searchsorted(mass, at).clamp(1, WORDS) - 1
    share = (at - mass[run]) / (mass[run + 1] - mass[run]).clamp_min(torch.finfo(torch.float32).tiny)
    return edges[run] + share * width[run]


def start_of(count: int) -> int:
    """Return the first column of the codebook of `count` components."""
    return sum(COMPONENTS[: COMPONENTS.index(count)])
