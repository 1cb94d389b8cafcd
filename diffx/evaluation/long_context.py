"""Loss by position in long texts, on repeated pairs of tokens (AR-hit) and on the rest.

AR-hit (Arora et al., "Zoology", arXiv 2312.04927): the last token of an n-gram (here a pair) that
is in the context and is not frequent in the training text. Notation: T tokens.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from diffx.config import RunError, UserError
from diffx.config.checks import refuse
from diffx.data import open_data
from diffx.data.shards import TokenArray
from diffx.data.sources import label
from diffx.evaluation.model import LanguageModel
from diffx.evaluation.suite import Context, Example, Record
from diffx.results.declare import Declaration, Metric, Picture, Table, metrics

_GROUP = 256  # documents tokenized at once
_BLOCK = 1 << 24  # training tokens counted at once


def plan(context: Context) -> list[Example]:
    """Cut ``suite.texts`` texts of ``suite.length`` scored tokens out of the documents."""
    suite, lm = context.suite, context.lm
    length, texts = int(suite.length or lm.context), len(context.limited(range(suite.texts)))
    context.check_length("suite.length", length)
    documents = context.documents()
    context.sources["tokenizer"] = lm.tokenizer.fingerprint  # texts are cut in tokens
    groups = [documents[first : first + _GROUP] for first in range(0, len(documents), _GROUP)]
    encoded = [tokens for group in groups for tokens in lm.encode_batch(group)]
    corpus = np.concatenate([np.array([lm.tokenizer.eot_id, *text], np.int32) for text in encoded])
    size = length + 1 - len(lm.prefix)  # the first token of a text is not scored
    reason = f"{label(context.data)} has {len(corpus)} tokens, and each text takes {size}"
    refuse(len(corpus) < texts * size, f"suite.texts={texts}", f"{reason}; ask for less")
    prefix, step = np.array(lm.prefix, np.int32), len(corpus) // texts
    examples = []
    for number in range(texts):
        tokens = np.concatenate([prefix, corpus[number * step : number * step + size]])
        examples.append(Example(f"{length}/{number}", {"tokens": tokens, "corpus": corpus}))
    return examples


def answer(context: Context, examples: list[Example]) -> Iterator[Record]:
    """Score the texts one by one."""
    suite = context.suite
    texts = [example.data["tokens"] for example in examples]
    where, train = _training_tokens(context, examples[0].data["corpus"])
    wanted = np.unique(np.concatenate([pair_keys(text)[repeated(text)] for text in texts]))
    frequent = wanted[count_pairs(train, wanted) > suite.frequent]
    for example, text in zip(examples, texts, strict=True):
        tokens = text.tolist()
        loss = token_losses(context.lm, tokens, suite.chunk)
        hits, n = repeated(text) & ~np.isin(pair_keys(text), frequent), len(loss)
        means = {"nll": loss, "nll/ar_hit": loss[hits], "nll/others": loss[~hits]}
        rows: list[Record] = [
            {"metric": name, "value": float(values.mean()), "weight": len(values), "length": n}
            for name, values in (means | {"ar_hit share": hits}).items()
            if len(values)
        ]
        sums = loss.cumsum()
        for position in (*(1 << power for power in range((n - 1).bit_length())), n):
            value = float(sums[position - 1] / position)
            rows.append({"metric": "cumulative nll", "value": value, "position": position})
        record = {"id": example.id, "by": {}, "scores": {}, "rows": rows, "tokens": n}
        record |= {"ar_hits": int(hits.sum()), "begin": context.lm.decode(tokens[:32])}
        yield record | {"frequent": f"over {suite.frequent} times in {where}"}


def pair_keys(tokens: np.ndarray) -> np.ndarray:
    """A number for each token (T,) and the one after it, int64 (T - 1,)."""
    tokens = tokens.astype(np.int64)
    return (tokens[:-1] << 32) | tokens[1:]


def repeated(tokens: np.ndarray) -> np.ndarray:
    """For each token (T,) but the first, whether its pair is repeated, bool (T - 1,)."""
    keys = pair_keys(tokens)
    _, first, which = np.unique(keys, return_index=True, return_inverse=True)
    return first[which] < np.arange(len(keys))


def count_pairs(tokens: TokenArray, wanted: np.ndarray) -> np.ndarray:
    """Counts, int64 (n,), of ``wanted`` pairs, sorted keys (n,), in ``tokens``."""
    counts = np.zeros(len(wanted), np.int64)
    for start in range(0, len(tokens) - 1 if len(wanted) else 0, _BLOCK):
        keys = pair_keys(tokens.read(start, min(start + _BLOCK + 1, len(tokens)))[0])
        places = np.minimum(np.searchsorted(wanted, keys), len(wanted) - 1)
        counts += np.bincount(places[wanted[places] == keys], minlength=len(wanted))
    return counts


def _training_tokens(context: Context, corpus: np.ndarray) -> tuple[str, TokenArray]:
    """The training tokens of the model, or where they are missing those of the evaluated corpus."""
    data = context.lm.loaded.data
    if data is not None:
        try:
            return "the training tokens", open_data(data, context.lm.tokenizer).train
        except (UserError, RunError) as error:
            counted = "frequent pairs are counted in the evaluated corpus"
            context.reporter.warn(f"{counted}: the training text is missing ({error})")
    return "the evaluated corpus", TokenArray([corpus])


def token_losses(lm: LanguageModel, tokens: Sequence[int], chunk: int) -> np.ndarray:
    """Negative log-likelihood, in nats, of each token (T,) but the first, fp64 (T - 1,).

    With a key/value cache ``chunk`` tokens are read at a time, else all at once.
    """
    inputs, targets = list(tokens[:-1]), torch.tensor(tokens[1:], device=lm.device)
    if not lm.caches:
        places = torch.arange(len(inputs))
        ids = torch.tensor([inputs])
        return -lm.score(ids, torch.zeros_like(places), places, targets)[0].double().cpu().numpy()
    state = lm.start([inputs[:1]])
    losses = [F.cross_entropy(state.logits, targets[:1], reduction="none")]
    for start in range(1, len(inputs), chunk):
        state, (logits,) = lm.extend(state, [0], [inputs[start : start + chunk]])
        part = targets[start : start + chunk]
        losses.append(F.cross_entropy(logits, part, reduction="none"))
    return torch.cat(losses).double().cpu().numpy()


def declare(context: Context) -> Declaration:
    """The loss, its two parts (each token counts the same), and the loss of the first tokens."""
    loss = {"unit": "nats per token", "better": "lower"}
    parts = ["nll/ar_hit", "nll/others"]
    first, title = ["cumulative nll"], "Loss of the first tokens"
    axes: Any = {"x": "position", "xlabel": "tokens", "log": "x"}
    axes |= {"ylabel": "nats per token up to there"}
    return Declaration(
        metrics=[
            *metrics(["nll", *parts], aggregate="weighted mean", **loss),
            Metric(name="ar_hit share", better="none", aggregate="weighted mean"),
            *metrics(first, **loss),
        ],
        tables=[
            Table(by=["length"], label="{length} tokens", metrics=["nll", *parts, "ar_hit share"]),
            Table(by=["position"], label="first {position} tokens", metrics=first),
        ],
        pictures=[
            Picture(kind="curve", title=title, metrics=first, **axes),
            Picture(kind="bars", title="Repeated pairs and the rest", metrics=parts, x="metric"),
        ],
        notes=[
            f"AR-hits: without pairs seen over {context.suite.frequent} times in training; bands "
            "and lines: 95% intervals over texts."
        ],
    )
