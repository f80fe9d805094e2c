"""Cases of vector sets: methods at nominally so many bits a number."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class VectorCase:
    """One method on one set, of nominally so many bits a number.

    Parameters
    ----------
    data : str
        `"glove"`, `"banking77"`, `"sentences"`, `"anisotropic"` or `"sift"`.
    bits : float
    method : str
        `"tersor:"` and a codec or a family (at `bits`), perhaps behind lists, `"faiss:"` and a factory string,
        `"turbovec:"` and bits, or `"usearch:"` and a type, perhaps `exact`.
    """

    data: str
    bits: float
    method: str

    @property
    def key(self) -> str:
        """The case's name in results."""
        return f"{self.data}|{self.bits}|{self.method}"


@dataclasses.dataclass(frozen=True)
class SingleCase:
    """Methods that answer one query at a time, in turn, on one set: `"tersor:"` and a codec, or `"faiss:"`."""

    data: str
    methods: tuple[str, ...]

    @property
    def key(self) -> str:
        """The case's name in results."""
        return f"single|{self.data}"


@dataclasses.dataclass(frozen=True)
class MillionCase:
    """One method with lists on a million vectors: `"tersor:"` and a codec, or `"faiss:"` and a factory string."""

    method: str

    @property
    def key(self) -> str:
        """The case's name in results."""
        return f"million|{self.method}"


@dataclasses.dataclass(frozen=True)
class DeviceCase:
    """One method on one made set, on a GPU.

    Parameters
    ----------
    data : str
        `"400k"`, 400,000 x 50, or `"1M"`, a million x 128.
    method : str
        `"tersor:"` and a codec, perhaps behind lists; `"torch:bf16"`, a product and `topk`; `"faiss:"` and a factory
        string, where a FAISS of GPUs is installed.
    """

    data: str
    method: str

    @property
    def key(self) -> str:
        """The case's name in results."""
        return f"gpu|{self.data}|{self.method}"


_REAL: Mapping[tuple[str, float], tuple[str, ...]] = {
    ("glove", 2): ("tersor:trellis", "tersor:qet_plus", "tersor:pq", "tersor:pq5x1024t", "tersor:opq", "tersor:rq",
                   "tersor:rotated_scalar", "tersor:rot,sym14", "tersor:rot,tr1.75", "faiss:PQ10x8np", "faiss:PQ10x9np",
                   "faiss:PQ10x10np", "faiss:PQ25x4np", "faiss:OPQ10,PQ10x9np", "faiss:RQ12x8", "faiss:LSQ12x8",
                   "faiss:RaBitQ", "faiss:PQ25x4fs", "faiss:RQ24x4fs_32_Nrq2x4", "tersor:IVF1024,trellis",
                   "faiss:IVF1024,PQ10x8np"),
    ("glove", 3): ("tersor:trellis", "tersor:qet_plus", "tersor:pq", "tersor:rq", "tersor:rotated_scalar",
                   "faiss:PQ25x6np", "faiss:RQ18x8", "faiss:RaBitQ"),
    ("glove", 4): ("tersor:trellis", "tersor:qet_plus", "tersor:pq", "tersor:opq", "tersor:rq",
                   "tersor:rotated_scalar", "faiss:PQ25x8np", "faiss:OPQ25,PQ25x8np", "faiss:RQ25x8", "faiss:SQ4",
                   "faiss:RaBitQ"),
    ("banking77", 1.5): ("tersor:ctr8,rot,tr1.5", "tersor:qet_plus", "tersor:pq", "tersor:rotated_scalar",
                         "faiss:PQ72x8np", "faiss:RaBitQ"),
    ("banking77", 2): ("tersor:trellis", "tersor:ctr8,rot,tr2", "tersor:rot,tr2", "tersor:qet_plus", "tersor:pq",
                       "tersor:opq", "tersor:rq", "tersor:rotated_scalar", "tersor:rot,sym16", "tersor:rot,lm2",
                       "faiss:PQ96x8np", "faiss:OPQ96,PQ96x8np", "faiss:RaBitQ"),
    ("banking77", 3): ("tersor:ctr8,rot,tr3", "tersor:qet_plus", "tersor:pq", "tersor:rotated_scalar",
                       "faiss:PQ192x6np", "faiss:RaBitQ"),
}
_ADDITIVE = {1: ("faiss:RQ30x4", "faiss:RQ16x6", "faiss:LSQ7x8"), 2: ("faiss:RQ58x4", "faiss:RQ31x6")}  # small tables
_OTHERS = {2: ("turbovec:2",), 4: ("tersor:ctr8,rot,tr4", "faiss:SQ4", "turbovec:4", "usearch:i8", "usearch:i8 exact")}
_CELLS: Mapping[tuple[str, float], tuple[str, ...]] = {  # what fits a cell with its tables; see `tables.SPARE`
    ("glove", 1): ("tersor:auto", "tersor:ctr8,ktr6", "tersor:rq50x256s6t", "faiss:RQ6x8", "faiss:PQ5x9np",
                   "faiss:OPQ5,PQ5x9np", "faiss:PQ10x4fs", "faiss:LSQ6x8"),
    ("glove", 2): ("tersor:auto", "tersor:spectral", "tersor:rq", "faiss:RQ11x8", "faiss:PQ10x9np",
                   "faiss:OPQ10,PQ10x9np", "faiss:PQ25x4fs"),
    ("glove", 4): ("tersor:auto", "tersor:spectral", "tersor:rq50x256s24t", "faiss:PQ25x8np", "faiss:OPQ25,PQ25x8np",
                   "faiss:SQ4", "faiss:RaBitQ", "faiss:RQ22x8", "usearch:i8", "usearch:i8 exact"),
    ("banking77", 1): ("tersor:auto", "tersor:ctr8,rot,sym8", "tersor:ctr8,ktr32", "tersor:ctr8,ktr46a140",
                       "faiss:PQ64x5np", "faiss:PQ96x4np", "faiss:OPQ32_64,PQ32x8np", "faiss:RQ1x8", "faiss:RaBitQ"),
    ("banking77", 2): ("tersor:auto", "tersor:ctr8,rot,tr2", "tersor:ctr8,ktr64", "tersor:ctr8,ktr91a240",
                       "faiss:PQ96x6np", "faiss:PQ192x4np", "faiss:OPQ64_128,PQ64x8np", "faiss:RQ2x8", "faiss:RaBitQ",
                       "faiss:RaBitQ unrotated", "turbovec:2"),
    ("banking77", 4): ("tersor:auto", "tersor:ctr8,ktr184a320", "faiss:PQ192x7np", "faiss:OPQ120_240,PQ120x8np",
                       "faiss:OPQ192_192,PQ192x6np", "faiss:OPQ96,PQ96x8np", "faiss:RaBitQ", "faiss:RaBitQ unrotated",
                       *_OTHERS[4]),
    **{(data, bits): ("tersor:auto", f"tersor:auto{bits + 1 / 16:g}", f"tersor:ctr8,ktr{16 * bits}", "tersor:pq",
                      f"faiss:PQ{16 * bits}x8np", f"faiss:OPQ{16 * bits},PQ{16 * bits}x8np",
                      f"faiss:PQ{32 * bits}x4fs", "faiss:RaBitQ", f"faiss:RQ{7 * bits}x8", *_ADDITIVE.get(bits, ()),
                      *_OTHERS.get(bits, ()))
       for data in ("sift", "anisotropic") for bits in (1, 2, 4)},
    **{("sentences", bits): ("tersor:auto", "tersor:trellis", f"faiss:PQ{48 * bits}x8np",
                             f"faiss:OPQ{rotated},PQ{parts}x8np", "faiss:RaBitQ", "faiss:RaBitQ unrotated",
                             *_OTHERS.get(bits, ()))
       for bits, rotated, parts in ((1, "44_352", 44), (2, "88_352", 88), (4, "184_368", 184))},
}
METHODS: Mapping[tuple[str, float], tuple[str, ...]] = {
    key: tuple(dict.fromkeys((*_CELLS.get(key, ()), *_REAL.get(key, ())))) for key in dict.fromkeys((*_REAL, *_CELLS))}
CELLS = tuple((data, bits) for data in ("glove", "banking77", "sentences", "sift", "anisotropic")
              for bits in (1, 2, 4))
CASES = tuple(VectorCase(data, bits, method) for (data, bits), methods in METHODS.items() for method in methods)
MILLION = tuple(MillionCase(method) for method in (
    "tersor:IVF1024,trellis2", "tersor:IVF1024,auto2", "faiss:IVF1024,PQ32x8", "faiss:IVF1024,PQ64x4fs",
    "faiss:RR128,IVF1024,RaBitQ", "faiss:RR128,IVF1024,RaBitQ2"))
SINGLE = (SingleCase("glove", ("tersor:ctr8,ktr6", "tersor:trellis2", "tersor:spectral2", "faiss:PQ10x4fs",
                               "faiss:PQ25x4fs", "faiss:PQ10x8np", "faiss:PQ10x10np")),)
ON_GPU = tuple(DeviceCase(data, method) for data, methods in {
    "400k": ("tersor:ctr8,rot,tr1.75", "tersor:pq5x256t", "tersor:ctr8,rot,sym12", "torch:bf16", "faiss:PQ10x8"),
    "1M": ("tersor:ctr8,rot,tr1.75", "tersor:IVF1024,ctr8,rot,tr1.75", "tersor:pq4x256t", "torch:bf16", "faiss:PQ32x8"),
}.items() for method in methods)
