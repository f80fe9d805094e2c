"""The codecs that the laws are tried on, as factory strings."""

from tersor.contract.codec import Codec
from tersor.registry import parse

CODECS = [
    "bf16", "fp32",
    "rtn4g64", "rtn3s", "rtn1g32", "rtnL5g32o", "rtn8",
    "lm3", "lm1", "lmL6o", "lm4g16", "lmL181", "fit4g128", "fitL3", "tab3", "tab2g32o",
    "rot,lm3", "rotout,lm2", "rotboth@7,lm2", "rot,rtn2g64", "rotboth,rotout@3,lm2",
    "sum(rot,lm2;rtn2g64)", "sum(rtn2s;fit2;bf16)", "sum(rot,lm2;tab2)",
    "rows2(lm3;lm2)", "head2(lm3;lm2)", "rows1(tab3;rtn2)", "rot,rows3(lm3;lm2)", "rows2(rows1(bf16;lm4);lm2)",
    "pq2x4", "pq2x5b10m", "pq1x3f32", "pq2x4t", "rot,pq2x4mt", "swap1,lm3", "swap2,pq2x3", "swap1,rows2(lm3;lm2)",
    "opq,pq2x4", "opqf32t,pq2x4t", "opq,pq2x4t", "std,lm3", "std,swap1,pq2x3b8", "sum(swap1,pq2x4b10;pq2x4b10)",
    "sym16", "sym12f", "sym24co", "sym20m", "rot,sym16o", "std,sym16m", "sum(sym16;sym8)",
    "kashin4", "kashinL9sudct", "kashin3cbfly", "kashin2mdense", "kashin4co@2", "rot,kashin2lv",
    "al96", "rotboth,lr2(al20;al21)", "lr3(al40;al37)", "sum(lr2(al20;al21);rot,lm1)",
    "klt3", "klt4h2x5", "klt4sh2x5", "rot,klt3", "fp8",
    "two2x2", "two3x2m", "two4x2@3", "two2x2h", "two2x2o", "std,two2x2m",
    "mm4", "mmL5", "mm9", "ns,mm1", "ns,lm2",
    "lr3(lm4o;lm4o)", "lr8(mm8;mm8)", "lr1(fp32;fp32)", "lr2(rot,lm3;tab3)", "ns,lr2(mm4;mm8)",
    "sum(lr2(lm3o;lm3o);lm2)",
    "id3(fp32;fp32)", "id8c(bf16;lm4)", "id1(lm3;rot,lm3)", "id2c(tab3;mm8)",
]
MIXING = {"rotated", "learned_rotation", "kashin", "two_basis", "low_rank", "klt", "interpolative"}


def mixes(codec: Codec) -> bool:
    """Whether an element is decoded from sums of many numbers, whose order rounds; else rows are bit-exact."""
    return codec.id in MIXING or any(mixes(child) for child in codec.children().values())


ELEMENTWISE = [text for text in CODECS if not mixes(parse(text))]
