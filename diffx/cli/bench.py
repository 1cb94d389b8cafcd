"""``diffx bench``: one command for each thing that is measured side by side."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

SETTINGS: dict[str, Any] = {
    "rich_markup_mode": None,
    "pretty_exceptions_enable": False,
    "no_args_is_help": True,
    "context_settings": {"help_option_names": ["--help", "-h"]},
}
_Out = Annotated[
    Path | None, typer.Option(help="The .json file for the figures, with rows in a .parquet file.")
]
_Device = Annotated[Literal["auto", "cpu", "cuda", "mps"], typer.Option(help="Where to compute.")]
_Rounds = Annotated[int, typer.Option(min=1, help="How often each takes its turn.")]
_Batch = Annotated[int, typer.Option(min=1, help="Sequences at once.")]
_Model = Annotated[
    str, typer.Option(help="A causal model of the Hugging Face hub, by name or folder.")
]
_SeqLen = Annotated[int, typer.Option(min=1, help="Context length in tokens.")]
_SeqLens = Annotated[
    list[int],
    typer.Option(min=1, help="A context length in tokens; may be given several times."),
]
bench = typer.Typer(help="Measure side by side.", **SETTINGS)


@bench.command("train")
def bench_train(
    out: _Out = None,
    size: Annotated[
        list[str], typer.Option(help="A size of diffx train; may be given several times.")
    ] = ["nano", "25m"],  # noqa: B006 - Typer's way
    seq_len: _SeqLens = [512, 2048],  # noqa: B006
    rounds: _Rounds = 5,
    device: _Device = "auto",
) -> None:
    """Measure training speed and peak memory.

    Every architecture beside transformers' Llama and DiffLlama, taking turns on the same data.

    \b
    Examples:
      diffx bench train
      diffx bench train --size nano --seq-len 512 --rounds 3
      diffx bench train --out bench.json
    """
    from diffx.bench.train import bench_train

    bench_train(out=out, sizes=size, seq_lens=seq_len, rounds=rounds, device=device)


@bench.command("eval")
def bench_eval(
    checkpoint: Annotated[
        str, typer.Option(help="A Llama of the Hugging Face hub, by name or folder.")
    ],
    out: _Out = None,
    documents: Annotated[int, typer.Option(min=1, help="Documents of each kind of request.")] = 24,
    rounds: _Rounds = 3,
    device: _Device = "auto",
) -> None:
    """Measure the harness adapter's requests a second.

    A Llama as diffx's transformer, beside lm-eval's class on the original, on the same requests.

    \b
    Examples:
      diffx bench eval --checkpoint HuggingFaceTB/SmolLM2-135M
      diffx bench eval --checkpoint models/smollm2 --documents 16 --out bench.json
    """
    from diffx.bench.eval import bench_eval

    bench_eval(out=out, checkpoint=checkpoint, documents=documents, rounds=rounds, device=device)


@bench.command("adapt")
def bench_adapt(
    base: _Model,
    out: _Out = None,
    seq_len: _SeqLen = 256,
    batch: _Batch = 2,
    rounds: _Rounds = 5,
    device: _Device = "auto",
) -> None:
    """Measure what DEX costs on a pretrained model.

    Training steps of dex beside attn_only and peft's LoRA, with peak memory; inference of dex,
    folded and unfolded, beside the base.

    \b
    Examples:
      diffx bench adapt --base Qwen/Qwen2.5-0.5B
      diffx bench adapt --base models/smollm2 --seq-len 128 --batch 1 --rounds 3
      diffx bench adapt --base models/smollm2 --out bench.json
    """
    from diffx.bench.adapt import bench_adapt

    bench_adapt(out=out, base=base, seq_len=seq_len, batch=batch, rounds=rounds, device=device)


@bench.command("quantize")
def bench_quantize(
    checkpoint: _Model,
    out: _Out = None,
    seq_len: _SeqLen = 512,
    batch: _Batch = 1,
    rounds: _Rounds = 5,
    device: _Device = "auto",
) -> None:
    """Measure what few bits cost and save.

    Inference, memory and size of weights stored at 8 bits beside the original; attention with
    rounded logits beside the reference.

    \b
    Examples:
      diffx bench quantize --checkpoint Qwen/Qwen2.5-0.5B
      diffx bench quantize --checkpoint models/smollm2 --seq-len 256 --rounds 3
      diffx bench quantize --checkpoint models/smollm2 --out bench.json
    """
    from diffx.bench.quantize import bench_quantize

    sizes = {"seq_len": seq_len, "batch": batch, "rounds": rounds}
    bench_quantize(out=out, checkpoint=checkpoint, device=device, **sizes)


@bench.command("attention")
def bench_attention(
    out: _Out = None,
    heads: Annotated[
        int, typer.Option(min=2, help="Heads of the baseline; two make a differential one.")
    ] = 16,
    width: Annotated[int, typer.Option(min=1, max=128, help="Features of a query and a key.")] = 64,
    seq_len: _SeqLens = [1024, 2048],  # noqa: B006
    rounds: _Rounds = 5,
    dtype: Annotated[
        Literal["auto", "fp32", "bf16", "fp16"], typer.Option(help="The tensors' type.")
    ] = "auto",
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="Where to compute.")
    ] = "auto",
) -> None:
    """Measure differential attention, forward and backward.

    The operation of diffx beside two padded calls, the four calls of public libraries, and the
    baseline's attention.

    \b
    Examples:
      diffx bench attention
      diffx bench attention --width 128 --heads 8 --seq-len 4096 --rounds 3
      diffx bench attention --device cuda --seq-len 2048 --seq-len 16384 --out bench.json
    """
    from diffx.bench.attention import bench_attention

    sizes = {"heads": heads, "width": width, "rounds": rounds}
    bench_attention(out=out, seq_lens=seq_len, dtype=dtype, device=device, **sizes)


@bench.command("profile")
def bench_profile(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Config groups and keys of diffx train."),
    ] = None,
    trace: Annotated[
        Path, typer.Option(help="The trace to write (JSON, for https://ui.perfetto.dev).")
    ] = Path("trace.json"),
    steps: Annotated[int, typer.Option(min=1, help="Steps that are timed.")] = 10,
) -> None:
    """Measure where the time of a training job's steps goes.

    A table of a step's parts, one of its operators, and a trace.

    \b
    Examples:
      diffx bench profile
      diffx bench profile model=transformer size=25m train.seq_len=512 train.batch_tokens=2048
      diffx bench profile size=1.4b train.compile=true device=cuda --trace step.json
    """
    from diffx.bench.profile import bench_profile

    bench_profile(words or [], trace, steps)
