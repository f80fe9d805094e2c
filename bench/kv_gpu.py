"""KV caches on a GPU after 8k and 32k tokens: decoding speed and memory beside the dense cache and quanto's.

    PYTHONPATH=src:dev/quanto python3 bench/kv_gpu.py OUT [--profile]
    python bench/kv_gpu.py OUT --merge        (here, after)

The model has an 8B Llama's attention (32 heads, 8 of keys and values, dimension 128), 4 of its 32 layers, a small
vocabulary, random bf16 weights; caches hold random states, so that no prompt has to be read. Steps are launched one by
one, as `generate()` does with caches that grow: on a GPU the launches are most of a step. So two times are given, by
the clock, and that of the kernels alone. Encoding, done once in so many tokens, is timed apart on one layer.
cuDNN's attention is off (`--cudnn` leaves it on): it is planned anew for every length, and a cache grows by each step.
Lines of results/kv_gpu.jsonl have keys `gpu|…`.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Cache, DynamicCache, LlamaConfig, QuantizedCache, StaticCache

import gpu_run
from gpu_run import SEED, Case, Emit, SetupError, SkipError, device, relative, settle
from tersor.hf.kv.attention import register_attention
from tersor.hf.kv.cache import CompressedCache
from tersor.hf.kv.layer import CompressedCacheLayer
from tersor.hf.kv.store import SIDES, LayerState
from tersor.kv import TokenStream, matrices
from tersor.payload.blocks import Tables
from tersor.registry import parse

RESIDUAL, SINK, BLOCK, GROUP = 128, 4, 64, 64
STEPS, WARM = 24, 4
ENCODED = 16  # blocks that are encoded; further ones are copies of their codes
TRAINED = 24  # blocks that tables of `klt` are trained on
TOLERANCE = 0.03  # Tersor's attention against stock attention on the same cache: float32 inside, bf16 inside
PROFILED = ("none", "klt:2", "klt:4", "rot,lm4", "quanto:4")
METHODS = ("none", "static", "klt:2", "klt:4", "rot,lm2", "rot,lm4", "quanto:2", "quanto:4", "none")
CONTEXTS = (8192, 32768)
ATTENTIONS = ("tersor", "sdpa")


def config() -> LlamaConfig:
    """Return the model's shape; a tiny one in a rehearsal."""
    if device().type == "cpu":
        return LlamaConfig(hidden_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
                           intermediate_size=64, vocab_size=64, num_hidden_layers=2, max_position_embeddings=65536)
    return LlamaConfig(hidden_size=4096, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
                       intermediate_size=14336, vocab_size=1024, num_hidden_layers=4, max_position_embeddings=65536,
                       rope_theta=5e5)


def cases(contexts: Iterable[int], methods: Iterable[str], attentions: Iterable[str] = ATTENTIONS, *,
          profile: bool = False) -> list[Case]:
    """Return the cases; a method that comes twice is measured twice, which shows the spread.

    Attentions are those that Tersor's caches are read with; the others' is `sdpa`.
    """
    found = []
    for tokens in contexts:
        seen: dict[str, int] = {}
        for method in methods:
            seen[method] = seen.get(method, 0) + 1
            again = "" if seen[method] == 1 else f"#{seen[method]}"
            ours = method not in ("none", "static") and not method.startswith("quanto")
            for attention in attentions if ours else ("sdpa",):
                found.append({"name": f"gpu|{tokens}|{method}{again}|{attention}", "method": method, "tokens": tokens,
                              "attention": attention, "profile": False})
    if not profile or device().type == "cpu":
        return found
    # last: once the profiler is there, launches are slower
    again = [{**one, "name": one["name"].replace("gpu|", "gpuprofile|"), "profile": True} for one in found
             if one["method"] in PROFILED and "#" not in one["name"]]
    return found + again


class Ratios:
    """Adds to every line tokens a second over those of the dense cache and of quanto's, of the same run."""

    def __init__(self) -> None:
        self.step: dict[tuple[str, int], float] = {}

    def finish(self, line: dict[str, Any]) -> None:
        """Add the ratios."""
        case, numbers = line["case"], line["numbers"]
        if numbers["red"] or case["profile"]:
            return
        total = numbers["step_ms"] + numbers["encode_ms"]
        self.step.setdefault((case["method"], case["tokens"]), total)
        dense = self.step.get(("none", case["tokens"]))
        if dense:
            numbers["x_none"] = float(f"{dense / total:.4g}")


STATE: dict[str, Any] = {}


def setup(options: dict[str, Any]) -> None:
    """Make the model."""
    STATE["cudnn"] = bool(options.get("cudnn"))
    torch.backends.cuda.enable_cudnn_sdp(STATE["cudnn"])
    torch.manual_seed(SEED)
    register_attention()
    with torch.device(device()):
        STATE["model"] = AutoModelForCausalLM.from_config(config(), dtype=torch.bfloat16).eval()


def states(tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return random keys and values (1, heads, tokens, dim), bf16, whose components decay in size."""
    made = config()
    random = torch.Generator(device()).manual_seed(seed)
    size = torch.linspace(2.0, 0.2, made.head_dim, device=device())
    shape = (1, made.num_key_value_heads, tokens, made.head_dim)
    both = [torch.randn(shape, device=device(), generator=random) * size for _ in range(2)]
    return both[0].to(torch.bfloat16), both[1].to(torch.bfloat16)


def codec_of(method: str) -> tuple[str, dict[str, Tables]]:
    """Return a method's codec string and tables by side; tables are trained on the processor, once a worker."""
    if not method.startswith("klt:"):
        return method, {}
    made = config()
    codec = parse(f"klt{round(float(method[4:]) * made.head_dim / 8)}h{made.num_key_value_heads}x{BLOCK}")
    if codec.spec() not in STATE:
        began = time.perf_counter()
        samples = states(TRAINED * BLOCK, SEED + 1000)
        STATE[codec.spec()] = {side: dict(codec.train(matrices(part.float().cpu(), BLOCK), seed=SEED))
                               for side, part in zip(SIDES, samples, strict=True)}
        print(f"    tables of {codec}: {time.perf_counter() - began:.1f} s", flush=True)
    return codec.spec(), STATE[codec.spec()]


@dataclasses.dataclass
class Filled:
    """A cache after so many tokens.

    Attributes
    ----------
    encode_ms : float
        A token, all layers: what is done now and then.
    """

    cache: Cache
    encode_ms: float = 0.0
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)


def filled(method: str, tokens: int) -> Filled:
    """Return a cache of random states."""
    made = STATE["model"].config
    if method == "none":
        return _updated(DynamicCache(config=made), tokens)
    if method == "static":
        return _updated(StaticCache(config=made, max_cache_len=tokens + 2 * STEPS), tokens)
    if method.startswith("quanto:"):
        notes = _quanto()
        cache = QuantizedCache("quanto", made, nbits=int(method[7:]), axis_key=0, axis_value=0, q_group_size=GROUP,
                               residual_length=RESIDUAL)
        begun = _Clock()
        found = _updated(cache, tokens)
        first = begun.ms() / made.num_hidden_layers
        layer: Any = cache.layers[0]
        layer._quantize(layer._dequantize(layer._quantized_keys).contiguous(), axis=0)  # warm
        again = _Clock()
        layer._quantize(layer._dequantize(layer._quantized_keys).contiguous(), axis=0)
        layer._quantize(layer._dequantize(layer._quantized_values).contiguous(), axis=0)
        notes["first_ms"] = first
        found.encode_ms = again.ms() * made.num_hidden_layers / RESIDUAL
        return dataclasses.replace(found, notes=notes)
    return _compressed(method, tokens)


class _Clock:
    """Milliseconds since it was made, the device settled before and after."""

    def __init__(self) -> None:
        settle()
        self.began = time.perf_counter()

    def ms(self) -> float:
        settle()
        return 1e3 * (time.perf_counter() - self.began)


def _updated(cache: Cache, tokens: int) -> Filled:
    keys, values = states(tokens, SEED)
    for number in range(STATE["model"].config.num_hidden_layers):
        cache.update(keys.clone(), values.clone(), number)
    return Filled(cache)


def _compressed(method: str, tokens: int) -> Filled:
    """Encode a few blocks, and repeat their codes: what decoding costs does not depend on them."""
    made = STATE["model"].config
    spec, tables = codec_of(method)
    held = {(number, side): table for number in range(made.num_hidden_layers) for side, table in tables.items()}
    cache = CompressedCache(made, spec, spec, residual=RESIDUAL, sink=SINK, block=BLOCK, tables=held)
    layer: Any = cache.layers[0]
    blocks = (tokens - SINK - RESIDUAL) // BLOCK
    some = min(ENCODED, blocks)
    keys, values = states(SINK + some * BLOCK + RESIDUAL, SEED)
    layer.extend(keys, values, lazy=True)
    assert layer.streams[0].tokens == some * BLOCK
    check = _against_processor(layer, keys, values)
    twin = copy.deepcopy(layer)
    twin.extend(keys[:, :, : 4 * BLOCK], values[:, :, : 4 * BLOCK], lazy=True)
    clock = _Clock()
    twin.extend(keys[:, :, : 4 * BLOCK], values[:, :, : 4 * BLOCK], lazy=True)
    share = clock.ms() / (4 * BLOCK) * made.num_hidden_layers
    state = layer.state()
    for number in range(made.num_hidden_layers):
        cache.layers[number] = CompressedCacheLayer.restore(_grown(state, blocks, some), cache.window,
                                                            f"layer {number}")
    return Filled(cache, share, check)


def _grown(state: LayerState, blocks: int, some: int) -> LayerState:
    """Return a layer's state with its encoded blocks repeated, in memory of its own; tables stay shared."""
    tensors, meta = dict(state.tensors), {name: dict(value) for name, value in state.meta.items()}
    for name, tensor in tensors.items():
        found = re.fullmatch(r"stream/(key|value)/(blocks|tables)/.*", name)
        if found is None:
            tensors[name] = tensor.clone()
            if re.fullmatch(r"stream/(key|value)/block\d+/.*", name):
                raise SetupError("payloads of this codec do not lie side by side; it is too slow to be timed")
        elif found[2] == "blocks":
            index = torch.arange(blocks, device=tensor.device) % some
            tensors[name] = tensor.index_select(0, index)
    for side in SIDES:
        meta[side]["blocks"] = blocks
    return LayerState(tensors, meta)


def _against_processor(layer: Any, keys: Tensor, values: Tensor) -> dict[str, Any]:
    """Return how far streams decode from what the processor makes of the same bytes, and from the states."""
    found: dict[str, Any] = {}
    inside = slice(SINK, SINK + layer.streams[0].tokens)
    for side, stream, given in zip(SIDES, layer.streams, (keys, values), strict=True):
        tensors, meta = stream.state()
        twin = TokenStream.from_state({name: t.cpu() for name, t in tensors.items()}, meta)
        here = stream.decode()
        found[f"{side}_decode_error"] = relative(here.cpu(), twin.decode())
        found[f"{side}_error"] = relative(here, given[:, :, inside])
    return found


def _quanto() -> dict[str, Any]:
    """Let quanto unpack without its CUDA extension, which would take minutes to build; return by what it unpacks.

    That is its own kernels, compiled here alone, where they agree with its plain torch, else the plain torch.
    """
    try:
        import optimum.quanto
        from optimum.quanto.library.extensions.extension import get_extension, is_extension_available
    except ImportError as error:
        raise SkipError(f"quanto cannot be imported: {error}; PYTHONPATH=src:dev/quanto") from error
    if not is_extension_available("quanto_cuda"):
        return {"unpack": "torch"}
    extension = get_extension("quanto_cuda")
    if extension._lib is None:
        folder = Path(optimum.quanto.__file__).parent / "library" / "extensions" / "cuda"
        extension._lib = SimpleNamespace(unpack=_unpacking((folder / "unpack.cu").read_text()))
    return {"unpack": "torch" if extension._lib.unpack is _plain_unpack else "quanto's kernel"}


def _plain_unpack(packed: Tensor, bits: int) -> Tensor:
    """Unpack as `quanto::unpack` does by default; on a GPU torch's dispatcher takes the missing extension instead."""
    return torch.cat([(packed & (2 ** (bits * (i + 1)) - 1)) >> bits * i for i in range(8 // bits)])


def _unpacking(source: str) -> Callable[[Tensor, int], Tensor]:
    """Return a function with quanto's kernels, or the plain one where they do not compile or differ."""
    try:
        kernels = {}
        for bits in (2, 4):
            name = f"unpack_{bits}bit_kernel"
            body = re.search(rf"__global__ void {name}.*?\n}}", source, re.DOTALL)
            if body is None:
                raise SetupError(f"no {name} in quanto's source")
            kernels[bits] = torch.cuda._compile_kernel(f'extern "C" {body[0]}', name)

        def unpack(packed: Tensor, bits: int) -> Tensor:
            packed = packed.contiguous()
            out = packed.new_empty((packed.shape[0] * (8 // bits), *packed.shape[1:]))
            count = packed.numel()
            kernels[bits](grid=(-(-count // 256), 1, 1), block=(256, 1, 1), args=[packed, out, count])
            return out

        sample = torch.randint(0, 256, (300, 7), dtype=torch.uint8, device=device())
        if all(torch.equal(unpack(sample, bits), _plain_unpack(sample, bits)) for bits in (2, 4)):
            return unpack
        print("    quanto's kernels, compiled alone, differ; plain torch is taken", flush=True)
    except (RuntimeError, AttributeError, TypeError, ValueError, ImportError, OSError, SetupError) as error:
        print(f"    quanto's kernels do not compile alone: {str(error)[:300]}; plain torch is taken", flush=True)
    return _plain_unpack


def held(cache: Cache) -> dict[str, int]:
    """Return bytes: of encoded tokens, of tables, and everything."""
    if isinstance(cache, CompressedCache):
        report = cache.report()
        return {"payload": report.payload, "tables": report.tables, "total": report.total,
                "elements": report.elements}
    found = {"payload": 0, "tables": 0, "total": 0, "elements": 0}
    for layer in cache.layers:
        own: Any = layer
        found["total"] += sum(t.numel() * t.element_size() for t in (own.keys, own.values))
        for side in (getattr(own, "_quantized_keys", None), getattr(own, "_quantized_values", None)):
            if side is not None:
                parts = (side._data._data, side._scale, side._shift)
                found["payload"] += sum(t.numel() * t.element_size() for t in parts)
                found["elements"] += side.numel()
    found["total"] += found["payload"]
    return found


def run(case: Case, emit: Emit) -> None:
    """Fill a cache, check it, then time decoding."""
    model, method, tokens = STATE["model"], case["method"], case["tokens"]
    if device().type == "cpu":
        tokens = min(tokens, 1024)
    model.set_attn_implementation(case["attention"])
    one = filled(method, tokens)
    bytes_ = held(one.cache)
    numbers: dict[str, Any] = {**one.notes, "encode_ms": one.encode_ms, "held": bytes_,
                               "rate": 8 * bytes_["payload"] / max(1, bytes_["elements"])}
    errors = [numbers.get(f"{side}_decode_error", 0.0) for side in SIDES]
    numbers["red"] = not max(errors) <= 1e-4
    if isinstance(one.cache, CompressedCache) and case["attention"] == "tersor":
        numbers["attention_error"] = _attentions(model, one.cache)
        numbers["red"] |= not numbers["attention_error"] <= TOLERANCE
    if not numbers["red"]:
        numbers.update((_profiled if case["profile"] else _decoding)(model, one.cache))
    emit(case["name"], {**case, "layers": model.config.num_hidden_layers, "cudnn": STATE["cudnn"]}, bytes_["total"],
         numbers)


def _token(model: Any, number: int) -> Tensor:
    return torch.full((1, 1), number % model.config.vocab_size, dtype=torch.int64, device=device())


def _step(model: Any, cache: Cache, number: int) -> Tensor:
    return model(input_ids=_token(model, number), past_key_values=cache, use_cache=True, logits_to_keep=1).logits


def _attentions(model: Any, cache: CompressedCache) -> float:
    """Return how far the logits of Tersor's attention are from those of stock attention on the same cache."""
    ours = _step(model, copy.deepcopy(cache), 1)
    model.set_attn_implementation("sdpa")
    theirs = _step(model, copy.deepcopy(cache), 1)
    model.set_attn_implementation("tersor")
    return relative(ours, theirs)


def _decoding(model: Any, cache: Cache) -> dict[str, Any]:
    """Return milliseconds a step by the clock, tokens a second, and the extra memory of a step at its peak."""
    for number in range(WARM):
        _step(model, cache, number)
    gpu = device().type == "cuda"
    settle()
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if gpu else 0
    times = []
    for number in range(STEPS if gpu else 3):
        clock = _Clock()
        _step(model, cache, number)
        times.append(clock.ms())
    found = {"step_ms": statistics.median(times), "step_ms_least": min(times), "step_ms_most": max(times)}
    found["tokens_s"] = 1e3 / found["step_ms"]
    if gpu:
        found["extra"] = torch.cuda.max_memory_allocated() - before
    return found


def _profiled(model: Any, cache: Cache) -> dict[str, Any]:
    """Return milliseconds of all kernels of a step, launches, and the longest kernels."""
    for number in range(WARM):
        _step(model, cache, number)
    settle()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        for number in range(2):
            _step(model, cache, number)
        settle()
    events = sorted(recorded.key_averages(), key=lambda event: -event.self_device_time_total)
    return {"kernels_ms": sum(event.self_device_time_total for event in events) / 2e3,
            "launches": sum(event.count for event in events) / 2,
            "longest": [[e.key[:70], e.count / 2, e.self_device_time_total / 2] for e in events[:5]]}


def merge(out: Path) -> None:
    """Append the lines of a run elsewhere to results/kv_gpu.jsonl."""
    import gpu

    gpu.merge_file(out / "kv_gpu.jsonl", "kv_gpu")


def main() -> int:
    """Parse the command line; exit status 1 if a case failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", nargs="*", type=int, default=list(CONTEXTS))
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--attention", nargs="*", default=list(ATTENTIONS), choices=ATTENTIONS,
                        help="what Tersor's caches are read with")
    parser.add_argument("--profile", action="store_true", help="also the kernels of a step, after all else")
    parser.add_argument("--cudnn", action="store_true", help="leave cuDNN's attention on, as torch does")
    parser.add_argument("--limit", type=float, default=540.0, help="seconds after which no case is begun")
    parser.add_argument("--merge", action="store_true")
    arguments = parser.parse_args()
    if arguments.merge:
        merge(arguments.out)
        return 0
    ratios = Ratios()
    options: Mapping[str, Any] = {"lines": "kv_gpu", "cudnn": arguments.cudnn}
    run_ = gpu_run.Run("kv_gpu", arguments.out, "kv_gpu", dict(options), limit=arguments.limit, finish=ratios.finish)
    listed = cases(arguments.tokens, arguments.methods, arguments.attention, profile=arguments.profile)
    return 1 if run_.cases(listed) else 0


if __name__ == "__main__":
    sys.exit(main())
