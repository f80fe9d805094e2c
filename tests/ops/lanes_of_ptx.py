"""Some PTX, run for the 32 lanes of a warp in numpy: so that what kernels put together as text is tested anywhere."""

from __future__ import annotations

import re

import numpy as np

LANES = 32


class Warp:
    """Registers of 32 lanes, and memory.

    Attributes
    ----------
    shared, memory : uint8 arrays
        What addresses count from; shared memory begins at `base`.
    """

    def __init__(self, shared: np.ndarray, memory: np.ndarray, base: int = 1024) -> None:
        self.shared, self.memory, self.base = shared, memory, base
        self.held: dict[str, np.ndarray] = {}

    def run(self, text: str) -> None:
        """Run a block; `$n` are registers as well."""
        for line in text.splitlines():
            for one in line.split("; "):
                self._run(one.rstrip(";"))

    def _read(self, name: str) -> np.ndarray:
        if name == "global_smem":
            return np.full(LANES, self.base, np.uint64)
        if re.fullmatch(r"-?\d+|0x[0-9a-f]+", name):
            return np.full(LANES, int(name, 0) & (1 << 32) - 1 if name[0] == "-" else int(name, 0), np.uint64)
        return self.held[name]

    def _write(self, name: str, values: np.ndarray) -> None:
        bits = 16 if name[0] == "h" and name != "hi" else 64 if name == "found" else 32
        self.held[name] = values.astype(np.uint64) & np.uint64((1 << bits) - 1)

    def _place(self, where: str) -> np.ndarray:
        parts = where.strip("[]").split("+")
        return sum((self._read(part) for part in parts[1:]), self._read(parts[0])).astype(np.int64)

    def _load(self, memory: np.ndarray, places: np.ndarray, size: int) -> np.ndarray:
        assert not (places % size).any()
        return sum(memory[places + byte].astype(np.uint64) << np.uint64(8 * byte) for byte in range(size))

    def _run(self, line: str) -> None:
        if line in ("{", "}", "") or line.startswith(".reg"):
            return
        if line.startswith("@wrong "):
            assert not self.held["wrong"].any()
            return
        name, rest = line.removeprefix("@inside ").split(" ", 1)  # all lanes are
        if name in ("setp.ne.b32", "setp.ne.b64"):
            predicate, one, other = rest.split(", ")
            self.held[predicate] = (self._read(one) != self._read(other)).astype(np.uint64)
            assert predicate != "inside" or self.held[predicate].all()
            return
        lists = re.findall(r"\{([^}]*)\}", rest)
        if name.startswith("mma") and ".b1." in name:
            self._count([one.split(", ") for one in lists])
        elif name.startswith("mma") and ".s32" in name:
            self._integers([one.split(", ") for one in lists], signed=".s8.s32" in name)
        elif name.startswith("mma"):
            self._multiply([one.split(", ") for one in lists])
        elif name.startswith("ldmatrix"):
            self._matrices(lists[0].split(", "), rest)
        elif name.startswith(("ld.", "st.")):
            self._move(name, rest)
        elif name == "mov.b32" and lists:
            self._halves(rest, lists[0].split(", "))
        else:
            out, *rest = rest.split(", ")
            self._write(out, self._value(name, [self._read(one) for one in rest]))

    def _move(self, name: str, rest: str) -> None:
        where = re.search(r"\[[^]]*\]", rest)
        assert where is not None
        names = re.sub(r"\[[^]]*\]|[{}]", "", rest).strip(", ").split(", ")
        size = {"b8": 1, "b16": 2, "b64": 8}.get(name.rpartition(".")[2], 4)
        places = self._place(where[0])
        if "shared" in name:
            self._near(name, names, places - self.base, size)
            return
        assert not (places % (4 * len(names))).any()
        for i, one in enumerate(names):
            if name.startswith("ld"):
                self._write(one, self._load(self.memory, places + 4 * i, 4))
            else:
                for byte in range(4):
                    self.memory[places + 4 * i + byte] = self.held[one] >> np.uint64(8 * byte) & np.uint64(255)

    def _matrices(self, names: list[str], rest: str) -> None:
        """Load as many matrices of 8 x 4 words; lanes 8 i … say where the rows of matrix i are."""
        where = re.search(r"\[[^]]*\]", rest)
        assert where is not None
        places, lanes = self._place(where[0]) - self.base, np.arange(LANES)
        for matrix, one in enumerate(names):
            self._write(one, self._load(self.shared, places[8 * matrix + lanes // 4] + lanes % 4 * 4, 4))

    def _near(self, name: str, names: list[str], places: np.ndarray, size: int) -> None:
        if name.startswith("ld"):
            assert not (places % (size * len(names))).any()
            for i, one in enumerate(names):
                self._write(one, self._load(self.shared, places + size * i, size))
            return
        for i, one in enumerate(names):
            for byte in range(size):
                self.shared[places + size * i + byte] = self.held[one] >> np.uint64(8 * byte) & np.uint64(255)

    def _halves(self, rest: str, parts: list[str]) -> None:
        if rest.startswith("{"):
            whole = self._read(rest.split("}, ")[1])
            for i, one in enumerate(parts):
                self._write(one, whole >> np.uint64(16 * i) & np.uint64(0xFFFF))
        else:
            self._write(rest.split(", ")[0], self._read(parts[0]) | self._read(parts[1]) << np.uint64(16))

    def _value(self, name: str, given: list[np.ndarray]) -> np.ndarray:  # noqa: C901
        one = given[0]
        if name in _OF_FLOATS:
            return _bits(_OF_FLOATS[name](*(_float(each) for each in given)))
        match name:
            case "mov.b32" | "mov.u32" | "mov.f32":
                return one
            case "and.b32":
                return one & given[1]
            case "xor.b32":
                return one ^ given[1]
            case "add.u32":
                return one + given[1]
            case "shl.b32":
                return one << given[1]
            case "shr.u32":
                return one >> given[1]
            case "mad.lo.u32" | "mad.lo.s32":
                return one * given[1] + given[2]
            case "dp4a.u32.u32":
                return sum((one >> np.uint64(8 * i) & np.uint64(255)) * (given[1] >> np.uint64(8 * i) & np.uint64(255))
                           for i in range(4)) + given[2]
            case "add.s32":
                return one + given[1]
            case "redux.sync.max.s32":
                return np.full(LANES, one.astype(np.uint32).view(np.int32).max(), np.int64).astype(np.uint64)
            case "redux.sync.add.s32":
                return np.full(LANES, one.sum(dtype=np.uint64), np.uint64)
            case "vote.sync.ballot.b32":
                return np.full(LANES, (one << np.arange(LANES, dtype=np.uint64)).sum(dtype=np.uint64), np.uint64)
            case "selp.b32":
                return np.where(given[2] != 0, one, given[1])
            case "shfl.sync.idx.b32":
                return one[given[1].astype(np.int64)]
            case "shfl.sync.bfly.b32":
                return one[np.arange(LANES) ^ given[1].astype(np.int64)]
            case "shf.r.wrap.b32":
                return (one | given[1] << np.uint64(32)) >> given[2]
            case "lop3.b32":
                return _any_of_three(one, given[1], given[2], int(given[3][0]))
            case "prmt.b32":
                return _bytes(one | given[1] << np.uint64(32), given[2])
            case "movmatrix.sync.aligned.m8n8.trans.b16":
                rows = np.stack([one & np.uint64(0xFFFF), one >> np.uint64(16)], 1).reshape(8, 8).T.reshape(LANES, 2)
                return rows[:, 0] | rows[:, 1] << np.uint64(16)
            case "cvt.rni.s32.f32":
                return np.rint(np.nan_to_num(_float(one))).astype(np.int32).view(np.uint32).astype(np.uint64)
            case "cvt.f32.f16":
                return _bits(one.astype(np.uint16).view(np.float16).astype(np.float32))
            case "cvt.rn.f16x2.f32":
                high, low = (_float(each).astype(np.float16).view(np.uint16).astype(np.uint64) for each in given)
                return high << np.uint64(16) | low
            case "add.rn.f16x2":
                sides = [(one >> np.uint64(16 * side)).astype(np.uint16).view(np.float16)
                         + (given[1] >> np.uint64(16 * side)).astype(np.uint16).view(np.float16) for side in range(2)]
                low, high = (side.view(np.uint16).astype(np.uint64) for side in sides)
                return high << np.uint64(16) | low
        raise AssertionError(name)

    def _half(self, name: str, place: int) -> np.ndarray:
        return (self.held[name] >> np.uint64(16 * place)).astype(np.uint16).view(np.float16)

    def _multiply(self, registers: list[list[str]]) -> None:
        lanes = np.arange(LANES)
        group, quad = lanes // 4, lanes % 4
        first, second = np.zeros((16, 16)), np.zeros((16, 8))
        total = np.zeros((16, 8), np.float32)
        for i in range(2):
            for place, one in enumerate(registers[1]):
                first[group + 8 * (place % 2), 2 * quad + i + 8 * (place // 2)] = self._half(one, i)
            for place, one in enumerate(registers[2]):
                second[2 * quad + i + 8 * place, group] = self._half(one, i)
        corners = [(group + 8 * (place // 2), 2 * quad + place % 2) for place in range(4)]
        for corner, one in zip(corners, registers[3], strict=True):
            total[corner] = _float(self.held[one])
        total = (total + first @ second).astype(np.float32)
        for corner, one in zip(corners, registers[0], strict=True):
            self._write(one, _bits(total[corner]))


    def _integers(self, registers: list[list[str]], *, signed: bool) -> None:
        """Multiply rows of bytes with signs and columns of bytes, with signs or without."""
        lanes = np.arange(LANES)
        group, quad = lanes // 4, lanes % 4
        rows, columns = np.zeros((16, 32), np.int64), np.zeros((8, 32), np.int64)
        for byte in range(4):
            for place, one in enumerate(registers[1]):
                rows[group + 8 * (place % 2), 16 * (place // 2) + 4 * quad + byte] = (
                    self._read(one) >> np.uint64(8 * byte)).astype(np.uint8).view(np.int8)
            for place, one in enumerate(registers[2]):
                found = (self._read(one) >> np.uint64(8 * byte)).astype(np.uint8)
                columns[group, 16 * place + 4 * quad + byte] = found.view(np.int8) if signed else found
        total = rows @ columns.T
        for place, (out, acc) in enumerate(zip(registers[0], registers[3], strict=True)):
            self._write(out, self._read(acc) + total[group + 8 * (place // 2), 2 * quad + place % 2].astype(np.uint64))

    def _count(self, registers: list[list[str]]) -> None:
        """Count bits that rows and columns share: words 4 place + quad of row group, then of row group + 8."""
        lanes = np.arange(LANES)
        group, quad = lanes // 4, lanes % 4
        steps = len(registers[2])
        rows, columns = np.zeros((16, 4 * steps), np.uint64), np.zeros((8, 4 * steps), np.uint64)
        for place, one in enumerate(registers[1]):
            rows[group + 8 * (place % 2), 4 * (place // 2) + quad] = self._read(one)
        for place, one in enumerate(registers[2]):
            columns[group, 4 * place + quad] = self._read(one)
        shared = np.bitwise_count(rows[:, None] & columns[None]).sum(2, dtype=np.uint64)
        for place, (out, acc) in enumerate(zip(registers[0], registers[3], strict=True)):
            self._write(out, self._read(acc) + shared[group + 8 * (place // 2), 2 * quad + place % 2])


def _added_product(one: np.ndarray, other: np.ndarray, third: np.ndarray) -> np.ndarray:
    return (one.astype(np.float64) * other + third).astype(np.float32)


_OF_FLOATS = {"add.f32": np.add, "sub.f32": np.subtract, "mul.f32": np.multiply, "max.NaN.f32": np.maximum,
              "fma.rn.f32": _added_product}


def _bytes(both: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """`prmt.b32`: a nibble of `kinds` chooses a byte; with its top bit, that byte's sign, eight times."""
    found = np.zeros(LANES, np.uint64)
    for place in range(4):
        kind = kinds >> np.uint64(4 * place) & np.uint64(15)
        byte = both >> np.uint64(8) * (kind & np.uint64(7)) & np.uint64(255)
        signs = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
        found |= np.where(kind & np.uint64(8), signs, byte) << np.uint64(8 * place)
    return found


def _any_of_three(one: np.ndarray, other: np.ndarray, third: np.ndarray, table: int) -> np.ndarray:
    out = np.zeros(LANES, np.uint64)
    for case in range(8):
        if table >> case & 1:
            signs = [value if case >> 2 - i & 1 else ~value for i, value in enumerate((one, other, third))]
            out |= signs[0] & signs[1] & signs[2]
    return out & np.uint64(0xFFFFFFFF)


def _float(values: np.ndarray) -> np.ndarray:
    return values.astype(np.uint32).view(np.float32)


def _bits(values: np.ndarray) -> np.ndarray:
    return np.asarray(values, np.float32).view(np.uint32).astype(np.uint64)
