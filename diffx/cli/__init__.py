"""The command line, by Typer. Nothing slow is imported before a command runs."""

import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

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
_INTERRUPTED = {"eval": _KEPT, "quantize": _KEPT}


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


_Work = TypeVar("_Work", bound=Callable[..., Any])
_Multirun = Annotated[
    bool, typer.Option("--multirun", "-m", help="Run every combination of a=1,2 b=x,y.")
]
_Cfg = Annotated[
    Literal["job", "hydra", "all"] | None,
    typer.Option(help="Print the composed config; run nothing."),
]
_Doc = Annotated[
    str | None,
    typer.Option(
        metavar="KEY",
        help="Print the meaning of a key (train.lr), a group (train) or all; run nothing.",
    ),
]
_Resolve = Annotated[bool, typer.Option("--resolve", help="Print it with interpolations resolved.")]
_Package = Annotated[
    str | None, typer.Option("--package", "-p", help="Print only this part of it, such as train.")
]
_Info = Annotated[
    Literal["all", "config", "defaults", "defaults-tree", "plugins", "searchpath"] | None,
    typer.Option(help="Print Hydra's view of the configs; run nothing."),
]
_ConfigDir = Annotated[
    Path | None, typer.Option(help="A folder of configs; it comes before those of diffx.")
]


def _composed(
    commands: typer.Typer,
    name: str,
    config: str,
    after: Callable[[list[Any], Path | None], None] | None = None,
) -> Callable[[_Work], _Work]:
    """Make a command of a function that does the work of a job; its docstring is the help text.

    Args:
        commands: the group that gets the command.
        name: the command's name.
        config: the primary config.
        after: gets the results of the jobs.
    """

    def candidates(ctx: typer.Context, incomplete: str) -> list[str]:
        from diffx.config.completion import complete

        words, config_dir = ctx.params.get("words") or [], ctx.params.get("config_dir")
        return complete(config, words, incomplete, config_dir)

    def decorate(work: _Work) -> _Work:
        def command(
            words: Annotated[
                list[str] | None,
                typer.Argument(
                    metavar="KEY=VALUE", help="Config groups and keys.", autocompletion=candidates
                ),
            ] = None,
            multirun: _Multirun = False,
            cfg: _Cfg = None,
            doc: _Doc = None,
            resolve: _Resolve = False,
            package: _Package = None,
            info: _Info = None,
            config_dir: _ConfigDir = None,
        ) -> None:
            from diffx.config.launch import launch, show_config

            if resolve or package:
                cfg = cfg or "job"
            flags = {"--cfg": cfg, "--info": info, "--doc": doc, "--multirun": multirun}
            shown = [flag for flag, value in flags.items() if value]
            if len(shown) > 1:
                raise UserError(f"{shown[-1]} with {shown[0]} cannot be used: ask for one of them")
            words = words or []
            if shown and not multirun:
                show_config(config, words, config_dir, cfg, resolve, package, doc, info)
                return
            try:
                code = launch(
                    config, work, words, multirun=multirun, config_dir=config_dir, after=after
                )
            except Stopped as stop:  # Typer would make 130 of it
                print(stop, file=sys.stderr)
                code = 0
            raise typer.Exit(code)

        command.__doc__ = work.__doc__
        commands.command(name)(command)
        return work

    return decorate


@_composed(app, "train", "train")
def _train(job: Any, words: list[str]) -> float | None:
    """Train a model.

    Without arguments: a small DIFF V1 on 3.6M tokens of Python's source, in minutes on two cores.

    \b
    Groups: model= size= data= tokenizer= experiment=
    Keys:   train.steps= train.lr= data.path= seed= device= run.dir=, all of them: --doc all
    Examples:
      diffx train
      diffx train model=transformer data=text 'data.path=books/*.txt' train.tokens=20M
      diffx train -m model=transformer,diff_v1 seed=0,1
      diffx train -m model=transformer,diff_v1 hydra.sweep.dir=runs/SWEEP train.resume=auto
      diffx train train.resume=auto run.dir=runs/x
    """
    from diffx.train.run import run_job

    summary = run_job(job, words) / "summary.json"
    # A sweeper such as optuna minimises the held-out loss.
    return float(read_json(summary, {"val/loss": float})["val/loss"]) if summary.exists() else None


@_composed(app, "adapt-dex", "adapt")
def _adapt(job: Any, words: list[str]) -> float | None:
    """Adapt a pretrained model with DEX, or with one of its controls.

    base= is a causal model of the Hugging Face hub, by name or folder. Without a network: any
    folder with config.json, safetensors and tokenizer.json. The default text is Python's source.

    \b
    Groups: data= experiment=
    Keys:   base= dex.variant= dex.heads= dex.k= train.tokens= run.dir=, all of them: --doc all
    Examples:
      diffx adapt-dex base=Qwen/Qwen2.5-0.5B data=text data.path=books/ train.tokens=100M
      diffx adapt-dex base=models/smollm2 train.tokens=200K train.seq_len=256
      diffx adapt-dex -m base=models/smollm2 dex.variant=dex,attn_only,lora
    """
    return _train(job, words)


@_composed(app, "export", "export")
def _export(job: Any, words: list[str]) -> None:
    """Write a run as a Hugging Face model.

    An adapted run becomes an ordinary model of its base's architecture, with DEX folded into the
    output projections; fold=false keeps the branch. transformer becomes a Llama, diff_v1 a
    DiffLlama; a model that these cannot express loads after `import diffx`.

    \b
    Keys: checkpoint= out= fold= dtype= trust_remote_code= format=hf
    Examples:
      diffx export checkpoint=runs/x out=models/x
      diffx export checkpoint=runs/dex@best out=models/dex dtype=bf16
      diffx export checkpoint=runs/dex out=models/dex-branch fold=false
    """
    from diffx.export import export

    export(job)


@_composed(app, "generate", "generate")
def _generate(job: Any, words: list[str]) -> None:
    """Continue a prompt with a trained model.

    The text goes to standard output as it is drawn.

    \b
    Keys: checkpoint= prompt= prompt_file= max_tokens= temperature= top_k= top_p= seed= device=
          trust_remote_code=

    \b
    Examples:
      diffx generate checkpoint=runs/x prompt="import os"
      diffx generate checkpoint=runs/x@best temperature=0 max_tokens=64
      cat story.txt | diffx generate checkpoint=runs/x prompt=-
    """
    from diffx.evaluation.generate import generate_text

    generate_text(job)


@_composed(app, "eval", "eval")
def _eval(job: Any, words: list[str]) -> Any:
    """Measure a model.

    checkpoint= is a run (runs/x, runs/x@best, runs/x@1000) or a model of the Hugging Face hub, by
    name or folder. Results, records and a picture go to its evals/ folder; an interrupted
    evaluation goes on, and a finished one is shown again. With a list of suites the model is loaded
    once, and suite.KEY= must be a key of each; the other suites run where one fails.

    \b
    Groups: suite=paper_lm | dex_lm | harness | math | retrieval | attention_allocation | icl |
            icl_order | long_context | outliers | hallucination | speed   data= judge=
    Keys:   checkpoint= suite.KEY= data.path= batch= limit= force=, all of them: --doc all
    Examples:
      diffx eval checkpoint=runs/x suite=[retrieval,outliers]
      diffx eval checkpoint=Qwen/Qwen2.5-0.5B suite=paper_lm limit=100
      diffx eval -m checkpoint=runs/a,runs/b suite=outliers data=text data.path=books/
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


@_composed(app, "quantize", "quantize", after=_report_quantization)
def _quantize(job: Any, words: list[str]) -> dict[int, str]:
    """Measure a model at few bits.

    Attention logits or hidden states are rounded while a suite runs, by default the loss on
    held-out text, or the weights are stored as a smaller model; the figures are compared with those
    of the unchanged model. Several checkpoints (-m) stand in one table and one picture.

    \b
    Groups: method=attention_logits | activations | weights   suite= data=
    Keys:   checkpoint= bits=[16,8,6,4] suite.KEY= method.KEY= limit=, all of them: --doc all
    Examples:
      diffx quantize checkpoint=runs/x
      diffx quantize -m checkpoint=runs/transformer,runs/diff method=activations bits=[8,6,4]
      diffx quantize checkpoint=Qwen/Qwen2.5-0.5B suite=harness suite.tasks=[hellaswag] limit=200
      diffx quantize checkpoint=runs/x method=weights bits=[8,4] method.skip=[o_proj]
    """
    from diffx.quantization.run import quantize

    return {bits: str(folder) for bits, folder in quantize(job).items()}


@_composed(app, "params", "train")
def _params(job: Any, words: list[str]) -> None:
    """Count parameters at one shape.

    All architectures side by side, split into the embedding and the rest; no weights are made.

    \b
    Examples:
      diffx params
      diffx params size=25m model.num_kv_heads=8
      diffx params size=1.4b model.vocab_size=100288
    """
    from rich.console import Console

    from diffx.train.params import parameter_table

    Console().print(parameter_table(job))


@_composed(data, "prepare", "prepare")
def _prepare(job: Any, words: list[str]) -> None:
    """Tokenize text once, for data=shards.

    Writes memory-mapped shards, in parallel; an unfinished folder is taken up where it stopped.

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


@app.command()
def compare(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN", help="Run folders, or the folder of a sweep; with suite=S, checkpoints."
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="Where to draw the picture (PNG).")] = None,
) -> None:
    """Compare runs, or with suite=S their evaluations, in a table and a picture.

    Runs: means over seeds, parameters, tokens, the token ratio at equal loss, and the loss curves.
    Adaptations: every variant against attn_only and the base, beside the noise floor.
    Evaluations: differences to the first checkpoint on the same examples, bootstrap intervals;
    that of one checkpoint is shown, and with --out drawn, again.

    \b
    Examples:
      diffx compare runs/a runs/b
      diffx compare runs/2026-01-01_12-00-00-sweep --out curves.png
      diffx compare runs/*-seed0
      diffx compare runs/transformer runs/diff@1000 suite=retrieval
    """
    if any(word.startswith("suite=") for word in words):
        from diffx.report.evals import compare_evaluations

        compare_evaluations(words, out)
    else:
        from diffx.report.compare import compare_runs

        compare_runs([Path(word) for word in words], out)


@cache
def _program() -> Any:
    """Make the commands once, since this takes Typer 20 ms."""
    return typer.main.get_command(app)


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after ``diffx``; those of the command line if ``None``.

    Returns:
        The exit code: 0, 1 for a run that failed, 2 for input that cannot be used, 130 for an
        interrupt; all but 0 with one line on standard error. Any other exception is a bug.
    """
    try:
        code = _program()(argv, prog_name="diffx", standalone_mode=False) or 0
        if code == 130:  # what Typer makes of a KeyboardInterrupt
            command = (sys.argv[1:] if argv is None else argv)[0]
            print(_INTERRUPTED.get(command, "interrupted"), file=sys.stderr)
        return code
    except TyperException as error:
        if "Usage:" in (text := error.format_message()):  # a group without a command: its help
            print(text)
            return 0
        code, line = 2, " ".join(text.split())
    except Exception as error:
        described = describe(error)
        if described is None:
            raise
        code, line = described
    if os.environ.get("RANK", "0") == "0":  # under torchrun every process refuses the same words
        print(f"error: {one_line(line)}", file=sys.stderr)
    return code
