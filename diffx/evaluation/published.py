"""What the two papers report, to stand beside our figures and always labelled "(paper)": none of it was measured here.

Shares and accuracies are fractions of 1, as our suites give them, whatever the papers print.
"""

TRANSFORMER, DIFF = "Transformer-3B (paper)", "DIFF-3B (paper)"

_DIFFERENTIAL, _DEX = "Ye et al., Differential Transformer, arXiv 2410.05258", "Kong et al., arXiv 2505.16333"
_SOURCES = {
    "paper_lm": f"{_DIFFERENTIAL}, tables 1 and 9; whether a figure is acc or acc_norm is not stated, so it stands beside both",
    "dex_lm": f"{_DEX}: average gains over the pretrained model in 11 benchmarks",
    "retrieval": f"{_DIFFERENTIAL}, section 3.4: 4K tokens for all cases but N=8 R=1, which is up to 64K; by generation, mean over depths",
    "attention_allocation": f"{_DIFFERENTIAL}, table 3: 4K tokens",
    "icl": f"{_DIFFERENTIAL}, section 3.5: average gain over the numbers of shots, up to 64K tokens",
    "icl_order": f"{_DIFFERENTIAL}, section 3.5: best minus worst accuracy over orders",
    "hallucination": f"{_DIFFERENTIAL}, section 3.6: 100 samples a task, accurate or not by a judge model",
    "math": f"{_DIFFERENTIAL}: average of eight benchmarks after distillation on long reasoning",
    "outliers": f"{_DIFFERENTIAL}, table 5: 0.4M tokens",
    "speed": (
        f"{_DIFFERENTIAL}: tokens/s of DIFF as a share of the Transformer's on an H100, forward and backward 0.916 (3B, 2K tokens), 0.897 "
        "(3B, 4K), 0.944 (13B, 2K), forward alone 0.914, 0.913, 0.952"
    ),
}

# (Transformer, DIFF) by suite, metric and group.
_PAIRS: dict[str, dict[str, dict[str, tuple[float, float]]]] = {
    "retrieval": {
        "greedy": {
            "N=1 R=1": (1.00, 1.00),
            "N=2 R=2": (0.85, 0.92),
            "N=4 R=2": (0.62, 0.84),
            "N=6 R=2": (0.55, 0.85),
            "N=8 R=1 8K": (0.95, 1.00),
            "N=8 R=1 16K": (0.84, 0.94),
            "N=8 R=1 24K": (0.78, 0.87),
            "N=8 R=1 32K": (0.64, 0.83),
            "N=8 R=1 40K": (0.50, 0.83),
            "N=8 R=1 48K": (0.75, 0.92),
            "N=8 R=1 56K": (0.78, 0.84),
            "N=8 R=1 64K": (0.52, 0.86),
        }
    },
    "attention_allocation": {
        "answer": {
            "depth 0%": (0.03, 0.27),
            "depth 25%": (0.03, 0.30),
            "depth 50%": (0.03, 0.31),
            "depth 75%": (0.07, 0.32),
            "depth 100%": (0.09, 0.40),
        },
        "noise": {
            "depth 0%": (0.51, 0.01),
            "depth 25%": (0.54, 0.02),
            "depth 50%": (0.52, 0.02),
            "depth 75%": (0.49, 0.02),
            "depth 100%": (0.49, 0.01),
        },
    },
    "icl_order": {
        "random max - min": {"trec": (0.190, 0.040), "trec_fine": (0.240, 0.090), "banking77": (0.130, 0.090), "clinc150": (0.120, 0.060)},
        "alternating max - min": {"trec": (0.567, 0.134)},
    },
    "hallucination": {
        "faithful": {
            "xsum": (0.44, 0.53),
            "cnn_dm": (0.32, 0.41),
            "multinews": (0.42, 0.61),
            "qasper": (0.28, 0.39),
            "hotpotqa": (0.36, 0.46),
            "2wikimqa": (0.29, 0.36),
        }
    },
    "math": {"accuracy": {"average": (0.433, 0.508)}, "tokens": {"average": (6913, 6144)}},
    "outliers": {
        "top-1": {"attention logits": (318.0, 38.8), "hidden states": (3608.6, 1688.2)},
        "top-2": {"attention logits": (308.2, 38.8), "hidden states": (3607.4, 1672.5)},
        "top-3": {"attention logits": (304.9, 37.3), "hidden states": (3603.6, 1672.1)},
        "top-10": {"attention logits": (284.7, 32.0), "hidden states": (3552.1, 1624.3)},
        "top-100": {"attention logits": (251.5, 27.4), "hidden states": (2448.2, 740.9)},
        "median": {"attention logits": (5.4, 3.3), "hidden states": (0.6, 1.2)},
    },
}

# Percent by number of shots and model, in the order of _TASKS, their average last.
_TASKS = ("arc_challenge", "arc_easy", "boolq", "hellaswag", "openbookqa", "piqa", "winogrande", "average")
_TRANSFORMER_350B, _DIFF_350B = "Transformer-3B, 350B tokens (paper)", "DIFF-3B, 350B tokens (paper)"
_HARNESS = {
    0: {
        _TRANSFORMER_350B: (32.2, 66.8, 62.9, 63.4, 26.2, 74.5, 61.6, 55.4),
        _DIFF_350B: (33.0, 68.3, 60.1, 66.2, 27.6, 75.5, 62.7, 56.2),
        "DIFF-3B, 1T tokens (paper)": (37.8, 72.9, 69.0, 71.4, 29.0, 76.8, 67.1, 60.6),
    },
    5: {
        _TRANSFORMER_350B: (34.0, 69.5, 65.3, 63.4, 25.0, 75.2, 62.6, 56.4),
        _DIFF_350B: (35.0, 69.5, 67.2, 66.9, 27.6, 76.1, 63.8, 58.0),
    },
}
_AVERAGES_1T = {"OpenLLaMA-3B-v2, 1T tokens (paper)": 0.575, "StableLM-base-alpha-3B-v2, 1T tokens (paper)": 0.568}

_PAIR_GAIN = "DIFF - Transformer (paper)"
_GAINS: dict[str, dict[str, dict[str, float]]] = {
    "icl": {
        "trec": {_PAIR_GAIN: 0.180},
        "trec_fine": {_PAIR_GAIN: 0.216},
        "banking77": {_PAIR_GAIN: 0.104},
        "clinc150": {_PAIR_GAIN: 0.052},
    },
    "dex_lm": {
        "average (0-shot)": {"DEX, Llama-3B (paper)": 0.040, "LoRA, Llama-3B (paper)": 0.016, "full fine-tuning, Llama-3B (paper)": 0.013}
    },
}


def published(suite: str, group: str, metric: str) -> dict[str, float]:
    """Figures of the papers for one row of a suite's table.

    Args:
        suite: such as ``retrieval``.
        group: the row, such as ``N=4 R=2`` or ``piqa (5-shot)``.
        metric: such as ``greedy``.

    Returns:
        Model and label to figure, such as ``{"Transformer-3B (paper)": 0.62, "DIFF-3B (paper)": 0.84}``; empty where there is none.
    """
    if suite == "paper_lm" and metric in ("acc", "acc_norm"):
        task, _, shots = group.removesuffix("-shot)").partition(" (")
        if task not in _TASKS or shots not in ("0", "5"):
            return {}
        column = _TASKS.index(task)
        figures = {label: round(row[column] / 100, 3) for label, row in _HARNESS[int(shots)].items()}
        return figures | (_AVERAGES_1T if task == "average" and shots == "0" else {})
    pair = _PAIRS.get(suite, {}).get(metric, {}).get(group)
    return dict(zip((TRANSFORMER, DIFF), pair, strict=True)) if pair else {}


def published_gain(suite: str, group: str, metric: str) -> dict[str, float]:
    """How much higher a paper reports its method than the model without it, in the row's own unit; empty where it does not say.

    ``icl`` and ``dex_lm`` have nothing but gains, over all metrics of accuracy; elsewhere it is DIFF minus Transformer.
    """
    if suite in _GAINS:
        return dict(_GAINS[suite].get(group, {})) if metric.startswith("acc") else {}
    figures = published(suite, group, metric)
    for theirs, ours in ((TRANSFORMER, DIFF), (_TRANSFORMER_350B, _DIFF_350B)):
        if ours in figures:
            return {_PAIR_GAIN: round(figures[ours] - figures[theirs], 4)}
    return {}


def source(suite: str) -> str:
    """The paper, section and settings behind a suite's published figures; empty where there are none."""
    return _SOURCES.get(suite, "")
