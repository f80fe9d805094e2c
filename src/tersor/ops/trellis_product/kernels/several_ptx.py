"""PTX that counts the bits which rows of signs share with bit planes of vectors; see `window_linear/kernels/ptx.py`.

A warp has 64 rows of 1,024 signs in shared memory, or 32, and eight vectors as planes. A step of a product is 16 rows by 256
signs by one plane of the eight.
"""

from __future__ import annotations

from tersor.ops.window_linear.kernels.ptx import Text

COUNT = "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc"
PRODUCTS = 4  # of 256 signs, in 1,024
ROW_BYTES = 128


def counted(planes: int, vectors: int, tiles: int) -> str:
    """Return a block: counts of 16 `tiles` rows, 1,024 signs and `planes` of eight vectors, added to those before.

    Registers: the counts, four for each plane of each 16 rows; the counts before; the lane; the address of the lane's
    row among the first 16; the address of the lane's words of planes, of `vectors` eights by turns.
    """
    text, count = Text(), tiles * planes * 4
    lane, rows, near = (f"${2 * count + place}" for place in range(3))
    held = [text.word() for _ in range(count)]
    for place, name in enumerate(held):
        text(f"mov.b32 {name}, ${count + place};")
    turn = text.made(f"and.b32 {{}}, {lane}, 7;")
    side = text.made(f"shr.u32 {{}}, {lane}, 4;")
    for product in range(PRODUCTS):
        unit = text.made(f"add.u32 {{}}, {side}, {2 * product};")
        unit = text.made(f"xor.b32 {{}}, {unit}, {turn};")
        unit = text.made(f"shl.b32 {{}}, {unit}, 4;")
        place = text.made(f"add.u32 {{}}, {rows}, {unit};")
        signs = []
        for tile in range(tiles):
            signs.append([text.word() for _ in range(4)])
            text(f"ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{{', '.join(signs[-1])}}}, "
                 f"[{place}+{16 * tile * ROW_BYTES}];")
        for pair in range(planes // 2):
            words = [text.word() for _ in range(4)]
            text(f"ld.shared.v4.b32 {{{', '.join(words)}}}, [{near}+{(product * vectors * planes // 2 + pair) * 512}];")
            for tile in range(tiles):
                for plane in range(2):
                    first = 4 * (tile * planes + 2 * pair + plane)
                    own = ", ".join(held[first : first + 4])
                    text(f"{COUNT} {{{own}}}, {{{', '.join(signs[tile])}}}, "
                         f"{{{', '.join(words[2 * plane : 2 * plane + 2])}}}, {{{own}}};")
    for place, name in enumerate(held):
        text(f"mov.b32 ${place}, {name};")
    return text.text()


def brought() -> str:
    """Return a block: start to bring bytes to shared memory, if a flag says so.

    Registers: a dummy; the flag; the address there; that of a barrier; how many bytes; where they lie.
    """
    return "\n".join([
        "{", ".reg .pred inside;", "setp.ne.b32 inside, $1, 0;",
        "@inside mbarrier.arrive.expect_tx.shared::cta.b64 _, [$3], $4;",
        "@inside cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$2], [$5], $4, [$3];",
        "mov.b32 $0, 0;", "}"])


def awaited() -> str:
    """Return a block: wait until a barrier has met its first phase. Registers: a dummy; the barrier's address."""
    return "\n".join(["{", ".reg .pred ready;", "WAIT:",
                      "mbarrier.try_wait.parity.shared::cta.b64 ready, [$1], 0;", "@!ready bra WAIT;",
                      "mov.b32 $0, 0;", "}"])
