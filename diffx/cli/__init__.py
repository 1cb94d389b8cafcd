"""The command line, by Typer. Nothing slow is imported before a command runs."""

import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.exceptions import TyperException

from diffx import __version__
from diffx.cli.bench import SETTINGS, bench
from diffx.cli.experiment import experiment
from diffx.errors import Stopped, UserError, describe, one_line
from diffx.files import read_json

app = typer.Typer(name="diffx", **SETTINGS)
data = typer.Typer(help="Prepare training data.", **SETTINGS)
app.add_typer(data, name="data")
app.add_typer(bench, name="bench")
app.add_typer(experiment, name="experiment")
_KEPT = "interrupted: what was measured is kept, and the same command (without force=true) goes on"


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"diffx {__version__}")
        raise typer.Exit


@app.callback()
def _diffx(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Train, adapt (DEX), evaluate, compare, quantize, export models with differential attention.

    \b
    Examples:
      diffx train
      diffx train model=diff_v2 size=micro data=text data.path=books/
      diffx eval checkpoint=runs/x suite=retrieval
      diffx adapt-dex base=HuggingFaceTB/SmolLM2-135M data=text data.path=books/

    `diffx COMMAND --help` shows the options, `diffx COMMAND --doc all` the meaning of each key.
    """


_Multirun = Annotated[
    bool, typer.Option("--multirun", "-m", help="Run every combination of a=1,2 b=x,y.")
]
_Cfg = Annotated[
    Literal["job"] | None, typer.Option(help="Print keys, values and meanings; run nothing.")
]
_Doc = Annotated[
    str | None,
    typer.Option(metavar="KEY", help="Print what train.lr, train or all mean; run nothing."),
]
_ConfigDir = Annotated[
    Path | None, typer.Option(help="A folder of configs; it comes before those of diffx.")
]


def _composed(
    name: str, config: str | None = None, commands: typer.Typer = app, after: Any = None
) -> Callable[[Any], Any]:
    """Make a command ``name`` of a function that does the work of a job and has the help text.

    ``config`` is the primary config; ``after`` gets the results of the jobs, as in ``launch``.
    """
    primary = config or name

    def candidates(ctx: typer.Context, incomplete: str) -> list[str]:
        from diffx.config.completion import complete

        words, config_dir = ctx.params.get("words") or [], ctx.params.get("config_dir")
        return complete(primary, words, incomplete, config_dir)

    words_help = "Config groups and keys."
    argument = typer.Argument(metavar="KEY=VALUE", help=words_help, autocompletion=candidates)

    def decorate(work: Any) -> Any:
        def command(
            words: Annotated[list[str], argument] = [],  # noqa: B006 - Typer's way
            multirun: _Multirun = False,
            cfg: _Cfg = None,
            doc: _Doc = None,
            config_dir: _ConfigDir = None,
        ) -> None:
            from diffx.config.launch import launch, show_config

            flags = {"--cfg": cfg, "--doc": doc, "--multirun": multirun}
            first, *others = [flag for flag, value in flags.items() if value] or [""]
            if others:
                raise UserError(f"{others[-1]} with {first} cannot be used: ask for one of them")
            if cfg or doc:
                return show_config(primary, words, config_dir, doc)
            options: Any = {"multirun": multirun, "config_dir": config_dir, "after": after}
            try:
                code = launch(primary, work, words, **options)
            except Stopped as stop:  # Typer would make 130 of it
                print(stop, file=sys.stderr)
                code = 0
            raise typer.Exit(code)

        commands.command(name, help=work.__doc__)(command)
        return work

    return decorate


@_composed("train")
def _train(job: Any, words: list[str]) -> float | None:
    """Train a model.

    By default a small DIFF V1 on 3.6M tokens of Python's source, in minutes on two cores.

    \b
    Groups: model= size= data= tokenizer= experiment=
    Keys:   train.steps= train.lr= data.path= seed= device= run.dir=
    Examples:
      diffx train
      diffx train model=transformer data=text 'data.path=books/*.txt' train.tokens=20M
      diffx train -m model=transformer,diff_v1 seed=0,1
      diffx train -m model=transformer,diff_v1 sweep.resume=runs/SWEEP
      diffx train train.resume=auto run.dir=runs/x
    """
    from diffx.train.run import run_job

    summary = run_job(job, words) / "summary.json"
    # A sweeper such as optuna minimises the held-out loss.
    return float(read_json(summary, {"val/loss": float})["val/loss"]) if summary.exists() else None


@_composed("adapt-dex", "adapt")
def _adapt(job: Any, words: list[str]) -> float | None:
    """Adapt a pretrained model with DEX, or with one of its controls.

    base= is a causal model of the Hugging Face hub, or a folder with config.json, safetensors and
    tokenizer.json. The default text is Python's source.

    \b
    Groups: data= experiment=
    Keys:   base= dex.variant= dex.heads= dex.k= train.tokens= run.dir=
    Examples:
      diffx adapt-dex base=Qwen/Qwen2.5-0.5B data=text data.path=books/ train.tokens=100M
      diffx adapt-dex base=models/smollm2 train.tokens=200K train.seq_len=256
      diffx adapt-dex -m base=models/smollm2 dex.variant=dex,attn_only,lora
    """
    return _train(job, words)


@_composed("export")
def _export(job: Any, words: list[str]) -> None:
    """Write a run as a Hugging Face model.

    An adapted run becomes a model of its base's architecture, with DEX folded into the output
    projections; fold=false keeps the branch. transformer becomes a Llama, diff_v1 a DiffLlama; a
    model that these cannot express loads after `import diffx`.

    \b
    Keys: checkpoint= out= fold= dtype= trust_remote_code= format=hf
    Examples:
      diffx export checkpoint=runs/x out=models/x
      diffx export checkpoint=runs/dex@best out=models/dex dtype=bf16
      diffx export checkpoint=runs/dex out=models/dex-branch fold=false
    """
    from diffx.export import export

    export(job)


@_composed("generate")
def _generate(job: Any, words: list[str]) -> None:
    """Continue a prompt with a trained model.

    The text goes to standard output as it is drawn.

    \b
    Keys: checkpoint= prompt= prompt_file= max_tokens= temperature= top_k= top_p= seed= device=
          trust_remote_code=
    Examples:
      diffx generate checkpoint=runs/x prompt="import os"
      diffx generate checkpoint=runs/x@best temperature=0 max_tokens=64
      cat story.txt | diffx generate checkpoint=runs/x prompt=-
    """
    from diffx.evaluation.generate import generate_text

    generate_text(job)


@_composed("eval")
def _eval(job: Any, words: list[str]) -> Any:
    """Measure a model.

    checkpoint= is a run (runs/x, runs/x@best, runs/x@1000) or a model of the Hugging Face hub, by
    name or folder. Results, records and a picture go to its evals/ folder; an interrupted
    evaluation goes on, a finished one is shown again. A list of suites loads the model once;
    suite.KEY= must be a key of each, and where one fails the others run.

    \b
    Groups: suite=paper_lm | dex_lm | harness | math | retrieval | attention_allocation | icl |
            icl_order | long_context | outliers | hallucination | speed   data= judge=
    Keys:   checkpoint= suite.KEY= data.path= batch= limit= force=
    Examples:
      diffx eval checkpoint=runs/x suite=[retrieval,outliers]
      diffx eval checkpoint=Qwen/Qwen2.5-0.5B suite=paper_lm limit=100
      diffx eval checkpoint=runs/x suite=harness suite.tasks=[my_task] suite.include_path=tasks/
    """
    from diffx.evaluation.run import evaluate, evaluate_all

    return evaluate_all(job) if isinstance(job, list) else str(evaluate(job, words))


def _report_quantization(results: list[dict[Any, str]], sweep: Path | None) -> None:
    from diffx.report.quantized import report_quantization

    # JSON's keys are text.
    folders = [{int(bits): Path(folder) for bits, folder in row.items()} for row in results]
    step = next(iter(folders[0].values())).parents[1]
    name = folders[0][min(folders[0])].parent.name.rpartition("-")[0] or "quantized"
    report_quantization(folders, (sweep or step) / f"{name}.png")


@_composed("quantize", after=_report_quantization)
def _quantize(job: Any, words: list[str]) -> dict[int, str]:
    """Measure a model at few bits.

    A suite (by default the loss on held-out text) runs with rounded attention logits, hidden states
    or weights, and is compared with the unchanged model. Rounded weights are stored as a smaller
    model. Several checkpoints (-m) stand in one table and one picture.

    \b
    Groups: method=attention_logits | activations | weights   suite= data=
    Keys:   checkpoint= bits=[16,8,6,4] suite.KEY= method.KEY= limit=
    Examples:
      diffx quantize -m checkpoint=runs/transformer,runs/diff method=activations bits=[8,6,4]
      diffx quantize checkpoint=Qwen/Qwen2.5-0.5B suite=harness suite.tasks=[hellaswag] limit=200
      diffx quantize checkpoint=runs/x method=weights bits=[8,4] method.skip=[o_proj]
    """
    from diffx.quantization.run import quantize

    return {bits: str(folder) for bits, folder in quantize(job).items()}


@_composed("params", "train")
def _params(job: Any, words: list[str]) -> None:
    """Count parameters at one shape.

    All architectures side by side, the embedding apart; no weights are made.

    \b
    Examples:
      diffx params
      diffx params size=25m model.num_kv_heads=8
      diffx params size=1.4b model.vocab_size=100288
    """
    from rich.console import Console

    from diffx.train.params import parameter_table

    Console().print(parameter_table(job))


@_composed("prepare", commands=data)
def _prepare(job: Any, words: list[str]) -> None:
    """Tokenize text once, for data=shards.

    Writes memory-mapped shards, in parallel; an unfinished folder is continued.

    \b
    Groups: data= tokenizer=
    Keys:   out= data.path= workers= shard_tokens=
    Examples:
      diffx data prepare data=text data.path=books/ out=shards/books
      diffx data prepare data=text 'data.path=crawl/*.jsonl.zst' out=shards/crawl workers=16
      diffx data prepare tokenizer=bytes out=shards/stdlib
    """
    from diffx.console import Reporter
    from diffx.data.prepare import prepare

    reporter = Reporter()
    with reporter.progress("corpus", None, unit="MB") as bar:

        def show(stage: str, done: int, total: int | None) -> None:
            bar.at(done // 10**6, f"{stage}, {done / total:.0%}" if total else stage)

        folder = prepare(job, show)
    reporter.line(f"token shards in {folder}")


_Runs = typer.Argument(metavar="RUN", help="Runs, or a sweep's folder; with suite=S, checkpoints.")


@app.command()
def compare(
    words: Annotated[list[str], _Runs],
    out: Annotated[Path | None, typer.Option(help="Where to draw the picture (PNG).")] = None,
) -> None:
    """Compare runs, or with suite=S their evaluations, in a table and a picture.

    Runs: means over seeds, parameters, tokens, the token ratio at equal loss, and the loss curves.
    Adaptations: every variant against attn_only and the base, beside the noise floor.
    Evaluations: differences to the first checkpoint on the same examples, with bootstrap intervals;
    that of one checkpoint is shown again.

    \b
    Examples:
      diffx compare runs/a runs/b
      diffx compare runs/2026-01-01_12-00-00-sweep --out curves.png
      diffx compare runs/transformer runs/diff@1000 suite=retrieval
    """
    from diffx.report.compare import compare_runs
    from diffx.report.evals import compare_evaluations

    if any(word.startswith("suite=") for word in words):
        compare_evaluations(words, out)
    else:
        compare_runs([Path(word) for word in words], out)


@cache
def _program() -> Any:
    """Make the commands once, since this takes Typer 20 ms."""
    return typer.main.get_command(app)


def main(argv: list[str] | None = None) -> int:
    """Run one command, given by the words after ``diffx`` or the command line.

    Returns:
        The exit code: 0, 1 for a run that failed, 2 for input that cannot be used, 130 for an
        interrupt; all but 0 with one line on standard error. Any other exception is a bug.
    """
    try:
        code = _program()(argv, prog_name="diffx", standalone_mode=False) or 0
        if code == 130:  # what Typer makes of a KeyboardInterrupt
            command = (sys.argv[1:] if argv is None else argv)[0]
            print(_KEPT if command in ("eval", "quantize") else "interrupted", file=sys.stderr)
        return code
    except TyperException as error:
        if "Usage:" in (text := error.format_message()):  # a group without a command: its help
            print(text)
            return 0
        code, line = 2, " ".join(text.split())
    except Exception as error:
        if not (described := describe(error)):
            raise
        code, line = described
    if os.environ.get("RANK", "0") == "0":  # under torchrun every process refuses the same words
        print(f"error: {one_line(line)}", file=sys.stderr)
    return code
