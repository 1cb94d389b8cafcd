"""Adapters of finished runs on a pretrained model: loaded, switched, folded, pushed to the hub."""

import copy
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download
from torch import Tensor, nn
from transformers import PreTrainedModel

from diffx.config import UserError
from diffx.config.bridge import from_plain
from diffx.config.checks import refuse
from diffx.config.dex import DexConfig, Variant
from diffx.data.hub import asking_hub
from diffx.dex.attach import attach, fold
from diffx.dex.layer import DexProjection, projection_weight
from diffx.dex.layout import check_heads, find_layers
from diffx.dex.pretrained import fingerprint_of, load_pretrained
from diffx.errors import reason
from diffx.files import read_json
from diffx.hub.card import CARD
from diffx.models.tensors import read_tensors

DESCRIPTION, BRANCH, TUNED = "adapter.json", "branch.safetensors", "tuned.safetensors"
_FILES = [DESCRIPTION, BRANCH, TUNED, CARD]


@dataclass
class _Adapter:
    folder: Path = Path()
    tuned: dict[str, Tensor] = field(default_factory=dict)  # weights, by parameter name
    branches: dict[str, DexProjection] = field(default_factory=dict)  # by output projection


@dataclass
class _Description:  # adapter.json
    dex: DexConfig
    base: dict[str, Any]
    heads: list[list[int]]
    step: int


class Adapters:
    """A pretrained model, changed in place, with named adapters, of which at most one is active.

    The original weights are kept and put back, so that no rounding error remains. ``fingerprint``
    is that of the weights; with None, adapters of other weights are not refused.

    Raises:
        UserError: the model has a branch already, or its attention cannot be analysed.
    """

    def __init__(self, model: PreTrainedModel, fingerprint: str | None = None):
        self.model, self.fingerprint = model, fingerprint
        self.active: str | None = None  # the name of the active adapter
        self.folded = False  # whether its branch is folded into the output projections
        self._adapters: dict[str, _Adapter] = {}
        self._layers = find_layers(model)
        self._parameters = dict(model.named_parameters())
        self._originals: dict[str, Tensor] = {}  # of the parameters that some adapter replaces
        names = sorted({name for layer in self._layers for name in layer.names})
        self._modules = {name: model.get_submodule(name) for name in names}

    @property
    def names(self) -> list[str]:
        """The names of the adapters, in the order of loading."""
        return list(self._adapters)

    def load(self, folder: str | Path, name: str = "default", revision: str | None = None) -> None:
        """Load and activate an adapter: the ``adapter/`` of a run, or a repository of the hub.

        Raises:
            UserError: the name is taken, or the adapter is damaged or of another model.
        """
        refuse(name in self._adapters, f"name={name}", "an adapter has it; choose another name")
        path = _fetched(folder, revision)
        try:
            described = from_plain(_Description, read_json(path / DESCRIPTION))
        except UserError as error:
            raise UserError(f"{path / DESCRIPTION} cannot be used: {error}") from error
        known = described.base.get("fingerprint")
        other = f"it is an adapter of other weights ({described.base.get('name')}, {known})"
        refuse(self.fingerprint not in (None, known), f"folder={path}", other)
        check_heads(f"folder={path}", self._layers, described.heads)
        with self.disabled():
            self._adapters[name] = self._make(path, described)
        self.activate(name)

    def activate(self, name: str | None) -> None:
        """Make an adapter the active one, its branch not folded; None gives the pretrained model.

        Raises:
            UserError: no adapter has the name.
        """
        self._place(name, False)

    @contextmanager
    def disabled(self) -> Iterator[PreTrainedModel]:
        """Give the pretrained model within the context."""
        active, folded = self.active, self.folded
        self.activate(None)
        try:
            yield self.model
        finally:
            self._place(active, folded)

    def fold(self) -> None:
        """Fold the branch of the active adapter into the output projections, in fp64.

        Raises:
            UserError: no adapter is active.
        """
        self._get(self.active)
        self._place(self.active, True)

    def unfold(self) -> None:
        """Undo ``fold``, bit for bit."""
        self._place(self.active, False)

    def save(self, folder: str | Path, name: str | None = None) -> Path:
        """Copy an adapter (None: the active one) and its model card into a new or empty folder.

        Raises:
            UserError: no adapter has the name, or the folder holds files.
        """
        source, target = self._get(name or self.active).folder, Path(folder)
        taken = target.exists() and (not target.is_dir() or any(target.iterdir()))
        refuse(taken, f"folder={folder}", "it exists; choose another")
        shutil.copytree(
            source, target, ignore=lambda _, names: {*names} - {*_FILES}, dirs_exist_ok=True
        )
        return target

    def push_to_hub(
        self,
        repo_id: str,
        name: str | None = None,
        *,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload a DEX adapter",
    ) -> str:
        """Push an adapter (None: the active one) and its model card to the hub.

        The repository is created if it does not exist. ``private=None`` is the default of the user,
        ``token=None`` what ``hf auth login`` stored. Returns the URL of the commit.
        """
        folder, api = self._get(name or self.active).folder, HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        options: Any = {"commit_message": commit_message, "allow_patterns": _FILES}
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **options).commit_url)

    def _get(self, name: str | None) -> _Adapter:
        if name is None or name not in self._adapters:
            reason = "no adapter is active" if name is None else "no adapter has it"
            raise UserError(f"name={name} cannot be used: {reason}; accepted: {self.names}")
        return self._adapters[name]

    def _make(self, path: Path, described: _Description) -> _Adapter:
        """Build an adapter by the code that a run uses, on a copy that shares unchanged weights."""
        config, originals = described.dex, self._parameters
        full = config.variant is Variant.full
        changed = list(originals) if full else [f"{name}.weight" for name in self._modules]
        parameters = {
            name: nn.Parameter(original.data.clone() if name in changed else original.data, False)
            for name, original in originals.items()
        }
        memo: dict[int, Any] = {id(originals[name]): parameters[name] for name in originals}
        model, steps = copy.deepcopy(self.model, memo), int(config.anneal_steps or 0)
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            adapted = attach(model, self._layers, config, described.heads, steps, seed=0)
        weights: dict[str, Tensor] = {}
        for file in (BRANCH, TUNED):
            trained = adapted.trained().items()
            if shapes := {name: value.shape for name, value in trained if file_of(name) == file}:
                weights |= read_tensors(path / file, shapes)
        adapted.load(weights, described.step, self.model.dtype)
        fold(adapted, keep_branch=True)
        branches = {}
        for layer, branch in zip(self._layers, adapted.branches, strict=False):  # or there are none
            branch.proj = self._modules[layer.output]
            branches[layer.output] = branch
        self._originals |= {name: originals[name].data for name in changed}
        tuned = {name: parameters[name].data.to(originals[name].dtype) for name in changed}
        return _Adapter(path, tuned, branches)

    @torch.no_grad()
    def _place(self, name: str | None, folded: bool) -> None:
        """Put the weights and branches of an adapter, or the original weights, into the model."""
        adapter = _Adapter() if name is None else self._get(name)
        for key, original in self._originals.items():
            parameter = self._parameters[key]  # the model may have been moved since
            parameter.data = adapter.tuned.get(key, original).to(parameter.device, parameter.dtype)
        for layer in self._layers:
            module = self._modules[layer.output]
            weight = projection_weight(module)
            if branch := adapter.branches.get(layer.output):
                branch.to(weight.device)
                if folded:
                    weight.data = branch.folded_weight().to(weight.dtype)
                else:
                    module = branch
            self.model.set_submodule(layer.output, module)
        self.active, self.folded = name, folded and name is not None


def load_adapter(
    model: str | PreTrainedModel | Adapters,
    folder: str | Path,
    name: str = "default",
    *,
    dtype: torch.dtype | str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Adapters:
    """Load an adapter (``adapter/`` of a run, or a repository of the hub) on its base; activate it.

    ``model`` is the base (hub name, folder or model), or the result of an earlier call, for a
    further adapter. The keywords are for a base that is loaded here by name.

    Raises:
        UserError: the base cannot be loaded, a keyword does not apply, or the adapter is damaged or
            of another model.
    """
    given = {"dtype": dtype != "auto", "revision": revision, "trust_remote_code": trust_remote_code}
    if isinstance(model, str):
        cpu = torch.device("cpu")
        base = load_pretrained("base", model, dtype, cpu, revision, trust_remote_code)
        model = Adapters(base.model, base.fingerprint)
    else:
        for key in given:
            advice = "give the name of its base, or leave the option out"
            refuse(bool(given[key]), f"{key}=", advice, "a model that is loaded already")
    if not isinstance(model, Adapters):
        model = Adapters(model, fingerprint_of(model))
    model.load(folder, name)
    return model


def file_of(name: str) -> str:
    """The file of an adapter that holds a trained parameter."""
    return BRANCH if name.endswith((".w_d", ".lambda_learn")) else TUNED


def _fetched(folder: str | Path, revision: str | None) -> Path:
    path = Path(folder)
    if path.exists() or path.is_absolute() or len(path.parts) != 2:
        return path
    try:
        with asking_hub(str(folder)):
            return Path(snapshot_download(str(folder), revision=revision, allow_patterns=_FILES))
    except Exception as error:  # huggingface_hub, httpx and the cache raise their own exceptions
        raise UserError(
            f"folder={folder} cannot be used: it is no folder here, and from the hub it cannot be "
            f"loaded: {reason(error)}; it must be the adapter/ of a run"
        ) from error
