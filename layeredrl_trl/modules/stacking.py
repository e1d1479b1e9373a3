"""Any network as a member of an ensemble: separate copies, evaluated as one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import chain

from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from layeredrl_trl.checks import check_count


class StackedNetworks(nn.Module):
    """``E`` networks of one architecture, evaluated side by side by ``torch.func.vmap``.

    Each member is made by a call of its own and so starts from an initialisation of its own. What
    is kept is one network, :attr:`network`, whose every parameter and buffer has a leading dim of
    members: optimisers, ``state_dict``, ``.to``, ``deepcopy`` and pickling see ordinary tensors.

    Args:
        n_members: ``E``.
        make_network: returns a new network, which maps ``[N, in]`` to ``[N, out]``, each row on
            its own. It must not branch on the values of tensors, see ``torch.func.vmap``.

    Attributes:
        network: the architecture with stacked tensors; not to be called by itself.

    Raises:
        ValueError: if ``n_members`` is below 1, or ``make_network`` returns one network twice or
            networks of different architecture.
        TypeError: if ``n_members`` is no integer or ``make_network`` returns no ``nn.Module``.

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
        self.network = networks[0]
        _put(self.network, *stack_module_state(networks))

    def forward(self, x: Tensor, member: Tensor | None = None) -> Tensor:
        """Map ``[E, N, in]`` to ``[E, N, out]``, row ``e`` through member ``e``.

        With ``member`` ``[G]`` ``[G, N, in]``, row ``g`` through that member.

        Raises:
            TypeError: if a network returns no tensor.
            ValueError: if it does not return ``[N, out]``.
        """
        params, buffers = dict(self.network.named_parameters()), dict(self.network.named_buffers())
        if member is not None:
            params = {name: p.index_select(0, member) for name, p in params.items()}
            buffers = {name: b.index_select(0, member) for name, b in buffers.items()}
        call = partial(functional_call, self.network)
        out = vmap(call, randomness="different")((params, buffers), (x,))
        name = f"StackedNetworks: the output of {type(self.network).__name__}"
        if not isinstance(out, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(out).__name__}.")
        if out.ndim != 3 or out.shape[:2] != x.shape[:2]:
            raise ValueError(
                f"{name} must be [N, out] for {list(x.shape[1:])}, got {list(out.shape[1:])}."
            )
        return out


def _check_networks(networks: list[nn.Module]) -> None:
    for network in networks:
        if not isinstance(network, nn.Module):
            raise TypeError(
                "StackedNetworks: expected make_network to return an nn.Module, got "
                f"{type(network).__name__}."
            )
    tensors = [id(x) for net in networks for _, x in _tensors_of(net)]
    if len(set(map(id, networks))) < len(networks) or len(set(tensors)) < len(tensors):
        raise ValueError(
            "StackedNetworks: members share a network or a tensor; make_network must return a new "
            "one at every call."
        )
    signatures = {
        tuple((name, tuple(x.shape), x.dtype, x.requires_grad) for name, x in _tensors_of(net))
        for net in networks
    }
    if len(signatures) > 1 or len(set(map(type, networks))) > 1:
        raise ValueError("StackedNetworks: expected networks of one architecture.")


def _tensors_of(network: nn.Module) -> chain[tuple[str, Tensor]]:
    return chain(network.named_parameters(), network.named_buffers())


def _put(network: nn.Module, params: dict[str, Tensor], buffers: dict[str, Tensor]) -> None:
    """Put stacked tensors in the place of a network's own; tied ones stay tied."""
    stacked = {id(own): buffers[name] for name, own in network.named_buffers()}
    for name, own in network.named_parameters():
        stacked[id(own)] = nn.Parameter(params[name].detach(), requires_grad=own.requires_grad)
    for module in network.modules():
        for own_tensors in (module._parameters, module._buffers):
            for name, own in own_tensors.items():
                if own is not None:
                    own_tensors[name] = stacked[id(own)]
