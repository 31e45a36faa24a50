"""One model on several devices: plan, split, worker, coordinator.

    with gkp.edge.Cluster("resnet.split", local=True) as cluster:
        y = cluster.run(x)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gkp.edge.coordinate.cluster import Cluster

__all__ = ["Cluster"]


def __getattr__(name: str) -> Any:
    """Import on first use: a plan can be read without gRPC."""
    if name != "Cluster":
        raise AttributeError(f"module 'gkp.edge' has no attribute {name!r}")
    from gkp.edge.wire.identity import require_grpc

    require_grpc()
    from gkp.edge.coordinate.cluster import Cluster

    return Cluster
