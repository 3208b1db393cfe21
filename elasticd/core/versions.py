"""Whether daemons of different versions may share a cluster. Pure.

The protocol number stands for the form of records and links: daemons of another number are not spoken to. Other
differences of version are told and tolerated, so that a cluster can be upgraded node by node.
"""

from __future__ import annotations

from collections.abc import Iterable

from elasticd.core.model import Node, Round
from elasticd.core.view import View


def speaks_otherwise(me: Node, nodes: Iterable[Node]) -> Node | None:
    """A registered node of another protocol, if there is one. The newcomer is the one that has to go."""
    return next((node for node in nodes if node.protocol != me.protocol and node.node_id != me.node_id), None)


def explain(me: Node, other: Node) -> str:
    """One line for the operator."""
    return (
        f"this daemon (elasticd {me.elasticd_version}, protocol {me.protocol}) cannot join node {other.node_id!r} "
        f"(elasticd {other.elasticd_version}, protocol {other.protocol}): install the same version on all nodes"
    )


def torch_versions(current: Round, view: View) -> tuple[str, ...]:
    """The versions of torch in a world, sorted; more than one may work, but nobody tests it."""
    found = {view.nodes[seat.node_id].value.torch_version for seat in current.seats if seat.node_id in view.nodes}
    return tuple(sorted(found - {""}))
