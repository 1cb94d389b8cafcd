"""Loss by position in long texts, and where it falls: on repeated pairs of tokens (AR-hit) or on the rest.

AR-hit (Arora et al., "Zoology", arXiv 2312.04927; arXiv 2410.05258, ablations): the last token of an n-gram that the context holds
already and that is not frequent in the training text, so that it can be known from the context alone. Here n is 2.

Notation: T tokens of a text, V vocabulary.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from diffx.config import RunError, UserError
from diffx.data import open_data
from diffx.data.shards import TokenArray
from diffx.data.sources import label
from diffx.evaluation.model import LanguageModel
from diffx.evaluation.suite import Context, Example, Record
from diffx.results.declare import Declaration, Metric, Picture, Table, metrics

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
        raise UserError(
            f"suite.length={length} cannot be used: the model reads {lm.limit} tokens at most"
        )
    documents = context.documents()
    context.sources["tokenizer"] = context.lm.tokenizer.fingerprint  # texts are cut in tokens
    groups = (
        lm.encode_batch(documents[first : first + _GROUP])
        for first in range(0, len(documents), _GROUP)
    )
    corpus = np.concatenate(
        [np.array([lm.tokenizer.eot_id, *tokens], np.int32) for group in groups for tokens in group]
    )
    own = (
        length + 1 - len(lm.prefix)
    )  # the first token of a text is only read, and the last one only scored
    if len(corpus) < texts * own:
        source = label(context.data)
        raise UserError(
            f"suite.texts={texts} cannot be used: {source} has {len(corpus)} tokens, and each text takes {own}; ask for less"
        )
    starts = [text * (len(corpus) // texts) for text in range(texts)]
    rows = [
        np.concatenate([np.array(lm.prefix, np.int32), corpus[start : start + own]])
        for start in starts
    ]
    return [
        Example(f"{length}/{number}", {"tokens": row, "corpus": corpus})
        for number, row in enumerate(rows)
    ]


def answer(context: Context, examples: list[Example]) -> Iterator[Record]:
    """Score the texts one by one."""
    suite = context.suite
    if not examples:
        return
    repeats = [repeated(example.data["tokens"]) for example in examples]
    pairs = [pair_keys(example.data["tokens"]) for example in examples]
    where, train = _training_tokens(context, examples[0].data["corpus"])
    wanted = np.unique(
        np.concatenate([keys[repeat] for keys, repeat in zip(pairs, repeats, strict=True)])
    )
    frequent = wanted[count_pairs(train, wanted) > suite.frequent]
    for example, keys, repeat in zip(examples, pairs, repeats, strict=True):
        loss = token_losses(context.lm, example.data["tokens"].tolist(), suite.chunk)
        hits = repeat & ~np.isin(keys, frequent)
        length = {"length": len(loss)}
        rows = [{"metric": "nll", "value": float(loss.mean()), "weight": len(loss), **length}]
        for name, part in (("ar_hit", hits), ("others", ~hits)):
            if part.any():
                value, weight = float(loss[part].mean()), int(part.sum())
                rows.append({"metric": f"nll/{name}", "value": value, "weight": weight, **length})
        share = {"value": float(hits.mean()), "weight": len(loss), **length}
        rows.append({"metric": "ar_hit share", **share})
        sums = loss.cumsum()
        for position in _positions(len(loss)):
            value = float(sums[position - 1] / position)
            rows.append({"metric": "cumulative nll", "value": value, "position": position})
        yield {
            "id": example.id,
            "by": {},
            "scores": {},
            "rows": rows,
            "tokens": len(loss),
            "ar_hits": int(hits.sum()),
            "frequent": f"over {suite.frequent} times in {where}",
            "begin": context.lm.decode(example.data["tokens"][:32].tolist()),
        }


def _positions(length: int) -> list[int]:
    """The powers of two below the length, and the length."""
    return [*(1 << power for power in range((length - 1).bit_length())), length]


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
            context.reporter.warn(
                f"frequent pairs are counted in the evaluated corpus: the training text is not here ({error})"
            )
    return "the evaluated corpus", TokenArray([corpus])


def token_losses(lm: LanguageModel, tokens: Sequence[int], chunk: int) -> np.ndarray:
    """Negative log-likelihood, in nats, of each token (T,) but the first, fp64 (T - 1,).

    The text is read behind a key/value cache, ``chunk`` tokens at a time: memory grows with T, and with chunk · V. Without a cache it is
    read at once.
    """
    inputs, targets = list(tokens[:-1]), torch.tensor(tokens[1:], device=lm.device)
    if not lm.caches:
        places = torch.arange(len(inputs))
        return (
            -lm.score(torch.tensor([inputs]), torch.zeros_like(places), places, targets)[0]
            .double()
            .cpu()
            .numpy()
        )
    state = lm.start([inputs[:1]])
    losses = [F.cross_entropy(state.logits, targets[:1], reduction="none")]
    for start in range(1, len(inputs), chunk):
        part = inputs[start : start + chunk]
        state, logits = lm.extend(state, [0], [part])
        losses.append(
            F.cross_entropy(logits[0], targets[start : start + len(part)], reduction="none")
        )
    return torch.cat(losses).double().cpu().numpy()


def declare(context: Context) -> Declaration:
    """The whole loss, its two parts (each token counts the same), and the loss of the first tokens."""
    loss = {"unit": "nats per token", "better": "lower"}
    parts = [f"nll/{name}" for name in ("ar_hit", "others")]
    frequent = f"AR-hits leave out pairs seen over {context.suite.frequent} times in training"
    return Declaration(
        metrics=[
            *metrics(["nll", *parts], aggregate="weighted mean", **loss),
            Metric(name="ar_hit share", better="none", aggregate="weighted mean"),
            *metrics(["cumulative nll"], **loss),
        ],
        tables=[
            Table(by=["length"], label="{length} tokens", metrics=["nll", *parts, "ar_hit share"]),
            Table(by=["position"], label="first {position} tokens", metrics=["cumulative nll"]),
        ],
        pictures=[
            Picture(
                kind="curve",
                title="Loss of the first tokens",
                metrics=["cumulative nll"],
                x="position",
                xlabel="tokens",
                ylabel="nats per token up to there",
                log="x",
            ),
            Picture(kind="bars", title="Repeated pairs and the rest", metrics=parts, x="metric"),
        ],
        notes=[f"{frequent}; bands and lines: 95% intervals over texts."],
    )
