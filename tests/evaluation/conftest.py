import json
import shutil

import pytest

from diffx.config.model import MODEL_CONFIGS
from diffx.evaluation.model import LanguageModel
from diffx.loading import Loaded
from diffx.models import build_model, init_weights

SHAPE = {
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "intermediate_size": 64,
    "init_std": 0.2,
}


@pytest.fixture
def wrap(tokenizer, tmp_path):
    """Make a ``LanguageModel`` of a model that reads bytes: ``wrap(model)``."""

    def make(model, limit=None):
        eot = tokenizer.eot_id
        loaded = Loaded(
            model.eval(), tokenizer, "tiny", "f" * 64, tmp_path / "run", 0, 256, limit, [eot], {eot}
        )
        return LanguageModel(loaded)

    return make


@pytest.fixture
def tiny(tokenizer, wrap):
    """Make a ``LanguageModel`` of our own with random weights: ``tiny("diff_v1")``."""

    def make(kind="diff_v1", seed=0, **shape):
        model = build_model(MODEL_CONFIGS[kind](**(SHAPE | shape), vocab_size=tokenizer.vocab_size))
        init_weights(model, seed)
        return wrap(model)

    return make


CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<{{ message.role }}>{{ message.content }}<|endoftext|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="session")
def chat_folder(hf_folder, tmp_path_factory):
    """The tiny Llama with a chat template."""
    folder = tmp_path_factory.mktemp("hub") / "tiny-chat"
    shutil.copytree(hf_folder, folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


@pytest.fixture(scope="session")
def documents(tmp_path_factory):
    """A file of short documents that differ."""
    path = tmp_path_factory.mktemp("documents") / "documents.jsonl"
    rows = (
        {"text": f"Note {n}. The square of {n} is {n * n}. Nothing else is known of it. " * 3}
        for n in range(100)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def summarize():
    """The rows that a suite makes of records, by label and metric; drawn if ``path`` is given."""
    from diffx.evaluation.run import make_rows
    from diffx.results.aggregate import aggregate
    from diffx.results.draw import draw_results

    def make(module, context, records, path=None):
        declaration = module.declare(context)
        assert (
            type(declaration).from_json(json.loads(json.dumps(declaration.as_json())))
            == declaration
        )
        frame = make_rows(module, context, records, declaration)
        rows = aggregate(frame, declaration)
        if path is not None:
            draw_results(rows, frame.to_dict("records"), declaration, "tiny", path)
        by_name = {(row["label"], row["metric"]): row for row in rows}
        assert len(by_name) == len(rows), "two rows of one name"
        return by_name

    return make
