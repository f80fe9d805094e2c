"""Cases of the suite `kv`: methods on windows of held-out text, planted keys, decoding speed; and its models."""

from __future__ import annotations

import dataclasses

from bench.places import DOMAINS

RESIDUAL, SINK, BLOCK = 128, 4, 64
CONTINUATION = 256
CHUNK = 64  # tokens of the continuation a call
RATES = (1.5, 2.0, 2.25, 3.0, 3.25, 4.0, 4.25)  # of plans
UNIFORM = (1.0, 1.5, 2.0, 3.0, 4.0)
TRELLIS = (("tr1.5x8", 1.5), ("tr2x8", 2), ("tr3x9", 3), ("tr4x8", 4),  # fast to encode, then what is closer
           ("tr1.5", 1.5), ("tr2", 2), ("tr3", 3), ("tr4", 4))
SMALL = "smollm2-135m"  # the model of planted keys and of speed
TOKENS = 1536  # of a prompt with planted keys
LENGTHS = (4096, 8192)  # tokens after which decoding is timed


@dataclasses.dataclass(frozen=True)
class Setup:
    """A model and its prompts."""

    name: str
    prompt: int
    windows: int  # of each text
    rungs: tuple[float, ...]
    scored: int  # tokens of continuation of a trial of the plan
    count: int  # windows of calibration text that plans are measured on
    training: int  # further ones, which train tables
    folder: str = ""  # of the model, where it is not the name
    reach: int | None = None  # positions that tables and plans are for; None: the model's

    @property
    def source(self) -> str:
        """Name of the model's folder."""
        return self.folder or self.name

    @property
    def context(self) -> int:
        """Tokens of a window."""
        return self.prompt + CONTINUATION


SETUPS = {setup.name: setup for setup in (
    Setup("fable-22m", 768, 3, (0.75, 1, 1.5, 2, 2.5, 3, 4, 5, 6), 256, 2, 8),
    Setup("smollm2-135m", 1792, 1, (1, 2, 3, 4, 5), 64, 1, 4, reach=1856),
)}

# what a GPU measures in minutes: three windows of each text, plans on three windows; planted keys up to the model's end
LONG = Setup("smollm2-135m-three", 1792, 3, (1, 2, 3, 4, 5), 64, 3, 4, "smollm2-135m", reach=1856)
FAR = Setup("smollm2-135m-far", 1792, 1, (1, 2, 3, 4, 5), 64, 3, 4, "smollm2-135m")
PLANTED = (2048, 4096, 8100)  # tokens of prompts with planted keys; question and answer fit behind the longest


def setup_of(name: str) -> Setup:
    """Return a setup by its name."""
    return {**SETUPS, LONG.name: LONG, FAR.name: FAR}[name]


@dataclasses.dataclass(frozen=True)
class Method:
    """One method; `kind` says whose, `spec` its setting, `bits` what it is called.

    Kinds: `none`; `quanto` and `hqq`, whose setting is bits and the axes of keys and values; `kivi`, `turbo`, `qet`,
    `fp8`, `free` (Tersor without trained tables) and `trained`, codec strings of keys and values, in which `klt@2`
    stands for `klt` at 2 bits; `klt` and `plan`, a rate.
    """

    kind: str
    spec: str
    bits: float

    @property
    def name(self) -> str:
        """Name within result lines."""
        return f"{self.kind}:{self.spec}"

    @property
    def ours(self) -> bool:
        """Tell whether it is a setting of Tersor's own rather than a published form."""
        return self.kind in ("klt", "plan", "free", "trained")


TRAINED = tuple(Method("trained", f"{keys};ctr8,rot,tr{bits:g}", bits) for bits in (1.5, 2, 3, 4)
                for keys in (f"ctr8,rot,tr{bits:g}", f"klt@{bits:g}"))


def cheap() -> list[Method]:
    """Return methods that encode fast."""
    found = [Method("none", "", 32)]
    for bits in (2, 4):
        found += [Method("quanto", f"{bits},{axes}", bits) for axes in ("0,0", "-1,0")]
        found += [Method("hqq", f"{bits},{axes}", bits) for axes in ("1,1", "0,1")]
    found += [Method("hqq", f"{bits},0,0", bits) for bits in (2, 3, 4)]
    found += [Method("kivi", f"rtn{levels}g{group}o;rtn{levels}g{group}", bits)
              for levels, bits in (("L3", 1.5), ("2", 2), ("3", 3), ("4", 4)) for group in (32, 64)]
    found += [Method("turbo", f"rot,lm{levels};rot,lm{levels}", bits)
              for levels, bits in (("L3", 1.5), ("2", 2), ("3", 3), ("4", 4))]
    found += [Method("free", f"rot,{trellis};rot,{trellis}", bits) for trellis, bits in TRELLIS]
    found += TRAINED
    found.append(Method("fp8", "fp8;fp8", 8))
    return found + [Method("klt", f"{rate:g}", rate) for rate in UNIFORM] + [
        Method("plan", f"{rate:g}", rate) for rate in RATES]


def dear() -> list[Method]:
    """Return methods that encode slowly."""
    return ([Method("free", f"rot,sym{int(8 * bits)};rot,sym{int(8 * bits)}", bits) for bits in (1.5, 2, 3, 4)]
            + [Method("qet", "published", bits) for bits in (2, 3, 4)])


@dataclasses.dataclass(frozen=True)
class Quality:
    """One method on one window of one text."""

    model: str
    method: str
    kind: str
    bits: float
    window: str
    setting: str = ""

    @property
    def key(self) -> str:
        """Name of the result line."""
        return f"quality|{self.model}|{self.method}@{self.bits:g}|{self.window}"


@dataclasses.dataclass(frozen=True)
class Needle:
    """One method."""

    method: str
    kind: str
    bits: float
    tokens: int = TOKENS
    model: str = SMALL

    @property
    def key(self) -> str:
        """Name of the result line."""
        longer = "" if self.tokens == TOKENS else f"|{self.tokens}"
        return f"needle|{self.method}@{self.bits:g}{longer}"


@dataclasses.dataclass(frozen=True)
class Speed:
    """One method after so many tokens."""

    method: str
    kind: str
    bits: float
    tokens: int
    attention: str

    @property
    def key(self) -> str:
        """Name of the result line."""
        return f"speed|{self.tokens}|{self.method}@{self.bits:g}|{self.attention}"


ASKED = (Method("none", "", 32), *(Method("plan", f"{rate:g}", rate) for rate in (4.0, 3.0, 2.0)),
           *(Method("klt", f"{rate:g}", rate) for rate in (2.0, 1.5, 1.0)),
           Method("kivi", "rtn2g32o;rtn2g32", 2), Method("kivi", "rtn2g64o;rtn2g64", 2),
           Method("turbo", "rot,lm2;rot,lm2", 2), Method("quanto", "2,0,0", 2), Method("quanto", "2,-1,0", 2))
TIMED = (Method("none", "", 32), Method("quanto", "4,0,0", 4), Method("quanto", "2,0,0", 2),
           Method("quanto", "4,-1,0", 4), Method("klt", "2", 2), Method("klt", "4", 4), Method("klt", "1.5", 1.5),
           Method("free", "rot,tr2x8;rot,tr2x8", 2), Method("free", "rot,tr4x8;rot,tr4x8", 4))


def attentions(method: Method) -> tuple[str, ...]:
    """Return what a method's cache is read with: Tersor's attention, and stock attention of one of its settings."""
    if not method.ours:
        return ("sdpa",)
    return ("tersor", "sdpa") if method.spec == "2" else ("tersor",)


def cases() -> list[Quality | Needle | Speed]:
    """Return all cases."""
    windows = {name: [f"{text}{k}" for text in DOMAINS for k in range(setup.windows)] for name, setup in SETUPS.items()}
    return [
        *(Quality(name, method.name, method.kind, method.bits, window) for name in SETUPS
          for window in windows[name] for method in (*cheap(), *dear())),
        *(Needle(method.name, method.kind, method.bits) for method in ASKED),
        *(Speed(method.name, method.kind, method.bits, tokens, attention) for tokens in LENGTHS for method in TIMED
          for attention in attentions(method))]


def long_cases() -> list[Quality | Needle]:
    """Return what is measured on a GPU: on SmolLM2, the best of others by bits, and Tersor."""
    windows = [f"{text}{k}" for text in DOMAINS for k in range(LONG.windows)]
    chosen = [method for method in cheap() if method.kind in ("none", "klt", "plan", "turbo")
              or (method.kind == "kivi" and "g32" in method.spec) or (method.kind == "quanto" and "-1," in method.spec)
              or method.spec == "rot,tr2x8;rot,tr2x8"]
    return [*(Quality(LONG.name, method.name, method.kind, method.bits, window) for window in windows
              for method in chosen),
            *(Needle(method.name, method.kind, method.bits, tokens, FAR.name) for tokens in PLANTED
              for method in ASKED)]


def method_of(case: Quality | Needle | Speed) -> Method:
    """Return the method of a case."""
    return Method(case.kind, case.method.partition(":")[2], case.bits)
