"""Commands on vector sets: build, search, info, export, bench."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.table import Table
from rich.text import Text
from torch import Tensor

from tersor import vectors
from tersor.cli.base import AsJson, Device, Effort, Seed, device_of, directory, emit, refuse_existing, show, write_new
from tersor.cli.funnel import Verb, existing
from tersor.cli.plots import check_plot, plotted
from tersor.cli.telling import Bars, spoken
from tersor.contract.checks import from_numpy
from tersor.errors import CodecConfigError
from tersor.files import locked
from tersor.vectors import Index
from tersor.vectors.checks import METRICS
from tersor.vectors.sources import KINDS
from tersor.vectors.trial import MOST_QUERIES, Trial, beside, exact, held_out, one_thread, tried

app = typer.Typer(rich_markup_mode=None, context_settings={"help_option_names": ["-h", "--help"]},
                  help="Build, search, export and compare sets of vectors.", no_args_is_help=True)

FILES = f"vectors as {', '.join(KINDS)}"
Data = Annotated[Path, typer.Argument(metavar="DATA", help=FILES)]
Set = Annotated[Path, typer.Argument(metavar="INDEX", help="directory written by `tersor vectors build`")]
Name = Annotated[str, typer.Option("--codec", help="a family, a codec string, or either behind lists: IVF1024,trellis",
                                   autocompletion=vectors.index_families)]
Rate = Annotated[float | None, typer.Option(help="most bits per element of a vector's code",
                                            show_default="2, for a family")]
Metric = Annotated[str, typer.Option(help=", ".join(METRICS), autocompletion=lambda: METRICS)]
Column = Annotated[str | None, typer.Option(help="column of a table", show_default="its only column of lists")]
Count = Annotated[int, typer.Option("-k", min=1, help="neighbours of each query")]
Probes = Annotated[int | None, typer.Option(min=1, help="lists that a query looks into",
                                            show_default="the root of their number")]


def build(data: Data, output: Annotated[Path, typer.Argument(metavar="OUT", callback=directory,
                                                             help="output directory; must not exist")],
          codec: Name = "auto", rate: Rate = None, metric: Metric = "l2", effort: Effort = None,
          ids: Annotated[Path | None, typer.Option(help="ids as .npy, integers, one a vector",
                                                   show_default="running numbers")] = None,
          column: Column = None, seed: Seed = 0, as_json: AsJson = False) -> None:
    """Build an index of the vectors in a file, which may be larger than memory."""
    refuse_existing(output)
    source = vectors.open_vectors(existing(data, FILES), column)
    index = Index(source.shape[1], codec, rate, seed, effort or "normal", metric)
    numbers = None if ids is None else _integers(ids)
    with locked(output), Bars() as progress:
        vectors.fill(index, source, progress, numbers)
        index.save(output)
    emit(_record(index, output), as_json, f"{data} → {output}")


def search(place: Set, queries: Annotated[Path, typer.Argument(metavar="QUERIES", help=FILES)], k: Count = 10,
           nprobe: Probes = None, metric: Annotated[str | None, typer.Option(help=", ".join(METRICS),
                                                                             show_default="that of the index")] = None,
           output: Annotated[Path | None, typer.Option("--out", help="write ids (q, k) as .npy, and distances beside "
                                                       "them as NAME.distances.npy")] = None,
           refine: Annotated[Path | None, typer.Option(help="original vectors as .npy, which score again what is "
                                                       "found")] = None,
           column: Column = None, device: Device = "cpu", as_json: AsJson = False) -> None:
    """Find the nearest vectors of queries."""
    index = Index.load(_index(place)).to(_where(device))
    asked = np.concatenate(list(vectors.open_vectors(existing(queries, FILES), column).chunks()))
    finer = None if refine is None else _mapped(refine)
    distances, ids = index.search(asked, k, metric, nprobe=nprobe, refine=finer)
    if output is not None:
        beside_it = output.with_suffix(".distances.npy")
        refuse_existing(beside_it)
        write_new(output, lambda handle: np.save(handle, ids))
        write_new(beside_it, lambda handle: np.save(handle, distances))
        emit({"queries": len(ids), "k": k, "ids": str(output), "distances": str(beside_it)}, as_json,
             f"{queries} in {place}")
        return
    if as_json:
        emit({"ids": ids.tolist(), "distances": distances.astype(float).tolist()}, as_json, "")
        return
    table = Table("query", "ids", "distances", title=Text(f"{queries} in {place}"), title_justify="left")
    for number, (row, far) in enumerate(zip(ids, distances, strict=True)):
        table.add_row(str(number), " ".join(map(str, row)), " ".join(f"{one:.4g}" for one in far))
    show(table)


def info(place: Set, as_json: AsJson = False) -> None:
    """Tell what an index holds; every byte of it is verified."""
    emit(_record(Index.load(_index(place)), place), as_json, str(place))


def export(place: Set, output: Annotated[Path, typer.Argument(metavar="OUT", help="file; must not exist")],
           to: Annotated[str, typer.Option(help="faiss")] = "faiss", as_json: AsJson = False) -> None:
    """Write an index as one of FAISS: product codes as they are, others decoded to float16."""
    if to != "faiss":
        raise CodecConfigError(f"--to: expected faiss, found '{to}'")
    refuse_existing(output)
    found = vectors.to_faiss(Index.load(_index(place)))
    held = importlib.import_module("faiss").serialize_index(found)
    write_new(output, lambda handle: handle.write(held.tobytes()))
    emit({"kind": type(found).__name__, "vectors": found.ntotal, "bytes": len(held)}, as_json, f"{place} → {output}")


def bench(data: Data, queries: Annotated[Path | None, typer.Option(
              help=FILES, show_default="drawn from DATA, and taken out of it")] = None,
          truth: Annotated[Path | None, typer.Option(help="true ids as .npy, integers (q, k), for --queries",
                                                     show_default="computed")] = None,
          codec: Annotated[list[str] | None, typer.Option("--codec", help="as of build; repeatable",
                                                          show_default="auto")] = None,
          rate: Rate = None, metric: Metric = "l2", effort: Effort = None, k: Count = 10, nprobe: Probes = None,
          plot: Annotated[Path | None, typer.Option(help="write recall against speed as .svg, or as .png "
                                                    "with matplotlib")] = None,
          seed: Seed = 0, device: Device = "cpu", as_json: AsJson = False) -> None:
    """Measure recall, bytes and speed, on one thread or a GPU, beside FAISS on one thread where it is installed."""
    if plot is not None:
        check_plot(plot)
        refuse_existing(plot)
    where, x = _where(device), from_numpy(vectors.open_vectors(existing(data, FILES)).sample(1 << 62))
    if truth is not None and queries is None:
        raise CodecConfigError("--truth: expected --queries, too, whose true ids they are")
    x, asked = held_out(x, seed) if queries is None else (x, _queries(queries))
    with one_thread():
        known = exact(x, asked, k, metric) if truth is None else _truth(truth, len(asked), k)
        indexes = [Index(x.shape[1], name, rate, seed, effort or "normal", metric).to(where)
                   for name in codec or ["auto"]]
        for index in indexes:
            index.nprobe = nprobe or index.nprobe
        found = [tried(index, x, asked, known) for index in indexes]
        found += beside(x, asked, known, max(index.code_size for index in indexes), metric)
    if plot is not None:
        picture = plotted(plot, data.name, f"recall@{k}", "queries a second, one by one",
                          {one.method: (one.recall, one.single) for one in found})
        write_new(plot, lambda handle: handle.write(picture))
    _tell(found, data, k, as_json)


def _tell(found: list[Trial], data: Path, k: int, as_json: bool) -> None:
    if as_json:
        emit({"k": k, "methods": [dataclasses.asdict(one) for one in found]}, as_json, "")
        return
    table = Table("method", "bytes a vector", f"recall@{k}", "queries/s, batch", "queries/s, single", "build, s",
                  title=Text(str(data)), title_justify="left")
    for one in sorted(found, key=lambda one: -one.recall):
        table.add_row(Text(one.method), f"{one.nbytes:.2f}", f"{one.recall:.3f}", f"{one.batch:.0f}",
                      f"{one.single:.0f}", f"{one.build:.1f}")
    show(table)


def _record(index: Index, place: Path) -> dict[str, Any]:
    changes = sum(1 for _ in (place / "journal").glob("*.change"))
    return {"vectors": len(index), "dim": index.dim, "codec": str(index.codec), "lists": index.nlist,
            "metric": index.metric, "bytes": index.nbytes, "table_bytes": index.table_bytes, "rate": index.rate,
            "changes": changes}


def _index(place: Path) -> Path:
    return existing(place, "an index, written by 'tersor vectors build'")


def _where(device: str) -> str:
    return device_of(device) if device == "auto" else device  # what is named, the index checks


def _queries(path: Path) -> Tensor:
    return from_numpy(vectors.open_vectors(existing(path, FILES)).sample(MOST_QUERIES))


def _mapped(path: Path) -> np.ndarray:
    """Return an array of a file, which is mapped."""
    try:
        return np.load(existing(path, "an array as .npy"), mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise CodecConfigError(f"{path}: expected an array as .npy: {error}") from error


def _truth(path: Path, count: int, k: int) -> Tensor:
    """Return the first `k` true ids of so many queries, int64 (count, k)."""
    known = _integers(path)
    if known.ndim != 2 or len(known) < count or known.shape[1] < k:
        raise CodecConfigError(f"--truth: {path}: expected ids of at least {count} queries, {k} each, found an array "
                               f"{known.shape}")
    return from_numpy(known[:count, :k])


def _integers(path: Path) -> np.ndarray:
    found = _mapped(path)
    if found.dtype.kind not in "iu":
        raise CodecConfigError(f"{path}: expected integers, found {found.dtype}")
    return np.asarray(found, np.int64)


for verb in (build, search, info, export, bench):
    app.command(cls=Verb)(spoken(verb))
