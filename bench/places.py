"""Where things lie: the repository, results, held-out texts, data handed out with the project, and what is kept."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
TEXTS = ROOT / "bench" / "data"
SHARED = ROOT.parent / "shared" / "data"
MODELS = SHARED / "models"
CALIBRATION = SHARED / "text" / "calibration.txt"
DOMAINS = ("fiction", "speech", "technical")


def kept(name: str) -> Path:
    """Return a folder under `out/`, which git ignores, for what takes long to make and may be made again."""
    folder = ROOT / "out" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def held_out(domain: str) -> str:
    """Return a held-out text."""
    return (TEXTS / f"{domain}.txt").read_text()
