"""The parts of a predictor as ONNX models, for runtimes without torch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn

from layeredrl_trl.checks import check_flag
from layeredrl_trl.modules import evaluate, head_entries, reads_action
from layeredrl_trl.predictors import Predictor

_EXAMPLE_ROWS = 2
"""Rows of the example that is traced; torch treats 0 and 1 differently."""

_STATE = ("latent", "context")

_Module = TypeVar("_Module", bound=nn.Module)


class _Part(NamedTuple):
    """A function of tensors ``[B, ...]``, the module it belongs to, and its names for ONNX."""

    function: Callable[..., Any]
    module: nn.Module
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class _Traced(nn.Module):
    """A function as a module, which has the parameters that the function reads."""

    def __init__(self, function: Callable[..., Any], module: nn.Module) -> None:
        super().__init__()
        self.function, self.module = function, module

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


def export_onnx(
    predictor: Predictor, folder: str | Path, *, action_indices: bool = False
) -> dict[str, Path]:
    """Write encoder, dynamics, reward and value of a predictor as ONNX models.

    Each takes batches of any size ``B`` in float32. They predict what the predictor does in
    evaluation mode, without randomness: ``dynamics.onnx`` gives the mixtures and leaves the
    drawing to you. A symmetry-breaking start is written as it is now, with its present share of the
    random map; export again when it is over. The predictor is copied and not changed.

    =================== =========================== ===========================================
    file                inputs                      outputs
    =================== =========================== ===========================================
    ``encoder.onnx``    ``observation`` ``[B, O]``  ``latent`` ``[B, D]``, ``context`` ``[B, C]``
    ``dynamics.onnx``   ``latent``, ``context``,    ``s_mean`` ``[B, E, M, D]``, ``weights``
                        ``action`` ``[B, A]``       ``[B, E, M]``, ``s_std`` ``[B, E, M, D]``,
                                                    ``term_prob`` ``[B]``
    ``reward.onnx``     likewise                    ``reward`` ``[B]``
    ``value.onnx``      ``latent``, ``context``, of ``value`` ``[B]``
                        a Q-function ``action``
    =================== =========================== ===========================================

    Needs the packages ``onnx`` and ``onnxscript``: ``pip install 'layeredrl_trl[onnx]'``.

    Args:
        predictor: the predictor; one without reward or value has no such file.
        folder: where to write; made if it does not exist. Files of these names are replaced.
        action_indices: let the models take indices ``[B]`` (int64) of discrete actions instead of
            ``[B, A]``.

    Returns:
        The path of each file, by the name of the part.

    Raises:
        ModuleNotFoundError: if a package is missing.
        TypeError: if ``predictor`` is no :class:`~layeredrl_trl.predictors.Predictor`, ``folder``
            no path, or ``action_indices`` neither True nor False.
        ValueError: if ``action_indices`` is set and the actions are continuous; if a part, maybe
            one of yours, cannot be traced for batches of any size. Nothing is written then.
        FileExistsError: if ``folder`` is a file.
    """
    for package in ("onnx", "onnxscript"):
        if find_spec(package) is None:
            raise ModuleNotFoundError(
                f"export_onnx needs {package}: pip install 'layeredrl_trl[onnx]'"
            )
    if not isinstance(predictor, Predictor):
        raise TypeError(
            f"export_onnx: predictor: expected a Predictor, got {type(predictor).__name__}."
        )
    if not isinstance(folder, str | Path):
        raise TypeError(f"export_onnx: folder: expected a path, got {type(folder).__name__}.")
    check_flag("export_onnx: action_indices", action_indices)
    if action_indices and not predictor.model.accepts_indices:
        raise ValueError("export_onnx: action_indices is set, but the actions are continuous.")
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"export_onnx: folder: {folder} is a file.")
    examples = _examples(predictor, action_indices)
    programs = {
        name: _program(name, part, [examples[key] for key in part.inputs])
        for name, part in _parts(predictor).items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"{name}.onnx" for name in programs}
    for name, path in paths.items():
        programs[name].save(path)
    return paths


def _parts(predictor: Predictor) -> dict[str, _Part]:
    """Copy the parts of a predictor, in evaluation mode, as functions of tensors ``[B, ...]``."""
    encoder, model = _copied(predictor.encoder), _copied(predictor.model)
    heads = {"reward": predictor.rew_func, "value": predictor.val_func}
    action_key = model.in_keys[2]
    names = (*encoder.out_keys, action_key)
    of_all = (*_STATE, "action")

    def of(head: TensorDictModuleBase) -> Callable[..., Tensor]:
        def call(latent: Tensor, context: Tensor, action: Tensor | None = None) -> Tensor:
            indices = model.accepts_indices
            entries = head_entries(
                names, latent, context, action, model.action_dim, indices=indices
            )
            return evaluate(head, entries).squeeze(-1)

        return call

    mixture = ("s_mean", "weights", "s_std", "term_prob")
    parts = {
        "encoder": _Part(encoder.encode, encoder, ("observation",), _STATE),
        "dynamics": _Part(model.predict, model, of_all, mixture),
    }
    for name, head in heads.items():
        if head is not None:
            inputs = of_all if name == "reward" or reads_action(head, action_key) else _STATE
            head = _copied(head)
            parts[name] = _Part(of(head), head, inputs, (name,))
    return parts


def _copied(part: _Module) -> _Module:
    return deepcopy(part).eval().requires_grad_(False).cpu()


def _examples(predictor: Predictor, action_indices: bool) -> dict[str, Tensor]:
    """Return an input of each name, to be traced with."""
    n, model = _EXAMPLE_ROWS, predictor.model
    return {
        "observation": torch.zeros(n, *predictor.encoder.obs_shape, dtype=torch.float32),
        "latent": torch.zeros(n, predictor.latent_state_dim, dtype=torch.float32),
        "context": torch.zeros(n, predictor.context_dim, dtype=torch.float32),
        "action": torch.zeros(n, dtype=torch.long)
        if action_indices
        else torch.zeros(n, model.action_dim, dtype=torch.float32),
    }


def _program(name: str, part: _Part, inputs: Sequence[Tensor]) -> Any:
    """Trace a part for batches of any size, and translate it to ONNX."""
    traced = _Traced(part.function, part.module).eval()
    batch = torch.export.Dim("batch")
    with torch.no_grad(), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # torch 2.13 uses functions of its own that it deprecates
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.|copyreg")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        try:
            program = torch.export.export(
                traced,
                tuple(inputs),
                dynamic_shapes={"inputs": tuple({0: batch} for _ in inputs)},
                strict=False,
            )
        except Exception as error:  # torch raises errors of many kinds here, of a user's code too
            raise ValueError(
                f"export_onnx: the {name} ({type(part.module).__name__}) cannot be traced for "
                f"batches of any size: {error}"
            ) from error
        return torch.onnx.export(
            program,
            dynamo=True,
            input_names=[*part.inputs],
            output_names=[*part.outputs],
            verbose=False,
        )
