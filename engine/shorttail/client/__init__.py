"""Clients of a running server: Client blocks, AsyncClient pipelines. Both return what the embedded engine returns."""

from shorttail.client.blocking import Client
from shorttail.client.pipelined import AsyncClient

__all__ = ["AsyncClient", "Client"]
