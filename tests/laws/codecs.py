"""The codecs that the laws are tried on: the examples that each class gives, as factory strings."""

from tersor.codecs import BUILT_IN
from tersor.contract.codec import Codec
from tersor.registry import parse

CODECS = [text for cls in BUILT_IN for text in cls.examples]
MIXING = {"rotated", "learned_rotation", "kashin", "two_basis", "low_rank", "klt", "interpolative", "spectral"}


def mixes(codec: Codec) -> bool:
    """Whether an element is decoded from sums of many numbers, whose order rounds; else rows are bit-exact."""
    return codec.id in MIXING or any(mixes(child) for child in codec.children().values())


ELEMENTWISE = [text for text in CODECS if not mixes(parse(text))]
