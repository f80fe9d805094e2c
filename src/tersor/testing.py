"""For authors of codecs: the laws that every codec keeps, matrices to try them on, and the one table of tolerances.

`check_codec(my_codec)` raises `AssertionError`, naming the law, where a codec breaks the contract. It needs no test
framework. Every matrix maker has its own generator; the global ones are never touched.
"""

from __future__ import annotations

import json
import pickle
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tersor import api
from tersor.contract.checks import check_tensor
from tersor.contract.codec import Codec, Encoded
from tersor.errors import CodecConfigError, CorruptStoreError, NonFiniteError
from tersor.numerics.kmeans import exponent_of, times_power
from tersor.numerics.settings import pinned
from tersor.payload.blocks import Shape
from tersor.registry import from_config, parse
from tersor.store.manifest import digest

POWERS = (-100, 100)  # of two, by which the law of scale multiplies
SLACK = 4.0  # what a tolerance allows over the root-mean-square estimate of a rounding error


def tolerance(dtype: torch.dtype, terms: int) -> float:
    """Return the relative error allowed to a sum of `terms` products computed in `dtype`: `4 eps √terms`.

    Rounding errors of a sum add up like a random walk, so its error against the product of the operands' norms grows as
    `eps √terms`. Use it on relative Frobenius errors, never on cosines.
    """
    return SLACK * torch.finfo(dtype).eps * max(1, terms) ** 0.5


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(shape: Shape, seed: int = 0) -> Tensor:
    """Return independent standard normal numbers, float32 (out, in)."""
    return torch.randn(shape, generator=_generator(seed))


def student_t3(shape: Shape, seed: int = 0, *, unit_variance: bool = False) -> Tensor:
    """Return independent Student t numbers of 3 degrees of freedom, float32 (out, in): heavy tails.

    Parameters
    ----------
    shape : (int, int)
    seed : int
    unit_variance : bool
        Divide by √3, the standard deviation of the distribution; False returns plain t numbers of variance 3.
    """
    normal = torch.randn((4, *shape), generator=_generator(seed), dtype=torch.float64)
    values = normal[0] / (normal[1:].square().sum(0) / 3.0).sqrt()
    return (values / 3.0**0.5 if unit_variance else values).to(torch.float32)


def outliers(shape: Shape, seed: int = 0) -> Tensor:
    """Return standard normal numbers with 1 % of the input columns, at least one, times 10; float32 (out, in)."""
    generator = _generator(seed)
    matrix = torch.randn(shape, generator=generator)
    chosen = torch.randperm(shape[1], generator=generator)[: max(1, round(0.01 * shape[1]))]
    matrix[:, chosen] *= 10.0
    return matrix


def with_spectrum(shape: Shape, singular_values: Sequence[float] | Tensor, seed: int = 0) -> Tensor:
    """Return a matrix with the given singular values and random singular vectors, float32 (out, in).

    Parameters
    ----------
    shape : (int, int)
    singular_values : sequence of float or Tensor
        At most min(out, in) numbers >= 0; the others are 0.
    seed : int
    """
    values = torch.as_tensor(singular_values, dtype=torch.float64)
    if values.ndim != 1 or not 1 <= values.numel() <= min(shape) or bool((values < 0).any()):
        raise ValueError(f"with_spectrum needs 1 to {min(shape)} singular values >= 0, found {singular_values}")
    generator, rank = _generator(seed), values.numel()
    with pinned():
        left, _ = torch.linalg.qr(torch.randn(shape[0], rank, generator=generator, dtype=torch.float64))
        right, _ = torch.linalg.qr(torch.randn(shape[1], rank, generator=generator, dtype=torch.float64))
        return ((left * values) @ right.T).to(torch.float32)


def encode(codec: Codec, matrix: Tensor, seed: int = 0, **options: Any) -> Encoded:
    """Encode `matrix` (out, in), training the codec's shared tables on it first, if it has any."""
    return codec.encode(matrix, seed=seed, options=options, tables=codec.train([matrix], seed=seed))


def _expect(holds: bool, codec: Codec, message: str) -> None:
    if not holds:
        raise AssertionError(f"codec '{codec.spec()}': {message}")


@dataclass(frozen=True, eq=False)
class Specimen:
    """A codec, a matrix, and what the codec makes of it: encoded once for all laws that only look at the result."""

    codec: Codec
    matrix: Tensor

    @cached_property
    def encoded(self) -> Encoded:
        """The encoding of a copy of the matrix, so that `matrix` itself is first encoded where a law watches it."""
        return encode(self.codec, self.matrix.clone())

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the payload, from before any law read it."""
        return digest(self.encoded.tensors)

    @property
    def shape(self) -> Shape:
        """(out, in) of the matrix."""
        return (self.matrix.shape[0], self.matrix.shape[1])


def law_config(specimen: Specimen) -> None:
    """Check that the configuration survives JSON and the factory string parses to an equal codec."""
    codec = specimen.codec
    text = json.dumps(codec.to_config(), allow_nan=False)
    rebuilt = from_config(json.loads(text))
    _expect(rebuilt == codec and hash(rebuilt) == hash(codec), codec, f"configuration {text} gives {rebuilt!r}")
    _expect(json.dumps(rebuilt.to_config()) == text, codec, "configuration changes on its way through JSON")
    _expect(parse(codec.spec()) == codec, codec, f"factory string parses to {parse(codec.spec())!r}")
    _expect(parse(codec.spec()).spec() == codec.spec(), codec, "factory string is not a fixed point of parsing")


def law_payload(specimen: Specimen) -> None:
    """Check that the payload is what the layout declares, and that the predicted size is the measured one."""
    codec, shape, encoded = specimen.codec, specimen.shape, specimen.encoded
    layout = codec.layout(shape)
    _expect(encoded.shape == shape and encoded.codec == codec, codec, f"encoded as {encoded.shape}, {encoded.codec!r}")
    _expect(set(encoded.tensors) == set(layout), codec, f"layout {sorted(layout)}, payload {sorted(encoded.tensors)}")
    for name, spec in layout.items():
        _expect("." not in name and bool(name), codec, f"tensor name '{name}': nested names use '/', never '.'")
        try:
            check_tensor(name, encoded.tensors[name], spec)
        except CorruptStoreError as error:
            raise AssertionError(f"codec '{codec.spec()}': {error}") from error
    measured = sum(t.numel() * t.element_size() for t in encoded.tensors.values())
    _expect(codec.nbytes(shape) == measured == encoded.nbytes, codec,
            f"predicted {codec.nbytes(shape)} bytes, reported {encoded.nbytes}, measured {measured}")
    _expect(codec.rate(shape) == encoded.rate == 8.0 * measured / specimen.matrix.numel(), codec,
            f"predicted {codec.rate(shape)} bits per element, measured {encoded.rate}")


def _global_generators() -> dict[str, Any]:
    """Return the states of the global generators, by library."""
    return {"torch": bytes(torch.random.get_rng_state().numpy()), "NumPy": pickle.dumps(np.random.get_state()),
            "random": random.getstate()}


def law_determinism(specimen: Specimen) -> None:
    """Check: same seed, same bytes; the input, the global generators and the number of threads are left alone."""
    codec, matrix, first = specimen.codec, specimen.matrix, specimen.digest
    kept = matrix.clone()
    before = _global_generators()
    threads = torch.get_num_threads()
    again = encode(codec, matrix)
    for name, state in _global_generators().items():
        _expect(state == before[name], codec, f"encode moved {name}'s global generator")
    _expect(torch.get_num_threads() == threads, codec, "encode changed the number of threads")
    _expect(torch.equal(kept, matrix), codec, "encode changed its input")
    _expect(first == digest(again.tensors), codec, "the same seed gave other bytes")


def law_threads(specimen: Specimen) -> None:
    """Check that another number of threads gives the same bytes, and that the setting is restored."""
    codec, first, before = specimen.codec, specimen.digest, torch.get_num_threads()
    other = 2 if before == 1 else 1
    try:
        torch.set_num_threads(other)
        found = encode(codec, specimen.matrix)
        _expect(torch.get_num_threads() == other, codec, "encode changed the number of threads")
    finally:
        torch.set_num_threads(before)
    _expect(first == digest(found.tensors), codec, "two threads give other bytes than one")


def law_decode(specimen: Specimen) -> None:
    """Check that decoding gives finite float32 of the right shape, and that zero decodes to exactly zero."""
    codec, matrix, decoded = specimen.codec, specimen.matrix, specimen.encoded.decode()
    _expect(decoded.dtype == torch.float32 and decoded.shape == matrix.shape, codec,
            f"decoded to {decoded.dtype} {tuple(decoded.shape)}")
    _expect(bool(torch.isfinite(decoded).all()), codec, "decoded to NaN or infinity")
    zero = encode(codec, torch.zeros_like(matrix)).decode()
    _expect(not bool(zero.any()), codec, f"the zero matrix decodes to magnitudes up to {float(zero.abs().max())}")


def law_errors(specimen: Specimen) -> None:
    """Check that bad input raises a typed error."""
    codec, matrix = specimen.codec, specimen.matrix
    for bad in (float("nan"), float("inf")):
        broken = matrix.clone()
        broken[-1, -1] = bad
        _raises(codec, NonFiniteError, broken)
    _raises(codec, CodecConfigError, matrix[0])
    _raises(codec, CodecConfigError, matrix[:0])
    _raises(codec, CodecConfigError, matrix.to(torch.int32))
    _raises(codec, CodecConfigError, matrix, hessian=torch.eye(matrix.shape[1] + 1))
    _raises(codec, CodecConfigError, matrix, options={"no such option": 1})


def _raises(codec: Codec, error: type[Exception], matrix: Tensor, **arguments: Any) -> None:
    try:
        codec.encode(matrix, **arguments)
    except error:
        return
    raise AssertionError(f"codec '{codec.spec()}': encode of {matrix.dtype} {tuple(matrix.shape)} with "
                         f"{sorted(arguments)} did not raise {error.__name__}")


def _rounding(matrix: Tensor, terms: int, dtype: torch.dtype = torch.float32) -> float:
    """Return the error, in norm, allowed to arithmetic of `terms` terms on numbers like those of `matrix`."""
    spacing = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # of subnormal numbers
    return tolerance(dtype, terms) * float(matrix.double().norm()) + spacing * terms * matrix.numel() ** 0.5


def law_rows(specimen: Specimen) -> None:
    """Check that `decode_rows` and `gather` agree with `decode`."""
    codec, matrix, encoded = specimen.codec, specimen.matrix, specimen.encoded
    decoded, count, terms = encoded.decode(), matrix.shape[0], sum(matrix.shape)
    bound = _rounding(decoded, terms)
    for start, stop in {(0, count), (count // 3, count // 2 + 1), (count - 1, count), (0, 0)}:
        rows = encoded.decode_rows(start, stop)
        _expect(rows.shape == (stop - start, matrix.shape[1]) and rows.dtype == torch.float32, codec,
                f"rows {start} to {stop} decode to {rows.dtype} {tuple(rows.shape)}")
        error = float((rows - decoded[start:stop]).double().norm())
        _expect(error <= bound, codec, f"rows {start} to {stop} differ from decode by {error:.3g} > {bound:.3g}")
    index = torch.randint(count, (2, 3), generator=_generator(1))
    for chosen in (index, index[0, 0], index[:0]):
        rows = encoded.gather(chosen)
        error = float((rows - decoded[chosen]).double().norm())
        _expect(rows.shape == (*chosen.shape, matrix.shape[1]) and error <= 3.0 * bound, codec,
                f"gather of {tuple(chosen.shape)} gives {tuple(rows.shape)}, {error:.3g} from decode")


def law_matmul(specimen: Specimen) -> None:
    """Check that `matmul(x) = x @ decode().T` for one vector, a batch and a batch of batches; float32 and bfloat16."""
    codec, matrix, encoded = specimen.codec, specimen.matrix, specimen.encoded
    decoded, width = encoded.decode().double(), matrix.shape[1]
    for batch in ((), (3,), (2, 3)):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn((*batch, width), generator=_generator(2)).to(dtype)
            y, expected = encoded.matmul(x), x.double() @ decoded.T
            _expect(y.dtype == dtype and y.shape == expected.shape, codec,
                    f"matmul of {x.dtype} {tuple(x.shape)} gives {y.dtype} {tuple(y.shape)}")
            bound = (float(x.double().norm()) * _rounding(decoded, sum(matrix.shape)) + _rounding(expected, 1, dtype))
            error = float((y.double() - expected).norm())
            _expect(error <= bound, codec, f"matmul of {dtype} {tuple(x.shape)} is {error:.3g} > {bound:.3g} off")


def law_scale(specimen: Specimen) -> None:
    """Check that a power of two times the matrix decodes to as much times what the matrix does, or is refused by name.

    From 2**-100 to 2**100, where the numbers themselves lose no digit on the way.
    """
    codec, wide = specimen.codec, specimen.matrix.to(torch.promote_types(specimen.matrix.dtype, torch.float32))
    away = exponent_of(wide)
    held = wide if abs(away) < POWERS[1] // 2 else times_power(wide, -away)
    expected = encode(codec, held).decode().double()
    bound = _rounding(expected, sum(specimen.shape))
    for power in POWERS:
        scaled = times_power(held, power)
        if not torch.equal(times_power(scaled.to(torch.float32).to(held.dtype), -power), held):
            continue
        try:
            found = encode(codec, scaled).decode().double()
        except NonFiniteError:
            continue
        error = float((times_power(found, -power) - expected).norm())
        _expect(error <= bound, codec, f"2**{power} times a matrix decodes to something else: {error:.3g} > {bound:.3g}"
                                       f" off, of a norm of {float(expected.norm()):.3g}")


def law_gradient(specimen: Specimen) -> None:
    """Check that the gradient of a product by its vectors is the product with the transpose, and of that the product.

    A product that is not recorded gives the same bits.
    """
    codec, encoded = specimen.codec, specimen.encoded
    decoded, (rows, width) = encoded.decode().double(), specimen.shape
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn((2, width), generator=_generator(3)).to(dtype).requires_grad_()
        incoming = torch.randn((2, rows), generator=_generator(4)).to(dtype).requires_grad_()
        y = encoded.matmul(x)
        _expect(torch.equal(y.detach(), encoded.matmul(x.detach())), codec, "a recorded product has other bits")
        (gradient,) = torch.autograd.grad(y, x, incoming, create_graph=True)
        (again,) = torch.autograd.grad(gradient, incoming, x.detach())
        for found, given, weights in ((gradient, incoming, decoded), (again, x, decoded.T)):
            expected = given.detach().double() @ weights
            _expect(found.dtype == dtype and found.shape == expected.shape, codec,
                    f"a gradient of {dtype} is {found.dtype} {tuple(found.shape)}")
            bound = (float(given.detach().double().norm()) * _rounding(decoded, sum(specimen.shape))
                     + _rounding(expected, 1, dtype))
            error = float((found.detach().double() - expected).norm())
            _expect(error <= bound, codec, f"a gradient of {dtype} is {error:.3g} > {bound:.3g} off")


def law_store(specimen: Specimen) -> None:
    """Check that what is saved loads with the same bytes and decodes to the same bits."""
    codec, encoded = specimen.codec, specimen.encoded
    with tempfile.TemporaryDirectory() as folder:
        api.save(Path(folder) / "store", encoded)
        loaded = api.load(Path(folder) / "store")
        assert isinstance(loaded, Encoded)
        _expect(loaded.codec == codec and loaded.shape == encoded.shape, codec, f"loaded as {loaded.codec!r}")
        _expect(specimen.digest == digest(loaded.tensors), codec, "loaded bytes differ from those saved")
        _expect(torch.equal(encoded.decode(), loaded.decode()), codec, "loaded matrix decodes otherwise")


def law_reading(specimen: Specimen) -> None:
    """Check that the payload is as it was encoded, after all that the other laws read of it."""
    _expect(specimen.digest == digest(specimen.encoded.tensors), specimen.codec,
            "decoding or multiplying changed the payload")


LAWS: Mapping[str, Callable[[Specimen], None]] = MappingProxyType({
    "config": law_config, "payload": law_payload, "determinism": law_determinism, "threads": law_threads,
    "decode": law_decode, "errors": law_errors, "rows": law_rows, "matmul": law_matmul,
    "scale": law_scale, "gradient": law_gradient, "reading": law_reading, "store": law_store,
})


_FRESH = """
import json, sys
sys.path[:], folder, threads = json.loads(sys.argv[1]), sys.argv[2], int(sys.argv[3])
import torch, tersor
from tersor.store.manifest import digest
torch.set_num_threads(threads)
print(json.dumps({n: digest({"": e.decode()}) for n, e in tersor.load(folder).items()}))
"""


def check_fresh_process(matrices: Mapping[str, Encoded]) -> None:
    """Save encoded matrices, decode them all in one fresh Python process, and compare bit by bit.

    Raises
    ------
    AssertionError
        If one decodes otherwise there: its decoder depends on something that the file does not hold.
    """
    with tempfile.TemporaryDirectory() as folder:
        api.save(Path(folder) / "store", matrices)
        command = [sys.executable, "-c", _FRESH, json.dumps([entry for entry in sys.path if entry]),
                   str(Path(folder) / "store"), str(torch.get_num_threads())]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise AssertionError(f"a fresh process cannot decode the store:\n{done.stderr}")
    found = json.loads(done.stdout)
    for name, encoded in matrices.items():
        _expect(found[name] == digest({"": encoded.decode()}), encoded.codec,
                f"'{name}' decodes otherwise in a fresh process")


def check_codec(codec: Codec, shape: Shape = (24, 64), *, matrix: Tensor | None = None,
                fresh_process: bool = True) -> None:
    """Check every law of the contract on one matrix.

    Parameters
    ----------
    codec : Codec
        Known to the registry: built in, or announced under the entry-point group `tersor.codecs`.
    shape : (int, int)
        (out, in) of the Gaussian matrix to try; ignored when `matrix` is given.
    matrix : Tensor or None
        (out, in), any float dtype.
    fresh_process : bool
        Also decode in a fresh Python process, which takes a few seconds.

    Raises
    ------
    AssertionError
        At the first law that does not hold.
    """
    specimen = Specimen(codec, gaussian(shape) if matrix is None else matrix)
    for law in LAWS.values():
        law(specimen)
    if fresh_process:
        check_fresh_process({"matrix": specimen.encoded})
