"""Any network as a member of an ensemble: separate copies, evaluated as one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap

from layeredrl_trl.checks import check_count
from layeredrl_trl.modules.architecture import differences, tensors_of
from layeredrl_trl.modules.outputs import in_dtype_of


class StackedNetworks(nn.Module):
    """``E`` networks of one architecture, evaluated side by side by ``torch.func.vmap``.

    Each member is made by a call of its own and so starts from an initialisation of its own. What
    is kept is one network, :attr:`network`, whose every parameter and buffer has a leading dim of
    members: optimisers, ``state_dict``, ``.to``, ``deepcopy`` and pickling see ordinary tensors.

    Several threads may evaluate it at once. For each evaluation the modules of the network are
    copied, without their tensors, so attributes that they set then are not kept.

    Args:
        n_members: ``E``.
        make_network: returns a new network, which maps ``[N, in]`` to ``[N, out]``, each row on
            its own. It must not branch on the values of tensors, see ``torch.func.vmap``. It is
            given the dtype of its parameters.

    Attributes:
        network: the architecture with stacked tensors; not to be called by itself.

    Raises:
        ValueError: if ``n_members`` is below 1, or ``make_network`` returns one network twice or
            networks that differ in more than the numbers in their tensors.
        TypeError: if ``n_members`` is no integer, or ``make_network`` returns no ``nn.Module``, or
            one compiled by ``torch.jit``.

    Example:
        >>> import torch
        >>> StackedNetworks(5, lambda: nn.Linear(3, 2))(torch.zeros(5, 7, 3)).shape
        torch.Size([5, 7, 2])
    """

    def __init__(self, n_members: int, make_network: Callable[[], nn.Module]) -> None:
        super().__init__()
        check_count("StackedNetworks: n_members", n_members)
        networks = [make_network() for _ in range(n_members)]
        _check_networks(networks)
        self.n_members = n_members
        self.network = _stacked(networks)

    def forward(self, x: Tensor, member: Tensor | None = None) -> Tensor:
        """Map ``[E, N, in]`` to ``[E, N, out]``, row ``e`` through member ``e``.

        With ``member`` ``[G]`` ``[G, N, in]``, row ``g`` through that member.

        Raises:
            TypeError: if a network returns no tensor.
            ValueError: if it does not return ``[N, out]``.
        """
        tensors = dict(tensors_of(self.network, remove_duplicate=False))
        if member is not None:
            tensors = {name: own.index_select(0, member) for name, own in tensors.items()}

        def call(own: dict[str, Tensor], rows: Tensor) -> Any:
            return _with_tensors(self.network, own)(rows)

        (inputs,) = in_dtype_of(self.network, x)
        out = vmap(call, randomness="different")(tensors, inputs)
        name = f"StackedNetworks: the output of {type(self.network).__name__}"
        if not isinstance(out, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(out).__name__}.")
        if out.ndim != 3 or out.shape[:2] != x.shape[:2]:
            raise ValueError(
                f"{name} must be [N, out] for {list(x.shape[1:])}, got {list(out.shape[1:])}."
            )
        return out.to(x.dtype)


def _with_tensors(network: nn.Module, tensors: Mapping[str, Tensor], path: str = "") -> nn.Module:
    """Copy the modules of a network, with other tensors, given by name.

    ``torch.func.functional_call`` lends the tensors to the network itself, where other threads
    would see them.
    """
    own = object.__new__(type(network))
    own.__dict__.update(network.__dict__)
    for name, x in network.__dict__.items():
        if inspect.ismethod(x) and x.__self__ is network:
            own.__dict__[name] = partial(x.__func__, own)
    for kind in ("_parameters", "_buffers"):
        own.__dict__[kind] = {
            name: None if x is None else tensors[path + name]
            for name, x in network.__dict__[kind].items()
        }
    own.__dict__["_modules"] = {
        name: None if x is None else _with_tensors(x, tensors, f"{path}{name}.")
        for name, x in network._modules.items()
    }
    return own


def _check_networks(networks: list[nn.Module]) -> None:
    for network in networks:
        if not isinstance(network, nn.Module):
            raise TypeError(
                "StackedNetworks: expected make_network to return an nn.Module, got "
                f"{type(network).__name__}."
            )
        if any(isinstance(part, torch.jit.ScriptModule) for part in network.modules()):
            raise TypeError("StackedNetworks: networks compiled by torch.jit cannot be stacked.")
    tensors = [id(x) for net in networks for _, x in tensors_of(net)]
    if len(set(map(id, networks))) < len(networks) or len(set(tensors)) < len(tensors):
        raise ValueError(
            "StackedNetworks: members share a network or a tensor; make_network must return a new "
            "one at every call."
        )
    for network in networks[1:]:
        if difference := next(differences(networks[0], network), None):
            raise ValueError(
                f"StackedNetworks: expected networks of one architecture, but {difference}."
            )


def _stacked(networks: list[nn.Module]) -> nn.Module:
    """Put the stacked tensors of all networks into the first one; tied ones stay tied."""
    tensors = [dict(tensors_of(network)) for network in networks]
    stacked = {}
    for name, own in tensors[0].items():
        each = torch.stack([x[name].detach() for x in tensors]).requires_grad_(own.requires_grad)
        is_parameter = isinstance(own, nn.Parameter)
        stacked[id(own)] = nn.Parameter(each, own.requires_grad) if is_parameter else each
    for module in networks[0].modules():
        for own_tensors in (module._parameters, module._buffers):
            for name, own in own_tensors.items():
                if own is not None:
                    own_tensors[name] = stacked[id(own)]
    return networks[0]
