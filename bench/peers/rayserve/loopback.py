"""Bind sockets of Ray Serve to 127.0.0.1 that Ray binds to all interfaces, because Ray has no setting for that.

Ray calls `bind` at the start of every worker process. It changes nothing else in Ray.
"""

from __future__ import annotations


def bind() -> None:
    """Bind the replicas' gRPC ports and HAProxy's ports for statistics and metrics to 127.0.0.1."""
    from ray.serve._private import haproxy, replica

    add_port = replica.add_port_to_grpc_server
    replica.add_port_to_grpc_server = lambda server, address: add_port(server, address.replace("[::]", "127.0.0.1"))
    haproxy.HAPROXY_CONFIG_TEMPLATE = haproxy.HAPROXY_CONFIG_TEMPLATE.replace("bind *:", "bind 127.0.0.1:").replace(
        "bind :", "bind 127.0.0.1:"
    )
