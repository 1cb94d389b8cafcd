"""Adapters of finished runs on a pretrained model: loaded, switched, folded and pushed to the hub."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download
from torch import Tensor
from transformers import PreTrainedModel

from diffx.config import UserError
from diffx.config.bridge import from_plain
from diffx.config.dex import DexConfig, Variant
from diffx.data.hub import asking_hub
from diffx.dex.attach import attach, fold
from diffx.dex.layer import DexProjection, projection_weight
from diffx.dex.layout import find_layers
from diffx.dex.pretrained import fingerprint_of, load_pretrained
from diffx.errors import reason
from diffx.files import read_json, write_json
from diffx.hub.card import CARD, adapter_card
from diffx.models.tensors import read_tensors

DESCRIPTION, BRANCH, TUNED = "adapter.json", "branch.safetensors", "tuned.safetensors"
_FIELDS = {"dex": dict, "base": dict, "heads": list, "step": int}


@dataclass
class _Adapter:
    folder: Path
    tuned: dict[str, Tensor]  # replace the model's weights, by parameter name
    branches: dict[str, DexProjection]  # by the name of the output projection


class Adapters:
    """A pretrained model with named adapters, of which at most one is active.

    The original weights are kept, and put back as they are: no weight is ever subtracted.

    Args:
        model: a causal model of ``transformers``; changed in place.
        fingerprint: of its weights; None if it is not known, so that adapters of other weights
            with the same shapes are not refused.

    Attributes:
        model: the model.
        active: the name of the active adapter; None if the model is the pretrained one.
        folded: whether the active adapter's branch is folded into the output projections.

    Raises:
        UserError: the model has a branch already, or its attention is not understood.
    """

    def __init__(self, model: PreTrainedModel, fingerprint: str | None = None):
        if any(isinstance(module, DexProjection) for module in model.modules()):
            raise UserError(
                f"model={type(model).__name__} cannot be used: it has a DEX branch already; "
                "give the Adapters object that load_adapter returned, or the pretrained model"
            )
        self.model, self.fingerprint = model, fingerprint
        self.active: str | None = None
        self.folded = False
        self._adapters: dict[str, _Adapter] = {}
        ids = torch.tensor([[0, 1]], device=model.device)
        self._layers = find_layers(model, {"input_ids": ids})
        self._parameters = dict(model.named_parameters())
        self._originals: dict[str, Tensor] = {}  # of the parameters that some adapter replaces
        names = {
            part.name
            for layer in self._layers
            for part in layer.queries + layer.keys + layer.values
        }
        names |= {layer.output for layer in self._layers}
        self._modules = {name: model.get_submodule(name) for name in sorted(names)}

    @property
    def names(self) -> list[str]:
        """The names of the adapters, in the order in which they were loaded."""
        return list(self._adapters)

    def load(self, folder: str | Path, name: str = "default", revision: str | None = None) -> None:
        """Load an adapter and activate it.

        Args:
            folder: the ``adapter/`` of a run, or a repository of the hub that holds one.
            name: what it is called here.
            revision: of the repository.

        Raises:
            UserError: the name is taken, or the adapter is damaged or of another model.
        """
        if name in self._adapters:
            raise UserError(f"name={name} cannot be used: an adapter has it; choose another name")
        path = _fetched(folder, revision)
        described, config = _read_description(path)
        self._check(path, described)
        with self.disabled():
            self._adapters[name] = self._make(path, described, config)
        self.activate(name)

    def activate(self, name: str | None) -> None:
        """Make an adapter the active one, its branch not folded; None gives the pretrained model.

        Raises:
            UserError: there is no adapter of this name.
        """
        if name is not None and name not in self._adapters:
            known = ", ".join(self._adapters)
            raise UserError(f"name={name} cannot be used: accepted here: {known}, or None")
        self._place(name, False)

    @contextmanager
    def disabled(self) -> Iterator[PreTrainedModel]:
        """Give the pretrained model within the context; after it everything is as before."""
        active, folded = self.active, self.folded
        self.activate(None)
        try:
            yield self.model
        finally:
            self._place(active, folded)

    def fold(self) -> None:
        """Fold the active adapter's branch into the output projections, in fp64, rounded once.

        Raises:
            UserError: no adapter is active.
        """
        self._place(self._active_name(), True)

    def unfold(self) -> None:
        """Undo ``fold``: each weight is again what it was, bit for bit."""
        self._place(self.active, False)

    def save(self, folder: str | Path, name: str | None = None) -> Path:
        """Write an adapter's files and its model card into a new folder, for ``load``.

        Args:
            folder: the folder; it must not exist, or be empty.
            name: which adapter; None is the active one.

        Raises:
            UserError: there is no such adapter, or the folder holds files.
        """
        source = self._adapters[self._active_name() if name is None else name].folder
        target = Path(folder)
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise UserError(f"folder={folder} cannot be used: it exists; choose another")
        target.mkdir(parents=True, exist_ok=True)
        for file in (BRANCH, TUNED, CARD):
            if (source / file).is_file():
                shutil.copyfile(source / file, target / file)
        described, config = _read_description(source)
        described["dex"]["heads"] = Path(config.heads).name  # not the folder of a heads.json
        write_json(target / DESCRIPTION, {key: described[key] for key in _FIELDS})
        if not (target / CARD).exists():  # the run was made before there were cards
            card = adapter_card(described["base"]["name"], config.variant.value, described["step"])
            card.save(target / CARD)
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
        """Push an adapter and its model card to the hub; the repository is created if needed.

        Args:
            repo_id: ``user/name``.
            name: which adapter; None is the active one.
            private: whether a new repository is private; None is the user's default.
            token: of the hub; None is the one that ``hf auth login`` stored.
            commit_message: of the commit.

        Returns:
            The URL of the commit.
        """
        api = HfApi(token=token)
        with TemporaryDirectory() as temporary:
            folder = self.save(Path(temporary) / "adapter", name)
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message=commit_message
            )
        return str(commit.commit_url)

    def _active_name(self) -> str:
        if self.active is None:
            raise UserError(
                f"name=None cannot be used: no adapter is active; activate one of {self.names}"
            )
        return self.active

    def _check(self, path: Path, described: dict[str, Any]) -> None:
        base = described["base"]
        if self.fingerprint is not None and base.get("fingerprint") != self.fingerprint:
            known = str(base.get("fingerprint"))[:12]
            raise UserError(
                f"folder={path} cannot be used: it is an adapter of other weights "
                f"({base.get('name')}, {known}, not {self.fingerprint[:12]}); give the base that it was trained on"
            )
        heads = described["heads"]
        if len(heads) != len(self._layers) or not all(
            set(chosen) <= set(range(layer.num_heads))
            for chosen, layer in zip(heads, self._layers, strict=True)
        ):
            raise UserError(
                f"folder={path} cannot be used: it names layers or heads that "
                f"{type(self.model).__name__} does not have; give the base that it was trained on"
            )

    def _make(self, path: Path, described: dict[str, Any], config: DexConfig) -> _Adapter:
        """Build an adapter by the code that a run uses, on the model, which is restored after."""
        parameters = self._parameters
        data = {name: parameter.data for name, parameter in parameters.items()}
        trains = {name: parameter.requires_grad for name, parameter in parameters.items()}
        buffers = [(module, dict(module._buffers)) for module in self.model.modules()]
        full = config.variant is Variant.full
        touched = list(parameters) if full else [f"{name}.weight" for name in self._modules]
        try:
            for name in touched:
                parameters[name].data = data[name].clone()
            with torch.random.fork_rng(range(torch.cuda.device_count())):
                steps = int(config.anneal_steps or 0)
                adapted = attach(
                    self.model, self._layers, config, described["heads"], steps, seed=0
                )
            shapes: dict[str, dict[str, torch.Size]] = {BRANCH: {}, TUNED: {}}
            for name, parameter in adapted.trained().items():
                shapes[file_of(name)][name] = parameter.shape
            files = [read_tensors(path / file, part) for file, part in shapes.items() if part]
            weights = {name: tensor for tensors in files for name, tensor in tensors.items()}
            adapted.load(weights, described["step"], self.model.dtype)
            fold(adapted, keep_branch=True)
            modules = {name: self.model.get_submodule(name) for name in self._modules}
            branches = {name: m for name, m in modules.items() if isinstance(m, DexProjection)}
            tuned = {name: parameters[name].data.to(data[name].dtype) for name in touched}
        finally:
            for name, module in self._modules.items():
                self.model.set_submodule(name, module)
            for name, parameter in parameters.items():
                parameter.data = data[name]
                parameter.requires_grad_(trains[name])
            for module, values in buffers:
                module._buffers.update(values)
        self._originals |= {name: data[name] for name in touched}
        return _Adapter(path, tuned, branches)

    @torch.no_grad()
    def _place(self, name: str | None, folded: bool) -> None:
        """Put weights and branches of an adapter into the model; of None, the original weights."""
        adapter = _Adapter(Path(), {}, {}) if name is None else self._adapters[name]
        for key, original in self._originals.items():
            parameter = self._parameters[key]  # the model may have been moved since
            parameter.data = adapter.tuned.get(key, original).to(parameter.device, parameter.dtype)
        for layer in self._layers:
            module, branch = self._modules[layer.output], adapter.branches.get(layer.output)
            weight = projection_weight(module)
            if branch is not None:
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
    """Load the ``adapter/`` of an adapted run on its base, and activate it.

    Args:
        model: the base, by hub name, by folder or itself; or what this function returned, for
            a further adapter on the same base.
        folder: the ``adapter/`` of a run, or a repository of the hub that holds one.
        name: what the adapter is called.
        dtype: of a base that is loaded here.
        revision: of a base that is loaded here.
        trust_remote_code: run Python code that comes with a base that is loaded here.

    Raises:
        UserError: the base cannot be loaded, or the adapter is damaged or of another model.
    """
    if isinstance(model, str):
        base = load_pretrained(
            "base", model, dtype, torch.device("cpu"), revision, trust_remote_code
        )
        model = Adapters(base.model, base.fingerprint)
    elif not isinstance(model, Adapters):
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
        files = [DESCRIPTION, BRANCH, TUNED, CARD]
        with asking_hub(str(folder)):
            return Path(snapshot_download(str(folder), revision=revision, allow_patterns=files))
    except Exception as error:  # huggingface_hub, requests and the cache fail each in their way
        raise UserError(
            f"folder={folder} cannot be used: there is no such folder here, and from the hub it "
            f"cannot be loaded: {reason(error)}; accepted: the adapter/ of a run, or a repository with one"
        ) from error


def _read_description(path: Path) -> tuple[dict[str, Any], DexConfig]:
    described = read_json(path / DESCRIPTION, _FIELDS)
    try:
        return described, from_plain(DexConfig, described["dex"])
    except UserError as error:
        raise UserError(f"{path / DESCRIPTION} cannot be used: {error}") from error
