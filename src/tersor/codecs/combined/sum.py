"""Sums of codecs: each stage encodes what the earlier ones left over (residual quantization).

A low-rank stage is encoded anew once the others are known, in turn with them: the alternation of CALDERA (Saha,
Sagan, Srivastava, Goldsmith, Pilanci, arXiv 2405.18886), for any codecs. Mathematics: docs/codecs/low_rank.md.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import ClassVar, final

import torch
from torch import Tensor

from tersor.contract.codec import Codec, ColumnEncoder, Encoded, Search, Traits
from tersor.contract.feedback import encode_with_feedback
from tersor.contract.nesting import nest, nest_tensors
from tersor.errors import CodecConfigError
from tersor.payload.blocks import Few, Rows, Shape, Tables, shape_of
from tersor.payload.layout import Layout
from tersor.quality import measure

ALTERNATIONS = 4  # default where a stage is spectral


@final
@dataclasses.dataclass(frozen=True)
class Sum(Codec):
    """`W = stage_0 + stage_1 + …`; stage i encodes the residual of the stages before it.

    Parameters
    ----------
    stages : tuple of Codec
        Two or more.

    Encoder options
    ---------------
    feedback : bool
        With a Hessian: error feedback, where the stages are column-wise.
    alternations : int
        Times that every stage is encoded on what all others leave, the best time kept; default 4 with a low-rank
        stage, else 1.
    """

    stages: tuple[Codec, ...]

    id: ClassVar[str] = "sum"
    grammar: ClassVar[str] = r"sum\("
    examples: ClassVar[tuple[str, ...]] = ("sum(rot,lm2;rtn2g64)", "sum(rtn2s;fit2;bf16)", "sum(rot,lm2;tab2)",
                                           "sum(swap1,pq2x4b10;pq2x4b10)", "sum(sym16;sym8)",
                                           "sum(lr2(al20;al21);rot,lm1)", "sum(lr2(lm3o;lm3o);lm2)")
    own_options: ClassVar[frozenset[str]] = frozenset({"feedback", "alternations"})

    def __post_init__(self) -> None:
        if not isinstance(self.stages, tuple) or not all(isinstance(stage, Codec) for stage in self.stages):
            raise CodecConfigError(f"sum: stages must be a tuple of codecs, found {self.stages!r}")
        if len(self.stages) < 2:
            raise CodecConfigError(f"sum: needs at least two stages, found {len(self.stages)}")

    def layout(self, shape: Shape) -> Layout:
        """Return every stage's layout under `0/`, `1/` and so on."""
        layout = {}
        for name, stage in self.children().items():
            layout.update(nest(name, stage.layout(shape)))
        return layout

    def learn(self, samples: Iterable[Tensor], *, seed: int = 0) -> Tables:
        """Train each stage on the residuals of the stages before it."""
        tables: dict[str, Tensor] = {}
        residuals = [sample.to(torch.float32) for sample in samples]
        for name, stage in self.children().items():
            own = stage.train(residuals, seed=seed)
            tables.update(nest_tensors(name, own))
            if int(name) + 1 < len(self.stages):
                residuals = [r - stage.encode(r, seed=seed, tables=own).decode() for r in residuals]
        return tables

    def traits(self) -> Traits:
        """Return the stages': column-wise where all are."""
        return dataclasses.replace(super().traits(), column_wise=all(s.traits().column_wise for s in self.stages))

    def columns(self, matrix: Tensor, how: Search) -> ColumnEncoder:
        """Return a column encoder: each block through all stages, whose parameters fit plain residuals."""
        if not self.traits().column_wise:
            return super().columns(matrix, how)
        plain = dataclasses.replace(how, hessian=None)
        encoders: list[ColumnEncoder] = []
        residual = matrix.to(torch.float32, copy=True)
        for name, stage in self.children().items():
            encoders.append(stage.columns(residual.clone(), how.inner(name)))
            residual -= stage.search(residual, plain.inner(name)).decode()
        return _Columns(self, shape_of(matrix), encoders)

    def search(self, matrix: Tensor, how: Search) -> Encoded:
        """Encode stage by stage, each on the residual; with error feedback, column by column through all stages.

        Where a stage is not column-wise only a last one has feedback, if any: that of an earlier stage enlarges what
        the next has to encode.
        """
        rounds = how.options.get("alternations", ALTERNATIONS if self.traits().spectral else 1)
        if not isinstance(rounds, int) or rounds < 1:
            raise CodecConfigError(f"sum: option alternations must be an integer >= 1, found {rounds!r}")
        if how.feedback is not None and self.traits().column_wise:
            return encode_with_feedback(self.columns(matrix, how), matrix, how.feedback)
        return self._alternate(matrix, how, rounds)

    def _alternate(self, matrix: Tensor, how: Search, rounds: int) -> Encoded:
        """Encode every stage on what all others leave, `rounds` times over; return the best time's result."""
        residual = matrix.to(torch.float32, copy=True)
        found: dict[str, Encoded] = {}
        best: tuple[float, Encoded] | None = None
        for _ in range(rounds):
            for name, stage in self.children().items():
                if name in found:
                    residual += found[name].decode()
                found[name] = stage.search(residual, self._how(name, how))
                residual -= found[name].decode()
            tensors = {key: t for name, one in found.items() for key, t in nest_tensors(name, one.tensors).items()}
            encoded = Encoded(self, shape_of(matrix), tensors)
            if rounds == 1:
                return encoded
            loss = measure(matrix, encoded, how.hessian).distortion
            if best is None or loss < best[0]:
                best = loss, encoded
        assert best is not None
        return best[1]

    def _how(self, name: str, how: Search) -> Search:
        """Return a stage's search; no error feedback but in the last one."""
        inner = how.inner(name)
        if int(name) + 1 == len(self.stages) and self.traits().spectral:
            return inner
        return dataclasses.replace(inner, options={**how.options, "feedback": False})

    def decode_rows(self, encoded: Encoded, rows: Rows) -> Tensor:
        """Return the sum of the stages' rows."""
        return _total([stage.decode_rows(encoded.child(name, stage, encoded.shape), rows)
                       for name, stage in self.children().items()])

    def matmul(self, encoded: Encoded, x: Tensor) -> Tensor:
        """Return the sum of the stages' products."""
        wide = x.to(torch.float32)
        return _total([stage.matmul(encoded.child(name, stage, encoded.shape), wide)
                       for name, stage in self.children().items()]).to(x.dtype)

    def ready(self, encoded: Encoded) -> Few | None:
        """See `Codec.ready`."""
        found = [stage.ready(encoded.child(name, stage, encoded.shape)) for name, stage in self.children().items()]
        stages = [few for few in found if few is not None]
        if len(stages) < len(found):
            return None
        if encoded.device.type != "cpu":
            return lambda x: _total([stage(x.to(torch.float32)) for stage in stages]).to(x.dtype)
        return lambda x: _total([torch.from_numpy(stage(x)) for stage in stages]).numpy()

    def matmul_transposed(self, encoded: Encoded, y: Tensor) -> Tensor:
        """Return the sum of the stages' products."""
        wide = y.to(torch.float32)
        return _total([stage.matmul_transposed(encoded.child(name, stage, encoded.shape), wide)
                       for name, stage in self.children().items()]).to(y.dtype)

    def spec(self) -> str:
        """Return for example `sum(rot,lm2;rtn2g64)`."""
        return f"sum({';'.join(stage.spec() for stage in self.stages)})"

    @classmethod
    def from_spec(cls, match: re.Match[str], parts: Sequence[Codec]) -> Codec:
        """Parse `sum(a;b)`."""
        del match
        return cls(tuple(parts))


class _Columns(ColumnEncoder):
    """Column encoder of a sum: what one stage leaves of a block goes to the next."""

    def __init__(self, codec: Sum, shape: Shape, encoders: Sequence[ColumnEncoder]) -> None:
        self.width = max(encoder.width for encoder in encoders)
        if any(self.width % encoder.width for encoder in encoders):
            raise CodecConfigError(f"codec '{codec.spec()}': error feedback needs stages whose block widths divide "
                                   f"{self.width}, found {[encoder.width for encoder in encoders]}")
        self._codec, self._shape, self._encoders = codec, shape, encoders

    def block(self, start: int, columns: Tensor) -> Tensor:
        """Encode columns; see `ColumnEncoder`."""
        total = torch.zeros_like(columns)
        for encoder in self._encoders:
            total += encoder.block(start, columns - total)
        return total

    def finish(self) -> Encoded:
        """Gather the stages' payloads; see `ColumnEncoder`."""
        tensors: dict[str, Tensor] = {}
        for number, encoder in enumerate(self._encoders):
            tensors.update(nest_tensors(str(number), encoder.finish().tensors))
        return Encoded(self._codec, self._shape, tensors)


def _total(terms: list[Tensor]) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total
