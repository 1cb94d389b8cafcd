"""Loss by position in long texts, and where it falls: on repeated pairs of tokens (AR-hit) or on the rest.

AR-hit (Arora et al., "Zoology", arXiv 2312.04927; arXiv 2410.05258, ablations): the last token of an n-gram that the context holds
already and that is not frequent in the training text, so that it can be known from the context alone. Here n is 2.

Notation: T tokens of a text, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from diffx.config import RunError, UserError
from diffx.data import open_data
from diffx.data.shards import TokenArray
from diffx.data.sources import label
from diffx.evaluation.bootstrap import interval, resampled_means
from diffx.evaluation.model import LanguageModel
from diffx.evaluation.suite import Context, Example, Metric, Record

_GROUP = 256  # documents tokenized at once
_BLOCK = 1 << 24  # training tokens counted at once


def plan(context: Context) -> list[Example]:
    """Cut ``suite.texts`` texts of ``suite.length`` scored tokens, evenly spread, out of the documents laid end to end.

    Raises:
        UserError: the model cannot read so many tokens, or the documents are too short.
    """
    suite, lm = context.suite, context.lm
    length, texts = int(suite.length or lm.context), len(context.limited(list(range(suite.texts))))
    if lm.limit is not None and length > lm.limit:
        raise UserError(f"suite.length={length} cannot be used: the model reads {lm.limit} tokens at most")
    documents = context.documents()
    context.sources["tokenizer"] = context.lm.tokenizer.fingerprint  # texts are cut in tokens
    groups = (lm.encode_batch(documents[first : first + _GROUP]) for first in range(0, len(documents), _GROUP))
    corpus = np.concatenate([np.array([lm.tokenizer.eot_id, *tokens], np.int32) for group in groups for tokens in group])
    own = length + 1 - len(lm.prefix)  # the first token of a text is only read, and the last one only scored
    if len(corpus) < texts * own:
        source = label(context.data)
        raise UserError(f"suite.texts={texts} cannot be used: {source} has {len(corpus)} tokens, and each text takes {own}; ask for less")
    starts = [text * (len(corpus) // texts) for text in range(texts)]
    rows = [np.concatenate([np.array(lm.prefix, np.int32), corpus[start : start + own]]) for start in starts]
    return [Example(f"{length}/{number}", {"tokens": row, "corpus": corpus}) for number, row in enumerate(rows)]


def answer(context: Context, examples: list[Example]) -> Iterator[Record]:
    """Score the texts one by one."""
    suite = context.suite
    if not examples:
        return
    repeats = [repeated(example.data["tokens"]) for example in examples]
    pairs = [pair_keys(example.data["tokens"]) for example in examples]
    where, train = _training_tokens(context, examples[0].data["corpus"])
    wanted = np.unique(np.concatenate([keys[repeat] for keys, repeat in zip(pairs, repeats, strict=True)]))
    frequent = wanted[count_pairs(train, wanted) > suite.frequent]
    for example, keys, repeat in zip(examples, pairs, repeats, strict=True):
        loss = token_losses(context.lm, example.data["tokens"].tolist(), suite.chunk)
        hits = repeat & ~np.isin(keys, frequent)
        positions = _positions(len(loss))
        scores = {"nll": loss.mean()} | {f"nll/{name}": loss[part].mean() for name, part in _split(hits) if part.any()}
        yield {
            "id": example.id,
            "group": f"{len(loss)} tokens",
            "scores": {name: float(score) for name, score in scores.items()},
            "tokens": len(loss),
            "ar_hits": int(hits.sum()),
            "frequent": f"over {suite.frequent} times in {where}",
            "positions": positions,
            "cumulative_nll": [float(total) for total in (loss.cumsum() / np.arange(1, len(loss) + 1))[np.array(positions) - 1]],
            "begin": context.lm.decode(example.data["tokens"][:32].tolist()),
        }


def _split(hits: np.ndarray) -> list[tuple[str, np.ndarray]]:
    return [("ar_hit", hits), ("others", ~hits)]


def _positions(length: int) -> list[int]:
    """Four positions an octave, and the last."""
    steps = (round(2 ** (quarter / 4)) for quarter in range(4 * length.bit_length()))
    return sorted({step for step in steps if step < length} | {length})


def pair_keys(tokens: np.ndarray) -> np.ndarray:
    """A number for each token (T,) and the one after it, int64 (T - 1,)."""
    tokens = tokens.astype(np.int64)
    return (tokens[:-1] << 32) | tokens[1:]


def repeated(tokens: np.ndarray) -> np.ndarray:
    """For each token (T,) but the first, whether the pair that it ends stood in the text before, bool (T - 1,)."""
    keys = pair_keys(tokens)
    _, first, which = np.unique(keys, return_index=True, return_inverse=True)
    return first[which] < np.arange(len(keys))


def count_pairs(tokens: TokenArray, wanted: np.ndarray) -> np.ndarray:
    """How often each of the ``wanted`` pairs, sorted keys (n,), stands in ``tokens``, int64 (n,)."""
    counts = np.zeros(len(wanted), np.int64)
    for start in range(0, len(tokens) - 1 if len(wanted) else 0, _BLOCK):
        keys = pair_keys(tokens.read(start, min(start + _BLOCK + 1, len(tokens)))[0])
        places = np.minimum(np.searchsorted(wanted, keys), len(wanted) - 1)
        counts += np.bincount(places[wanted[places] == keys], minlength=len(wanted))
    return counts


def _training_tokens(context: Context, corpus: np.ndarray) -> tuple[str, TokenArray]:
    """The tokens that the model was trained on; those of the evaluated corpus for a model of which they are not known or not here."""
    data = context.lm.loaded.data
    if data is not None:
        try:
            return "the training tokens", open_data(data, context.lm.tokenizer).train
        except (UserError, RunError) as error:
            context.reporter.warn(f"frequent pairs are counted in the evaluated corpus: the training text is not here ({error})")
    return "the evaluated corpus", TokenArray([corpus])


def token_losses(lm: LanguageModel, tokens: Sequence[int], chunk: int) -> np.ndarray:
    """Negative log-likelihood, in nats, of each token (T,) but the first, fp64 (T - 1,).

    The text is read behind a key/value cache, ``chunk`` tokens at a time: memory grows with T, and with chunk · V. Without a cache it is
    read at once.
    """
    inputs, targets = list(tokens[:-1]), torch.tensor(tokens[1:], device=lm.device)
    if not lm.caches:
        places = torch.arange(len(inputs))
        return -lm.score(torch.tensor([inputs]), torch.zeros_like(places), places, targets)[0].double().cpu().numpy()
    state = lm.start([inputs[:1]])
    losses = [F.cross_entropy(state.logits, targets[:1], reduction="none")]
    for start in range(1, len(inputs), chunk):
        part = inputs[start : start + chunk]
        state, logits = lm.extend(state, [0], [part])
        losses.append(F.cross_entropy(logits[0], targets[start : start + len(part)], reduction="none"))
    return torch.cat(losses).double().cpu().numpy()


def summarize(context: Context, records: list[Record]) -> list[Metric]:
    """The whole loss, its two parts (each token counts the same), and the loss of the first 1, 2, 4 … tokens."""
    lengths, hits = (np.array([record[key] for record in records], float) for key in ("tokens", "ar_hits"))
    whole, parts = records[0]["group"], f"frequent: {_frequent(records)}"
    metrics = [_ratio(whole, "nll", _scores(records, "nll") * lengths, lengths)]
    for name, counts in (("nll/ar_hit", hits), ("nll/others", lengths - hits)):
        if counts.any():
            metrics.append(_ratio(parts, name, _scores(records, name) * counts, counts))
    metrics.append(_ratio(parts, "ar_hit share", hits, lengths))
    for place, position in enumerate(records[0]["positions"]):
        if position & (position - 1) == 0 and position < lengths[0]:
            values = np.array([record["cumulative_nll"][place] for record in records])
            metrics.append(_ratio(f"first {position} tokens", "nll", values, np.ones(len(values))))
    return metrics


def _frequent(records: list[Record]) -> str:
    return " or ".join(dict.fromkeys(record["frequent"] for record in records))


def _scores(records: list[Record], name: str) -> np.ndarray:
    return np.array([record["scores"].get(name, 0.0) for record in records])


def _ratio(group: str, name: str, sums: np.ndarray, counts: np.ndarray) -> Metric:
    """Sum of ``sums`` over that of ``counts``, both by text; error and interval by drawing texts anew."""
    value, n = float(sums.sum() / counts.sum()), len(sums)
    if n == 1:
        return Metric(group, name, value)
    above, below = resampled_means(np.stack([sums, counts], 1), f"{group}/{name}").T  # (RESAMPLES,) each
    ratios = above[below > 0] / below[below > 0]
    return Metric(group, name, value, float(ratios.std()), *interval(ratios), n)


def _binary(position: int) -> str:
    return f"{position >> 10}K" if position >= 1024 and position % 1024 == 0 else str(position)


def draw(context: Context, records: list[Record], metrics: list[Metric], path: Path) -> None:
    """Cumulative loss by position with its interval over texts, and the two parts of the loss."""
    canvas = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = canvas.subplots(1, 2, width_ratios=(2, 1))
    every = records[0]["positions"]
    first = next(place for place, position in enumerate(every) if position >= every[-1] // 64)  # the first tokens would flatten the rest
    positions, curves = every[first:], np.array([record["cumulative_nll"][first:] for record in records])  # (texts, positions)
    if len(records) > 1:
        low, high = np.percentile(resampled_means(curves, "picture"), [2.5, 97.5], axis=0)  # (positions,) each
        left.fill_between(positions, low, high, color="#0072B2", alpha=0.18, linewidth=0)
    left.plot(positions, curves.mean(0), color="#0072B2", linewidth=1.8, label=f"{context.lm.name}, {len(records)} texts")
    left.set(xscale="log", xlabel="position in tokens", ylabel="nats per token up to there (band: 95% interval)")
    ticks = [position for position in positions if position & (position - 1) == 0]
    left.set_xticks(ticks[:: 2 if len(ticks) > 9 else 1])
    left.xaxis.set_major_formatter(FuncFormatter(lambda position, _: _binary(round(position))))
    left.xaxis.set_minor_locator(NullLocator())
    left.set_title("Cumulative loss by position", loc="left", fontsize=11, fontweight="bold")
    left.legend(frameon=False, fontsize=9)
    parts = [metric for metric in metrics if metric.name.startswith("nll/")]
    share = next(metric.value for metric in metrics if metric.name == "ar_hit share")
    names = {"nll/ar_hit": f"AR-hit\n{share:.1%} of tokens", "nll/others": f"others\n{1 - share:.1%}"}
    errors = [metric.stderr or 0.0 for metric in parts]
    bars = right.bar([names[metric.name] for metric in parts], [metric.value for metric in parts], 0.5, yerr=errors, capsize=4)
    for bar, colour in zip(bars, ("#009E73", "#CC79A7"), strict=False):
        bar.set_color(colour)
    right.bar_label(bars, fmt="%.3f", padding=4, fontsize=9)
    right.set(ylabel="nats per token", ylim=(0, 1.15 * max(metric.value for metric in parts)))
    right.set_xlabel(f"no hits: pairs seen\n{_frequent(records)}", fontsize=8.5)
    right.set_title("Repeated pairs and the rest", loc="left", fontsize=11, fontweight="bold")
    for axes in (left, right):
        axes.grid(color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    canvas.savefig(path, dpi=150)
