"""Process groups on CPU: what Paddle's gloo groups need to find the right processes.

paddle 3.3.1 publishes the addresses of every gloo group under the same keys of one store ("/0", "/1", ... by rank,
whatever the group), so that a process may read the address that another had in an earlier group: the connection is
refused, or nobody listens and all wait. With two processes it is rare; with four it is most of the time. Other
backends name their keys by group.

Source: paddlepaddle 3.3.1, distributed/collective.py, new_group and _new_process_group_impl.
"""

import os
from typing import Any

from paddle.base import core
from paddle.distributed import collective

from modernbert_align.core.ports import free_ports

_TIMEOUT_S = 120
_stores: list[Any] = []  # a group's addresses live as long as its first process's store


def give_groups_own_stores() -> None:
    """Make every gloo group of this process publish its addresses in a store of its own; once is enough.

    Call it in every process before `fleet.init` or `paddle.distributed.new_group`. Groups of other backends stay as
    they are.
    """
    create = collective._new_process_group_impl
    if getattr(create, "own_stores", False):
        return

    def with_own_store(
        backend: str, store: Any, rank: int, world_size: int, group_name: str, *rest: Any, **named: Any
    ) -> Any:
        if backend == "gloo":
            store = _store_of(group_name, store, rank, world_size)
        return create(backend, store, rank, world_size, group_name, *rest, **named)

    with_own_store.own_stores = True  # type: ignore[attr-defined]
    collective._new_process_group_impl = with_own_store


def _store_of(group_name: str, common: Any, rank: int, world_size: int) -> Any:
    """A store that only one group uses: its first process runs it, and tells the others where, in the common one."""
    key = f"modernbert_align/{group_name}"
    if rank == 0:
        host = os.environ.get("PADDLE_CURRENT_ENDPOINT", "127.0.0.1:0").rpartition(":")[0]
        (port,) = free_ports(1, host)
        store = core.TCPStore(host, port, True, 1, timeout=_TIMEOUT_S)
        common.set(key, f"{host}:{port}")
    else:
        common.wait(key)
        host, _, told = common.get(key).decode().rpartition(":")
        store = core.TCPStore(host, int(told), False, 1, timeout=_TIMEOUT_S)
    _stores.append(store)
    return store
