"""A saved config is read back as it was, or refused in one line that says why."""

import pytest
import yaml

from diffx.config import UserError
from diffx.config.bridge import load_config, save_config
from diffx.config.data import BytesTokenizer, TextData
from diffx.config.model import DiffV1Config, LambdaScope
from diffx.config.train import Schedule, TrainConfig, TrainJob, WandbConfig


@pytest.fixture
def saved(tmp_path):
    job = TrainJob(
        model=DiffV1Config(lambda_init=0.5, lambda_scope=LambdaScope.head),
        data=TextData(path=["a b", "c=d,e"], prompt_key="question"),
        tokenizer=BytesTokenizer(),
        train=TrainConfig(tokens="1.5B", schedule=Schedule.wsd),
    )
    save_config(job, tmp_path / "config.yaml")
    return job, tmp_path / "config.yaml"


def test_round_trip_through_plain_yaml(saved):
    job, path = saved
    assert load_config(path) == job
    plain = yaml.safe_load(path.read_text())
    assert plain["train"]["schedule"] == "wsd"
    assert plain["model"]["lambda_scope"] == "head"
    assert plain["data"]["path"] == ["a b", "c=d,e"]


def put(config, key, value):
    *groups, name = key.split(".")
    for group in groups:
        config = config[group]
    config[name] = value


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train.stepz", 3, "train.stepz is not a key"),
        ("model.flavour", "odd", "model.flavour is not a key"),
        ("kind", "cook", "kind=cook must be one of train, adapt, prepare, generate"),
        ("model.kind", "diff_v9", "model.kind=diff_v9 must be one of transformer"),
        ("model", "diff_v1", "model.kind=None must be one of"),
        ("train", 5, "train must be a group of keys"),
        ("train.lr", "fast", "train.lr=fast cannot be used: it must be a number"),
        ("train.schedule", "wavy", "train.schedule=wavy cannot be used: it must be one of linear"),
        ("model.num_heads", 7, "model.num_heads=7 cannot be used"),
    ],
)
def test_what_another_version_or_a_slip_wrote_is_named(saved, key, value, message):
    _, path = saved
    config = yaml.safe_load(path.read_text())
    put(config, key, value)
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(UserError) as refused:
        load_config(path)
    assert message in str(refused.value)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "key", ["seed", "train.lr", "train.fused_attention", "model.lambda_init", "wandb"]
)
def test_a_key_that_an_older_version_did_not_write_takes_its_default(saved, key):
    job, path = saved
    config = yaml.safe_load(path.read_text())
    *groups, name = key.split(".")
    del (config[groups[0]] if groups else config)[name]
    path.write_text(yaml.safe_dump(config))
    part = getattr(job, groups[0]) if groups else job
    setattr(part, name, WandbConfig() if key == "wandb" else getattr(type(part)(), name))
    assert load_config(path) == job


def test_a_missing_key_without_a_default_is_named(saved):
    _, path = saved
    config = yaml.safe_load(path.read_text())
    del config["data"]["path"]
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match=r"data\.path is missing"):
        load_config(path)


@pytest.mark.parametrize(
    "content",
    [
        b"train: [",
        b"\xff\xfe",
        b"",
        b"- 1\n- 2\n",
        b"kind: !!python/object:os.system {}\n",
        b"[" * 2000,
        b"a: &a [1]\nb: *a\n",
    ],
)
def test_a_damaged_file_is_named(tmp_path, content):
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError) as refused:
        load_config(path)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        load_config(tmp_path / "nowhere" / "config.yaml")


TEXTS = [
    "${oc.env:HOME}",
    "a ${x",
    "\\${x}",
    "\\\\${x} \\",
    "$${x}",
    "${a:${b}} \\${c} ${",
    "two\\\\lines\n\\${oc.env:HOME} and \\n ${",
    'it\'s "${x}"\\',
    "1e3",
    "null",
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_that_looks_like_an_interpolation_is_kept(saved, text):
    job, path = saved
    job.train.sample_prompt, job.data.path = text, [text, text]
    save_config(job, path)
    assert load_config(path) == job
    save_config(load_config(path), path)
    assert load_config(path) == job


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.sample_prompt", "${oc.env:SECRET_OF_TEST}"),
        ("train.sample_prompt", "\\\\${oc.env:SECRET_OF_TEST}"),
        ("train.lr", "${oc.env:SECRET_OF_TEST}"),
        ("train.schedule", "${oc.env:SECRET_OF_TEST}"),
        ("train", "${oc.env:SECRET_OF_TEST}"),
        ("run.name", "${run.dir}"),
        ("wandb.project", "x${oc.env:SECRET_OF_TEST,y}"),
        ("data.path", ["a", "${oc.env:SECRET_OF_TEST}"]),
        ("data.path", [["a", {"b": "${oc.env:SECRET_OF_TEST}"}]]),
        ("data.path", [{"${oc.env:SECRET_OF_TEST}": 1}]),
        ("${oc.env:SECRET_OF_TEST}", 1),
        ("train.${oc.env:SECRET_OF_TEST}", 1),
        ("train.sample_prompt", "a ${"),
    ],
)
def test_an_interpolation_in_a_file_is_refused(saved, monkeypatch, key, value):
    monkeypatch.setenv("SECRET_OF_TEST", "0.123456")
    _, path = saved
    config = yaml.safe_load(path.read_text())
    groups, name = (
        (key.split(".", 1)[:1], key.split(".", 1)[1]) if key[0] != "$" and "." in key else ([], key)
    )
    (config[groups[0]] if groups else config)[name] = value
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(UserError) as refused:
        load_config(path)
    line = str(refused.value)
    assert str(path) in line and "\n" not in line and "0.123456" not in line
