"""``diffx bench``: one command for each thing that is measured side by side."""

from collections.abc import Callable
from functools import wraps
from importlib import import_module
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
_Model = Annotated[str, typer.Option(help="A causal model of the Hugging Face hub, or its folder.")]
_SeqLen = Annotated[int, typer.Option(min=1, help="Context length in tokens.")]
_SeqLens = Annotated[
    list[int], typer.Option("--seq-len", min=1, help="A context length in tokens; may be repeated.")
]
_Sizes = Annotated[
    list[str], typer.Option("--size", help="A size of diffx train; may be repeated.")
]
_Words = Annotated[
    list[str], typer.Argument(metavar="KEY=VALUE", help="Groups and keys of diffx train.")
]
bench = typer.Typer(help="Measure side by side.", **SETTINGS)


def _command(declaration: Callable[..., None]) -> Callable[..., None]:
    """Add the command NAME of a function that declares its options and its help text.

    It calls ``diffx.bench.NAME.bench_NAME``, which takes the same arguments.
    """
    name = declaration.__name__

    @bench.command()
    @wraps(declaration)
    def command(**arguments: Any) -> None:
        getattr(import_module(f"diffx.bench.{name}"), f"bench_{name}")(**arguments)

    return command


@_command
def train(
    out: _Out = None,
    sizes: _Sizes = ["nano", "25m"],  # noqa: B006 - Typer's way
    seq_lens: _SeqLens = [512, 2048],  # noqa: B006
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


@_command
def eval(
    checkpoint: Annotated[
        str, typer.Option(help="A Llama of the Hugging Face hub, or its folder.")
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


@_command
def adapt(
    base: _Model,
    out: _Out = None,
    seq_len: _SeqLen = 256,
    batch: _Batch = 2,
    rounds: _Rounds = 5,
    device: _Device = "auto",
) -> None:
    """Measure what DEX costs on a pretrained model.

    Training steps and peak memory of dex beside attn_only and peft's LoRA; inference of dex, folded
    and unfolded, beside the base.

    \b
    Examples:
      diffx bench adapt --base Qwen/Qwen2.5-0.5B
      diffx bench adapt --base models/smollm2 --seq-len 128 --batch 1 --rounds 3
      diffx bench adapt --base models/smollm2 --out bench.json
    """


@_command
def quantize(
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


@_command
def attention(
    out: _Out = None,
    heads: Annotated[
        int, typer.Option(min=2, help="Heads of the baseline; two make a differential one.")
    ] = 16,
    width: Annotated[int, typer.Option(min=1, max=128, help="Features of a query and a key.")] = 64,
    seq_lens: _SeqLens = [1024, 2048],  # noqa: B006
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


@_command
def profile(
    words: _Words = [],  # noqa: B006
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
