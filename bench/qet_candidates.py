"""The candidates for a better QET, each measured by itself: `qet_candidates.py [--write]`; the basis of ADR 8.

Every line is at 2 bits an element, all bytes counted (codes, masks, codebooks as fp16 unless said, scales), on Gaussian
4096 x 128, MiniLM's first feed-forward matrix and SmolLM2's keys. Errors are relative to the variance.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

import common
import qet_data
import tersor
from tersor import testing
from tersor.families.qet import PRESETS
from tersor.numerics.kmeans import assign, kmeans
from tersor.numerics.linalg import single_thread
from tersor.quality import measure

RATE = 2.0
SEED = 0
BEAM = 8
STAGE_WORDS = 256


@dataclasses.dataclass(frozen=True)
class CandidateCase:
    """One candidate on one matrix."""

    candidate: str
    data: str

    @property
    def key(self) -> str:
        """The case's name in results."""
        return f"candidate|{self.candidate}|{self.data}"


Result = tuple[Tensor, float]  # decoded matrix, bits an element


def codec(text: str) -> Callable[[Tensor], Result]:
    """Return a candidate that is a family at the rate, or a concrete codec."""
    def run(matrix: Tensor) -> Result:
        family = text in tersor.families()
        encoded = tersor.compress(matrix, rate=RATE if family else None, codec=text, seed=SEED)
        return encoded.decode(), encoded.rate
    return run


def budgeted(template: str, dim: int) -> Callable[[Tensor], Result]:
    """Return a candidate `template` with the most codewords `{}` that the rate admits."""
    def run(matrix: Tensor) -> Result:
        shape = (matrix.shape[0], matrix.shape[1])
        low, high = 2, min(65536, shape[0])
        while low < high:
            middle = (low + high + 1) // 2
            fits = tersor.parse(template.format(dim, middle)).rate(shape) <= RATE
            low, high = (middle, high) if fits else (low, middle - 1)
        return codec(template.format(dim, low))(matrix)
    return run


def preset(name: str, layers: int, dim: int) -> Callable[[Tensor], Result]:
    """Return a published preset with other swap layers of its first stage, and another dimension, at the rate."""
    def run(matrix: Tensor) -> Result:
        published = PRESETS[name]
        changed = dataclasses.replace(published, layers=(layers, *published.layers[1:]), dim=dim)
        shape = (matrix.shape[0], matrix.shape[1])
        return codec(changed.fit(shape, int(RATE * matrix.numel() / 8)).spec())(matrix)
    return run


def best_of(*runs: Callable[[Tensor], Result]) -> Callable[[Tensor], Result]:
    """Return the candidate of least error among some that stay within the rate."""
    def run(matrix: Tensor) -> Result:
        results = []
        for one in runs:
            with contextlib.suppress(tersor.BudgetError):  # masks and the least codebooks may cost more than the rate
                results.append(one(matrix))
        within = [r for r in results if r[1] <= RATE + 1e-9]
        return min(within, key=lambda r: float((r[0] - matrix).square().sum()))
    return run


def joint_pairs(matrix: Tensor) -> Result:
    """Swap once, then put min and max of each comparator into the same sub-vector of 4 (two pairs)."""
    ordered, mask_bits = sorted_pairs(matrix), 0.5
    half = matrix.shape[1] // 2
    order = torch.arange(matrix.shape[1]).reshape(2, half).T.reshape(-1)  # min, max, min, max …
    words = most_words(matrix, 4, RATE - mask_bits)
    encoded = tersor.parse(f"pq4x{words}b10").encode(ordered[:, order], seed=SEED)
    decoded = torch.empty_like(matrix)
    decoded[:, order] = encoded.decode()
    swapped = matrix[:, 0::2] < matrix[:, 1::2]
    low, high = decoded[:, :half], decoded[:, half:]
    out = torch.empty_like(matrix)
    out[:, 0::2], out[:, 1::2] = torch.where(swapped, low, high), torch.where(swapped, high, low)
    return out, encoded.rate + mask_bits


def sorted_pairs(matrix: Tensor) -> Tensor:
    """Return the minima, then the maxima, of adjacent pairs."""
    even, odd = matrix[:, 0::2], matrix[:, 1::2]
    return torch.cat([torch.minimum(even, odd), torch.maximum(even, odd)], 1)


def most_words(matrix: Tensor, dim: int, rate: float) -> int:
    """Return the most codewords of a 10-bit product quantizer at a rate."""
    shape = (matrix.shape[0], matrix.shape[1])
    fits = [words for words in range(2, 600) if tersor.parse(f"pq{dim}x{words}b10").rate(shape) <= rate]
    return max(fits, default=2)


def standardized(run: Callable[[Tensor], Result]) -> Callable[[Tensor], Result]:
    """Return a candidate on standardized columns: 32 bits a column more."""
    def wrapped(matrix: Tensor) -> Result:
        mean, scale = matrix.mean(0), matrix.std(0)
        decoded, rate = run((matrix - mean) / scale)
        return decoded * scale + mean, rate + 32 / matrix.shape[0]
    return wrapped


def sign_symmetric(matrix: Tensor) -> Result:
    """Standardize; 256 codewords of magnitudes in 8 dimensions, fitted, shared by all sub-vectors; 8 sign bits each."""
    points = matrix.reshape(-1, 8)
    with single_thread():
        table = kmeans(points.abs()[None, :: max(1, len(points) // 65536)], STAGE_WORDS, iterations=25, seed=SEED)
        chosen = table[0][assign(points.abs()[None], table)[0]]
    bits = 16 / 8 + STAGE_WORDS * 8 * 16 / matrix.numel()
    return (chosen * torch.where(points < 0, -1.0, 1.0)).reshape(matrix.shape), bits


def residual(beam: int) -> Callable[[Tensor], Result]:
    """Return two stages of 256 fitted words of dimension 8, shared by all sub-vectors, searched with a beam."""
    def run(matrix: Tensor) -> Result:
        points = matrix.reshape(-1, 8)
        sample = points[:: max(1, len(points) // 65536)]
        with single_thread():
            first = kmeans(sample[None], STAGE_WORDS, iterations=25, seed=SEED)[0]
            second = kmeans((sample - search([first], sample, beam))[None], STAGE_WORDS, iterations=25, seed=SEED)[0]
            decoded = search([first, second], points, beam)
        return decoded.reshape(matrix.shape), 2 + 2 * STAGE_WORDS * 8 * 16 / matrix.numel()
    return run


def search(tables: list[Tensor], points: Tensor, beam: int) -> Tensor:
    """Return the best sums of one word of each table, `beam` partial sums kept."""
    out = []
    for block in points.split(8192):
        sums, errors = torch.zeros(len(block), 1, block.shape[1]), block.square().sum(1, keepdim=True)
        for table in tables:
            rest = block[:, None] - sums
            scores = rest.square().sum(-1)[:, :, None] - 2 * rest @ table.T + table.square().sum(1)
            errors, index = scores.flatten(1).topk(min(beam, scores[0].numel()), largest=False)
            parent, word = index // len(table), index % len(table)
            sums = sums.gather(1, parent[..., None].expand(-1, -1, block.shape[1])) + table[word]
        out.append(sums[torch.arange(len(block)), errors.argmin(1)])
    return torch.cat(out)


CANDIDATES: dict[str, Callable[[Tensor], Result]] = {
    "published QET, best of vanilla and full": best_of(
        *(preset("qet", layers, dim) for layers in (1, 2, 3) for dim in (4, 8)),
        *(budgeted(f"swap{layers},pq{{}}x{{}}{book}", dim)
          for layers in (1, 3) for book in ("f32", "b10") for dim in (2, 4, 8))),
    "swap 1, columns standardized first": standardized(best_of(*(budgeted("swap1,pq{}x{}b10", d) for d in (2, 4)))),
    "swap 1, min and max in one sub-vector": joint_pairs,
    "rotation, then swap 1": best_of(*(budgeted("rot,swap1,pq{}x{}b10", d) for d in (2, 4))),
    "no swap: product, 10-bit codebooks": best_of(*(budgeted("pq{}x{}b10", d) for d in (2, 4))),
    "no swap: product, one shared codebook": best_of(*(budgeted("pq{}x{}m", d) for d in (2, 4))),
    "residual 2 x 256, dim 8, greedy, standardized": standardized(residual(1)),
    f"residual 2 x 256, dim 8, beam {BEAM}, standardized": standardized(residual(BEAM)),
    "sign-symmetric 256 x dim 8, standardized": standardized(sign_symmetric),
    "permutation and sign symmetric, fitted, standardized": codec("std,sym16fm"),
    "permutation and sign symmetric, rotated": codec("rot,sym16m"),
    "qet_plus": codec("qet_plus"),
}
DATA: dict[str, Callable[[], Tensor]] = {"Gaussian 4096 x 128": qet_data.gaussian4096, "MiniLM Wff": qet_data.wff,
                                         "SmolLM2 K": qet_data.keys}


def mask_entropy(matrix: Tensor) -> float:
    """Return the entropy of the first layer's mask given its column, in bits a comparator."""
    share = (matrix[:, 0::2] < matrix[:, 1::2]).to(torch.float64).mean(0).clamp(1e-12, 1 - 1e-12)
    return float(-(share * share.log2() + (1 - share) * (1 - share).log2()).mean())


def hessian_weighting() -> tuple[float, float]:
    """Return the relative distortion under a skewed diagonal Hessian, plain and weighted k-means."""
    matrix = testing.gaussian((1024, 128), 1)
    order = torch.randperm(128, generator=torch.Generator().manual_seed(SEED))
    hessian = torch.diag(torch.logspace(-1.5, 1.5, 128)[order])
    chosen = tersor.parse("pq4x64")
    plain, weighted = chosen.encode(matrix, seed=SEED), chosen.encode(matrix, hessian=hessian, seed=SEED)
    return measure(matrix, plain, hessian).distortion, measure(matrix, weighted, hessian).distortion


def main() -> None:
    """Measure and print; with --write, record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    write = parser.parse_args().write
    for data, make in DATA.items():
        matrix = make()
        power = float((matrix - matrix.mean()).square().sum())
        for name, run in CANDIDATES.items():
            decoded, rate = run(matrix)
            error = float((decoded - matrix).square().sum()) / power
            print(f"{data:<20} {name:<55} {rate:7.4f} bits  {error:.5f}", flush=True)
            if write:
                common.record("qet_candidates", CandidateCase(name, data), seed=SEED,
                              nbytes=math.ceil(rate * matrix.numel() / 8), numbers={"rate": rate, "nmse": error})
        centred = (matrix - matrix.mean(0)) / matrix.std(0)
        numbers = {"raw": mask_entropy(matrix), "standardized": mask_entropy(centred)}
        print(f"{data:<20} mask entropy, bits a comparator: {numbers}", flush=True)
        if write:
            common.record("qet_candidates", CandidateCase("mask entropy", data), seed=SEED, nbytes=0, numbers=numbers)
    plain, weighted = hessian_weighting()
    print(f"k-means under a diagonal Hessian: plain {plain:.5f}, weighted {weighted:.5f}")
    if write:
        common.record("qet_candidates", CandidateCase("Hessian-weighted k-means", "Gaussian 1024 x 128"), seed=SEED,
                      nbytes=0, numbers={"plain": plain, "weighted": weighted})


if __name__ == "__main__":
    main()
