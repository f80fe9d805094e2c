"""The contract: what a codec is, and what an encoded matrix is.

A codec is a frozen dataclass whose fields are all that decoding needs. An encoded matrix is a linear operator:
`decode()` rebuilds the matrix, `matmul(x)` applies it. Payload tensors are declared once, by `Codec.layout`.
"""

from __future__ import annotations

import abc
import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from tersor.contract.checks import HUGE, SMALL, check_hessian, check_matrix, check_tensor, may_overflow
from tersor.contract.coordinates import Coordinates
from tersor.contract.derived import Derived
from tersor.contract.gradient import product, recorded
from tersor.contract.operator import Operator, as_tensor, like
from tersor.errors import CodecConfigError, CorruptStoreError, NonFiniteError
from tersor.numerics.kmeans import exponent_of, times_power
from tersor.numerics.remembered import remembering
from tersor.numerics.settings import pinned, steadily
from tersor.payload.blocks import Few, Rows, Shape, Tables, row_blocks
from tersor.payload.layout import Layout

LOST = 2.0**-10  # of the norm, and of the error: what tiny numbers may lose more than larger ones do


@dataclasses.dataclass(frozen=True, eq=False)
class Search:
    """What steers an encoder and is not stored: the Hessian, the seed, options and trained tables."""

    hessian: Tensor | None = None
    seed: int = 0
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tables: Tables = dataclasses.field(default_factory=dict)

    @property
    def feedback(self) -> Tensor | None:
        """The Hessian that steers error feedback, where there is one and feedback is asked for."""
        return self.hessian if self.options.get("feedback", False) else None

    def inner(self, name: str) -> Search:
        """Return the search for the nested codec `name`: tables are those under its prefix."""
        prefix = f"{name}/"
        tables = {key.removeprefix(prefix): t for key, t in self.tables.items() if key.startswith(prefix)}
        return dataclasses.replace(self, tables=tables)


class ColumnEncoder(abc.ABC):
    """Encoder state over blocks of columns; what error feedback drives.

    The driver hands over blocks of `width` columns, or those between `edges`, from left to right, already
    corrected for earlier errors, and uses the decoded block that comes back to correct what follows.
    """

    width: int

    def edges(self, columns: int) -> list[int]:
        """Return the first column of every block that the driver hands over alone, and the number of columns."""
        return [*range(0, columns, self.width), columns]

    @abc.abstractmethod
    def block(self, start: int, columns: Tensor) -> Tensor:
        """Encode columns `start` to `start + k`, a float32 tensor (out, k); return them decoded, same shape."""

    @abc.abstractmethod
    def finish(self) -> Encoded:
        """Return the encoded matrix once every column has been given."""


@dataclasses.dataclass(frozen=True)
class Traits:
    """What generic code asks of a codec.

    Attributes
    ----------
    column_wise : bool
        Whether `Codec.columns` is there, which error feedback needs.
    spectral : bool
        Whether the error follows from the spectrum of the whole matrix, as of a low-rank code. Then a sample of rows
        says little about it, and a sum encodes it anew once the other stages are known.
    mixes_rows : bool
        Whether a decoded row depends on the codes of others, so that no row decodes alone.
    runs : (int, int) or None
        (heads, rows) where runs of so many rows are coded as of different heads, in turn; None: all rows alike.
    """

    column_wise: bool = False
    spectral: bool = False
    mixes_rows: bool = False
    runs: Shape | None = None


class Codec(Derived, abc.ABC):
    """A fully specified method. Children are final frozen dataclasses with at most eight fields.

    Five methods make a codec: `layout`, `search`, `decode_rows`, `spec` and `from_spec`. The others have defaults.

    Class attributes
    ----------------
    id : str
        Name in configurations and manifests.
    version : int
        Raised when old bytes would decode differently, or when a field comes.
    later : mapping of str to (int, object)
        Fields that came with a later version: which, and what they are in configurations before it.
    grammar : str
        Regular expression of the codec's head in a factory string such as `"rot,lm3"`.
    own_options : frozenset of str
        Encoder options that this class reads.
    examples : tuple of str
        Factory strings that messages show and that the shared laws are tried on; the first is the plainest.
    own_traits : Traits
        Of every codec of this class; see `traits`.
    """

    grammar: ClassVar[str]
    examples: ClassVar[tuple[str, ...]] = ()
    own_traits: ClassVar[Traits] = Traits()

    @abc.abstractmethod
    def layout(self, shape: Shape) -> Layout:
        """Return the specification of every stored tensor for a matrix of `shape` (out, in)."""

    @abc.abstractmethod
    def search(self, matrix: Tensor, how: Search) -> Encoded:
        """Encode a checked 2-D float matrix; called by `encode`, which users call."""

    @abc.abstractmethod
    def decode_rows(self, encoded: Encoded, rows: Rows) -> Tensor:
        """Return decoded rows, float32 (k, in), for a slice of rows or an int64 index (k,)."""

    @abc.abstractmethod
    def spec(self) -> str:
        """Return the factory string; `registry.parse(codec.spec()) == codec`."""

    @classmethod
    @abc.abstractmethod
    def from_spec(cls, match: re.Match[str], parts: Sequence[Codec]) -> Codec:
        """Build the codec from a match of `grammar` and the codecs nested in it."""

    def decode(self, encoded: Encoded) -> Tensor:
        """Return the matrix, float32 (out, in)."""
        out = torch.empty(encoded.shape, dtype=torch.float32, device=encoded.device)
        for block in row_blocks(encoded.shape):
            out[block] = self.decode_rows(encoded, block)
        return out

    def matmul(self, encoded: Encoded, x: Tensor) -> Tensor:
        """Return `x @ decode().T` for `x` (*batch, in), one block of rows dense at a time, float32 inside."""
        wide = x.to(torch.float32)
        out = torch.empty(*x.shape[:-1], encoded.shape[0], dtype=x.dtype, device=x.device)
        for block in row_blocks(encoded.shape):
            out[..., block] = (wide @ self.decode_rows(encoded, block).T).to(x.dtype)
        return out

    def ready(self, encoded: Encoded) -> Few | None:
        """Return `matmul` of few vectors, with all done that depends on the payload alone; None where there is none."""
        del encoded

    def matmul_transposed(self, encoded: Encoded, y: Tensor) -> Tensor:
        """Return `y @ decode()` for `y` (*batch, out), in its dtype: the gradient of `matmul`; as it, by blocks."""
        wide = y.to(torch.float32)
        total = torch.zeros(*y.shape[:-1], encoded.shape[1], dtype=torch.float32, device=y.device)
        for block in row_blocks(encoded.shape):
            total += wide[..., block] @ self.decode_rows(encoded, block)
        return total.to(y.dtype)

    def coordinates(self, encoded: Encoded) -> Coordinates:
        """Return the coordinates in which attention meets the rows; by default the decoded rows."""
        return Coordinates(encoded)

    def row_scales(self, encoded: Encoded) -> Mapping[str, Rows]:
        """Return which rows the numbers of a stored tensor multiply, in order, by its name; none by default.

        Tensors are bf16 and not shared, and no row is multiplied by two numbers: what recovery trains.
        """
        del encoded
        return MappingProxyType({})

    def columns(self, matrix: Tensor, how: Search) -> ColumnEncoder:
        """Return an encoder over column blocks of `matrix` (out, in).

        Raises
        ------
        CodecConfigError
            If the codec cannot encode a matrix column block by column block.
        """
        raise CodecConfigError(f"codec '{self.spec()}' cannot encode column blocks, which error feedback needs; "
                               "use rtn, lm, sym or pq, plain, summed, or rotated on the input side")

    def train(self, samples: Iterable[Tensor], *, seed: int = 0) -> Tables:
        """Train the tables of `layout` that are marked shared, from sample matrices; empty where there are none.

        Raises
        ------
        NonFiniteError
            If a sample that is looked at holds NaN, infinity or numbers beyond float32.
        CodecConfigError
            If samples do not fit.
        """
        with pinned():
            return self.learn((_checked(sample) for sample in samples), seed=seed)

    def learn(self, samples: Iterable[Tensor], *, seed: int = 0) -> Tables:
        """Train on checked samples; called by `train`, which users call."""
        del samples, seed
        return MappingProxyType({})

    def traits(self) -> Traits:
        """Return the traits of this codec: those of its class, and what its children pass on."""
        own, inner = self.own_traits, [child.traits() for child in self.children().values()]
        return Traits(own.column_wise, own.spectral or any(one.spectral for one in inner),
                      own.mixes_rows or any(one.mixes_rows for one in inner),
                      next((one.runs for one in inner if one.runs), own.runs))

    def encode(self, matrix: Tensor, *, hessian: Tensor | None = None, seed: int = 0,
               options: Mapping[str, Any] | None = None, tables: Tables | None = None) -> Encoded:
        """Encode `matrix` (out, in), any float dtype.

        Parameters
        ----------
        matrix : Tensor
            Left untouched.
        hessian : Tensor or None
            `E[x xᵀ]` of the inputs, (in, in); codecs that cannot use it ignore it.
        seed : int
            Steers the encoder's search only; what decoding needs is a field of the codec.
        options : mapping or None
            Encoder options (see `option_names`); recorded by the pipeline, never stored in the codec.
        tables : mapping or None
            Shared tables from `train`.

        Raises
        ------
        NonFiniteError
            If the matrix or the Hessian holds NaN or infinity, or numbers so large that the codec overflows float32.
        CodecConfigError
            If shape, dtype, Hessian or options do not fit.
        """
        check_matrix(matrix)
        check_hessian(hessian, matrix.shape[1])
        unknown = set(options or {}) - self.option_names()
        if unknown:
            known = ", ".join(sorted(self.option_names())) or "none"
            raise CodecConfigError(f"codec '{self.spec()}' has no encoder option {sorted(unknown)}; known: {known}")
        how = Search(hessian, seed, dict(options or {}), dict(tables or {}))
        return steadily(lambda: self._searched(matrix.detach(), how))

    @remembering()  # parts of one codec meet one Hessian
    def _searched(self, matrix: Tensor, how: Search) -> Encoded:
        """Encode; very large and very small numbers only if they decode as others would."""
        encoded = self.search(matrix, how)
        peak = max(float(matrix.max()), -float(matrix.min()))
        if (peak > HUGE or may_overflow(how.tables.values())) and not encoded.is_finite():
            raise NonFiniteError(f"the matrix or the shared tables hold magnitudes up to {peak:.3g} or more, with "
                                 f"which codec '{self.spec()}' overflows float32; scale the matrix down first")
        if 0 < peak < SMALL:
            self._check_small(matrix, encoded, how)
        return encoded

    def _check_small(self, matrix: Tensor, encoded: Encoded, how: Search) -> None:
        """Raise unless tiny numbers err as they would if they were larger: below 2**-126 digits get lost."""
        power = -exponent_of(matrix)
        unit = times_power(matrix.to(torch.float64), power)
        like = self.search(unit.to(torch.promote_types(matrix.dtype, torch.float32)), how)
        size = float(unit.norm())
        found, least = (float((one.decode().to(torch.float64) * 2.0**k - unit).norm()) / size
                        for one, k in ((encoded, power), (like, 0)))
        if not found <= (1 + LOST) * least + LOST:
            raise NonFiniteError(f"the matrix holds magnitudes up to {float(matrix.abs().max()):.3g}, of which codec "
                                 f"'{self.spec()}' loses digits: a relative error of {found:.2g} instead of "
                                 f"{least:.2g}; scale the matrix up before encoding")

    def __str__(self) -> str:
        return self.spec()


def _checked(sample: Tensor) -> Tensor:
    check_matrix(sample, "sample")
    return sample.detach()


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Encoded(Operator):
    """A compressed matrix: a linear operator made of a codec and its payload.

    Parameters
    ----------
    codec : Codec
    shape : (int, int)
        (out, in).
    tensors : mapping of str to Tensor
        The payload, exactly what `codec.layout(shape)` declares.
    dtype : torch.dtype
        Of decoded rows. `tersor.compress` and `tersor.load` set that of the original; codecs compute in float32.
    numpy : bool
        Whether decoding returns NumPy arrays. `tersor.compress` sets it where the matrix was one; it is not stored.
    """

    codec: Codec
    shape: Shape
    tensors: Mapping[str, Tensor]
    dtype: torch.dtype = torch.float32
    numpy: bool = False

    def decode(self) -> Tensor:
        """Return the matrix (out, in), in `dtype`: a tensor, or an array where `numpy` is set.

        Raises
        ------
        NoMemoryError
            If it takes more memory than there is; names the bytes.
        """
        self.check_room(self.shape[0])
        return self.as_given(_steady(lambda: self.codec.decode(self)))

    def decode_rows(self, start: int, stop: int) -> Tensor:
        """Return rows `start` to `stop`, (stop - start, in), as `decode` returns them."""
        if not (isinstance(start, int) and isinstance(stop, int)):
            raise CodecConfigError(f"rows are named by whole numbers, found {start!r} and {stop!r}")
        if not 0 <= start <= stop <= self.shape[0]:
            raise CodecConfigError(f"rows {start} to {stop} do not lie within the {self.shape[0]} rows of the matrix")
        self.check_room(stop - start)
        return self.as_given(_steady(lambda: self.codec.decode_rows(self, slice(start, stop))))

    def gather(self, index: Tensor | np.ndarray) -> Any:
        """Return the rows named by integers `index` (any shape): (*index.shape, in), in `dtype`.

        An array of NumPy gives one, and a tensor a tensor.
        """
        given, index = index, as_tensor(index, "index")
        if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
            raise CodecConfigError(f"gather needs integers, found {index.dtype}")
        flat = index.reshape(-1).to(torch.int64)
        checked = not (index.is_cuda or torch.compiler.is_compiling())  # a check would wait for the device
        if checked and flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < self.shape[0]:
            raise CodecConfigError(f"rows {int(flat.min())}..{int(flat.max())} do not lie within the {self.shape[0]} "
                                   "rows of the matrix")
        found = _steady(lambda: self.codec.decode_rows(self, flat)).to(self.dtype)
        return like(given, found.reshape(*index.shape, self.shape[1]))

    def matmul(self, x: Tensor | np.ndarray) -> Any:
        """Return `x @ decode().T`: (*batch, in) to (*batch, out), in the dtype of `x`; an array gives an array.

        Differentiable in `x`.
        """
        given, x = x, as_tensor(x, "x")
        if not x.ndim or x.shape[-1] != self.shape[1] or not x.is_floating_point():
            raise CodecConfigError(f"matmul needs floats x of shape (..., {self.shape[1]}), found {x.dtype} "
                                   f"{tuple(x.shape)}")
        return like(given, product(self, x) if recorded(x) else self.codec.matmul(self, x))

    @property
    def nbytes(self) -> int:
        """Bytes of the payload held, measured from the tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    @property
    def rate(self) -> float:
        """Bits per element, measured from the tensors."""
        return 8.0 * self.nbytes / (self.shape[0] * self.shape[1])

    def child(self, name: str, codec: Codec, shape: Shape) -> Encoded:
        """Return the nested codec's view of this payload."""
        prefix = f"{name}/"
        return Encoded(codec, shape, {k.removeprefix(prefix): t for k, t in self.tensors.items()
                                      if k.startswith(prefix)})

    def check(self, name: str = "matrix") -> Encoded:
        """Check the payload against the layout, its floats and what they decode to for NaN and infinity; return self.

        Raises
        ------
        CorruptStoreError
            If a tensor is missing, extra, misshapen, of another dtype or not finite, names it; or if numbers are so
            large that they decode to infinity or NaN.
        """
        layout = self.codec.layout(self.shape)
        if set(layout) != set(self.tensors):
            raise CorruptStoreError(f"{name}: codec '{self.codec}' stores {sorted(layout)}, found "
                                    f"{sorted(self.tensors)}; the payload and the manifest do not belong together")
        for key, spec in layout.items():
            check_tensor(f"{name}/{key}", self.tensors[key], spec)
        if may_overflow(self.tensors.values()) and not self.is_finite():
            raise CorruptStoreError(f"{name}: codec '{self.codec}' decodes it to NaN or infinity, from numbers that "
                                    "are finite but too large; the file is damaged or was forged")
        return self


def _steady(decode: Callable[[], Tensor]) -> Tensor:
    """Decode at torch's default precision; what `torch.compile` traces is left as it is."""
    return decode() if torch.compiler.is_compiling() else steadily(decode, threads=False, gradients=True)
