"""Every shipped config composes, is valid, and is read back from config.yaml unchanged."""

import dataclasses
import itertools

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from diffx.config import UserError
from diffx.config.bridge import GROUPS, JOBS, load_config, save_config, to_typed
from diffx.config.composition import CONFIGS, compose_config, composer, config_groups

KINDS = list(GROUPS["model"])
PAPER_SIZES = {
    "830m": (1536, 24, 8),
    "1.4b": (2048, 24, 8),
    "2.8b": (2560, 32, 10),
    "6.8b": (4096, 32, 16),
    "13.1b": (5120, 40, 20),
}
PAPER_SIZES["3b"] = (3072, 28, 12)  # (D, layers, diff heads)
ABLATIONS = {
    "diff_v1_no_norm": {"sublayer_norm": False},
    "diff_v1_lambda_init_0.5": {"lambda_init": 0.5},
    "diff_v1_lambda_init_0.8": {"lambda_init": 0.8},
    "diff_v1_half_head_dim": {"halve": "head_dim"},
    "diff_v1_plus": {"sign": "plus"},
    "diff_v2_across": {"pairing": "across"},
    "diff_v2_lambda_linear": {"lambda_form": "linear"},
    "diff_v2_lambda_one": {"lambda_form": "one"},
    "diff_v2_ratio_2": {"ratio": 2},
    "transformer_gated_element": {"gate": "element"},
    "transformer_sink_zero": {"sink": "zero"},
    "transformer_wide_head_norm": {"sublayer_norm": True},
}
NEEDED = {
    "text": ["data.path=x"],
    "hub": ["data.name=x"],
    "shards": ["data.path=x"],
    "hf": ["tokenizer.name=x"],
}
EXPERIMENTS = {  # and the jobs of each
    "diff/default_run": 6,
    "diff/architectures": 24,
    "diff/ablations": 24,
    "diff/scaling_nano": 8,
    "diff/scaling_paper": 6,
    "diff/scaling_paper_large": 4,
    "diff/retrieval_tiny": 4,
    "recipes/laptop": 1,
    "recipes/gpu": 1,
    "recipes/recall": 1,
    "diff/stable_3b": 1,
    "diff/long_context_64k": 1,
    "diff/low_bits": 1,
    "dex/controls": 24,
    "dex/smollm2": 12,
}


def names(folder):
    return {
        str(path.relative_to(CONFIGS / folder).with_suffix(""))
        for path in (CONFIGS / folder).rglob("*.yaml")
    }


SIZES = sorted(names("size"))


def compose(name, *words, several=False):
    with composer() as app:
        cfg = compose_config(app, name, list(words), several=several)
    OmegaConf.set_struct(cfg, False)
    return cfg, cfg.pop("hydra")


def job_of(name, *words):
    return to_typed(compose(name, *words)[0], JOBS[name])


def check_round_trip(job, folder):
    save_config(job, folder / "config.yaml")
    assert load_config(folder / "config.yaml") == job
    assert "!!" not in (folder / "config.yaml").read_text(), "YAML with Python tags"
    assert [path.name for path in folder.iterdir()] == ["config.yaml"], (
        "something else was left behind"
    )


def test_each_group_offers_what_the_dataclasses_define():
    with composer() as app:
        offered = config_groups(app, "train")
    assert set(offered) == {"model", "size", "data", "tokenizer", "experiment"}
    assert set(offered["model"]) == {*KINDS, *(f"ablation/{name}" for name in ABLATIONS)}
    for group in ("data", "tokenizer"):
        assert set(offered[group]) == set(GROUPS[group])
    assert set(offered["experiment"]) == set(EXPERIMENTS)
    assert set(PAPER_SIZES) < set(offered["size"])


def test_a_glob_over_models_is_all_architectures():
    parsed = "model=glob(*)"
    with composer() as app:
        (word,) = OverridesParser.create(app.config_loader).parse_overrides([parsed])
        assert sorted(word.sweep_string_iterator()) == sorted(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_models(kind, tmp_path):
    job = job_of("train", f"model={kind}")
    assert job.model == GROUPS["model"][kind](), (
        "a model's YAML names its dataclass, whose defaults stand"
    )
    check_round_trip(job, tmp_path)


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_change_one_thing(name, tmp_path):
    job = job_of("train", f"model=ablation/{name}")
    plain = dataclasses.asdict(GROUPS["model"][job.model.kind]())
    assert {
        key: value for key, value in dataclasses.asdict(job.model).items() if value != plain[key]
    } == ABLATIONS[name]
    check_round_trip(job, tmp_path)


@pytest.mark.parametrize("size", SIZES)
def test_sizes_suit_every_architecture(size, tmp_path):
    job = job_of("train", "model=transformer", f"size={size}")
    check_round_trip(job, tmp_path)
    shape = {key: value for key, value in dataclasses.asdict(job.model).items() if key != "kind"}
    for kind, cls in GROUPS["model"].items():
        # The papers' H_kv = H does not divide 1.5 H, and has more pairs of keys than noise maps.
        refused = {"transformer_1p5h": r"num_kv_heads=\d+ .* 1\.5·num_heads", "diff_gda": "ratio=3"}
        if size in PAPER_SIZES and kind in refused:
            with pytest.raises(UserError, match=refused[kind]):
                cls(**shape)
        else:
            assert cls(**shape).kind == kind
    if size in PAPER_SIZES:
        model = job.model
        assert (model.hidden_size, model.num_layers, model.num_heads // 2) == PAPER_SIZES[size]
        assert model.head_dim == (96 if size == "830m" else 128)
        assert model.num_kv_heads == model.num_heads
        assert model.ffn_size == 8192 if size == "3b" else model.ffn_size % 256 == 0


@pytest.mark.parametrize(
    ("group", "kind"), [(group, kind) for group in ("data", "tokenizer") for kind in GROUPS[group]]
)
@pytest.mark.parametrize("name", ["train", "prepare"])
def test_data_and_tokenizers(name, group, kind, tmp_path):
    words = [f"{group}={kind}", *NEEDED.get(kind, []), *(["out=x"] if name == "prepare" else [])]
    if name == "prepare" and kind in ("shards", "retrieval", "recall"):
        with pytest.raises(UserError, match=f"data={kind} cannot be prepared"):
            job_of(name, *words)
        return
    job = job_of(name, *words)
    assert type(getattr(job, group)) is GROUPS[group][kind]
    check_round_trip(job, tmp_path)


def test_generate(tmp_path):
    check_round_trip(job_of("generate", "checkpoint=runs/x"), tmp_path)


@pytest.mark.parametrize(
    "experiment",
    [
        pytest.param(name, marks=pytest.mark.slow if jobs > 6 else ())
        for name, jobs in EXPERIMENTS.items()
    ],
)
def test_every_job_of_every_experiment(experiment, tmp_path):
    name, *own = ("adapt", "base=x") if experiment.startswith("dex/") else ("train",)
    if experiment == "diff/low_bits":
        name, own = "quantize", ["checkpoint=x"]
    cfg, hydra = compose(name, f"experiment={experiment}", several=True)
    given = [f"experiment={experiment}", *own, *NEEDED.get(cfg.data.kind if cfg.data else "", [])]
    parsed = OverridesParser.create().parse_overrides(
        [f"{key}={value}" for key, value in (hydra.sweeper.params or {}).items()]
    )
    axes = [
        [f"{word.get_key_element()}={value}" for value in word.sweep_string_iterator()]
        for word in parsed
    ]
    jobs = [job_of(name, *given, *words) for words in itertools.product(*axes)]
    assert len({str(job) for job in jobs}) == len(jobs) == EXPERIMENTS[experiment]
    for job in jobs:
        if name != "quantize":  # which saves no job
            check_round_trip(job, tmp_path)


@pytest.mark.parametrize(
    ("experiment", "steps", "warmup", "final_lr"),
    [
        ("scaling_paper", 40000, 375, 0.0),
        ("scaling_paper_large", 40000, 375, 0.0),
        ("stable_3b", 238419, 1000, 1.28e-5),
    ],
)
def test_paper_recipes(experiment, steps, warmup, final_lr):
    train = job_of("train", f"experiment=diff/{experiment}", "data.path=x").train
    assert (train.num_steps, train.warmup_steps) == (steps, warmup)
    assert train.lr * train.min_lr_ratio == pytest.approx(final_lr)
